"""A killed writer leaves the old whole or the new whole; see kills.py beside this file."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.fuzz.kills import TOO_LATE
from tests.fuzz.writers import WRITERS

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX")


def kills(*arguments):
    """Outcomes of a run, by writer, without those that came too late to kill."""
    command = [sys.executable, "-m", "tests.fuzz.kills", *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    found = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert found.returncode == 0, found.stdout + found.stderr
    told = [line.partition(": ") for line in found.stdout.splitlines()]
    counts = {name: json.loads(words.partition("; ")[2]) for name, _, words in told}
    return {name: {way: count for way, count in ways.items() if way != TOO_LATE} for name, ways in counts.items()}


def test_a_killed_writer_leaves_the_old_or_the_new():
    found = kills("--seed", 1, "--kills", 1)
    assert {name: sum(ways.values()) for name, ways in found.items()} == dict.fromkeys(WRITERS, 1)


@pytest.mark.slow
def test_two_hundred_kills_of_every_writer(tmp_path):
    """Goes on where it was stopped: the second run has nothing to do."""
    arguments = ("--seed", 19, "--kills", 200, "--state", tmp_path / "done.json")
    first = kills(*arguments)
    assert {name: sum(ways.values()) for name, ways in first.items()} == dict.fromkeys(WRITERS, 200)
    assert kills(*arguments) == first
    for name in ("encoder", "model", "processor", "release"):
        assert {"old", "new", "new, moved by readers"} <= first[name].keys(), name
