"""Kill writers, and look at what is left: ``python -m tests.fuzz.kills --seed 0 --kills 200 [--state FILE]``.

Half of the kills come before a chosen step (opening, moving, removing a file, making a folder), the others after a
chosen time. Where files are being moved, the next reader is killed, too. Then the place must hold the old or the new
whole (or nothing, where nothing was), and the next write must leave the new whole and nothing of the killed one. A run
with ``--state`` goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.utils import logging

from tests.fuzz.writers import WRITERS
from uhd.writing import READY

STEPS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod"}
OTHER = "somebody's notes.txt"
TOO_LATE = "too late"


def forked(work: Callable[[], Any], *, step: int | None = None, after: float | None = None) -> tuple[bool, int]:
    """Do it in a process of its own; return whether it was killed, and else how many steps it took."""
    seen, tell = os.pipe()
    child = os.fork()
    if child == 0:
        steps = 0

        def count(event: str, arguments: tuple) -> None:
            nonlocal steps
            if event in STEPS:
                if steps == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                steps += 1

        try:
            sys.addaudithook(count)
            work()
            os.write(tell, str(steps).encode())
        finally:
            os._exit(0)
    os.close(tell)
    start = time.perf_counter()
    if after is not None:
        time.sleep(max(after - (time.perf_counter() - start), 0))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with open(seen) as pipe:
        steps = int(pipe.read() or 0)
    return os.WIFSIGNALED(status), steps


def hidden(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if ".uhd-" in path.name]


class Trial:
    """One writer, its two states, and kills over it."""

    def __init__(self, name: str, work: Path) -> None:
        self.name, self.work = name, work / name
        self.work.mkdir()
        self.writer = WRITERS[name](self.work)
        self.place = self.work / "out" / self.writer.name
        self.wanted = []
        for state in (0, 1):
            self.fresh(state)
            self.wanted.append(self.writer.read(self.place))
        assert self.wanted[0] != self.wanted[1]
        self.fresh(0)
        shutil.copytree(self.place.parent, self.work / "old")
        times = []
        for _ in range(3):
            start = time.perf_counter()
            _, self.steps = forked(self.new)
            times.append(time.perf_counter() - start)
            assert self.writer.read(self.place) == self.wanted[1]
        self.seconds = min(times)

    def new(self) -> None:
        self.writer.write(self.place, 1)

    def old_or_new(self) -> str:
        found = self.writer.read(self.place)
        assert found in self.wanted, "neither the old nor the new is there"
        return ("old", "new")[self.wanted.index(found)]

    def fresh(self, state: int) -> None:
        shutil.rmtree(self.place.parent, ignore_errors=True)
        self.place.parent.mkdir()
        self.writer.write(self.place, state)

    def kill(self, seed: int, number: int) -> str:
        """What came of it; an ``AssertionError`` where what is left is neither the old nor the new."""
        rng = random.Random(f"{seed} {self.name} {number}")
        shutil.rmtree(self.place.parent)
        if first := rng.random() < 0.1:  # nothing was there before
            self.place.parent.mkdir()
        else:
            shutil.copytree(self.work / "old", self.place.parent)
        folder = self.place if self.place.is_dir() else self.place.parent
        (folder / OTHER).write_text("keep")
        how = {"step": rng.randrange(self.steps)} if number % 2 else {"after": rng.random() * self.seconds}
        killed, _ = forked(self.new, **how)
        if ready := (self.place / READY).exists():  # whoever reads it next goes on with it, and is killed, too
            forked(self.old_or_new, step=rng.randrange(20))
        try:
            outcome = self.old_or_new()
        except (ValueError, OSError) as problem:
            if not first or str(self.place) not in str(problem):
                raise AssertionError(f"it is refused: {problem}") from problem
            outcome = "none"
        assert (folder / OTHER).read_text() == "keep"
        self.new()
        assert self.writer.read(self.place) == self.wanted[1], "the next write is not whole"
        assert not hidden(self.place.parent), f"{hidden(self.place.parent)} stay"
        return f"{outcome}{', moved by readers' * ready}" if killed else TOO_LATE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=200, help="of each writer")
    parser.add_argument("--writers", nargs="+", choices=WRITERS, default=list(WRITERS))
    parser.add_argument("--state", type=Path, help="JSON of what is done already")
    args = parser.parse_args()
    done = json.loads(args.state.read_text()) if args.state and args.state.exists() else {}
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as work:
        for name in args.writers:
            trial, counts = Trial(name, Path(work)), Counter(done.get(f"{args.seed} {name}", {}))
            while (number := sum(counts.values())) - counts[TOO_LATE] < args.kills:
                try:
                    counts[trial.kill(args.seed, number)] += 1
                except AssertionError as problem:
                    print(f"{name}, seed {args.seed}, kill {number}: {problem}")
                    return 1
                done[f"{args.seed} {name}"] = counts
                if args.state:
                    args.state.with_suffix(".new").write_text(json.dumps(done))
                    os.replace(args.state.with_suffix(".new"), args.state)
            print(f"{name}: {trial.steps} steps, {trial.seconds:.3f} s; {json.dumps(dict(sorted(counts.items())))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
