"""Damaged artefacts are met with a ``ValueError`` or ``OSError`` that names the file, soon, and in little memory.

``tests/fuzz/artefacts.py`` says how other seeds are run, and how a run goes on.
"""

import json
import subprocess
import sys

import pytest

from tests.fuzz import artefacts


def test_a_few_of_every_kind(tmp_path, recwarn):
    for kind, cases in (("tokens", 60), ("encoder", 60), ("model", 40)):
        (tmp_path / kind).mkdir()
        assert list(artefacts.run(kind, 7, range(cases), tmp_path / kind)) == []
    assert list(artefacts.run_plans(7, range(400))) == []


def test_what_is_met_badly_is_told(tmp_path):
    def wrong():
        raise KeyError("x")

    assert artefacts.complaint(wrong, "file") == "KeyError('x')"
    assert "does not name file" in artefacts.complaint(lambda: int("x"), "file")
    assert artefacts.complaint(lambda: int("x"), "int()") is None
    assert artefacts.complaint(lambda: 3, "file") is None


@pytest.mark.slow
@pytest.mark.parametrize("kind, cases", [("plans", 4000), ("tokens", 3000), ("encoder", 2000), ("model", 1000)])
def test_ten_thousand(kind, cases):
    command = [sys.executable, "-m", "tests.fuzz.artefacts", "--kind", kind, "--seed", "1", "--cases", str(cases)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["peak_mib"] < 1024
