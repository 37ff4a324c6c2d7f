"""``python -m uhd.nano``: Read fresh images with a shipped model, or with one in a folder, and print how well."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from transformers.utils import logging

from uhd import commands
from uhd.nano.answer import SHIPPED, check_source, load_model
from uhd.nano.evaluate import EVALUATION_SEED, evaluate, summary, table
from uhd.nano.task import LEARNED, QUESTIONS
from uhd.writing import check_place, write_text


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns the exit status."""
    return commands.run("python -m uhd.nano", lambda: measure(_arguments(argv)))


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m uhd.nano", description=__doc__.partition(": ")[2])
    parser.add_argument("--images", type=int, default=2000, metavar="N")
    parser.add_argument("--seed", type=int, default=EVALUATION_SEED, help=f"default {EVALUATION_SEED}")
    parser.add_argument("--model", default="nano", metavar="MODEL", help=f"a folder, or one of {', '.join(SHIPPED)}")
    parser.add_argument("--kinds", nargs="+", choices=QUESTIONS, default=LEARNED, help="of questions")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write summary and every item")
    args = parser.parse_args(argv)
    if args.images < 1:
        parser.error(f"--images must be at least 1, got {args.images}")
    if args.seed < 0:
        parser.error(f"--seed must be at least 0, got {args.seed}")
    try:
        check_source(args.model)
    except ValueError as problem:
        parser.error(str(problem))
    return args


def measure(args: argparse.Namespace) -> int:
    if args.json:
        check_place(args.json)
    logging.disable_progress_bar()
    model = load_model(args.model)
    start = time.perf_counter()
    items = evaluate(model, images=args.images, seed=args.seed, kinds=list(dict.fromkeys(args.kinds)))
    found = summary(items)
    print(table(found))
    print(f"{args.images} images of seed {args.seed}, {len(items)} answers in {time.perf_counter() - start:.0f} s")
    if args.seed < EVALUATION_SEED:
        print(f"seeds below {EVALUATION_SEED} are for training: the model may have seen these images")
    if args.json:
        write_text(args.json, json.dumps({"summary": found, "items": [asdict(item) for item in items]}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
