"""Slicing strategies judged by models that learned with them.

    python benchmarks/learned.py run --workers 2            # the long run, resumable; --quick takes ten minutes
    python benchmarks/learned.py run --set plus --workers 2 # options of the planner; --set pages: on a second task
    python benchmarks/learned.py report                     # tables and plots of what has run so far
    python benchmarks/learned.py cuts                       # what a border through a glyph costs, on paired images

``run`` trains every arm from nothing with equal steps on the same images and lets it answer questions about the same
fresh scenes; docs/learned.md says what is equal and what is not. Your own model on your own images: ``uhd evaluate``.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded, also in the workers

import learned_cuts
import learned_report
import learned_run
from learned_results import SETS
from train import SEEDS as TRAINING_SEEDS  # the example, which learned_run puts on the path
from transformers.utils import logging

HERE = Path(__file__).resolve().parent


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    args = parser().parse_args(argv)
    logging.disable_progress_bar()
    try:
        return {"run": run, "report": report, "cuts": cuts}[args.command](args)
    except (ValueError, OSError, RuntimeError) as problem:
        print(f"learned.py: {problem}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    told = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = told.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="train and judge the arms, or go on with it")
    one.add_argument("--out", type=Path, default=HERE / "results" / "learned", help="of results, which are committed")
    one.add_argument("--checkpoints", type=Path, default=HERE / "out" / "learned", help="what git ignores")
    one.add_argument("--arms", nargs="+", metavar="ARM", help="of the set; a wrong name lists them")
    one.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="default 0 1 2, or 0 where quick")
    one.add_argument("--quick", action="store_true", help="few steps, one seed, four arms: a look, no evidence")
    one.add_argument("--set", choices=sorted(SETS), help="of runs, each in a folder of its own (long)")
    one.add_argument("--workers", type=int, default=1, metavar="N", help="runs side by side, a core each")
    one.add_argument(
        "--minutes",
        type=float,
        help="begin no piece that would end later, going by what pieces took (about 2 minutes each)",
    )
    two = commands.add_parser("report", help="tables, report.json and plots")
    two.add_argument("--out", type=Path, default=HERE / "results" / "learned")
    two.add_argument("--page", type=Path, help="a Markdown file whose results section is written anew")
    four = commands.add_parser("cuts", help="the shipped model and finished runs on glyphs with and without a border")
    four.add_argument("--out", type=Path, default=HERE / "results" / "learned")
    four.add_argument("--checkpoints", type=Path, default=HERE / "out" / "learned", help="where the runs' models are")
    four.add_argument("--images", type=int, default=1000, help="test scenes to make pairs from")
    return told


def run(args: argparse.Namespace) -> int:
    """Train and judge."""
    if args.quick and args.set not in (None, "quick"):
        raise ValueError(f"--quick is a set of runs, as --set {args.set} is: give one of them")
    name = "quick" if args.quick else args.set or "long"
    settings, arms, *_ = SETS[name]
    arms = args.arms or arms
    if unknown := sorted(set(arms) - set(settings.arms())):
        raise ValueError(f"no arm {', '.join(unknown)}: there are {', '.join(settings.arms())}")
    if args.workers < 1:
        raise ValueError(f"--workers must be at least 1, got {args.workers}")
    if args.minutes is not None and not (math.isfinite(args.minutes) and args.minutes > 0):
        raise ValueError(f"--minutes must be above 0, got {args.minutes:g}")
    if wrong := sorted(seed for seed in args.seeds or () if not 0 <= seed < TRAINING_SEEDS):
        raise ValueError(
            f"--seeds must be 0 to {TRAINING_SEEDS - 1} (scenes of larger ones are for judging), "
            f"got {', '.join(map(str, wrong))}"
        )
    given = {
        "arms": list(dict.fromkeys(arms)),
        "seeds": list(dict.fromkeys(args.seeds or ()))
        or ((learned_run.TUNING_SEED,) if name == "quick" else learned_run.SEEDS),
        "out": args.out / name,
        "checkpoints": args.checkpoints / name,
        "minutes": args.minutes,
    }
    if args.workers == 1:
        learned_run.work(settings, **given)
    else:
        learned_run.work_side_by_side(args.workers, settings, **given)
    found = learned_run.read_runs(args.out / name, settings)
    planned, blocked = learned_run.tasks(settings.factors, given["arms"], given["seeds"], found, settings.takes)
    left = [task.name for task in planned if task not in found]
    print(f"{len(planned) - len(left)} runs done, {len(left) + len(blocked)} left: {', '.join((*left, *blocked))}")
    if blocked:
        print(f"those without a learning rate wait for seed {learned_run.TUNING_SEED}'s")
    return 0


def report(args: argparse.Namespace) -> int:
    """Tables and plots."""
    learned_report.report(args.out, page=args.page)
    return 0


def cuts(args: argparse.Namespace) -> int:
    """Borders through glyphs."""
    if args.images < 1:
        raise ValueError(f"--images must be at least 1, got {args.images}")
    args.out.mkdir(parents=True, exist_ok=True)
    learned_cuts.work(args.out, args.checkpoints, images=args.images)
    return 0


if __name__ == "__main__":
    sys.exit(main())
