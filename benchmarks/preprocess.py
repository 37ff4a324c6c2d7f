"""How long pictures take to become patches, beside transformers' MiniCPM-V 4.6 image processor.

    python benchmarks/preprocess.py --out benchmarks/results            # files' bytes to float32 patches
    python benchmarks/preprocess.py --uint8 --out benchmarks/results    # ours stop at uint8; the model does the rest

Both cut by the same rule, into equally many patches. First the pixels are compared: the fast backend with the exact
one, and the exact one with transformers' Pillow backend; where one is off by more than it may, nothing is reported
and the exit status is 1. Then process CPU time, one thread, contenders in turn, medians. The ratio is to whichever of
transformers' backends is fastest on that picture. Made pictures are noise of equal power in every octave, as
photographs have it, with as many bits a pixel; the photographs are scikit-image's; the page is text and a table. JPEG
unless said otherwise. Last, 64 JPEGs and PNGs at once on one thread and on two, by the wall's clock.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from reporting import device

import uhd
from uhd.batch import SliceBatch
from uhd.charts import curves, log_axis
from uhd.demo import page_image
from uhd.pixels import PixelSettings
from uhd.pixels.fast import decoder
from uhd.pixels.views import load_picture

PRESET = "minicpm-v-4.6"
MADE = ((672, 1008), (1080, 1920), (3000, 4000))
FORMATS = ("PNG", "WebP")
"""Of the made pictures and the page, beside JPEG."""
PHOTOS = ("chelsea", "coffee", "rocket", "astronaut")
TARGETS = {False: (1.3, 1.4, 2.5), True: (1.8, 1.9, 3.3)}
"""Least ratio for the made pictures: to float32, and with --uint8."""
PNG_TARGET = ("made 1080x1920, PNG", 1.5)
BATCH = 64
BATCH_TARGET = 1.7
"""Least ratio of the wall's time of ``BATCH`` pictures on one thread to that on two."""
NORMAL = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
OURS = {
    "uhd, fast": PixelSettings(**NORMAL, backend="fast"),
    "uhd, exact": PixelSettings(**NORMAL),
    "uhd, fast, draft": PixelSettings(**NORMAL, backend="fast", draft=True),
}


