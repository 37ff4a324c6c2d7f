"""What it costs to move the borders of slices, and what they cut then: ms beside the decoding of the same JPEG.

    python benchmarks/borders.py [--repeats 30] [--count 100] [--out FOLDER]

Pages of print (words of strokes in lines, as scans have them) of several sizes, read by both backends. First, both
must find the same borders, which cut no more than those of equal slices; where they do not, nothing is reported. Times
are medians of one thread's CPU time; "cut" is the share of the image's gradient on borders, before and after.

Then every option of the adaptive planner, and all of them, beside the preset without: means over ``--count`` pages of
the sizes that strategies.py draws, seed 0. TFLOPs: CLIP-L, a perceiver, a 13B LM; preparing is planning, moving
borders, resizing and packing of a decoded picture, by Pillow.
"""

from __future__ import annotations

import io
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from preprocess import versions
from reporting import device, options, reported
from strategies import draw_sizes

import uhd
from uhd.loading import Preparation
from uhd.pixels import PixelSettings, move_borders
from uhd.pixels.views import load_picture
from uhd.slicing import PRESETS, SlicingConfig, plan
from uhd.slicing.adaptive import Planner
from uhd.slicing.borders import content_cut
from uhd.slicing.flops import plan_flops

SIZES = ((1080, 1920), (1920, 1080), (1654, 1169), (3000, 4000))
MOVES = (1, 2, 4, 8)
BACKENDS = ("fast", "pillow")
SETTINGS = {name: PixelSettings(mean=(0.5,) * 3, std=(0.5,) * 3, backend=name) for name in BACKENDS}

PARTS: dict[str, dict[str, Any]] = {
    "none": {},
    "cut_by='shape'": {"cut_by": "shape"},
    "border_moves=2": {"border_moves": 2},
    "one_view_below=2.5": {"one_view_below": 2.5},
    "latents='fitted'": {"latents": "fitted"},
}
PARTS["all four"] = {name: value for part in PARTS.values() for name, value in part.items()}
PARTS["uhd-plus"] = {name: getattr(PRESETS["uhd-plus"], name) for name in SlicingConfig.later}


def page(height: int, width: int) -> bytes:
    """A JPEG of lines of words."""
    draw = np.random.default_rng(0)
    pixels = np.full((height, width, 3), 250, np.uint8)
    for top in range(20, height - 40, 32):
        left = 30
        while left < width - 140:
            length = int(draw.integers(30, 120))
            strokes = draw.integers(0, 2, (3, length // 4 + 1), np.uint8)
            word = np.kron(strokes, np.ones((6, 4), np.uint8))[:, :length]
            pixels[top : top + 18, left : left + length][word > 0] = 30
            left += length + 14
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def milliseconds(call: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):  # the first fills tables
        start = time.process_time()
        call()
        times.append((time.process_time() - start) * 1e3)
    return round(statistics.median(times[1:]), 2)


def row(size_hw: tuple[int, int], moves: int, file: bytes, repeats: int) -> dict[str, Any]:
    """One size and number of moves; a ``RuntimeError`` where the backends differ, or a border got worse."""
    config = SlicingConfig.preset("llava-uhd-safe", border_moves=moves)
    even, pictures = plan(size_hw, config), {name: load_picture(file, settings=how) for name, how in SETTINGS.items()}

    def moved(name: str) -> uhd.SlicePlan:
        return move_borders(pictures[name], even, config, settings=SETTINGS[name])

    fast, pillow = map(moved, BACKENDS)
    before, after = (content_cut(one, np.asarray(pictures["pillow"])) for one in (even, pillow))
    if fast != pillow or after > before:
        raise RuntimeError(
            f"{size_hw}, {moves} patches: {before} of the gradient is cut, then {after}; {fast}, {pillow}"
        )
    found = {f"{name}_ms": milliseconds(lambda name=name: moved(name), repeats) for name in BACKENDS}
    decode = {f"decode_{name}_ms": _decoding(file, name, repeats) for name in BACKENDS}
    cut = {"cut_before": round(before, 5), "cut_after": round(after, 5)}
    return {"size_hw": size_hw, "moves": moves, "grid": even.grid, **found, **decode, **cut}


def _decoding(file: bytes, name: str, repeats: int) -> float:
    return milliseconds(lambda: load_picture(file, settings=SETTINGS[name]), min(repeats, 5))


def part(name: str, pages: list[np.ndarray], repeats: int) -> dict[str, Any]:
    """Means over these pages of the preset with a part."""
    config = SlicingConfig.preset("llava-uhd-safe", **PARTS[name])
    prepare, sizes = Preparation(config, SETTINGS["pillow"], config.patch_size), [one.shape[:2] for one in pages]
    plans = [prepare([one]).plans[0] for one in pages]
    costs = {
        "patches": [found.num_patches for found in plans],
        "tokens": [found.num_tokens for found in plans],
        "tflops": [plan_flops(found, resampler="perceiver-64").total / 1e12 for found in plans],
        "planning_ms": [
            milliseconds(lambda: [*map(Planner(config).plan, *zip(*sizes, strict=True))], repeats) / len(pages)
        ],
        "preparing_ms": [milliseconds(lambda: [prepare([one]) for one in pages], min(repeats, 3)) / len(pages)],
    }
    return {"part": name, **{key: round(statistics.fmean(values), 4) for key, values in costs.items()}}


def run(repeats: int, count: int) -> dict[str, Any]:
    pixels = np.asarray(Image.open(io.BytesIO(page(4096, 4096))))
    sizes = [size for kind in draw_sizes(count, seed=0).values() for size in kind]
    pages = [np.ascontiguousarray(pixels[:height, :width]) for height, width in sizes]
    parts = [part(name, pages, repeats) for name in PARTS]
    rows = [row(size, moves, file, repeats) for size in SIZES for file in [page(*size)] for moves in MOVES]
    about = "milliseconds to move borders after decoding, ms to decode, and the share of gradient cut before and after"
    return {
        "about": about,
        "versions": versions(),
        "device": device(),
        "repeats": repeats,
        "rows": rows,
        "pages": len(pages),
        "parts": parts,
    }


def table(result: dict[str, Any]) -> str:
    lines = [
        "| height x width | grid | k | fast | Pillow | decoding | cut before | after |",
        "|---|---|---:" + "|---:" * 5 + "|",
    ]
    for one in result["rows"]:
        sizes = "{}x{} | {}x{}".format(*one["size_hw"], *one["grid"])
        times = f"{one['fast_ms']:.1f} ms | {one['pillow_ms']:.1f} ms | {one['decode_fast_ms']:.0f} ms"
        cut = f"{100 * one['cut_before']:.2f}% | {100 * one['cut_after']:.2f}%"
        lines.append(f"| {sizes} | {one['moves']} | {times} | {cut} |")
    columns = ("patches", "tokens", "TFLOPs", "planning, ms", "preparing, ms")
    lines += ["", f"| of {result['pages']} pages | {' | '.join(columns)} |", "|---" + "|---:" * len(columns) + "|"]
    for name, patches, tokens, tflops, *ms in map(dict.values, result["parts"]):
        lines.append(f"| {name} | {patches:,.0f} | {tokens:.0f} | {tflops:.2f} | {ms[0]:.3f} | {ms[1]:.1f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = options(__doc__, repeats=30)
    parser.add_argument("--count", type=int, default=100, help="pages of the second table (default 100)")
    chosen = parser.parse_args(arguments)
    return reported(lambda: run(chosen.repeats, chosen.count), chosen.out / "borders.json", table)


if __name__ == "__main__":
    sys.exit(main())
