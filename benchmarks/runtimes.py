"""One float32 ViT in four runtimes, on one CPU thread: uhd, transformers, onnxruntime and OpenVINO.

    pip install onnx onnxscript onnxruntime openvino
    python benchmarks/runtimes.py [--depth 4] [--width 768] [--repeats 5] [--out FOLDER]

The images of benchmarks/encoder.py, the same weights, the views packed one after the other; transformers gets them
padded to one batch. onnxruntime and OpenVINO run the graph that `torch.onnx.export` makes of uhd's ViT for these very
grids, with their own optimizations. A runtime that is not installed is a row without figures. Nothing is timed before
all give the same numbers but for rounding. Times are process CPU time, contenders interleaved, medians.
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from einops import rearrange
from encoder import IMAGES, PATCH, PEER, build_peer, peer_call, plans, vit_flops
from reporting import ROUNDING, cpu_times, device, options, relative, reported
from torch import Tensor, nn

import uhd
from uhd.vision import ViT, vit_from

OURS = "uhd"
TARGETS = {"onnxruntime": 1.05}
"""Most of another runtime's time that ours may take."""


class OfGrids(nn.Module):
    """A ViT for views of fixed grids, as exporters want it."""

    def __init__(self, vit: ViT, grids: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.vit, self.grids = vit, tuple(grids)

    def forward(self, patches: Tensor) -> Tensor:
        return self.vit(patches, self.grids)


def exported(vit: ViT, grids: Sequence[tuple[int, int]], patches: Tensor, file: Path) -> None:
    """Write the ONNX graph; ImportError where the exporter is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        torch.onnx.export(OfGrids(vit, grids).eval(), (patches,), dynamo=True, verbose=False).save(file)


def onnxruntime_call(file: Path, patches: Tensor) -> Callable[[], Tensor]:
    """On as many threads as torch has here."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: patches.numpy()}
    return lambda: torch.from_numpy(session.run(None, given)[0])


def openvino_call(file: Path, patches: Tensor) -> Callable[[], Tensor]:
    """In float32, on as many threads as torch has here."""
    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = core.compile_model(core.read_model(str(file)), "CPU", settings)
    return lambda: torch.from_numpy(compiled([patches.numpy()])[0])


RUNTIMES = {"onnxruntime": onnxruntime_call, "OpenVINO": openvino_call}


def run(depth: int, width: int, repeats: int) -> dict[str, Any]:
    """Everything that is written, as plain JSON types."""
    peer = build_peer(depth, width)
    grids = [view.patches_hw for hw in IMAGES for view in plans(hw).views]
    drawn = torch.Generator().manual_seed(1)
    patches = torch.randn(sum(h * w for h, w in grids), 3 * PATCH**2, generator=drawn)
    vit = vit_from(peer).eval().requires_grad_(False)
    kept = vit_from(peer).eval().requires_grad_(False)
    kept.compile_blocks()
    theirs = rearrange(patches, "n (c k) -> n (k c)", c=3).contiguous()
    calls: dict[str, Callable[[], Tensor]] = {
        PEER: peer_call(peer, theirs, [grids]),
        OURS: lambda: vit(patches, grids),
        "uhd, compiled": lambda: kept(patches, grids),
    }
    missing = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vit.onnx"
        for name, make in RUNTIMES.items():
            try:
                if not file.exists():
                    exported(vit, grids, patches, file)
                calls[name] = make(file, patches)
            except ImportError as problem:
                missing[name] = f"not installed: {problem}"
        wanted = calls[PEER]()
        off = {name: relative(call(), wanted) for name, call in calls.items()}
        wrong = {name: error for name, error in off.items() if not error <= ROUNDING}
        if wrong:
            raise RuntimeError(f"errors above {ROUNDING:.1e}: {wrong}")
        times = cpu_times(calls, repeats)
    ours = min(seconds for name, seconds in times.items() if name.startswith("uhd"))
    rows = [
        {
            "contender": name,
            "cpu_ms": round(1e3 * seconds, 1),
            "ratio": round(seconds / times[OURS], 2),
            "gflops_a_second": round(vit_flops(depth, width, grids) / seconds / 1e9),
            "relative_error": float(f"{off[name]:.1e}"),
        }
        for name, seconds in times.items()
    ]
    return {
        "about": f"ViT of width {width}, {depth} blocks, {len(patches)} patches in {len(grids)} views, float32; "
        f"median process CPU time of {repeats} interleaved calls, one thread; ratio: this / {OURS}",
        "versions": {"uhd": uhd.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
        | {name: importlib.metadata.version(name.lower()) for name in RUNTIMES if name in calls}
        | {"python": platform.python_version()},
        "device": device(),
        "rows": rows,
        "missing": missing,
        "targets": [
            {"peer": name, "wanted": most, "ratio": round(ours / times[name], 2), "ok": ours <= most * times[name]}
            for name, most in TARGETS.items()
            if name in times
        ],
    }


def table(result: dict[str, Any]) -> str:
    """The rows, as Markdown."""
    lines = ["| | CPU ms | time / uhd | GFLOP/s | relative error |", "|---|---:|---:|---:|---:|"]
    lines += [
        f"| {row['contender']} | {row['cpu_ms']:.0f} | {row['ratio']:.2f} | {row['gflops_a_second']} | "
        f"{row['relative_error']:.1e} |"
        for row in result["rows"]
    ]
    return "\n".join([*lines, *(f"| {name} | {why} | | | |" for name, why in result["missing"].items())])


def main(argv: list[str] | None = None) -> int:
    """Write ``runtimes.json`` and print the table; 1 where a contender is wrong."""
    parser = options(__doc__)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--width", type=int, default=768, help="heads are 64 wide")
    args = parser.parse_args(argv)
    return reported(
        lambda: run(args.depth, args.width, args.repeats),
        args.out / "runtimes.json",
        table,
        verdict=lambda target: "{ratio} of {peer}'s time, {wanted} at most".format_map(target),
    )


if __name__ == "__main__":
    sys.exit(main())
