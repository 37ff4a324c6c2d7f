"""Ctrl-C and SIGTERM: one line, status 130 or 143, and finished work is kept."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import uhd
from tests.tiny import picture
from uhd import cli, commands

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX")

SIGNALS = [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]


def interrupted(number, pipe, arguments):
    """The status of a command that gets a signal while it waits for a picture to come through a pipe."""

    def send():
        with open(pipe, "wb"):  # opens when the command does
            time.sleep(0.05)  # until it reads: between opening and reading a file is open and nobody knows of it
            os.kill(os.getpid(), number)
            waited.wait(60)

    waited = threading.Event()
    os.mkfifo(pipe)
    sender = threading.Thread(target=send)
    sender.start()
    try:
        return cli.main([str(argument) for argument in arguments])
    finally:
        waited.set()
        sender.join()


@pytest.mark.parametrize(("number", "status", "word"), SIGNALS)
def test_encoded_images_are_kept(number, status, word, tmp_path, capsys):
    images = [tmp_path / f"{name}.png" for name in "ab"]
    for image in images:
        picture(40, 60).save(image)
    out, pipe = tmp_path / "t.safetensors", tmp_path / "pipe"
    arguments = ("encode", *images, pipe, images[0], "-o", out)
    assert interrupted(number, pipe, arguments) == status
    assert capsys.readouterr() == ("", f"uhd encode: {word}, 2 of 4 images are in {out}\n")
    assert len(uhd.load_tokens(out)) == 2


@pytest.mark.parametrize(("number", "status", "word"), SIGNALS)
def test_compared_images_are_kept(number, status, word, tmp_path, capsys):
    out, pipe = tmp_path / "c.html", tmp_path / "pipe"
    assert interrupted(number, pipe, ("compare", "30x40", pipe, "--html", out, "--strategies", "clip")) == status
    told, error = capsys.readouterr()
    assert error == f"uhd compare: {word}, 1 of 2 images are in {out}\n"
    assert "30x40" in told
    assert "30x40" in out.read_text()


def test_nothing_is_written_where_nothing_was_finished(tmp_path, capsys):
    out, pipe = tmp_path / "t.safetensors", tmp_path / "pipe"
    out.write_text("old")
    assert interrupted(signal.SIGINT, pipe, ("encode", pipe, "-o", out)) == 130
    assert capsys.readouterr() == ("", "uhd encode: interrupted\n")
    assert out.read_text() == "old"


def test_what_is_being_written_is_written(capsys):
    """A signal while finished work is written; a second one ends that, too."""
    for signals, wanted in ((1, ["begun", "begun", "whole"]), (2, ["begun", "begun"])):
        told, left = [], [commands.Terminated] * signals

        def write(told=told, left=left):
            told.append("begun")
            if left:
                raise left.pop()
            told.append("whole")

        assert commands.run("x", lambda write=write: commands.keep(None, write, "2 of 4")) == 143
        assert told == wanted
        assert capsys.readouterr().err == ("x: terminated, 2 of 4\n" if signals == 1 else "x: terminated\n")


def test_handlers_of_others_stay():
    """A program that runs a command inside itself keeps its own."""
    got = []
    before = signal.signal(signal.SIGTERM, lambda *_: got.append("mine"))
    try:
        status = commands.run("x", lambda: os.kill(os.getpid(), signal.SIGTERM) or 7)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (status, got) == (7, ["mine"])
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_signals_at_any_time(seed, tmp_path):
    """After the first tenth of a second, in which Python itself starts. While it ends, a signal kills as ever."""
    rng = random.Random(seed)
    for number in range(4):
        picture(400, 700, number).save(tmp_path / f"{number}.png")
    images = [f"{number}.png" for number in range(4)]
    (tmp_path / "sizes.json").write_text(str(np.random.default_rng(seed).integers(1, 4000, (20_000, 2)).tolist()))
    runs = {
        "encode": (6, [*images, "-o", "t.safetensors"]),
        "plan": (2, ["--sizes", "sizes.json", "--json"]),
        "compare": (4, [*images, "--html", "c.html"]),
        "show": (2, ["0.png", "-o", "o.png"]),
    }

    def started(name):
        command = [sys.executable, "-m", "uhd.cli", name, *runs[name][1]]
        return subprocess.Popen(command, cwd=tmp_path, stdout=-1, stderr=-1, text=True)

    whole = {name: started(name).communicate(timeout=120)[0] for name in runs}
    for _ in range(25):
        name = rng.choice(list(runs))
        number, status, word = rng.choice(SIGNALS)
        process = started(name)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=rng.uniform(0.3, runs[name][0]))
        process.send_signal(number)
        told, error = process.communicate(timeout=120)
        assert process.returncode in (0, status, -number), error
        if process.returncode == status:
            assert error.startswith(f"uhd {name}: {word}"), error
            assert error.count("\n") == 1, error
        else:
            assert told == whole[name], error
        if name == "encode":
            assert 1 <= len(uhd.load_tokens(tmp_path / "t.safetensors")) <= 4
        assert not list(tmp_path.glob(".*")), "hidden files stay"
