"""A unit of a data set: its images read, prepared, encoded and written, in this process and by whoever calls."""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from uhd.batch import SliceBatch
from uhd.datasets.index import BORDERS
from uhd.datasets.plan import FORMAT, Unit, file_of
from uhd.datasets.sources import Item, read
from uhd.encoded import num_rows
from uhd.files import DAMAGE
from uhd.loading import Preparation
from uhd.machine import in_threads, use_products
from uhd.pixels.views import load_picture
from uhd.slicing.borders import even_borders, moved_borders
from uhd.writing import new_file

_SHOWN = 500  # characters of an error


@dataclass(frozen=True)
class Job:
    """What every worker of a run is told, so that all of them compute the same.

    Attributes:
        out: Where units are written.
        encoder: The encoder's folder.
        preparation: Its own.
        budget_patches: Most patches that are encoded at once, unless an image alone has more.
        dtype: Of the tokens that are written; ``None``: the encoder's.
        stop: Whether an image that is refused ends the run.
        device, threads, products: Where and how an encoder multiplies, see :mod:`uhd.machine`.
    """

    out: str
    encoder: str
    preparation: Preparation
    budget_patches: int
    dtype: str | None
    stop: bool
    device: str
    threads: int
    products: dict[str, str]


class Part(NamedTuple):
    """Images of a unit that are encoded together: packed, what is known of each, and those refused up to here."""

    batch: SliceBatch
    rows: list[dict[str, Any]]
    errors: list[dict[str, str]]


def prepare(unit: Unit, job: Job) -> Iterator[Part]:
    """Read, decode, plan and cut a unit's images, a part of at most ``budget_patches`` after the other.

    An image whose file is known is a row of its part, without a shard of its own, and none of its batch.

    Raises:
        ValueError: An image is refused, and the job stops there.
    """
    some, rows, errors, filled, threads = [], [], [], 0, torch.get_num_threads()
    known = {*(unit.known or ())}
    for start in range(0, len(unit.items), threads):
        for batch, row in in_threads(lambda item: _prepared(item, job), unit.items[start : start + threads]):
            if batch is None:
                errors.append(row)
                continue
            if row["sha256"] in known:
                rows.append({**row, "shard": None, "start": None, "stop": None})
                continue
            if unit.known is not None:
                known.add(row["sha256"])
            if some and filled + len(batch.patches) > job.budget_patches:
                yield Part(SliceBatch.cat(some), rows, errors)
                some, rows, errors, filled = [], [], [], 0
            some.append(batch)
            rows.append(row)
            filled += len(batch.patches)
    yield Part(SliceBatch.cat(some), rows, errors)


def _prepared(item: Item, job: Job) -> tuple[SliceBatch | None, dict[str, Any]]:
    stage, how = "read", job.preparation
    try:
        content, kept = read(item)
        stage = "decode"
        picture = load_picture(content, settings=how.pixels)
        stage = "plan"
        plan = how.slicing.plan((picture.height, picture.width))
        (plan,) = how.moved([picture], [plan])
        batch = how.cut([picture], [plan])
    except (*DAMAGE, OSError) as problem:  # a decoder may raise anything
        told = f"{problem}"[:_SHOWN] or repr(problem)
        if job.stop:
            raise ValueError(f"{item.key} ({stage}): {told}") from problem
        return None, {"key": item.key, "stage": stage, "error": told}
    rows, columns = plan.grid or (0, 0)
    return batch, {
        "key": item.key,
        "sha256": hashlib.sha256(content).hexdigest(),
        "height": picture.height,
        "width": picture.width,
        "grid_rows": rows,
        "grid_columns": columns,
        "num_views": plan.num_views,
        "num_patches": plan.num_patches,
        "num_tokens": plan.num_tokens,
        "num_visual_tokens": num_rows(plan),
        BORDERS: moved_borders(plan) or even_borders(plan),
        **kept,
    }


def give_back() -> None:
    """Return memory that is free to the system, where glibc has kept it.

    Blocks of many sizes come and go: what lies between them would grow by hundreds of MiB over a run.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def as_before() -> Iterator[None]:
    """What an :class:`Encoder` settles for its process is undone at the end: a caller may have pinned others."""
    threads, products = torch.get_num_threads(), use_products(None)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        use_products(products)


class Encoder:
    """The second half of the work: parts to a unit's file. It settles the threads and products of its process."""

    def __init__(self, job: Job) -> None:
        from uhd.encoder import VisualEncoder

        if job.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError("device='cuda': torch finds no GPU here")
        torch.set_num_threads(job.threads)
        use_products(job.products)
        self.job, self.encoder = job, VisualEncoder.from_pretrained(job.encoder).to(job.device).requires_grad_(False)
        weight = next((one for one in self.encoder.parameters() if one.is_floating_point()), torch.empty(0))
        self.dtype = getattr(torch, job.dtype) if job.dtype else weight.dtype
        self.width = getattr(self.encoder.compressor, "out_dim", 0)

    @torch.inference_mode()
    def encode(self, batch: SliceBatch) -> Tensor:
        """(n, D) on the host, in the dtype that is written."""
        return self.encoder.encode(batch.to(self.job.device)).to("cpu", self.dtype)

    def __call__(self, unit: Unit, parts: Iterable[Part]) -> dict[str, int]:
        """Encode and write; counts of what was.

        Raises:
            OSError: The file cannot be written.
        """
        images, errors, tokens = [], [], []
        for part in parts:
            errors += part.errors
            images += part.rows
            tokens += [self.encode(part.batch)] if part.batch.plans else []
        none = torch.empty(0, self.width, dtype=self.dtype)
        counts = _write(unit, self.job.out, torch.cat(tokens or [none]), images, errors)
        give_back()
        return counts


def _write(
    unit: Unit, out: str, tokens: Tensor, images: list[dict[str, Any]], errors: list[dict[str, str]]
) -> dict[str, int]:
    if len(images) + len(errors) != len(unit.items):
        raise RuntimeError(f"unit {unit.number}: {len(images)} images + {len(errors)} errors of {len(unit.items)}")
    path, start, offsets = file_of(out, unit.number), 0, [0]
    for row in images:
        if "shard" not in row:
            row |= {"shard": path.name, "start": start, "stop": start + row["num_visual_tokens"]}
            offsets.append(start := row["stop"])
    if start != len(tokens):
        raise RuntimeError(f"unit {unit.number}: its plans count {start} tokens, the encoder gave {len(tokens)}")
    told = torch.frombuffer(bytearray(json.dumps({"images": images, "errors": errors}).encode()), dtype=torch.uint8)
    tensors = {"tokens": tokens.contiguous(), "offsets": torch.tensor(offsets), "index": told}
    header = {"format": FORMAT, "unit": unit.number, "inputs": len(unit.items), "keys": unit.keys}
    header |= {"images": len(images), "tokens": len(tokens), "sha256": digest(tensors)}
    with new_file(path) as new:  # one entry: those of several come in any order
        save_file(tensors, new, metadata={"uhd": json.dumps(header)})
    return {"inputs": len(unit.items), "images": len(images), "errors": len(errors), "tokens": len(tokens)}


def digest(tensors: dict[str, Tensor]) -> str:
    """sha256 of a unit's tensors, bit by bit."""
    found = hashlib.sha256()
    for name in ("tokens", "offsets", "index"):
        if tensors[name].numel():
            found.update(tensors[name].view(torch.uint8).numpy().data)
    return found.hexdigest()
