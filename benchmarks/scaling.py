"""How time and memory grow: with the pixels of an image, with its slices, with the images of a batch.

    python benchmarks/scaling.py [--width 192] [--depth 4] [--points 7] [--repeats 3] [--out FOLDER]

Three series of JPEGs through `prepare` (decode, resize, cut: fast pixels) and `encode` (a small ViT and a perceiver):
one image of 0.1 to 50 megapixels under the default rule, whose slices stop at its cap, so that patches stop growing
where pixels do not; one image of 1 to 64 slices of 24 x 24 patches, under the same rule with a higher cap; 1 to 32
images. The latter two also with all patches encoded at once, which the default does not do. Each quantity gets the
line of least relative squares: `encode` over patches, `prepare` over patches and, where these are not in proportion,
megapixels. Where the tokens of a batch are not those of its images alone, nothing is reported.

Times are process CPU time of one thread, points in turn, medians. Memory is what a process of its own holds at most
above what it held before the call, by the kernel's count: VmHWM of /proc/self/status, which /proc/self/clear_refs sets
back; so Linux only. glibc is told to give freed blocks of 64 KiB and more back at once: it may keep them otherwise.
Weights, the JPEGs' bytes and, for `encode`, the prepared patches are there before.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from preprocess import jpeg, made_picture, versions
from reporting import ROUNDING, device, measured, relative, written

import uhd
from uhd.charts import curves, log_axis
from uhd.pixels import PixelSettings
from uhd.resampler import PerceiverConfig, PerceiverResampler
from uhd.vision import ViT, ViTConfig

MEGAPIXELS = (0.1, 0.3, 1, 3, 10, 25, 50)
GRIDS = ((1, 1), (1, 2), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8))
BATCHES = (1, 2, 4, 8, 16, 32)
SIDE, PATCH, HEAD_DIM, LM_WIDTH = 336, 14, 64, 512
OVER = {("megapixels", "prepare"): ("patches", "megapixels")}
"""What a fit is over, where not over patches alone."""
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def bounded(encoder: uhd.VisualEncoder, patches: int) -> uhd.VisualEncoder:
    """The same modules with another bound on the patches that are encoded at once."""
    other = copy.copy(encoder)
    other.max_patches_per_step = patches
    return other


VARIANTS: dict[str, Callable[[uhd.VisualEncoder], uhd.VisualEncoder]] = {
    ", at once": lambda encoder: bounded(encoder, 2**40),
}
"""What else is made of an encoder, by what that adds to a series' name; tokens must stay equal."""


class Shape(NamedTuple):
    """What is measured: the ViT's width and depth, and how many points of each series."""

    width: int
    depth: int
    points: int


class Point(NamedTuple):
    """Images that go through an encoder at once."""

    images: list[bytes]
    megapixels: float


