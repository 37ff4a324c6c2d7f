"""Encoded images and videos in a file: their tokens, and the plans and schema that say what these are."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from uhd.encoded import EncodedImage, EncodedVideo
from uhd.files import damage_named
from uhd.schema import SpatialSchema, TokenLayout
from uhd.schema.counted import checked_layout, layout_of, video_layout
from uhd.settings import Settings
from uhd.slicing import SlicePlan, VideoPlan
from uhd.writing import check_place, new_file

FORMAT = "uhd-tokens-2"
"""``tokens`` (n, D) and ``images``, JSON of names and plans; in "uhd-tokens-1" that was metadata, whose size is
bounded."""

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
"""What safetensors calls the dtypes that tokens have."""

_DIGITS = 160  # bytes that sizes and offsets of a file add to a header of none, at most
Add = Callable[[str, EncodedImage | EncodedVideo], None]


@dataclass(frozen=True)
class _Item(Settings):
    """What a file says of one image or video."""

    name: str
    plan: dict[str, Any]


def save_tokens(
    path: str | os.PathLike,
    encoded: Sequence[EncodedImage | EncodedVideo],
    *,
    schema: SpatialSchema,
    names: Sequence[str] | None = None,
    note: str = "",
) -> None:
    """Write encoded images or videos to one safetensors file: their ``tokens`` (n, D) and JSON, ``images``.

    Args:
        path: The file; its folder must exist.
        encoded: What :class:`VisualEncoder` or its ``encode_videos`` returned.
        schema: The encoder's.
        names: Where each of them came from.
        note: Free text for whoever reads the file, e.g. that the weights are untrained.

    Raises:
        ValueError: Nothing to save, another schema's layouts, or no such place.
        OSError: The file cannot be written; what stood there before is unchanged.
    """
    if not encoded:
        raise ValueError("no images to save")
    names = [""] * len(encoded) if names is None else list(names)
    if len(names) != len(encoded):
        raise ValueError(f"got {len(encoded)} encoded images and {len(names)} names")
    with token_file(path, schema=schema, note=note) as add:
        for name, item in zip(names, encoded, strict=True):
            add(name, item)


@contextmanager
def token_file(path: str | os.PathLike, *, schema: SpatialSchema, note: str = "") -> Iterator[Add]:
    """Give a function of a name and an encoded image or video that writes it to a file of :func:`save_tokens`.

    Nothing is kept in memory; the file is there at the end, whole, and after an error not at all. Errors as there.
    """
    _check_name(path)
    settings = {"format": FORMAT, "schema": json.dumps(schema.to_dict()), **({"note": note} if note else {})}
    shape, dtype, size = [0, 0], None, 0

    def add(name: str, item: EncodedImage | EncodedVideo) -> None:
        nonlocal dtype, size
        if _layout_under(schema, item.plan).symbols != item.layout.symbols:
            raise ValueError(f"image {size} was laid out by another schema than {schema.name!r}: give the encoder's")
        tokens = item.tokens.detach().cpu().contiguous()
        if dtype is None:
            dtype, shape[1] = tokens.dtype, tokens.shape[1]
        if (tokens.dtype, tokens.shape[1]) != (dtype, shape[1]):
            told = f"image {size} has {tokens.dtype} tokens of width {tokens.shape[1]}"
            raise ValueError(f"{told}, those before have {dtype} and {shape[1]}: save them to another file")
        told = {"name": name, "plan": item.plan.to_dict()}
        try:
            body.write(tokens.view(torch.uint8).numpy().data)
            items.write((",\n" if size else "").encode() + json.dumps(told).encode())
        except OSError as problem:
            raise _Unwritable(problem) from problem
        shape[0] += len(tokens)
        size += 1

    def header() -> bytes:
        bounds = [0, shape[0] * shape[1] * (dtype.itemsize if dtype else 1)]
        fields = {
            "__metadata__": settings,
            "tokens": {"dtype": NAMES.get(dtype, "F32"), "shape": shape, "data_offsets": bounds},
            "images": {"dtype": "U8", "shape": [images], "data_offsets": [bounds[1], bounds[1] + images]},
        }
        return json.dumps(fields).encode()

    images = 0
    room = (len(header()) + _DIGITS) // 8 * 8
    with new_file(path) as new, open(new, "wb") as body, open(new.with_name("images"), "w+b") as items:
        body.write(bytes(8 + room))
        items.write(b"[")
        yield add
        if not size:
            raise ValueError("no images to save")
        items.write(b"]")
        images = items.tell()
        items.seek(0)
        shutil.copyfileobj(items, body)
        body.seek(0)
        body.write(struct.pack("<Q", room) + header().ljust(room))


class _Unwritable(RuntimeError):
    """The file cannot be written on, so no item's own error, as an ``OSError`` may be; :mod:`uhd.writing` tells it."""

    def __init__(self, problem: OSError) -> None:
        super().__init__(problem.strerror)
        self.errno = problem.errno


def _layout_under(schema: SpatialSchema, plan: SlicePlan | VideoPlan) -> TokenLayout:
    return video_layout(plan, schema) if isinstance(plan, VideoPlan) else layout_of(plan, schema)


def check_output(path: str | os.PathLike) -> None:
    """Raise what :func:`save_tokens` would where it could not write, before any work is done."""
    check_place(path)
    _check_name(path)


def _check_name(path: str | os.PathLike) -> None:
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"tokens are written to a .safetensors file, got {os.fspath(path)!r}")


def load_tokens(path: str | os.PathLike) -> list[EncodedImage | EncodedVideo]:
    """The inverse of :func:`save_tokens`.

    Raises:
        ValueError: Not such a file, or damaged: a field is missing or of another type, plans contradict themselves or
            the schema, or their counts are not those of the tokens; the message names the file.
    """
    with damage_named(Path(path)):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") not in ("uhd-tokens-1", FORMAT):
                raise ValueError(f"format {metadata.get('format')!r}, so not written by `uhd encode`")
            tokens = file.get_tensor("tokens")
            told = metadata["images"] if "images" in metadata else file.get_tensor("images").numpy().tobytes()
        if tokens.dim() != 2 or not tokens.is_floating_point():
            raise ValueError(f"tokens is {tuple(tokens.shape)} of {tokens.dtype}, expected (n, D) of floats")
        schema = SpatialSchema.from_dict(json.loads(metadata["schema"]))
        items = [_Item.from_dict(item) for item in json.loads(told)]
        plans = [(VideoPlan if "plans" in item.plan else SlicePlan).from_dict(item.plan) for item in items]
        for number, p in enumerate(plans):
            for frame in p.plans if isinstance(p, VideoPlan) else (p,):
                checked_layout(frame, schema, where=f"image {number}", advice="its plan or its schema is another's")
        layouts = [_layout_under(schema, p) for p in plans]
        counts = [laid.num_visual_tokens for laid in layouts]
        if sum(counts) != len(tokens):
            raise ValueError(f"it holds {len(tokens)} tokens, its {len(plans)} plans count {sum(counts)}")
    return [
        (EncodedVideo if isinstance(p, VideoPlan) else EncodedImage)(part, p, laid)
        for part, p, laid in zip(tokens.split(counts), plans, layouts, strict=True)
    ]
