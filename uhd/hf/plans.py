"""Plans as tensors, so that a batch says by itself how its views become the language model's positions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor

from uhd.slicing import SlicePlan, VideoPlan


def write_plans(plans: Sequence[SlicePlan | VideoPlan]) -> np.ndarray:
    """(I, L) uint8: a row is the JSON text of a plan in UTF-8, zeros behind it. :func:`read_plans` is the inverse.

    Equal frames of a video are written once.

    >>> from uhd.slicing import plan
    >>> plans = plan((1008, 672)), plan((30, 20))
    >>> read_plans(write_plans(plans)) == plans
    True
    """
    rows = [_written(plan) for plan in plans]
    found = np.zeros((len(rows), max(map(len, rows), default=0)), np.uint8)
    for row, text in zip(found, rows, strict=True):
        row[: len(text)] = np.frombuffer(text, np.uint8)
    return found


def read_plans(rows: Tensor | np.ndarray) -> tuple[SlicePlan | VideoPlan, ...]:
    """The plans of :func:`write_plans`.

    Raises:
        ValueError: A row is no plan.
    """
    if isinstance(rows, Tensor):
        rows = rows.cpu().numpy()
    if rows.ndim != 2 or rows.dtype != np.uint8:
        raise ValueError(f"plans are (I, L) uint8 as the processor writes them, got {rows.shape} of {rows.dtype}")
    return tuple(_read(row.tobytes().rstrip(b"\0")) for row in rows)


@lru_cache(maxsize=1024)
def _written(plan: SlicePlan | VideoPlan) -> bytes:
    data: Any = plan.to_dict() if isinstance(plan, SlicePlan) else _video_to_dict(plan)
    return json.dumps(data, separators=(",", ":")).encode()


def _video_to_dict(plan: VideoPlan) -> dict[str, Any]:
    distinct = list(dict.fromkeys(plan.plans))
    places = {frame: place for place, frame in enumerate(distinct)}
    return {
        "plans": [frame.to_dict() for frame in distinct],
        "frames": [places[frame] for frame in plan.plans],
        "newline": plan.newline,
    }


@lru_cache(maxsize=1024)
def _read(text: bytes) -> SlicePlan | VideoPlan:
    try:
        data = json.loads(text)
        if "frames" not in data:
            return SlicePlan.from_dict(data)
        distinct = [SlicePlan.from_dict(frame) for frame in data["plans"]]
        return VideoPlan(tuple(distinct[place] for place in data["frames"]), bool(data["newline"]))
    except (ValueError, KeyError, TypeError, IndexError) as problem:
        raise ValueError(f"a row of the plans is not one: {problem}. Pass what the processor returned") from None
