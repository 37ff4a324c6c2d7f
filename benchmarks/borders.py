"""What it costs to move the borders of slices, and what they cut then: ms beside the decoding of the same JPEG.

    python benchmarks/borders.py [--repeats 30] [--out FOLDER]

Pages of print (words of strokes in lines, as scans have them) of several sizes, read by both backends. First, both
must find the same borders, which cut no more than those of equal slices; where they do not, nothing is reported. Times
are medians of one thread's CPU time; "cut" is the share of the image's gradient on borders, before and after.
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

import uhd
from uhd.pixels import PixelSettings, move_borders
from uhd.pixels.views import load_picture
from uhd.slicing import SlicingConfig, plan
from uhd.slicing.borders import content_cut

SIZES = ((1080, 1920), (1920, 1080), (1654, 1169), (3000, 4000))
MOVES = (1, 2, 4, 8)
BACKENDS = ("fast", "pillow")
SETTINGS = {name: PixelSettings(mean=(0.5,) * 3, std=(0.5,) * 3, backend=name) for name in BACKENDS}


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


def run(repeats: int) -> dict[str, Any]:
    rows = [row(size, moves, file, repeats) for size in SIZES for file in [page(*size)] for moves in MOVES]
    about = "milliseconds to move borders after decoding, ms to decode, and the share of gradient cut before and after"
    return {"about": about, "versions": versions(), "device": device(), "repeats": repeats, "rows": rows}


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
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    chosen = options(__doc__, repeats=30).parse_args(arguments)
    return reported(lambda: run(chosen.repeats), chosen.out / "borders.json", table)


if __name__ == "__main__":
    sys.exit(main())
