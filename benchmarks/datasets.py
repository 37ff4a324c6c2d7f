"""Encoding data sets: speed of one process, two, and Ray, with the memory of each, and of listing many keys.

``python benchmarks/datasets.py speed --images 2000 [--encoder wide] [--ray PYTHON]``: wall and CPU time and the
largest memory of all processes together, of the same run by one process, by two, and by Ray in a Python that has it.
``keys --keys 5000000``: the memory of listing so many keys.
The source holds pictures of varied sizes as files, in a tar and in Parquet, names that repeat in other folders, 1 %
that cannot be read, and 2 % that are copies. ``python -m tests.fuzz.data_sets`` kills such runs.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

import uhd
from uhd.pixels import PixelSettings
from uhd.resampler import PerceiverConfig, PerceiverResampler
from uhd.vision import ViT, ViTConfig

ENCODERS = {"small": (56, 32, 2, 24), "wide": (224, 384, 6, 256)}  # side of a view, width, depth, width of tokens


def save_encoder(name: str, folder: Path) -> None:
    """A new encoder, the same at every call."""
    torch.manual_seed(0)
    side, width, depth, out = ENCODERS[name]
    sizes = {"image_size": side, "patch_size": 14, "width": width, "depth": depth}
    sizes |= {"heads": max(2, width // 64), "mlp_width": 4 * width}
    grid = (side // 14,) * 2
    vision = ViT(ViTConfig(**sizes, position_grid_hw=grid))
    resampler = PerceiverResampler(PerceiverConfig(width=out, vision_width=width, num_heads=2, num_latents=16))
    pixels = PixelSettings(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    uhd.VisualEncoder(vision, resampler, pixels=pixels).save_pretrained(folder)


def picture(number: int, rng: np.random.Generator) -> tuple[str, bytes]:
    """A name and a file; of every hundred one that cannot be read."""
    height, width = rng.integers(40, 240, 2)
    coarse = rng.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((int(width), int(height))).save(file, "PNG" if number % 3 else "JPEG")
    content = file.getvalue()
    if number % 100 == 13:
        content = content[: len(content) // 3] if number % 200 == 13 else b"no image"
    return f"{number % 7}/{number // 7 % 500}.{'png' if number % 3 else 'jpg'}", content


def make_source(folder: Path, images: int) -> None:
    """Half of them files, a quarter in a tar, a quarter in Parquet."""
    import pyarrow.parquet

    rng, rows, before = np.random.default_rng(0), [], b""
    folder.mkdir()
    with tarfile.open(folder / "some.tar", "w") as tar:
        for number in range(images):
            name, content = picture(number, rng)
            content = before if number % 50 == 49 else content
            before = content if number % 50 == 5 else before
            if number < images // 2:
                path = folder / str(number // 3500) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            elif number < 3 * images // 4:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                rows.append({"bytes": content, "path": name})
    pyarrow.parquet.write_table(pyarrow.table({"image": rows}), folder / "rest.parquet", row_group_size=500)


class Run:
    """One command in a process of its own, and what it and all below it take."""

    def __init__(self, python: str, source: Path, out: Path, encoder: Path, *more: str) -> None:
        words = [python, "-m", "uhd.cli", "encode-dataset", str(source), "-o", str(out), "--encoder", str(encoder)]
        self.start, self.cpu, self.memory = time.perf_counter(), {}, 0
        env = {**os.environ, "RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([*words, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
        threading.Thread(target=self._watch, daemon=True).start()

    def tree(self) -> list[psutil.Process]:
        try:
            first = psutil.Process(self.process.pid)
            return [first, *first.children(recursive=True)]
        except psutil.Error:
            return []

    def _watch(self) -> None:
        while self.process.poll() is None:
            memory = 0
            for one in self.tree():
                try:
                    times = one.cpu_times()
                    self.cpu[one.pid] = times.user + times.system
                    memory += _shared_out(one.pid)
                except (psutil.Error, OSError):
                    continue
            self.memory = max(self.memory, memory)
            time.sleep(0.5)  # looking takes a process's time

    def wait(self) -> dict[str, Any]:
        out, err = self.process.communicate()
        if self.process.returncode:
            raise RuntimeError(f"exit {self.process.returncode}: {out.decode()} {err.decode()}")
        wall = time.perf_counter() - self.start
        told = out.decode().strip().splitlines()[-1]
        cpu = round(sum(self.cpu.values()), 1)
        return {"wall_s": round(wall, 1), "cpu_s": cpu, "peak_mib": self.memory >> 20, "told": told}


def _shared_out(pid: int) -> int:
    """Bytes of a process, of what several have in common its share."""
    told = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return 1024 * int(told.partition("\nPss:")[2].split()[0])


def contents(out: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in sorted(out.iterdir()) if not one.name.startswith(".")}


def speed(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    source, few, encoder = work / "source", work / "few", work / "encoder"
    make_source(few, 16)
    ways = {"one process": ["--processes", "1"], "two processes": ["--processes", "2"]}
    python = dict.fromkeys(ways, sys.executable)
    if args.ray:
        ways["ray"] = ["--engine", "ray", "--actors", "1"]
        python["ray"] = args.ray
    found: dict[str, Any] = {}
    for name, words in ways.items():
        start = Run(python[name], few, work / f"few {name}", encoder, *words).wait()
        found[name] = Run(python[name], source, work / name, encoder, *words).wait()
        found[name]["past_start_up"] = {key: round(found[name][key] - start[key], 1) for key in ("wall_s", "cpu_s")}
        print(name, json.dumps(found[name]), flush=True)
    same = [contents(work / name) == contents(work / "one process") for name in ways]
    past = {name: one["past_start_up"] for name, one in found.items()}
    ratio = past["one process"]["wall_s"] / past["two processes"]["wall_s"]
    told = {"same_bytes": all(same), "two_over_one": round(ratio, 2)}
    if args.ray:
        told["ray_cpu_over_local"] = round(past["ray"]["cpu_s"] / past["one process"]["cpu_s"], 2)
    return {**found, **told}


def keys(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    with open(work / "list.txt", "w") as file:
        file.writelines(f"pictures/{number // 1000:06d}/{number:09d}.jpg\n" for number in range(args.keys))
    code = (
        "import sys, time; from pathlib import Path; from uhd.datasets import plan, sources\n"
        "def peak(): return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) >> 10\n"
        "start = time.time(); plan = plan.Plan(Path(sys.argv[2]), sources.listed(sys.argv[1]), None, (0, 1))\n"
        "for _ in plan: pass\n"
        "assert 'torch' not in sys.modules\n"
        "print(plan.inputs, plan.units, peak(), time.time() - start)"
    )
    words = [sys.executable, "-c", code, str(work / "list.txt"), str(work)]
    told = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    return {
        "inputs": int(told[0]),
        "units": int(told[1]),
        "peak_mib": int(told[2]),
        "seconds": round(float(told[3]), 1),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "keys"))
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--encoder", choices=ENCODERS, default="small")
    parser.add_argument("--ray", metavar="PYTHON", help="a Python that has Ray")
    parser.add_argument("--keys", type=int, default=5_000_000)
    parser.add_argument("--work", type=Path, help="a folder to work in, which stays")
    args = parser.parse_args(argv)
    work = args.work or Path(tempfile.mkdtemp(prefix="uhd-datasets-"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        if args.what != "keys":
            save_encoder(args.encoder, work / "encoder")
            make_source(work / "source", args.images)
        print(json.dumps({"speed": speed, "keys": keys}[args.what](args, work), indent=1))
    finally:
        if args.work is None:
            shutil.rmtree(work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