def made_picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(h, w, 3) uint8: noise of equal power in every octave, mostly gray, with a little more in the finest one."""
    noise, total = np.random.default_rng(seed), np.zeros((height, width, 3), np.float32)
    for step in (2**n for n in range(9, -1, -1)):
        coarse = noise.normal(size=(height // step + 2, width // step + 2, 3)).astype(np.float32)
        coarse = coarse.mean(axis=2, keepdims=True) + 0.35 * coarse
        for channel in range(3):
            plane = Image.fromarray(coarse[..., channel]).resize((width, height), Image.Resampling.BICUBIC)
            total[..., channel] += np.asarray(plane) * (22 if step > 2 else 4)
    return (total + 120).clip(0, 255).astype(np.uint8)


def jpeg(pixels: np.ndarray) -> bytes:
    return saved(pixels, "JPEG")


def saved(pixels: np.ndarray, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, quality=90)  # a PNG has none
    return file.getvalue()


def pictures() -> dict[str, bytes]:
    """JPEGs first."""
    import skimage.data

    made = {f"made {height}x{width}": made_picture(height, width) for height, width in MADE}
    photos = {name: getattr(skimage.data, name)() for name in PHOTOS}
    photos = {f"{name} {pixels.shape[0]}x{pixels.shape[1]}": pixels for name, pixels in photos.items()}
    found = {name: jpeg(pixels) for name, pixels in (made | photos).items()}
    height, width = MADE[1]
    screens = made | {f"page {height}x{width}": np.asarray(page_image(width, height))}
    return found | {f"{name}, {kind}": saved(pixels, kind) for kind in FORMATS for name, pixels in screens.items()}


def ours(data: object, settings: PixelSettings, *, raw: bool) -> SliceBatch:
    picture = load_picture(data, settings=settings)
    plan = uhd.plan((picture.height, picture.width), PRESET)
    inner = "hwc" if settings.backend == "fast" else "chw"
    batch = SliceBatch.from_images([picture], [plan], settings=settings, inner=inner)
    return batch if raw else batch.normalized(settings)


def by_torchvision(data: bytes) -> torch.Tensor:
    """(3, h, w) uint8."""
    from torchvision.io import ImageReadMode, decode_image

    return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)


def peers() -> dict[str, Callable[[bytes], dict]]:
    """By the ways in which its users hand pictures over."""
    from transformers.models.minicpmv4_6.image_processing_minicpmv4_6 import MiniCPMV4_6ImageProcessor
    from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

    means = {"image_mean": NORMAL["mean"], "image_std": NORMAL["std"]}
    fast, pillow = MiniCPMV4_6ImageProcessor(**means), MiniCPMV4_6ImageProcessorPil(**means)

    return {
        "transformers, torchvision": lambda data: fast(by_torchvision(data), return_tensors="pt"),
        "transformers, torchvision, Pillow decodes": lambda data: fast(
            Image.open(io.BytesIO(data)), return_tensors="pt"
        ),
        "transformers, Pillow": lambda data: pillow(Image.open(io.BytesIO(data)), return_tensors="pt"),
    }


def peer_patches(found: dict) -> np.ndarray:
    """Its (1, 3, p, N * p) as (N, 3 * p * p) levels of 0..255."""
    patches = rearrange(torch.as_tensor(found["pixel_values"])[0], "c y (n x) -> n (c y x)", x=14)
    return (patches * 127.5 + 127.5).round().numpy()


def complaints(name: str, data: bytes) -> list[str]:
    """What is farther off than it may be, in levels of 0..255."""
    exact = ours(data, OURS["uhd, exact"], raw=True).patches.numpy().astype(int)
    quick = ours(data, OURS["uhd, fast"], raw=True).ordered("chw").patches.numpy()
    whole = ours(data, OURS["uhd, fast"], raw=False).ordered("chw").patches * 127.5 + 127.5
    peer = peer_patches(peers()["transformers, Pillow"](data))
    if peer.shape != exact.shape:
        return [f"{name}: {len(peer)} patches by transformers, {len(exact)} by uhd"]
    pairs = {"fast and exact": (quick, exact, 2), "float32 and uint8": (whole.numpy(), quick, 0.01)}
    pairs["exact and transformers"] = (exact, peer, 1)
    far = {what: float(np.abs(a - b.astype(float)).max()) for what, (a, b, _) in pairs.items()}
    return [f"{name}: {what} differ by {far[what]}" for what, (_, _, most) in pairs.items() if far[what] > most]


def handed() -> dict[str, Callable[[bytes], object]]:
    """Ours where others decode, which is no news of a JPEG."""
    fast = OURS["uhd, fast"]
    return {
        "Pillow decodes": lambda data: ours(Image.open(io.BytesIO(data)), fast, raw=False),
        "torchvision decodes": lambda data: ours(by_torchvision(data).permute(1, 2, 0), fast, raw=False),
    }


def measure(data: bytes, rounds: int, *, raw: bool) -> dict[str, float]:
    """Median milliseconds of CPU time."""
    run: dict[str, Callable[[bytes], object]] = dict(peers())
    for name, settings in OURS.items():
        run[name] = lambda data, settings=settings: ours(data, settings, raw=raw)
    if not raw and data[:2] != b"\xff\xd8":
        run |= handed()
    times: dict[str, list[float]] = {name: [] for name in run}
    for _ in range(rounds + 1):  # the first round warms up
        for name, call in run.items():
            start = time.process_time()
            call(data)
            times[name].append((time.process_time() - start) * 1e3)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def batches(rounds: int) -> list[dict]:
    """``Preparation`` of a list of files, on one thread and on two: the least of the wall's milliseconds."""
    made = [made_picture(height // 2, width // 2) for height, width in (*MADE, MADE[0][::-1])]
    rows = []
    for kind in ("JPEG", "PNG"):
        files = [saved(made[number % len(made)], kind) for number in range(BATCH)]
        for name in ("uhd, exact", "uhd, fast"):
            prepare = uhd.Preparation(PRESET, OURS[name], patch_size=14, inner="hwc" if "fast" in name else "chw")
            times: dict[int, list[float]] = {1: [], 2: []}
            for _ in range(rounds + 1):  # the first round warms up
                for threads, taken in times.items():
                    torch.set_num_threads(threads)
                    start = time.perf_counter()
                    prepare(files)
                    taken.append((time.perf_counter() - start) * 1e3)
            torch.set_num_threads(1)
            one, two = (min(taken[1:]) for taken in times.values())
            row = {"files": f"{BATCH} {kind}", "contender": name, "one_ms": round(one, 1), "two_ms": round(two, 1)}
            rows.append({**row, "ratio": round(one / two, 2), "reached": one / two >= BATCH_TARGET})
    return rows


def batch_table(rows: list[dict]) -> str:
    """Markdown."""
    lines = ["| files | | one thread, ms | two, ms | ratio |", "|---|---|---:|---:|---:|"]
    for row in rows:
        times = f"{row['one_ms']:.0f} | {row['two_ms']:.0f} | {row['ratio']:.2f}"
        lines.append(f"| {row['files']} | {row['contender']} | {times} |")
    return "\n".join(lines)


def row_of(name: str, data: bytes, rounds: int, wanted: float | None, *, raw: bool) -> dict:
    batch, times = ours(data, OURS["uhd, fast"], raw=True), measure(data, rounds, raw=raw)
    best = min(value for contender, value in times.items() if contender.startswith("transformers"))
    height, width = batch.plans[0].image_hw
    return {
        "picture": name,
        "megapixels": height * width / 1e6,
        "bits_per_pixel": round(8 * len(data) / (height * width), 2),
        "patches": len(batch.patches),
        "cpu_ms": {contender: round(value, 2) for contender, value in times.items()},
        "ratio": {contender: round(best / value, 2) for contender, value in times.items()},
        "must_reach": wanted,
        "reached": None if wanted is None else best / times["uhd, fast"] >= wanted,
    }


def versions() -> dict[str, str]:
    import PIL
    import torchvision
    import transformers

    modules = [torch, torchvision, transformers, PIL, np]
    if decoder("PNG"):
        modules.append(importlib.import_module("imagecodecs"))
    return {"python": platform.python_version()} | {module.__name__: module.__version__ for module in modules}


def chart(rows: list[dict]) -> str:
    """Of the made JPEGs."""
    made = [row for row in rows if row["picture"].startswith("made") and "," not in row["picture"]]
    lines = {name: sorted((row["megapixels"], row["cpu_ms"][name]) for row in made) for name in made[0]["cpu_ms"]}
    points = [point for line in lines.values() for point in line]
    x = log_axis([x for x, _ in points], "megapixels")
    return curves(lines, x, log_axis([y for _, y in points], "CPU ms"), width=900)


def table(rows: list[dict]) -> str:
    """Markdown of CPU ms, and how many times faster than the faster backend of transformers."""
    names = ["transformers, Pillow", "uhd, exact", "uhd, fast"]
    others = [name for name in handed() if any(name in row["cpu_ms"] for row in rows)]
    head = ["picture", "patches", "bits/px", "transformers, fastest", "its Pillow", *names[1:], "ratio", "wanted"]
    head += ["with `draft`", *others]
    lines = [f"| {' | '.join(head)} |", f"|---|{(len(head) - 1) * '---:|'}"]
    for row in rows:
        times = row["cpu_ms"]
        fastest = min(value for name, value in times.items() if name.startswith("transformers"))
        cells = [row["picture"], row["patches"], row["bits_per_pixel"]]
        cells += [f"{value:.1f}" for value in (fastest, *(times[name] for name in names))]
        cells += [
            f"{row['ratio']['uhd, fast']:.2f}",
            row["must_reach"] or "",
            f"{row['ratio']['uhd, fast, draft']:.2f}",
        ]
        cells += [f"{times[name]:.1f}" if name in times else "" for name in others]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--uint8", action="store_true", help="ours stop at uint8 patches")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="folder for the JSON and SVG files")
    chosen = parser.parse_args(arguments)
    if chosen.out:
        chosen.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # torchvision's decoder, which the peer needs
    known, found = versions(), pictures()
    print(", ".join(f"{name} {version}" for name, version in known.items()))
    wrong = [line for name, data in found.items() for line in complaints(name, data)]
    if wrong:
        print("pixels are off, so nothing is measured:", *wrong, sep="\n", file=sys.stderr)
        return 1
    wanted = dict(zip((f"made {height}x{width}" for height, width in MADE), TARGETS[chosen.uint8], strict=True))
    wanted |= dict([PNG_TARGET])
    rows = [row_of(name, data, chosen.rounds, wanted.get(name), raw=chosen.uint8) for name, data in found.items()]
    print(table(rows))
    many = [] if chosen.uint8 or (os.cpu_count() or 1) < 2 else batches(max(chosen.rounds // 3, 1))
    if many:
        print(f"\n{batch_table(many)}")
    if chosen.out:
        name = "preprocess_uint8" if chosen.uint8 else "preprocess"
        about = {"versions": known, "device": device(), "preset": PRESET}
        about |= {"to": "uint8" if chosen.uint8 else "float32", "rows": rows, "batches": many}
        (chosen.out / f"{name}.json").write_text(json.dumps(about, indent=1) + "\n")
        (chosen.out / f"{name}.svg").write_text(chart(rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
