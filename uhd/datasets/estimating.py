"""What encoding a data set would give and cost, from its headers and ten seconds of work."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from itertools import chain
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from uhd.datasets.plan import Plan, Unit
from uhd.datasets.running import BUDGET, check_form, job_of, saved, settled_on
from uhd.datasets.sources import Item, listed, read
from uhd.datasets.units import Encoder, as_before, prepare
from uhd.encoded import num_rows
from uhd.loading import collected
from uhd.pixels import image_size_hw

SECONDS = 10.0
"""For how long the rate is measured at most, the first part not counted."""


def estimate(
    source: str | os.PathLike[str],
    encoder: Any,
    *,
    budget_patches: int = BUDGET,
    dtype: str | None = None,
    columns: Sequence[str] = (),
    limit: int | None = None,
    shard: tuple[int, int] = (0, 1),
    device: str | None = None,
) -> dict[str, Any]:
    """Read the headers of a source, and encode some of it without writing; arguments as of :func:`encode`.

    Returns:
        ``inputs``, ``images`` and ``errors`` as headers tell, ``views``, ``patches``, ``tokens`` (rows on disk),
        ``bytes`` of these, ``tflops``, ``images_a_second`` of one process, and ``hours`` of it.
    """
    check_form({"budget_patches": budget_patches, "dtype": dtype, "columns": columns, "limit": limit}, shard)
    with saved(encoder) as folder, as_before():
        work = Encoder(job_of("", folder, budget_patches, dtype, stop=False, settled=settled_on(device)))
        return _estimated(source, Plan(None, listed(source, columns=columns), limit, shard), work)


def _estimated(source: Any, plan: Plan, work: Encoder) -> dict[str, Any]:
    found = dict.fromkeys(("inputs", "images", "errors", "views", "patches", "tokens"), 0)
    some: list[Unit] = []

    def cost(_: int, item: Item) -> tuple[int, int, int]:
        source, how = item.place[0] if item.kind == "file" else read(item)[0], work.job.preparation
        plan = how.slicing.plan(image_size_hw(source, settings=how.pixels))
        return plan.num_views, plan.num_patches, num_rows(plan)

    for unit in plan:
        costs, errors = collected(cost, unit.items)
        found["inputs"] += len(unit.items)
        found["errors"] += len(errors)
        for one in filter(None, costs):
            for name, more in zip(("views", "patches", "tokens"), one, strict=True):
                found[name] += more
        some += [unit] if len(some) < 64 else []
    if not found["inputs"]:
        raise ValueError(f"{source} holds no images")
    found["images"] = found["inputs"] - found["errors"]
    images, patches, seconds, flops = _rate(work, some)
    scale = found["patches"] / max(patches, 1)
    found |= {"bytes": found["tokens"] * work.width * work.dtype.itemsize, "tflops": flops * scale / 1e12}
    rate = images / seconds if images else 0.0
    return {**found, "images_a_second": rate, "hours": seconds * scale / 3600}


def _rate(work: Encoder, units: list[Unit]) -> tuple[int, int, float, float]:
    """Images and patches that were encoded, in how many seconds, and FLOPs as torch counts its own products."""
    begin = time.perf_counter()
    parts = (part for unit in units for part in prepare(unit, work.job) if part.batch.plans)
    if (first := next(parts, None)) is None:
        return 0, 0, 0.0, 0.0
    seconds, images, patches = time.perf_counter() - begin, 0, 0
    with FlopCounterMode(display=False) as counter:
        work.encode(first.batch)
    begin = time.perf_counter() - seconds
    for part in chain([first], parts):
        work.encode(part.batch)
        images, patches = images + len(part.rows), patches + len(part.batch.patches)
        if (seconds := time.perf_counter() - begin) > SECONDS:
            break
    return images, patches, seconds, counter.get_total_flops() * patches / len(first.batch.patches)
