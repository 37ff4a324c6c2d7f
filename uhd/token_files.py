"""Encoded images and videos in a file: their tokens, and the plans and schema that say what these are."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import safe_open

from uhd.encoded import EncodedImage, EncodedVideo, frames_of
from uhd.files import damage_named
from uhd.schema import SpatialSchema
from uhd.schema.counted import checked_layout, planned_layout
from uhd.settings import Settings
from uhd.slicing import SlicePlan, VideoPlan
from uhd.writing import check_place, new_file

FORMAT = "uhd-tokens-2"
"""``tokens`` (n, D) and ``images``, JSON of names and plans; in "uhd-tokens-1" that was metadata, whose size is
bounded."""

DTYPES = {"float32": ("F32", 4), "bfloat16": ("BF16", 2), "float16": ("F16", 2), "float64": ("F64", 8)}
"""What safetensors calls the dtypes that tokens have, and their bytes."""

_DIGITS = 160  # bytes that sizes and offsets of a file add to a header of none, at most


@dataclass(frozen=True)
class _Item(Settings):
    """What a file says of one image or video."""

    name: str
    plan: dict[str, Any]


def save_tokens(
    path: str | os.PathLike[str],
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
        ValueError: Nothing to save, another schema's layouts, a note that is no string, or no such place.
        OSError: The file cannot be written; what stood there before is unchanged.
    """
    if not encoded:
        raise ValueError("no images to save")
    if not isinstance(note, str):
        raise ValueError(f"note must be a string, got {note!r:.80}")
    names = [""] * len(encoded) if names is None else list(names)
    if len(names) != len(encoded):
        raise ValueError(f"got {len(encoded)} encoded images and {len(names)} names")
    with token_file(path, schema=schema, note=note) as file:
        for name, item in zip(names, encoded, strict=True):
            file.add(name, item)


@contextmanager
def token_file(path: str | os.PathLike[str], *, schema: SpatialSchema, note: str = "") -> Iterator[TokenFile]:
    """Give a file to add encoded images or videos to; errors as of :func:`save_tokens`.

    It is there at the end, or once its ``finish`` has returned, and never after an error before.
    """
    _check_name(path)
    with ThreadPoolExecutor(1) as thread, ExitStack() as stack:
        new = stack.enter_context(new_file(path))
        body, items = (stack.enter_context(open(each, "w+b")) for each in (new, new.with_name("images")))
        file = TokenFile(schema, note, body, items, lambda: thread.submit(stack.close))
        yield file
        file.finish()


class TokenFile:
    """A safetensors file that grows on disk: the header, which tells sizes, has room before them, and comes last."""

    def __init__(
        self, schema: SpatialSchema, note: str, body: BinaryIO, items: BinaryIO, move: Callable[[], Future]
    ) -> None:
        self.schema, self.size, self.moved = schema, 0, None
        self._settings = {"format": FORMAT, "schema": json.dumps(schema.to_dict()), **({"note": note} if note else {})}
        self._body, self._items, self._move = body, items, move
        self._room = (len(self._header(0, 0, "float32", 0)) + _DIGITS) // 8 * 8
        self._kind: tuple[str, int] | None = None
        self._ends = 0, 8 + self._room, 0  # rows, and where both files end, of what was added whole

    def add(self, name: str, item: EncodedImage | EncodedVideo) -> None:
        """Write one more; its tokens may be an array of NumPy, too."""
        number, (rows, end, end_of_items) = self.size, self._ends
        if planned_layout(item.plan, self.schema).symbols != item.layout.symbols:
            named = self.schema.name
            raise ValueError(f"image {number} was laid out by another schema than {named!r}: give the encoder's")
        tokens = item.tokens
        kind = str(tokens.dtype).removeprefix("torch."), tokens.shape[1]
        if self._kind not in (None, kind):
            told = f"image {number} has tokens of {kind[0]} and width {kind[1]}, those before of {self._kind[0]} and "
            raise ValueError(f"{told}{self._kind[1]}: save them to another file")
        data = _bytes_of(tokens)
        told = ("," if number else "[").encode() + json.dumps({"name": name, "plan": item.plan.to_dict()}).encode()
        try:
            for file, start, content in ((self._body, end, data), (self._items, end_of_items, told)):
                file.seek(start)
                file.write(content)
        except OSError as problem:
            raise _Unwritable(problem) from problem
        self._ends = rows + len(tokens), end + data.nbytes, end_of_items + len(told)
        self._kind, self.size = kind, number + 1

    def finish(self) -> None:
        """Write the rest and move the file to its place, even where a signal comes; the same again does nothing."""
        if not self.size:
            raise ValueError("no images to save")
        if self.moved is None:
            rows, end, end_of_items = self._ends
            for file, place in ((self._body, end), (self._items, end_of_items)):
                file.truncate(place)  # what an interrupt left of one more
                file.seek(place)
            self._items.write(b"]")
            self._items.seek(0)
            shutil.copyfileobj(self._items, self._body)
            header = self._header(rows, self._kind[1], self._kind[0], end_of_items + 1)
            self._body.seek(0)
            self._body.write(struct.pack("<Q", self._room) + header.ljust(self._room))
            self.moved = self._move()
        self.moved.result()

    def _header(self, rows: int, width: int, dtype: str, images: int) -> bytes:
        name, one = DTYPES[dtype]
        size = rows * width * one
        fields = {
            "__metadata__": self._settings,
            "tokens": {"dtype": name, "shape": [rows, width], "data_offsets": [0, size]},
            "images": {"dtype": "U8", "shape": [images], "data_offsets": [size, size + images]},
        }
        return json.dumps(fields).encode()


def _bytes_of(tokens: Any) -> memoryview:
    if isinstance(tokens, np.ndarray):
        return np.ascontiguousarray(tokens).view(np.uint8).data
    import torch  # which a file of another runtime's tokens is written without

    return tokens.detach().cpu().contiguous().view(torch.uint8).numpy().data


class _Unwritable(RuntimeError):
    """The file cannot be written on, so no item's own error, as an ``OSError`` may be; :mod:`uhd.writing` tells it."""

    def __init__(self, problem: OSError) -> None:
        super().__init__(problem.strerror)
        self.errno = problem.errno


def check_output(path: str | os.PathLike[str]) -> None:
    """Raise what :func:`save_tokens` would where it could not write, before any work is done."""
    check_place(path)
    _check_name(path)


def _check_name(path: str | os.PathLike[str]) -> None:
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"tokens are written to a .safetensors file, got {os.fspath(path)!r}")


def load_tokens(path: str | os.PathLike[str]) -> list[EncodedImage | EncodedVideo]:
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
            for frame in frames_of(p):
                checked_layout(frame, schema, where=f"image {number}", advice="its plan or its schema is another's")
        layouts = [planned_layout(p, schema) for p in plans]
        counts = [laid.num_visual_tokens for laid in layouts]
        if sum(counts) != len(tokens):
            raise ValueError(f"it holds {len(tokens)} tokens, its {len(plans)} plans count {sum(counts)}")
    return [
        (EncodedVideo if isinstance(p, VideoPlan) else EncodedImage)(part, p, laid)
        for part, p, laid in zip(tokens.split(counts), plans, layouts, strict=True)
    ]
