"""The index of a folder of units: made of theirs once all are there, and read in Parquet or JSON lines."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from uhd.datasets.plan import FORMAT, file_of, header_of, index_of
from uhd.datasets.sources import pyarrow_for
from uhd.files import damage_named, read_json
from uhd.settings import read_values
from uhd.writing import new_file, write_text

RUN, INDEX, ERRORS = "run.json", "index", "errors"
UNIT_FILE = re.compile(r"unit-([0-9]{8})\.safetensors")
_ROWS = 10_000  # that are written together

README = """# Visual tokens of a data set

Written by `uhd encode-dataset`, format 1. `uhd.datasets.Tokens` reads it, and so does anything that reads safetensors
and Parquet (or JSON lines, where pyarrow was missing).

* `unit-NNNNNNNN.safetensors`: the images of one unit. `tokens` (n, D): rows of all its images, in order; `offsets`
  (images + 1): where each begins; `index`: UTF-8 bytes of JSON, the unit's rows of `index` and `errors`. Its metadata,
  `uhd`, is JSON: the unit's number, a digest of its keys, counts, and the sha256 of the three tensors' bytes in that
  order. With `--dedupe` an image whose file came before has no tokens here, and null for `shard`, `start` and `stop`.
* `index.parquet`: a row an image, in the order of the source. `key`; `sha256` of its file; `height` and `width`, px,
  upright; `grid_rows` and `grid_columns` of its slices, 0 where it is not cut; `num_views`; `num_patches`;
  `num_tokens`: positions in a language model's sequence, separators included; `num_visual_tokens` = stop - start;
  `shard`, `start`, `stop`: the file, and rows of its `tokens`, with `--dedupe` the same for all of one sha256;
  `slice_borders`, only where the slicing moves them: JSON, the y and the x of every border between slices, px;
  columns of the source that were asked for, as text.
* `errors.parquet`: `key`, `stage` (read, decode, plan) and `error` of every image that was refused. Images + errors =
  inputs.