def make_encoder(shape: Shape) -> uhd.VisualEncoder:
    """With random weights, and the default rule."""
    torch.manual_seed(0)
    grid = (SIDE // PATCH,) * 2
    width = shape.width
    sizes = {"width": width, "depth": shape.depth, "heads": width // HEAD_DIM, "mlp_width": 4 * width}
    vit = ViT(ViTConfig(patch_size=PATCH, image_size=SIDE, position_grid_hw=grid, **sizes))
    perceiver = PerceiverResampler(PerceiverConfig(width=LM_WIDTH, vision_width=width, num_heads=LM_WIDTH // 128))
    pixels = PixelSettings(mean=(0.5,) * 3, std=(0.5,) * 3, backend="fast")
    return uhd.VisualEncoder(vit, perceiver, pixels=pixels).eval().requires_grad_(False)


def series(shape: Shape) -> dict[str, tuple[uhd.VisualEncoder, list[Point]]]:
    """Name -> the encoder with its rule, and its first points."""
    encoder, most = make_encoder(shape), shape.points
    more = copy.copy(encoder)
    more.slicing = encoder.slicing.replace(max_slices=max(math.prod(grid) for grid in GRIDS))
    sides = [math.sqrt(1e6 * size / 1.5) for size in MEGAPIXELS]
    grown = [made_point(round(side), round(1.5 * side)) for side in sides[:most]]
    cut = [made_point(rows * SIDE, columns * SIDE) for rows, columns in GRIDS[:most]]
    one = made_point(400, 600)
    several = [Point(one.images * count, one.megapixels * count) for count in BATCHES[:most]]
    found = {"megapixels": (encoder, grown), "slices": (more, cut), "batch": (encoder, several)}
    for name in ("slices", "batch"):
        own, points = found[name]
        found |= {name + suffix: (change(own), points) for suffix, change in VARIANTS.items()}
    return found


def kinds(name: str) -> tuple[str, ...]:
    """What is told of a series: variants prepare as the others do."""
    return ("encode",) if name.endswith(tuple(VARIANTS)) else ("prepare", "encode")


@cache
def part() -> np.ndarray:
    return made_picture(500, 750)


def made_point(height: int, width: int) -> Point:
    """One picture, of repeated parts where it is large."""
    times = (-(-height // len(part())), -(-width // part().shape[1]), 1)
    return Point([jpeg(np.tile(part(), times)[:height, :width])], height * width / 1e6)


# --- memory, in a process of its own


def memory(shape: Shape) -> dict[str, list[dict[str, float]]]:
    """Peaks of every point by series, in MiB."""
    found = {}
    every = series(shape)
    gc.freeze()  # what is here stays, and need not be looked through before every call
    for name, (encoder, points) in every.items():
        found[name] = []
        for point in points:
            batch = encoder.prepare(point.images)
            if len(batch.patches) < 5000:  # what is made once for a grid and kept does not count
                encoder.encode(batch)
            calls = {"prepare_mb": lambda e=encoder, p=point: e.prepare(p.images)}
            calls["encode_mb"] = lambda e=encoder, b=batch: e.encode(b)
            found[name].append({what: round(peak_mb(call), 2) for what, call in calls.items()})
    return found


def peak_mb(call: Callable[[], Any]) -> float:
    """MiB that this process holds at most during a call, above what it held before."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    call()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    """kB"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def memory_elsewhere(shape: Shape) -> dict[str, list[dict[str, float]]]:
    """:func:`memory` of a new process.

    Raises:
        RuntimeError: it failed.
    """
    numbers = [part for name, value in shape._asdict().items() for part in (f"--{name}", str(value))]
    command = [sys.executable, __file__, "--memory", *numbers]
    done = subprocess.run(command, env=os.environ | ALLOCATOR, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"memory could not be measured (it needs Linux's /proc/self/clear_refs): {done.stderr}")
    return json.loads(done.stdout)


# --- measuring


def check(encoder: uhd.VisualEncoder, images: list[bytes]) -> None:
    """The tokens of images together are those of each alone, and so with every variant.

    Raises:
        RuntimeError: they are not.
    """
    alone = torch.cat([item.tokens for image in images for item in encoder([image])])
    for name, change in {"": lambda encoder: encoder, **VARIANTS}.items():
        off = relative(torch.cat([item.tokens for item in change(encoder)(images)]), alone)
        if not off <= ROUNDING:
            raise RuntimeError(f"tokens of {len(images)} images together{name}: off by {off:.1e} from each alone")


def times(encoder: uhd.VisualEncoder, points: Sequence[Point], repeats: int) -> list[dict[str, Any]]:
    """A row for every point. A round takes each point once, so that a slower moment is everyone's."""
    rows, taken = [], [{"prepare_ms": [], "encode_ms": []} for _ in points]
    encoder(points[0].images)
    for _ in range(repeats):
        for point, lists in zip(points, taken, strict=True):
            start = time.process_time()
            batch = encoder.prepare(point.images)
            middle = time.process_time()
            encoder.encode(batch)
            lists["prepare_ms"].append(1e3 * (middle - start))
            lists["encode_ms"].append(1e3 * (time.process_time() - middle))
    for point, lists in zip(points, taken, strict=True):
        batch = encoder.prepare(point.images)
        facts = {"images": len(point.images), "megapixels": round(point.megapixels, 4), "views": batch.num_views}
        facts["patches"] = len(batch.patches)
        rows.append(facts | {what: round(statistics.median(values), 2) for what, values in lists.items()})
    return rows


def fit(rows: Sequence[dict[str, Any]], what: str, over: Sequence[str]) -> dict[str, Any]:
    """The line of a column over others with the least squares of relative residuals."""
    columns = [np.ones(len(rows)), *(np.array([row[name] for row in rows], float) for name in over)]
    y = np.array([row[what] for row in rows], float)
    x = np.stack(columns, 1)
    line = np.linalg.lstsq(x / y[:, None], np.ones(len(y)), rcond=None)[0]
    off = y - x @ line
    return {
        "what": what,
        "points": len(rows),
        "intercept": float(f"{line[0]:.4g}"),
        "slopes": {name: float(f"{slope:.4g}") for name, slope in zip(over, line[1:], strict=True)},
        "r2": round(1 - float(off @ off) / float(((y - y.mean()) ** 2).sum()), 5),
        "largest_relative_residual": round(float(np.abs(off / y).max()), 3),
    }


def run(shape: Shape, repeats: int) -> dict[str, Any]:
    """Everything that is written, as plain JSON types."""
    found, rows, fits = series(shape), [], []
    check(found["slices"][0], [image for _, points in found.values() for image in points[-1].images[:1]][:3])
    peaks = memory_elsewhere(shape)
    for name, (encoder, points) in found.items():
        some = [
            {"series": name, **row, **peak}
            for row, peak in zip(times(encoder, points, repeats), peaks[name], strict=True)
        ]
        rows += some
        for kind in kinds(name):
            over = OVER.get((name, kind), ("patches",))
            fits += [{"series": name, **fit(some, f"{kind}_{unit}", over)} for unit in ("ms", "mb")]
    return {
        "about": f"fast pixels; ViT of width {shape.width}, {shape.depth} blocks; 64 latents of width {LM_WIDTH}; "
        f"float32; median process CPU time of {repeats} calls in turn, one thread; MiB at most above those before",
        "versions": {"uhd": uhd.__version__, **versions()},
        "device": device(),
        "rows": rows,
        "fits": fits,
    }


# --- showing


def table(result: dict[str, Any]) -> str:
    """The rows, as Markdown."""
    lines = [
        "| series | images | megapixels | views | patches | prepare, ms | encode, ms | prepare, MiB | encode, MiB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['series']} | {row['images']} | {row['megapixels']:.2f} | {row['views']} | {row['patches']} | "
        f"{row['prepare_ms']:.1f} | {row['encode_ms']:.0f} | {row['prepare_mb']:.1f} | {row['encode_mb']:.1f} |"
        for row in result["rows"]
    ]
    return "\n".join(lines)


def fit_table(result: dict[str, Any]) -> str:
    """The fits, as Markdown."""
    units, scales = {"ms": "ms", "mb": "MiB"}, {"patches": (1000, "1000 patches"), "megapixels": (1, "megapixel")}
    lines = ["| series | | line | R^2 | largest residual |", "|---|---|---|---:|---:|"]
    for row in result["fits"]:
        kind, unit = row["what"].split("_")
        parts = [f"{row['intercept']:.3g}"]
        parts += [f"{scales[name][0] * slope:.3g} a {scales[name][1]}" for name, slope in row["slopes"].items()]
        lines.append(
            f"| {row['series']} | {kind}, {units[unit]} | {' + '.join(parts).replace('+ -', '- ')} | "
            f"{row['r2']:.4f} | {100 * row['largest_relative_residual']:.0f} % |"
        )
    return "\n".join(lines)


def plots(result: dict[str, Any]) -> dict[str, str]:
    """File name -> SVG: each column over what it grows with, a line for every series."""
    titles, found = {"ms": "CPU ms", "mb": "MiB"}, {}
    for kind, over in (("prepare", "megapixels"), ("encode", "patches")):
        for unit, title in titles.items():
            lines: dict[str, list[tuple[float, float]]] = {}
            for row in result["rows"]:
                if kind in kinds(row["series"]):
                    lines.setdefault(row["series"], []).append((row[over], row[f"{kind}_{unit}"]))
            points = [point for line in lines.values() for point in line]
            x, y = log_axis([x for x, _ in points], over), log_axis([y for _, y in points], f"{title} of {kind}")
            found[f"scaling_{kind}_{unit}.svg"] = curves({k: sorted(v) for k, v in lines.items()}, x, y)
    return found


def main(argv: list[str] | None = None) -> int:
    """Write ``scaling.json`` and four plots, print the tables; 1 where tokens are wrong or memory cannot be told."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=192, help=f"of the ViT, a multiple of {HEAD_DIM}")
    parser.add_argument("--depth", type=int, default=4, help="its blocks")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--points", type=int, default=7, help="of each series, the smallest first; 3 or more")
    parser.add_argument("--memory", action="store_true", help="print peaks of memory as JSON, and nothing else")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    if args.points < 3:
        parser.error("--points must be at least 3, for a line")
    shape = Shape(args.width, args.depth, args.points)
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # torchvision's decoder
    with torch.no_grad():
        result = measured(lambda: memory(shape) if args.memory else run(shape, args.repeats))
    if result is None:
        return 1
    if args.memory:
        print(json.dumps(result))
        return 0
    written(result, args.out / "scaling.json", plots(result))
    print(f"\n{table(result)}\n\n{fit_table(result)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
