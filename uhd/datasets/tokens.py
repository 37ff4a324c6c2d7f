"""Tokens read from a folder of units: by number and by key, only the pages that are asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from operator import index as whole
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from torch import Tensor

from uhd.datasets.index import BORDERS, RUN, UNIT_FILE, read_columns, read_rows, read_run
from uhd.encoded import EncodedImage, num_rows
from uhd.files import damage_named
from uhd.saving import EncoderDescription
from uhd.schema import SpatialSchema
from uhd.schema.counted import layout_of, slicing_from_dict
from uhd.slicing.borders import with_borders

_COLUMNS = ("key", "height", "width", "shard", "start", "stop")
_OPEN = 64  # files that are kept mapped


class Tokens:
    """The images of a folder that ``uhd encode-dataset`` wrote, as a map-style data set.

    ``tokens[3]``, ``tokens[-1]`` and ``tokens["cats/1.jpg"]`` are an :class:`uhd.EncodedImage` each, whose tokens are
    copied from a memory-mapped file. Processes, forked or spawned, and threads may read at once; what is pickled is
    the folder's name.

    Args:
        out: The folder.

    Raises:
        ValueError: It is no such folder, not finished, or damaged.
    """

    def __init__(self, out: str | os.PathLike[str]) -> None:
        self.out = Path(out)
        self.run = read_run(self.out)
        with damage_named(self.out / RUN):
            self.description = EncoderDescription.from_dict(self.run["recipe"]["encoder"])
            self.slicing = slicing_from_dict(self.description.slicing)
            self.schema = SpatialSchema.from_dict(self.description.schema)
        self._moves = self.slicing.border_moves > 0
        self._columns = read_columns(self.out, (*_COLUMNS, *([BORDERS] if self._moves else [])))
        self._files: dict[str, Any] = {}
        self._by_key: tuple[np.ndarray, np.ndarray] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self.out),)

    def __len__(self) -> int:
        return len(self._columns["start"])

    def __iter__(self) -> Iterator[EncodedImage]:
        return map(self.__getitem__, range(len(self)))

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and bool(self._numbers(key))

    def __getitem__(self, which: int | str) -> EncodedImage:
        """The image of a number, in the order of the source, or of a key.

        Raises:
            IndexError: There is no such number.
            KeyError: There is no such key, or an image of it was refused.
            ValueError: Several images have the key; or the file is damaged.
        """
        number = self.number(which) if isinstance(which, str) else whole(which)
        number += len(self) if number < 0 else 0
        if not 0 <= number < len(self):
            raise IndexError(f"images are numbered from 0 to {len(self) - 1}, got {which}")
        one = {name: self._value(name, number) for name in _COLUMNS}
        plan = self.slicing.plan((one["height"], one["width"]))
        if self._moves:
            with damage_named(self.out):
                plan = with_borders(plan, json.loads(self._value(BORDERS, number)), self.slicing)
        tokens = self._rows(one["shard"], one["start"], one["stop"])
        if len(tokens) != num_rows(plan):
            raise ValueError(f"{self.out}: {one['key']!r} has {len(tokens)} tokens, its plan counts {num_rows(plan)}")
        return EncodedImage(tokens, plan, layout_of(plan, self.schema))

    def number(self, key: str) -> int:
        """The number of the image with this key; errors as of indexing."""
        numbers = self._numbers(key)
        if len(numbers) > 1:
            raise ValueError(
                f"{len(numbers)} images of {self.out} have the key {key!r}: take their numbers, {numbers}"
            )
        if not numbers:
            raise KeyError(f"{self.out} has no image {key!r}: its errors may tell why")
        return numbers[0]

    def key(self, number: int) -> str:
        """The key of an image."""
        return self._value("key", number)

    def keys(self) -> Iterator[str]:
        """The keys of all images, in the order of the source."""
        return map(self.key, range(len(self)))

    def items(self) -> Iterator[tuple[str, EncodedImage]]:
        """Keys and images, in the order of the source: what a stream is made of."""
        return zip(self.keys(), self, strict=True)

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows of the index, with all of its columns."""
        return read_rows(self.out, "index")

    def errors(self) -> Iterator[dict[str, str]]:
        """``key``, ``stage`` and ``error`` of every image that was refused."""
        return read_rows(self.out, "errors")

    def _value(self, name: str, number: int) -> Any:
        value = self._columns[name][number]
        return value.as_py() if hasattr(value, "as_py") else value.item() if hasattr(value, "item") else value

    def _numbers(self, key: str) -> list[int]:
        if self._by_key is None:  # numbers in the order of hashes, which are of this process
            hashes = np.fromiter(map(hash, self.keys()), np.int64, len(self))
            order = np.argsort(hashes, kind="stable")
            self._by_key = hashes[order], order
        hashes, order = self._by_key
        some = order[np.searchsorted(hashes, hash(key)) : np.searchsorted(hashes, hash(key), side="right")]
        return [number for number in some.tolist() if self.key(number) == key]

    def _rows(self, shard: str, start: int, stop: int) -> Tensor:
        path = self.out / shard
        with damage_named(path):
            file = self._files.get(shard)
            if file is None:
                if not UNIT_FILE.fullmatch(shard):
                    raise ValueError(f"the index names {shard!r}, which is no file of a unit")
                if not path.is_file():
                    raise ValueError(f"{path} is missing: uhd inspect tells what else is")
                file = safe_open(path, framework="pt")
                for old in list(self._files)[: len(self._files) + 1 - _OPEN]:
                    self._files.pop(old, None)
                self._files[shard] = file
            return file.get_slice("tokens")[start:stop].clone()
