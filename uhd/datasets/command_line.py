"""The commands over data sets: ``uhd encode-dataset`` and ``uhd inspect``."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Thread
from typing import Any

_UNITS = ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)


def add(known: Any) -> None:
    """Add both to the parser's commands."""
    command = known.add_parser("encode-dataset", help="a folder, list, tar or Parquet of images to tokens on disk")
    command.add_argument("source", metavar="SRC", help="what holds the images; all of a folder is searched")
    command.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="a folder; goes on in one")
    command.add_argument("--encoder", type=Path, required=True, metavar="DIR", help="an encoder's folder")
    command.add_argument("--budget-patches", type=int, metavar="N", help="patches that are encoded at once")
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the tokens on disk")
    command.add_argument("--columns", default="", metavar="A,B", help="columns of the source to keep in the index")
    command.add_argument("--limit", type=int, metavar="N", help="the first N images")
    command.add_argument("--dedupe", action="store_true", help="encode files of equal bytes once; reads all twice")
    command.add_argument("--shard", type=_shard, default=(0, 1), metavar="i/n", help="the i-th, from 0, of n runs")
    command.add_argument("--engine", choices=("local", "ray"), default="local")
    command.add_argument("--processes", type=int, metavar="N", help="of the local engine (default: one a core or GPU)")
    command.add_argument("--actors", type=int, metavar="N", help="of Ray: processes that hold the encoder")
    command.add_argument("--cpus-per-task", type=float, metavar="X", help="of Ray: cores of a task that prepares")
    command.add_argument("--device", choices=("cpu", "cuda"))
    command.add_argument(
        "--on-error", choices=("record", "stop"), default="record", help="record images that are refused (default)"
    )
    command.add_argument("--dry-run", action="store_true", help="read headers and say what all of it would cost")
    command.set_defaults(run=_encode)

    command = known.add_parser("inspect", help="what a folder of tokens holds, and whether it is whole")
    command.add_argument("folder", type=Path, metavar="OUT")
    command.add_argument("--json", action="store_true", help="one JSON object")
    command.set_defaults(run=_inspect)


def _shard(text: str) -> tuple[int, int]:
    if not (found := re.fullmatch(r"(\d+)/(\d+)", text)):
        raise argparse.ArgumentTypeError(f"expected i/n, such as 0/8, got {text!r}")
    return int(found[1]), int(found[2])


def _encode(args: argparse.Namespace) -> int:
    from uhd import commands, datasets
    from uhd.datasets import index

    own = {name: getattr(args, name) for name in ("dtype", "limit", "shard", "device")}
    own["columns"] = [name.strip() for name in args.columns.split(",") if name.strip()]
    if args.budget_patches is not None:
        own["budget_patches"] = args.budget_patches
    if args.dry_run:
        found = datasets.estimate(args.source, args.encoder, **own)
        print("\n".join(f"{name}: {_worded(value)}" for name, value in found.items()))
        return 0
    for engine, names in (("local", ["processes"]), ("ray", ["actors", "cpus_per_task"])):
        given = {name: value for name in names if (value := getattr(args, name)) is not None}
        if given and engine != args.engine:
            raise ValueError(f"--{next(iter(given)).replace('_', '-')} is of --engine {engine}")
        own |= given
    own |= {name: getattr(args, name) for name in ("engine", "on_error", "dedupe")}
    own["progress"] = partial(_bar, args, own["columns"])
    try:
        found = datasets.encode(args.source, args.output, args.encoder, **own)
    except commands.Stopped as stop:
        raise type(stop)(f"what is done is in {args.output}: the same command goes on") from None
    print(f"{found['images']:,} images + {found['errors']:,} errors = {found['inputs']:,} inputs", end=", ")
    print(f"{found['tokens']:,} tokens in {found['units']:,} units, {found['done']:,} of them new: {args.output}")
    if not found["complete"]:
        print("not all units are there: the last of the other shards' runs writes the index", file=sys.stderr)
    if found["errors"] and found["complete"]:
        print(f"{index.table_of(args.output, index.ERRORS)} says which, and why", file=sys.stderr)
    return 0


def _worded(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


def _bar(args: argparse.Namespace, columns: list[str], done: Iterator[tuple[int, dict[str, int]]]) -> Iterator[Any]:
    """On a terminal's stderr: images done, a second, and the time left, once the source has been listed beside."""
    if not sys.stderr.isatty():
        yield from done
        return
    from tqdm import tqdm

    from uhd.datasets import index, sources

    def count() -> None:
        place, shards = args.shard
        there = len([one for one in index.units_in(args.output) if one % shards == place])
        items = sources.listed(args.source, columns=columns, skip=args.output)
        inputs = sum(1 for _ in islice(items, args.limit))
        bar.total = max(0, inputs // shards - there * sources.UNIT)

    with tqdm(unit=" images", smoothing=0.05) as bar:
        Thread(target=count, daemon=True).start()
        errors = 0
        for number, counts in done:
            errors += counts["errors"]
            bar.set_postfix(errors=errors, refresh=False)
            bar.update(counts["inputs"])
            yield number, counts


def _inspect(args: argparse.Namespace) -> int:
    from uhd.datasets import inspect

    found = inspect(args.folder)
    if args.json:
        print(json.dumps(found))
        return 1 if found["problems"] else 0
    print(f"{args.folder}: {found['images']:,} images + {found['errors']:,} errors = {found['inputs']:,} inputs")
    size = next((f"{found['bytes'] / one:.1f} {name}" for name, one in _UNITS if found["bytes"] >= one), "0 kB")
    shape = f"{found['tokens']:,} tokens of width {found['width']}, {found['dtype']}"
    print(f"  {shape}, {size} in {found['units']:,} units" + ("" if found["complete"] else ", not finished"))
    if found["copies"]:
        print(f"  {found['copies']:,} of the images have the tokens of an equal file")
    for stage, number in found["stages"].items():
        print(f"  refused to {stage}: {number:,}")
    for problem in found["problems"][:20]:
        print(f"problem: {problem}")
    if len(found["problems"]) > 20:
        print(f"and {len(found['problems']) - 20} more problems, all in --json")
    return 1 if found["problems"] else 0
