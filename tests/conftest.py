"""Shared by all tests: one thread, and hypothesis without deadlines (a busy machine is not a failure)."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import copy
import signal
import sys

import pytest
import torch
from hypothesis import settings

settings.register_profile("uhd", deadline=None, max_examples=60, print_blob=True)
settings.load_profile("uhd")


@pytest.fixture(autouse=True, scope="session")
def in_the_foreground():
    """A shell lets the jobs behind ``&`` ignore Ctrl-C, and theirs with them: commands are tested as without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def seeded():
    """A test draws the same weights alone as behind others."""
    torch.manual_seed(0)


@pytest.fixture
def silenced(tmp_path, capsys):
    """Check that a benchmark ends with 1, says why, and writes nothing."""

    def check(script, words, *arguments):
        assert script.main([*arguments, "--out", str(tmp_path)]) == 1
        assert words in capsys.readouterr().err
        assert not list(tmp_path.iterdir())

    return check


@pytest.fixture(autouse=True)
def nothing_stays_registered():
    """Names that a test, or a page, gives to its own parts are its own."""
    from uhd.slicing import rules

    strategies, parts = dict(rules._REGISTERED), copy.deepcopy(getattr(sys.modules.get("uhd.parts"), "_OWN", {}))
    yield
    rules._REGISTERED = strategies
    if "uhd.parts" in sys.modules:
        sys.modules["uhd.parts"]._OWN.update({"vision": {}, "compressor": {}} | parts)
