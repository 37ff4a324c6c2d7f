"""Which units a source has, and which are there already: without a tensor library, in memory that does not grow."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open

from uhd.datasets.sources import Item, units
from uhd.files import DAMAGE, damage_named

FORMAT = 1
"""Of a folder of units."""


class Unit(NamedTuple):
    """Neighbouring images of a source, and their number among units."""

    number: int
    items: list[Item]

    @property
    def keys(self) -> str:
        """A digest of its images' keys, in order."""
        return hashlib.sha256("\n".join(item.key for item in self.items).encode()).hexdigest()


def file_of(out: str | os.PathLike, number: int) -> Path:
    """A unit's file."""
    return Path(out) / f"unit-{number:08d}.safetensors"


class Plan:
    """The units of a source that are this run's, and not done; iterated once, it knows how many there are in all.

    Nothing is done where there is no ``out``.
    """

    def __init__(self, out: Path | None, items: Iterator[Item], limit: int | None, shard: tuple[int, int]) -> None:
        self.out, self.items, self.shard = out, islice(items, limit), shard
        self.inputs = self.units = 0

    def __iter__(self) -> Iterator[Unit]:
        for number, items in zip(count(), units(self.items)):
            self.inputs, self.units = self.inputs + len(items), number + 1
            unit = Unit(number, items)
            if number % self.shard[1] != self.shard[0]:
                continue
            header = self.out and header_of(path := file_of(self.out, number))
            if header is None:  # missing, or damaged
                yield unit
            elif (header["unit"], header["keys"]) != (number, unit.keys):
                raise ValueError(
                    f"{path} is of other images than the source has there now, from {items[0].key!r} on: the source "
                    "has changed since; encode it into another folder"
                )


def header_of(path: Path) -> dict[str, Any] | None:
    """What a unit's file says of itself; ``None`` where it is missing, or damaged as far as its header shows."""
    try:
        with safe_open(path, framework="np") as file:
            header = json.loads(file.metadata()["uhd"])
        return header if header["format"] == FORMAT else None
    except (*DAMAGE, OSError):
        return None


def index_of(path: Path) -> dict[str, list[dict[str, Any]]]:
    """A unit's ``images`` and ``errors``; a ``ValueError`` names a damaged file."""
    with damage_named(path), safe_open(path, framework="np") as file:
        return json.loads(file.get_tensor("index").tobytes())
