"""Damage to JSON and safetensors files, drawn from a seed: the same seed and number give the same damage."""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

ODD: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 7, 99, 10**5, 10**9, 10**30, 1e308, 0.5, math.nan, math.inf),
    *("", "x", "../x", "\ud83d", [], {}, [None, "x"], [0, 0], [10**6, 10**6], [[]], {"a": 1}),
)
"""Values that a field of settings may be damaged to."""


def damaged_json(value: Any, rng: random.Random) -> Any:
    """A copy with one to three places replaced, removed, doubled or scaled."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            break
        holder, key = rng.choice(places)
        how = rng.randrange(6)
        if how == 0:
            del holder[key]
        elif how == 1 and isinstance(holder, dict):
            holder[f"{key}s"] = holder.pop(key)
        elif how == 2 and type(holder[key]) in (int, float):
            holder[key] = holder[key] * rng.choice((-1, 2, 1000, 10**9))
        elif how == 3 and isinstance(holder[key], list):
            holder[key] = holder[key] * rng.choice((0, 2, 50))
        elif how == 4:
            other, its = rng.choice(places)
            holder[key] = json.loads(json.dumps(other[its]))
        else:
            holder[key] = rng.choice(ODD)
    return value


def _places(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _places(inner)


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    """A copy with bits flipped, cut short, with bytes put in, or with a stretch of zeros."""
    how, place = rng.randrange(5), rng.randrange(max(len(data), 1))
    if how == 0:
        return data[:place]
    if how == 1:
        return data[:place] + rng.randbytes(rng.randrange(1, 20)) + data[place:]
    if how == 2:
        end = min(place + rng.randrange(1, 200), len(data))
        return data[:place] + bytes(end - place) + data[end:]
    if how == 3:
        return rng.choice((b"", b"null", b"[]", b"{}", b"[" * 10_000, b"\xff\xfe", data * 2, data[::-1]))
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 3, 30))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def damaged_header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header, or with numbers that are none."""
    length = struct.unpack("<Q", data[:8])[0]
    header, numbers = json.loads(data[8 : 8 + length]), data[8 + length :]
    how = rng.randrange(4)
    if how == 0:
        spoilt = bytearray(numbers)
        for _ in range(rng.choice((1, 20))):
            place = rng.randrange(len(numbers) // 4) * 4
            spoilt[place : place + 4] = struct.pack("<f", rng.choice((math.nan, math.inf, -math.inf)))
        numbers = bytes(spoilt)
    else:
        inner = header.get("__metadata__", {})
        read = {key: json.loads(text) for key, text in inner.items() if text[:1] in ("{", "[")}
        if read and how < 3:  # settings inside, as token files have them
            key = rng.choice(sorted(read))
            inner[key] = json.dumps(damaged_json(read[key], rng))
        else:
            header = damaged_json(header, rng)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + numbers


def damaged_file(path: Path, rng: random.Random) -> None:
    """Damage one file in place, as fits its suffix."""
    data = path.read_bytes()
    ways: list[Callable[[], bytes]] = [lambda: damaged_bytes(data, rng)]
    if path.suffix == ".json":
        ways += [lambda: json.dumps(damaged_json(json.loads(data), rng)).encode()] * 4
    elif path.suffix == ".safetensors":
        ways += [lambda: damaged_header(data, rng)] * 3
    path.write_bytes(rng.choice(ways)())
