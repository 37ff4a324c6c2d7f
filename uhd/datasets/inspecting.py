"""What a folder of units holds, and whether it is all there, bit by bit."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from uhd.datasets import index
from uhd.datasets.plan import file_of, header_of
from uhd.datasets.units import digest
from uhd.files import DAMAGE


def inspect(out: str | os.PathLike[str]) -> dict[str, Any]:
    """Look through a folder that ``uhd encode-dataset`` wrote, reading every byte of it.

    Returns:
        ``units``, ``inputs``, ``images``, ``copies``: how many of these have the tokens of an equal file; ``errors``,
        ``tokens``, ``bytes``, ``dtype`` and ``width`` of its files; ``stages``: how many images were refused where;
        ``complete``; and ``problems``: a sentence for whatever is missing, damaged or, once all units are whole,
        contradicts them, with what to do.

    Raises:
        ValueError: It is no such folder.
    """
    out = Path(out)
    run = index.read_run(out)
    numbers = index.units_in(out)
    found: dict[str, Any] = {
        "units": len(numbers),
        **dict.fromkeys(("inputs", "images", "copies", "errors", "tokens"), 0),
    }
    found |= {"bytes": 0, "dtype": "", "width": 0, "stages": {}, "complete": "counts" in run}
    counts, problems = run.get("counts") or {}, []
    if not counts:
        problems.append("the run has not ended: the same command goes on")
    for number in numbers:
        if problem := _looked(file_of(out, number), number, found):
            problems.append(f"{problem}: remove what is left of it, and the same command makes it again")
    behind = max(counts.get("units", 0), max(numbers, default=-1) + 1)
    for first, last in ((one + 1, two - 1) for one, two in pairwise([-1, *numbers, behind])):
        if first <= last:
            some = "is" if first == last else f"to {file_of(out, last).name} are"
            problems.append(f"{file_of(out, first).name} {some} missing: the same command makes what is missing")
    if counts and not problems:
        problems += _compared(out, numbers, run["recipe"])
        told = {name: found[name] for name in index.COUNTS}
        if told != counts:
            problems.append(f"{index.RUN} counts {counts}, the files hold {told}: the same command counts again")
    return {**found, "problems": problems}


def _looked(path: Path, number: int, found: dict[str, Any]) -> str:
    """What is wrong with a unit; else what it holds is added to what was found."""
    header = header_of(path)
    if header is None:
        return f"{path.name} is damaged"
    try:
        tensors, told = load_file(path), index.index_of(path)
        same = (header["unit"], header["images"], header["sha256"]) == (number, len(told["images"]), digest(tensors))
        tokens, stages = tensors["tokens"], Counter(row["stage"] for row in told["errors"])
    except (*DAMAGE, OSError) as problem:
        return f"{path.name} is damaged ({problem})"
    if not same or header["inputs"] != len(told["images"]) + len(told["errors"]):
        return f"{path.name} is damaged: its bytes are not those that were written, or it is another unit's"
    found |= {"dtype": str(tokens.dtype).removeprefix("torch."), "width": tokens.shape[1] or found["width"]}
    found["bytes"] += path.stat().st_size
    found["stages"] = dict(Counter(found["stages"]) + stages)
    found["images"] += len(told["images"])
    found["copies"] += sum(row["shard"] is None for row in told["images"])
    found["inputs"] += header["inputs"]
    found["tokens"] += len(tokens)
    found["errors"] = found["inputs"] - found["images"]
    return ""


def _compared(out: Path, units: list[int], recipe: dict[str, Any]) -> Iterator[str]:
    """Where the tables are not what the units say."""
    for name in index.TABLES:
        try:
            pairs = zip_longest(index.read_rows(out, name), index.rows_of(out, units, name, recipe))
            other = [number for number, (one, two) in enumerate(pairs) if one != two]
        except (*DAMAGE, OSError) as problem:
            yield f"{name}: {problem}: the same command writes it again"
            continue
        if other:
            yield (
                f"{index.table_of(out, name).name}: {len(other)} rows, the first number {other[0]}, are not what the "
                "units say: the same command writes it again"
            )
