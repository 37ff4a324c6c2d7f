"""One float32 ViT in four runtimes, on one CPU thread: uhd, transformers, onnxruntime and OpenVINO.

    pip install '.[onnx]' openvino
    python benchmarks/runtimes.py [--depth 4] [--width 768] [--repeats 5] [--out FOLDER]

The images of benchmarks/encoder.py, the same weights, the views packed one after the other; transformers gets them
padded to one batch. onnxruntime and OpenVINO run, with their own optimizations, two graphs of uhd's ViT: that of these
very grids, packed; and, as "uhd.export", the one that `uhd.export.onnx` writes, padded, for any views. A runtime that
is not installed is a row without figures. Nothing is timed before all give the same numbers but for rounding. Times
are process CPU time, contenders interleaved, medians.
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from einops import rearrange
from encoder import IMAGES, PATCH, PEER, build_peer, peer_call, plans, vit_flops
from reporting import ROUNDING, cpu_times, device, options, relative, reported
from torch import Tensor, nn

import uhd
from uhd.export.graph import described, free_axes, save_graph
from uhd.export.padded import see
from uhd.pixels import PixelSettings
from uhd.resampler import MLPProjector
from uhd.vision import ViT, vit_from

OURS = "uhd"
TARGETS = {"onnxruntime": 1.05}
"""Most of another runtime's time that ours may take."""


class OfGrids(nn.Module):
    """A ViT for views of fixed grids."""

    def __init__(self, vit: ViT, grids: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.vit, self.grids = vit, tuple(grids)

    def forward(self, given: dict[str, Tensor]) -> Tensor:
        return self.vit(given["patches"], self.grids)


class Padded(nn.Module):
    """A ViT for padded views of any grids."""

    def __init__(self, vit: ViT) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, given: dict[str, Tensor]) -> Tensor:
        return see(self.vit, given)


def exported(vit: ViT, grids: Sequence[tuple[int, int]], patches: Tensor, folder: Path) -> dict[str, Any]:
    """Write both graphs: (file, inputs) of each, by how it is called; ImportError without the exporter."""
    packed, padded = folder / "packed.onnx", folder / "padded.onnx"
    given = {"patches": patches.numpy()}
    save_graph(OfGrids(vit, grids).eval(), given, packed, {})
    encoder = uhd.VisualEncoder(vit, MLPProjector(vit.out_dim, 8), pixels=PixelSettings(mean=(0,) * 3, std=(1,) * 3))
    views = [view.numpy() for view in patches.split([h * w for h, w in grids])]
    all_views = described(encoder).arrays(views, grids)
    save_graph(Padded(vit).eval(), all_views, padded, {name: free_axes(name) for name in all_views})
    return {"{}": (packed, given), "{}, uhd.export": (padded, all_views)}


def unpadded(found: np.ndarray, given: dict[str, np.ndarray]) -> Tensor:
    return torch.from_numpy(found if "mask" not in given else found[given["mask"]])


def onnxruntime_call(file: Path, given: dict[str, np.ndarray]) -> Callable[[], Tensor]:
    """On as many threads as torch has here."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda: unpadded(session.run(None, given)[0], given)


def openvino_call(file: Path, given: dict[str, np.ndarray]) -> Callable[[], Tensor]:
    """In float32, on as many threads as torch has here."""
    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = core.compile_model(core.read_model(str(file)), "CPU", settings)
    return lambda: unpadded(compiled(given)[0], given)


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
    missing, graphs = {}, None
    with tempfile.TemporaryDirectory() as folder:
        for name, make in RUNTIMES.items():
            try:
                graphs = graphs or exported(vit, grids, patches, Path(folder))
                calls |= {how.format(name): make(*graph) for how, graph in graphs.items()}
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
