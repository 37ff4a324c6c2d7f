"""How long planning takes, beside transformers' MiniCPM-V 4.6 planner, for the same sizes and the same rule.

    python benchmarks/planner.py --out benchmarks/results

First every size is planned by both and all numbers are compared; where one differs, nothing is reported and the exit
status is 1. Then process CPU time, one thread, contenders in turn, medians. Nothing is cached between images: every
size is planned once a round, and whole plans are forgotten between rounds.
"""

from __future__ import annotations

import argparse
import inspect
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import uhd
from uhd.slicing.adaptive import planner_of

PRESET = "minicpm-v-4.6"
TARGETS = {"integer core": 2.0, "SlicePlan": 1.0, "plan_many": 30.0}
"""Least ratio, peer's time to ours."""

Numbers = tuple[tuple[int, int] | None, tuple[int, int], tuple[int, int] | None]
"""Grid, overview and slice, (rows, columns) and (height, width); ``None`` where nothing is cut."""


def draw_sizes(count: int, seed: int) -> list[tuple[int, int]]:
    """(height, width), px."""
    sides = np.random.default_rng(seed).integers(64, 4097, (count, 2))
    return [tuple(pair) for pair in sides.tolist()]


def peer_planner() -> Callable[[tuple[int, int]], Numbers]:
    from transformers.models.minicpmv4_6.image_processing_minicpmv4_6 import MiniCPMV4_6ImageProcessor

    peer = MiniCPMV4_6ImageProcessor()
    most, side, sizes = peer.max_slice_nums, peer.scale_resolution, [peer.scale_resolution, peer.patch_size]
    if "downsample_mode" in inspect.signature(peer.find_best_resize).parameters:  # else always that of this preset
        sizes.append(peer.downsample_mode)

    def planned(image_hw: tuple[int, int]) -> Numbers:
        grid = peer.get_sliced_grid(image_hw, most, side)
        overview = peer.find_best_resize(image_hw, *sizes, allow_upscale=grid is None)
        if grid is None:
            return None, overview, None
        height, width = peer.get_refine_size(image_hw, grid, *sizes, allow_upscale=True)
        return (grid[0], grid[1]), overview, (height // grid[0], width // grid[1])

    return planned


def our_core(config: uhd.SlicingConfig) -> Callable[[tuple[int, int]], Numbers]:
    """The same numbers without a plan around them."""
    planner = planner_of(config)

    def planned(image_hw: tuple[int, int]) -> Numbers:
        height, width = image_hw
        grid = planner.grid(height, width)
        if grid is None:
            return None, planner.fit(height, width), None
        return grid, planner.fit(height, width), planner.slice_hw(height, width, grid)

    return planned


def differences(sizes: list[tuple[int, int]], config: uhd.SlicingConfig) -> list[str]:
    """Sizes that any two of the four do not plan alike."""
    peer, core, many = peer_planner(), our_core(config), uhd.plan_many(sizes, config)
    found = []
    for row, size in enumerate(sizes):
        expected, plan = peer(size), uhd.plan(size, config)
        columns = [tuple(many[name][row].tolist()) for name in ("grid", "overview_hw", "slice_hw")]
        columns = [None if pair == (0, 0) else pair for pair in columns]
        ours = [core(size), (plan.grid, plan.overview_hw, plan.slice_hw), tuple(columns)]
        if any(numbers != expected for numbers in ours):
            found.append(f"{size}: {expected} by transformers, {ours} by uhd")
    return found


def contenders(sizes: list[tuple[int, int]], config: uhd.SlicingConfig) -> dict[str, Callable[[], object]]:
    peer, core, array = peer_planner(), our_core(config), np.array(sizes)
    forget = planner_of(config).plan.cache_clear
    few = sizes[:1000]

    def whole_plans() -> None:
        forget()
        for size in sizes:
            uhd.plan(size, config)

    return {
        "transformers": lambda: [peer(size) for size in sizes],
        "integer core": lambda: [core(size) for size in sizes],
        "SlicePlan": whole_plans,
        "plan_many": lambda: uhd.plan_many(array, config),
        "SlicePlan, cached": lambda: [uhd.plan(size, config) for size in few for _ in range(len(sizes) // len(few))],
    }


def measure(run: dict[str, Callable[[], object]], rounds: int, count: int) -> dict[str, float]:
    """Median microseconds of CPU time a size."""
    times: dict[str, list[float]] = {name: [] for name in run}
    for _ in range(rounds + 1):  # the first round fills tables
        for name, call in run.items():
            start = time.process_time()
            call()
            times[name].append((time.process_time() - start) / count * 1e6)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def report(times: dict[str, float]) -> list[dict]:
    rows = []
    for name, microseconds in times.items():
        ratio = times["transformers"] / microseconds
        wanted = TARGETS.get(name)
        reached = None if wanted is None else ratio >= wanted
        row = {"planner": name, "us_per_image": round(microseconds, 3), "ratio": round(ratio, 2)}
        rows.append({**row, "must_reach": wanted, "reached": reached})
    return rows


def table(rows: list[dict]) -> str:
    """Markdown of the report."""
    lines = ["| | us an image | ratio | wanted |", "|---|---:|---:|---:|"]
    for row in rows:
        wanted = row["must_reach"] or ""
        lines.append(f"| {row['planner']} | {row['us_per_image']:.2f} | {row['ratio']:.2f} | {wanted} |")
    return "\n".join(lines)


def versions() -> dict[str, str]:
    import transformers

    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "transformers": transformers.__version__,
        "machine": platform.processor() or platform.machine(),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000, help="image sizes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="folder for planner.json")
    chosen = parser.parse_args(arguments)
    config, sizes = uhd.SlicingConfig.preset(PRESET), draw_sizes(chosen.count, chosen.seed)
    wrong = differences(sizes, config)
    if wrong:
        print(f"{len(wrong)} of {len(sizes)} sizes are planned otherwise, so nothing is measured:", file=sys.stderr)
        print("\n".join(wrong[:5]), file=sys.stderr)
        return 1
    known = versions()
    print(", ".join(f"{name} {version}" for name, version in known.items()))
    print(f"{len(sizes)} sizes of 64 to 4096 px a side, preset {PRESET}: all numbers equal")
    rows = report(measure(contenders(sizes, config), chosen.rounds, len(sizes)))
    print(table(rows))
    if chosen.out:
        about = {"versions": known, "sizes": len(sizes), "seed": chosen.seed, "rounds": chosen.rounds, "rows": rows}
        chosen.out.mkdir(parents=True, exist_ok=True)
        (chosen.out / "planner.json").write_text(json.dumps(about, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
