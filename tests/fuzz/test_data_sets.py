"""What killed runs over a data set leave is what others have; see data_sets.py beside this file."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

for needed in ("psutil", "pyarrow"):
    pytest.importorskip(needed)

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_killed_runs_go_on_to_the_same_bytes():
    ray = ["--ray", sys.executable] if importlib.util.find_spec("ray") else []
    command = [sys.executable, "-m", "tests.fuzz.data_sets", "--images", "3000", "--times", "1", "--dedupe", *ray]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    told = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert told.returncode == 0, told.stdout + told.stderr
    found = dict(line.split(" ", 1) for line in told.stdout.splitlines())
    victims = {"run", "worker", "server"} | ({"driver", "actor", "task"} if ray else set())
    assert found.keys() == {"whole"} | victims
    for victim in victims:
        assert (json.loads(found[victim])["same_bytes"], json.loads(found[victim])["killed"]) == (True, 1)
