"""Time alternatives to the table of configurations on this machine's GPU. It changes nothing; edit the table by hand.

    python benchmarks/tune_kernels.py [--dtype bf16] [--shape 1] [--json FILE]

Each candidate replaces the entry of `uhd_kernels.configs` that the shape would use, is checked against the float64
reference, then timed. Candidates that do not compile, ask for too much memory or are wrong are listed with the reason.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels"))

from uhd_kernels.configs import FEW_LATENTS, Config

import kernels as benchmark  # kernels.py beside this file


def candidates(direction: str, latents: int, dtype: torch.dtype) -> list[Config]:
    """What could replace an entry: tiles that fit the direction, then keys in a step, warps and stages."""
    few = latents <= FEW_LATENTS and dtype.itemsize == 2
    if direction == "forward":
        tiles = [(64, 0)] if few else [(128, 16), (64, 64), (64, 0), (32, 32)]
    else:
        tiles = [(64, 0), (16, 0)] if few else [(16, 0), (32, 0), (64, 0)]
    return [Config(*parts) for parts in itertools.product(tiles, (16, 32, 64, 128), (4, 8), (1, 2, 3))]


def time_candidate(case: benchmark.Case, direction: str, config: Config, exact, plain) -> float | str:
    """Microseconds of that direction, or what is wrong."""
    from uhd_kernels import cross_attention

    with mock.patch.object(cross_attention, f"{direction}_config", return_value=config):
        if problem := benchmark.check(case, lambda: case.ours("triton"), exact, plain):
            return problem
        if direction == "forward":
            with torch.no_grad():
                return benchmark.time_us(lambda: case.ours("triton"))
        out = case.ours("triton")
        grad = torch.randn_like(out)
        return benchmark.time_us(lambda: torch.autograd.grad(out, case.leaves, grad, retain_graph=True))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=benchmark.DTYPES, default="bf16")
    parser.add_argument("--shape", type=int, default=1, help="number of the shape in benchmarks/kernels.py")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every time and reason there")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("Nothing was tuned: torch sees no GPU here.")
        return 1
    shape, dtype = benchmark.SHAPES[options.shape], benchmark.DTYPES[options.dtype]
    case = benchmark.Case.make(shape, "cuda", dtype)
    exact, plain = benchmark.exactly(case), benchmark.results(case, case.per_view_sdpa())
    report = {"versions": benchmark.versions(), "shape": shape.name, "dtype": options.dtype}
    print("  ".join(f"{name} {value}" for name, value in report["versions"].items()))
    for direction in ("forward", "backward"):
        found = [
            (config, time_candidate(case, direction, config, exact, plain))
            for config in candidates(direction, shape.latents, dtype)
        ]
        timed = sorted((result, str(config)) for config, result in found if isinstance(result, float))
        print(f"\n{direction}, {shape.name}: {len(timed)} of {len(found)} candidates ran; the fastest")
        for microseconds, config in timed[:5]:
            print(f"  {microseconds:9.1f} us  {config}")
        report[direction] = [{"config": str(config), "result": result} for config, result in found]
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