* `run.json`: the recipe (the encoder's description, sha256 of its weights, settings), what every worker computed with,
  versions, and counts.
"""

COLUMNS = (
    *("key", "sha256", "height", "width", "grid_rows", "grid_columns", "num_views", "num_patches", "num_tokens"),
    *("num_visual_tokens", "shard", "start", "stop"),
)
"""Columns of every index; those of the source come after them."""

BORDERS = "slice_borders"
"""The column that stands beside them where borders of slices move, so that plans follow from the index."""

TABLES = {INDEX: COLUMNS, ERRORS: ("key", "stage", "error")}
COUNTS = ("units", "inputs", "images", "errors", "tokens")
TEXTS = ("key", "sha256", "shard", "stage", "error", BORDERS)
Write = Callable[[list[dict[str, Any]]], object]


def read_run(out: Path) -> dict[str, Any]:
    """What ``run.json`` says; a ``ValueError`` where there is none, of another format or damaged."""
    if not (out / RUN).is_file():
        raise ValueError(f"{out} holds no {RUN}: give a folder that uhd encode-dataset wrote")
    run = read_json(out / RUN)
    if run.get("format") != FORMAT:
        raise ValueError(f"{out / RUN} has format {run.get('format')!r}, this version knows {FORMAT}: another folder")
    with damage_named(out / RUN):
        read_values(run, "a run's description", recipe=dict[str, Any], settled=dict[str, Any])
        read_values(run["recipe"], "a run's recipe", encoder=dict[str, Any], columns=tuple[str, ...], dedupe=bool)
        read_values(run["settled"], "what a run settled", device=str, threads=int, products=dict[str, str])
        if run.get("counts") is not None:
            read_values(run["counts"], "a run's counts", **dict.fromkeys(COUNTS, int))
    return run


def units_in(out: Path) -> list[int]:
    """Numbers of the units whose files are there, sorted."""
    with os.scandir(out) as entries:
        return sorted(int(found[1]) for entry in entries if (found := UNIT_FILE.fullmatch(entry.name)))


def finish(out: Path, inputs: int, units: int) -> dict[str, Any]:
    """Write the index where all units are there, as whichever run is the last finds; counts of what is.

    Raises:
        ValueError: A unit is damaged, or of another number; or there are more units than the source has.
        RuntimeError: Images and errors are not the inputs.
    """
    there = units_in(out)
    counts: dict[str, Any] = {"inputs": 0, "images": 0, "errors": 0, "tokens": 0, "units": len(there)}
    for number in there:
        header = header_of(file_of(out, number)) or {}
        counts["inputs"] += header.get("inputs", 0)
        counts["images"] += header.get("images", 0)
        counts["tokens"] += header.get("tokens", 0)
    counts["errors"] = counts["inputs"] - counts["images"]
    if over := [number for number in there if number >= units]:
        raise ValueError(f"{file_of(out, over[0])} is past the source's {units} units: the source has changed since")
    if len(there) < units:
        return {**counts, "complete": False}
    run = read_run(out)
    images, errors = (_write(out, name, there, run["recipe"]) for name in TABLES)
    if (images, errors, images + errors) != (counts["images"], counts["errors"], inputs):
        raise RuntimeError(f"{out}: {images} images + {errors} errors of {inputs} inputs: uhd inspect tells which")
    write_json(out / RUN, {**run, "counts": counts})
    return {**counts, "complete": True}


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def rows_of(out: Path, units: Sequence[int], name: str, recipe: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of all units as a table has them: values of the source's columns as text, JSON where they were none.

    Raises:
        ValueError: A unit is damaged, or without the tokens of an image that no other unit has.
    """
    if name == ERRORS:
        yield from (row for number in units for row in index_of(file_of(out, number))["errors"])
        return
    copied = {row["sha256"] for _, row in _images(out, units) if row["shard"] is None} if recipe["dedupe"] else set()
    places: dict[str, dict[str, Any]] = {}
    for number, row in _images(out, units):
        if row["shard"] is None and row["sha256"] not in places:
            raise ValueError(
                f"no unit has the file of {row['key']!r} any more, which an earlier one had, the source has changed: "
                f"remove {file_of(out, number).name}, and the same command makes it again"
            )
        if row["sha256"] in copied:  # the first comes first
            row |= places.setdefault(row["sha256"], {name: row[name] for name in ("shard", "start", "stop")})
        yield {column: row[column] for column in COLUMNS} | {name: _text(row.get(name)) for name in _more(recipe)}


def _more(recipe: dict[str, Any]) -> list[str]:
    """Columns of the images' index beside :data:`COLUMNS`."""
    moves = recipe["encoder"]["slicing"].get("border_moves", 0)
    return [*([BORDERS] if moves else []), *recipe["columns"]]


def _images(out: Path, units: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number in units:
        for row in index_of(file_of(out, number))["images"]:
            yield number, row


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, default=str)


def _write(out: Path, name: str, units: Sequence[int], recipe: dict[str, Any]) -> int:
    """Write a table, in blocks; how many rows it has."""
    rows, number = rows_of(out, units, name, recipe), 0
    suffix, other, table = (".parquet", ".jsonl", _parquet_of) if _pyarrow() else (".jsonl", ".parquet", _lines_of)
    columns = [*TABLES[name], *(_more(recipe) if name == INDEX else ())]
    with new_file((out / name).with_suffix(suffix)) as new, table(new, columns) as write:
        while some := list(islice(rows, _ROWS)):
            write(some)
            number += len(some)
    (out / name).with_suffix(other).unlink(missing_ok=True)
    return number


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet

        return pyarrow
    except ImportError:
        return None


@contextmanager
def _lines_of(path: Path, _: Sequence[str]) -> Iterator[Write]:
    with open(path, "w", encoding="utf-8") as file:
        yield lambda rows: file.writelines(json.dumps(row) + "\n" for row in rows)


@contextmanager
def _parquet_of(path: Path, columns: Sequence[str]) -> Iterator[Write]:
    pyarrow = _pyarrow()
    whole = {*COLUMNS} - {*TEXTS}
    schema = pyarrow.schema([(name, pyarrow.int64() if name in whole else pyarrow.string()) for name in columns])
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        yield lambda rows: writer.write_table(pyarrow.Table.from_pylist(rows, schema))


def read_rows(out: Path, name: str) -> Iterator[dict[str, Any]]:
    """A table's rows, in order; a ``ValueError`` where it is missing or damaged."""
    path = table_of(out, name)
    with damage_named(path):
        if path.suffix == ".jsonl":
            with open(path, encoding="utf-8") as file:
                yield from map(json.loads, file)
            return
        with pyarrow_for(path).parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_ROWS):
                yield from batch.to_pylist()


def read_columns(out: Path, columns: Sequence[str]) -> dict[str, Any]:
    """Columns of the index: arrays of integers, and of texts what has an item for every row."""
    path = table_of(out, INDEX)
    with damage_named(path):
        if path.suffix == ".parquet":
            table = pyarrow_for(path).parquet.read_table(path, columns=list(columns))
            found = {name: table[name].combine_chunks() for name in columns}
            if empty := [name for name, values in found.items() if values.null_count]:
                raise ValueError(f"{empty[0]} is null in a row")
        else:
            rows = list(read_rows(out, INDEX))
            found = {name: [row[name] for row in rows] for name in columns}
        return {name: values if name in TEXTS else np.asarray(values, np.int64) for name, values in found.items()}


def table_of(out: Path, name: str) -> Path:
    """The file of a table; a ``ValueError`` where there is none."""
    for suffix in (".parquet", ".jsonl"):
        if (path := (out / name).with_suffix(suffix)).is_file():
            return path
    there = f"{len(units_in(out))} units are there" if out.is_dir() else "there is no such folder"
    raise ValueError(
        f"{out} has no {name}.parquet or .jsonl ({there}): the command that encodes it writes it at its end"
    )
