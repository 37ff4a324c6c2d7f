"""On one GPU, in under six minutes: what is right, how fast it is, what memory it takes, and whether anything waits.

    benchmarks/gpu.sh [--steps waits times ...] [--out FOLDER]
    python benchmarks/gpu.py --table benchmarks/results/gpu.json

Every step is a process of its own with a bound on its time, since a kernel that writes where it must not takes its
process along: what fails is a row that says so, and the rest runs. Without a GPU nothing runs and nothing is written.

Times are medians of warm calls by CUDA events, the L2 cache flushed before each (`triton.testing.do_bench`); they hold
what the host takes where that is longer. TF32 is off.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_steps import STEPS, Row, Work

import kernels as bench  # kernels.py beside this file

FOLDER = Path(__file__).resolve().parent

FULL = Work("cuda", "triton", 1024, 6, ((672, 1008), (1080, 1920), (480, 640), (900, 500)))
"""What is run: ViT-L's width, and a quarter of its blocks."""


def run_step(name: str, file: Path, work: Work = FULL) -> None:
    """Write a step's rows to a file as they come, one a line."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with file.open("w", encoding="utf-8") as lines:
        for row in STEPS[name].rows(work):
            print(json.dumps(row), file=lines, flush=True)


def in_a_process(name: str, file: Path, bound_s: float) -> str | None:
    """Run a step elsewhere; what went wrong with it as a whole."""
    command = [sys.executable, str(Path(__file__).resolve()), "--step", name, "--rows", str(file)]
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
        try:
            status = child.wait(timeout=bound_s)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # compilers that it started too
            child.wait()
            return f"stopped after {bound_s:.0f} s"
        said.seek(0)
        last = [line for line in said.read().splitlines() if line.strip()][-1:] or ["nothing was said"]
    return None if status == 0 else f"exit status {status}: {last[0][:300]}"


def run(names: list[str], out: Path, start: Callable[[str, Path, float], str | None] = in_a_process) -> dict[str, Any]:
    """Run the steps, those that are not timed side by side; `gpu.json` is written after each."""
    result: dict[str, Any] = {
        "about": __doc__.strip().split("\n\n")[-1].replace("\n", " "),
        "versions": versions(),
        "steps": {},
    }
    out.mkdir(parents=True, exist_ok=True)
    for timed in (False, True):
        some = [name for name in names if STEPS[name].timed == timed]
        with ThreadPoolExecutor(1 if timed else len(STEPS)) as pool:
            for name, step in zip(some, pool.map(partial(_step, start=start), some), strict=True):
                result["steps"][name] = step
                (out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
                wrong = sum(row["problem"] is not None for row in step["rows"])
                early = f"; {step['problem']}" if step["problem"] else ""
                print(f"{name}: {step['seconds']} s, {len(step['rows'])} rows, {wrong} with a problem{early}")
    return result


def _step(name: str, start: Callable[[str, Path, float], str | None]) -> dict[str, Any]:
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows"
        problem = start(name, file, STEPS[name].bound_s)
        lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []  # the last may be cut
    seconds = round(time.perf_counter() - began, 1)
    return {"seconds": seconds, "problem": problem, "rows": [json.loads(line) for line in lines]}


def versions() -> dict[str, str]:
    """As of the kernels' benchmark, and those of what the encoder's steps need, where it is there."""
    found = bench.versions()
    for name in ("uhd", "transformers"):
        try:
            found[name] = __import__(name).__version__
        except ImportError as problem:
            found[name] = str(problem)
    return found


def problems(result: dict[str, Any]) -> int:
    steps = result["steps"].values()
    return sum(
        (step["problem"] is not None) + sum(row["problem"] is not None for row in step["rows"]) for step in steps
    )


def tables(result: dict[str, Any]) -> str:
    """Every step's rows, as Markdown."""
    parts = [", ".join(f"{name} {version}" for name, version in result["versions"].items()) + "."]
    for name, step in result["steps"].items():
        rows = STEPS[name].summary(step["rows"])
        parts.append(f"### {STEPS[name].title}\n\n{table(rows)}" if rows else f"### {STEPS[name].title}\n\nNo rows.")
        if step["problem"]:
            parts.append(f"This step ended early: {step['problem']}.")
    return "\n\n".join(parts)


def table(rows: list[Row]) -> str:
    """A column for everything that any row has but a problem; where there is one, it stands in the last column."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name != "problem"]
    numbers = {name for name in names if any(isinstance(row.get(name), (int, float)) for row in rows)}
    lines = [f"| {' | '.join(each.replace('_', ' ') for each in names)} | |"]
    lines.append("|" + "".join("---:|" if name in numbers else "---|" for name in names) + "---|")
    for row in rows:
        cells = [_cell(row.get(name)) for name in names]
        lines.append(f"| {' | '.join(cells)} | {(row['problem'] or '').replace('|', '/')} |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return (
            f"{value:.1e}" if value and abs(value) < 0.01 else f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
        )
    return "" if value is None else str(value)


class Options(NamedTuple):
    """What was asked for."""

    steps: list[str]
    out: Path
    table: Path | None
    step: str | None
    rows: Path | None


def options(argv: list[str] | None) -> Options:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--steps", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP", help=", ".join(STEPS)
    )
    parser.add_argument("--out", type=Path, default=FOLDER / "results", help="folder of gpu.json")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the tables of a gpu.json, and run nothing")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)  # as this script calls itself
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    return Options(**vars(parser.parse_args(argv)))


def main(argv: list[str] | None = None) -> int:
    """0 where every row is as it should be, 1 where one is not or there is no GPU."""
    asked = options(argv)
    if asked.table is not None:
        print(tables(json.loads(asked.table.read_text(encoding="utf-8"))))
        return 0
    if not torch.cuda.is_available():
        print("Nothing was run: torch sees no GPU here.", file=sys.stderr)
        return 1
    if asked.step is not None:
        run_step(asked.step, asked.rows)
        return 0
    result = run(asked.steps, asked.out)
    print(f"\n{tables(result)}")
    return 1 if problems(result) else 0


if __name__ == "__main__":
    sys.exit(main())
