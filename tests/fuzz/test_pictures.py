"""Whatever is done to a picture's file: pixels, or one of the documented errors, within time and memory.

The whole run, which goes on where it was stopped if it is given the same FILE for its notes::

    python -m tests.fuzz.test_pictures --seed 0 --files 100000 --notes FILE

or ``pytest -m slow tests/fuzz/test_pictures.py``, whose blocks can be chosen with ``-k``.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from tests.fuzz.mutators import damaged, whole_files
from tests.memory import peak_mib
from uhd.pixels import PixelSettings, image_size_hw, load_image
from uhd.pixels.views import load_picture

FAST = PixelSettings(backend="fast")
BLOCK = 1000
SECONDS = 2
MEBIBYTES = 1024


def outcome(read, *args, **kwargs):
    """What it returns, or the documented error; anything else goes through."""
    try:
        return read(*args, **kwargs)
    except ValueError as error:
        return str(error)


def look_at(file: bytes) -> bool:
    """Read a file in every way, and tell whether it was one picture in all of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about damage
        exact, fast = outcome(load_image, file), outcome(load_picture, file, settings=FAST)
        size_hw = outcome(image_size_hw, file)
    if isinstance(exact, str):
        assert isinstance(fast, str), exact
        assert isinstance(size_hw, (str, tuple))
        assert "bytes" in exact
        return False
    assert not isinstance(fast, str), fast
    assert (exact.mode, exact.info) == ("RGB", {})
    assert load_image(exact) is exact
    if file[:2] not in (b"II", b"MM"):  # libtiff leaves rows that it cannot decode as the memory was
        assert np.array_equal(np.asarray(exact), fast.pixels)
    assert size_hw == (exact.height, exact.width)
    return True


def _timed(file: bytes, name: str) -> tuple[bool, float]:
    """Look at a file: whether it is a picture, and the CPU time that this took, in s."""
    start = time.process_time()
    try:
        picture = look_at(file)
    except Exception as error:
        raise AssertionError(f"{name}: {error!r}") from error
    return picture, time.process_time() - start


def run(seed: int, numbers: range) -> tuple[int, float, int]:
    """Look at the files of these numbers: how many are pictures, the longest look in s of CPU time, and its number."""
    pictures, longest, slowest = 0, 0.0, numbers.start
    assert all(look_at(file) for file in whole_files())  # what is loaded or tried at the first picture is not counted
    before = peak_mib(anew=True)
    for number in numbers:
        file = damaged(seed, number)
        picture, spent = _timed(file, f"seed {seed}, number {number}")
        if spent > SECONDS:  # it may have been the machine
            picture, spent = _timed(file, f"seed {seed}, number {number}")
        pictures += picture
        longest, slowest = max((longest, slowest), (spent, number))
        assert spent < SECONDS, (seed, number, spent)
    assert peak_mib() - before < MEBIBYTES, (seed, numbers)
    return pictures, longest, slowest


def test_whole_files_are_pictures():
    for file in whole_files():
        assert look_at(file)


def test_some_damaged_files():
    pictures = run(1, range(BLOCK))[0]
    assert BLOCK // 10 < pictures < BLOCK // 2  # neither all refused, nor hardly any damaged


@pytest.mark.slow
@pytest.mark.parametrize("block", range(100))
def test_damaged_files(block):
    run(0, range(block * BLOCK, (block + 1) * BLOCK))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--notes", type=Path)
    args = parser.parse_args()
    notes = {"seed": args.seed, "next": 0, "pictures": 0, "longest": [0, 0], "seconds": 0}
    if args.notes and args.notes.exists():
        notes = json.loads(args.notes.read_text())
        args.seed = notes["seed"]
    for first in range(notes["next"], args.files, BLOCK):
        start, last = time.time(), min(first + BLOCK, args.files)
        pictures, longest, slowest = run(args.seed, range(first, last))
        notes |= {"next": last, "pictures": notes["pictures"] + pictures}
        notes |= {"longest": max(notes["longest"], [round(longest, 3), slowest]), "peak_mib": round(peak_mib())}
        notes["seconds"] = round(notes["seconds"] + time.time() - start)
        if args.notes:
            args.notes.write_text(json.dumps(notes))
        print(json.dumps(notes), flush=True)


if __name__ == "__main__":
    main()
