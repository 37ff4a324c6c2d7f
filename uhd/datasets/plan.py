"""Which units a source has, and which are there already: without a tensor library, in memory that does not grow."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open

from uhd.datasets import sources
from uhd.datasets.sources import Item, read
from uhd.files import DAMAGE, damage_named

FORMAT = 1
"""Version of the format of a folder of units."""


class Unit(NamedTuple):
    """Neighbouring images of a source.

    Attributes:
        number: Among units.
        items: The images.
        known: sha256 of those of their files that units before it hold, too; ``None``: equal files are as others.
    """

    number: int
    items: list[Item]
    known: frozenset[str] | None = None

    @property
    def keys(self) -> str:
        """A digest of its images' keys, in order."""
        return hashlib.sha256("\n".join(item.key for item in self.items).encode()).hexdigest()


def file_of(out: str | os.PathLike[str], number: int) -> Path:
    """A unit's file."""
    return Path(out) / f"unit-{number:08d}.safetensors"


class Plan:
    """The units of a source that are this run's, and not done; iterated once, it knows how many there are in all.

    Nothing is done where there is no ``out``. With ``dedupe`` every file is read, of all shards, but for those of
    units that are done, and a hash of each is kept: 120 bytes an image.
    """

    def __init__(
        self, out: Path | None, items: Iterator[Item], limit: int | None, shard: tuple[int, int], dedupe: bool = False
    ) -> None:
        self.out, self.items, self.shard, self.dedupe = out, islice(items, limit), shard, dedupe
        self.inputs = self.units = 0

    def __iter__(self) -> Iterator[Unit]:
        seen: set[bytes] = set()
        while items := list(islice(self.items, sources.UNIT)):
            unit, mine = Unit(self.units, items), self.units % self.shard[1] == self.shard[0]
            self.inputs, self.units = self.inputs + len(items), self.units + 1
            if not (mine or self.dedupe):
                continue
            path = self.out and file_of(self.out, unit.number)
            header = path and header_of(path)  # None: missing, or damaged
            if header and (header["unit"], header["keys"]) != (unit.number, unit.keys):
                raise ValueError(
                    f"{path} is of other images than the source has there now, from {items[0].key!r} on: the source "
                    "has changed since; encode it into another folder"
                )
            if self.dedupe:
                files = {bytes.fromhex(row["sha256"]) for row in index_of(path)["images"]} if header else _files(items)
                unit = unit._replace(known=frozenset(map(bytes.hex, files & seen)))
                seen |= files
            if mine and header is None:
                yield unit


def _files(items: list[Item]) -> set[bytes]:
    """sha256 of the files of images, but for those that cannot be read."""

    def one(item: Item) -> bytes | None:
        with suppress(*DAMAGE, OSError):
            return hashlib.sha256(read(item)[0]).digest()
        return None

    with ThreadPoolExecutor(4) as pool:
        return set(pool.map(one, items)) - {None}


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
