"""How a benchmark measures and tells: on one thread, and not at all where a contender is wrong."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uhd import machine

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SLACK = 2
"""Ours may be off by so many times what the peer is off by in the same run, or rounding makes of the longest sum."""

ROUNDING = SLACK * torch.finfo(torch.float32).eps * math.sqrt(4096)
"""1.5e-5: the relative difference allowed between two orders of adding up to 4096 products in float32."""


def options(doc: str, *, repeats: int = 5) -> argparse.ArgumentParser:
    """Of a script with this docstring: how often everything is measured, and where results go."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    return parser


def measured(run: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """What ``run`` gives on one thread; ``None``, and why on standard error, where it raises a ``RuntimeError``."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return run()
    except RuntimeError as problem:
        print(f"nothing is reported: {problem}", file=sys.stderr)
        return None
    finally:
        torch.set_num_threads(threads)


def written(
    result: Mapping[str, Any],
    file: Path,
    drawings: Mapping[str, str],
    circumstances: Sequence[str] = ("versions", "device"),
) -> None:
    """Write a result, and drawings by name beside it; print these parts of it, and what it is about."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, drawn in drawings.items():
        (file.parent / name).write_text(drawn + "\n", encoding="utf-8")
    for part in circumstances:
        print(", ".join(f"{key} {value}" for key, value in result[part].items()))
    print(result["about"])


def reported(
    run: Callable[[], dict[str, Any]],
    file: Path,
    table: Callable[[dict[str, Any]], str],
    *,
    drawings: Callable[[dict[str, Any]], Mapping[str, str]] = lambda result: {},
    circumstances: Sequence[str] = ("versions", "device"),
    verdict: Callable[[dict[str, Any]], str] | None = None,
) -> int:
    """Measure without gradients, write, print the table and, of every target, whether it is reached: the exit status.

    That is 1 where a contender is wrong. ``verdict``: what was reached of what, of one of the result's targets.
    """
    with torch.no_grad():
        result = measured(run)
    if result is None:
        return 1
    written(result, file, drawings(result), circumstances)
    print(f"\n{table(result)}\n")
    for target in result["targets"] if verdict else ():
        print(f"{verdict(target)} wanted: {'reached' if target['ok'] else 'NOT reached'}")
    return 0


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def cpu_times(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median process CPU seconds; a round calls each once, so that a slower moment is everyone's."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.process_time()
            call()
            taken[name].append(time.process_time() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def gemm_rate(dtype: torch.dtype) -> float:
    """FLOPs a second of a product of 2048 x 2048 matrices."""
    a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    return 2 * 2048**3 / cpu_times({"": lambda: a @ b}, 5)[""]


def device() -> dict[str, Any]:
    """The CPU, the units that decide which dtype is fast on it, the threads, and the products that inference takes."""
    units = ("avx512", "avx512_bf16", "amx_tile")
    return {
        "cpu": machine.cpu(),
        **{name: bool(getattr(torch.cpu, f"_is_{name}_supported", bool)()) for name in units},
        "threads": torch.get_num_threads(),
        "products": ", ".join(f"{name} {way}" for name, way in machine.products().items()),
        "rates": machine.rates(),
    }
