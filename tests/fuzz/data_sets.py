"""Kill runs over a data set: ``python -m tests.fuzz.data_sets --images 20000 --times 5 [--ray PYTHON] [--dedupe]``.

A worker, all workers with the server that they are copies of, and the local run itself, and of Ray (in a Python that
has it) an actor, a task and the driver are each killed at random moments. What the last run leaves must be, byte by
byte, what a run has that nobody killed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from benchmarks.datasets import Run, contents, make_source, save_encoder

LOCAL, RAY = ["--processes", "2"], ["--engine", "ray", "--actors", "1"]
VICTIMS = {"run": LOCAL, "worker": LOCAL, "server": LOCAL, "driver": RAY, "actor": RAY, "task": RAY}
_WORDS = {"actor": "ray::_Actor", "task": "ray::_prepared", "server": "forkserver", "worker": "forkserver"}


def found(run: Run, victim: str) -> list[psutil.Process]:
    """Processes of a run that are such a victim; a worker is a child of its server, with the same command line."""
    tree = run.tree()
    if victim in ("run", "driver"):
        return tree[:1]
    there = []
    for one in tree:
        with contextlib.suppress(psutil.Error):
            if _WORDS[victim] in " ".join(one.cmdline()):
                child = _WORDS[victim] in " ".join(one.parent().cmdline())
                there += [one] if victim != "worker" or child else []
    return there


def killed(begin: Callable[[], Run], out: Path, victim: str, goals: list[int], rng: random.Random) -> dict[str, Any]:
    """Kill a victim soon after so many units are there, for every goal; what the last run told."""
    run, kills = begin(), 0
    for goal in goals:
        while True:
            if run.process.poll() is not None:
                run.wait()  # an error, or it was quicker
                return {"killed": kills, "told": "it ended before"}
            if len(list(out.glob("unit-*"))) >= goal and (those := found(run, victim)):
                break
            time.sleep(0.02)
        time.sleep(0.3 * rng.random())
        others = run.tree()[1:] if victim == "driver" else []
        with contextlib.suppress(psutil.NoSuchProcess):
            for one in those if victim == "server" else [rng.choice(those)]:
                one.kill()
            kills += 1
        if victim in ("run", "driver"):
            for one in others:  # what Ray leaves would take the memory
                with contextlib.suppress(psutil.Error):
                    one.kill()
            run.process.wait()
            run = begin()
    return {"killed": kills, **run.wait()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--victims", nargs="+", choices=VICTIMS, help="all, those of Ray where --ray is given")
    parser.add_argument("--ray", metavar="PYTHON", help="a Python that has Ray")
    parser.add_argument("--dedupe", action="store_true")
    args = parser.parse_args()
    more, rng, bad = ["--dedupe"] * args.dedupe, random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        save_encoder("small", work / "encoder")
        make_source(work / "source", args.images)

        def begin(name: str, words: list[str]) -> Run:
            python = args.ray if words is RAY else sys.executable
            return Run(python, work / "source", work / name, work / "encoder", *words, *more)

        print("whole", json.dumps(begin("whole", LOCAL).wait()), flush=True)
        wanted = contents(work / "whole")
        units = sum(name.startswith("unit-") for name in wanted)
        for victim in args.victims or [name for name, words in VICTIMS.items() if words is LOCAL or args.ray]:
            goals = sorted(rng.sample(range(units * 9 // 10), args.times))
            told = killed(lambda victim=victim: begin(victim, VICTIMS[victim]), work / victim, victim, goals, rng)
            same = contents(work / victim) == wanted
            bad += not same or told["killed"] < args.times
            print(victim, json.dumps({"same_bytes": same, "at_units": goals, **told}), flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
