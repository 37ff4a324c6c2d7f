"""The command ``uhd evaluate``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from uhd import commands


def add(known: Any) -> None:
    """Add it to the parser's commands."""
    command = known.add_parser("evaluate", help="what slicing rules make of own questions: accuracy and cost")
    command.add_argument("model", nargs="?", metavar="MODEL", help="a saved model's folder, or nano or nano-plus")
    command.add_argument("data", type=Path, metavar="DATA.jsonl", help="lines of image, question, answer")
    command.add_argument("--nano", action="store_true", help="the same as giving nano as MODEL")
    command.add_argument("--strategies", default="own", metavar="A,B,C", help="rules' names; own is the model's")
    command.add_argument("--prompt", help="with {image} and {question} (default: the model's chat template)")
    command.add_argument("--batch-size", type=int, default=16, metavar="N")
    command.add_argument("--max-new-tokens", type=int, default=48, metavar="N")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the table and every answer")
    commands.add_on_error(command, "a line that cannot be asked")
    command.set_defaults(run=_evaluate, wrong=command.error)


def _evaluate(args: argparse.Namespace) -> int:
    if args.nano == (args.model is not None):
        args.wrong("give a model's folder, or nano or nano-plus, before the data; or --nano alone")
    if min(args.batch_size, args.max_new_tokens) < 1:
        raise ValueError(
            f"--batch-size and --max-new-tokens must be at least 1, got {args.batch_size} and {args.max_new_tokens}"
        )
    from transformers.utils import logging

    from uhd.evaluation import judging, read_questions
    from uhd.nano.answer import SHIPPED, load_model
    from uhd.writing import check_place, write_text

    strategies = _strategies(args.strategies)
    if args.json is not None:
        check_place(args.json)
        if args.json.exists() and args.data.exists() and args.json.samefile(args.data):
            raise ValueError(f"{args.json} holds the questions: choose another output")
    bad: set[int] = set()

    def refuse(line: int, what: str) -> None:
        if args.on_error == "stop":
            raise ValueError(f"{args.data}, line {line}: {what}")
        bad.add(line)
        print(f"uhd evaluate: {args.data}, line {line}: {what}", file=sys.stderr)

    asked = read_questions(args.data, refuse)
    total = len(asked) + len(bad)
    if not asked:
        return commands.status(len(bad), total)
    logging.disable_progress_bar()
    source = "nano" if args.nano else args.model
    told = {"model": source, "prompt": args.prompt, "max_new_tokens": args.max_new_tokens}
    done: list[int] = []

    def keep(rows: list[dict[str, Any]]) -> None:
        done.append(rows[0]["questions"])
        print(judging.table(rows, model=source))
        if bad:
            print(f"lines that could not be asked: {len(bad)} of {total}")
        if args.json is not None:
            found = {**told, "refused": sorted(bad), "strategies": rows}
            write_text(args.json, json.dumps(found, indent=1, ensure_ascii=False) + "\n")

    try:
        rows = judging.evaluate(
            load_model(source),
            asked,
            strategies,
            prompt=args.prompt,
            batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens,
            repaint=source in SHIPPED,
            refuse=refuse,
            keep=keep,
        )
    except KeyboardInterrupt as stop:
        raise type(stop)(f"{sum(done)} of {total} questions were asked") from None
    keep(rows)
    return commands.status(len(bad), total)


def _strategies(text: str) -> list[str]:
    """Rules by their names; one that does not exist is an error before any work."""
    from uhd.evaluation.judging import OWN
    from uhd.slicing.rules import find, split_names

    found = list(dict.fromkeys(split_names(text)))
    for name in found:
        if name != OWN:
            find(name)
    if not found:
        raise ValueError("--strategies names none: own is the model's own rule")
    return found
