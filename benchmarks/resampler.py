"""The perceiver resampler's inference against the layer as released, on one CPU thread.

    python benchmarks/resampler.py [--widths 1024 2048 4096] [--dtypes fp32 bf16] [--repeats 5] [--out FOLDER]

64 latents, 7 views of 576 features of width 1024, heads of 128. The peer is the released layer around
`torch.nn.MultiheadAttention` as it is called there (attention weights returned, latents repeated for every view), with
the same weights: the views as one batch, and one view at a time; the faster of the two is compared with. Nothing is
timed before every contender is right: in float32 equal to the peer but for rounding, in bfloat16 at most twice as far
from float64 as the peer in bfloat16. Times are process CPU time, contenders interleaved, medians.
"""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from reporting import DTYPES, ROUNDING, SLACK, cpu_times, device, gemm_rate, options, relative, reported
from torch import Tensor, nn

import uhd
from uhd import machine
from uhd.charts import curves, log_axis
from uhd.resampler import PerceiverConfig, PerceiverResampler
from uhd.resampler.folded import PATHS, flops

GRIDS = [(24, 24)] * 7
VISION_WIDTH, LATENTS, HEAD_DIM = 1024, 64, 128
PEERS = ("released, a batch", "released, one by one")
TARGETS = {(1024, "fp32"): 1.5, (2048, "fp32"): 2.3, (4096, "fp32"): 3.5}
HALF_TARGETS = {"native": {1024: 1.3, 4096: 2.5}, "float32": {1024: 2.0, 4096: 5.0}}
"""In bfloat16, by width: where its products are fast, and where inference takes float32's."""


class Released(nn.Module):
    """The released layer's forward over the parameters of one of ours."""

    def __init__(self, ours: PerceiverResampler) -> None:
        super().__init__()
        config = ours.config
        self.ours = ours
        with torch.device("meta"):
            self.attn = nn.MultiheadAttention(config.width, config.num_heads)
        self.attn.load_state_dict(ours.attn.state_dict(), assign=True)
        self.eval()

    def forward(self, x: Tensor, grid_hw: tuple[int, int], *, need_weights: bool = True) -> Tensor:
        """(B, n, D_v), views of one grid -> (B, Q, D)."""
        ours, side = self.ours, math.isqrt(LATENTS)
        table = ours.pos_embed.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
        positions = F.interpolate(table, grid_hw, mode="bicubic").permute(0, 2, 3, 1).flatten(0, 2).to(x.dtype)
        x = ours.ln_kv(ours.kv_proj(x)).permute(1, 0, 2)
        q = (ours.ln_q(ours.query) + ours.pos_embed).unsqueeze(1).repeat(1, x.shape[1], 1)
        out = self.attn(q, x + positions.unsqueeze(1), x, need_weights=need_weights)[0].permute(1, 0, 2)
        return ours.ln_post(out) @ ours.proj


def build(width: int) -> PerceiverResampler:
    """A layer with no parameter at a special value."""
    torch.manual_seed(0)
    sizes = {"vision_width": min(VISION_WIDTH, width), "num_heads": width // HEAD_DIM, "num_latents": LATENTS}
    module = PerceiverResampler(PerceiverConfig(width=width, **sizes)).eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    return module


def contenders(module: PerceiverResampler, features: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Name -> call that gives (V, Q, D)."""
    released, views = Released(module), features.unflatten(0, (len(GRIDS), -1))
    calls: dict[str, Callable[[], Tensor]] = {
        PEERS[0]: lambda: released(views, GRIDS[0]),
        PEERS[1]: lambda: torch.cat([released(view[None], GRIDS[0]) for view in views]),
        "released, a batch, need_weights=False": lambda: released(views, GRIDS[0], need_weights=False),
    }

    def ours(path: str) -> Tensor:
        module.inference = path
        return module(features, GRIDS)

    return calls | {f"uhd, {path}": lambda path=path: ours(path) for path in (*PATHS, "auto")}


def errors(module: PerceiverResampler, calls: dict[str, Callable[[], Tensor]], features: Tensor) -> dict[str, Any]:
    """Relative error of every contender: of float32 from the peer, else of the first view from float64.

    Raises:
        RuntimeError: one of ours is wrong.
    """
    outputs = {name: call() for name, call in calls.items()}
    if features.dtype == torch.float32:
        found = {name: relative(out, outputs[PEERS[0]]) for name, out in outputs.items()}
        bound = ROUNDING
    else:
        exact = build(module.config.width).to(features.dtype).double()  # of the weights as rounded
        exact.inference = "plain"
        truth = exact(features[: math.prod(GRIDS[0])].double(), GRIDS[:1])
        found = {name: relative(out[:1], truth) for name, out in outputs.items()}
        bound = SLACK * found[PEERS[0]]
    wrong = {name: error for name, error in found.items() if not error <= bound and name.startswith("uhd")}
    if wrong:
        raise RuntimeError(f"errors above {bound:.1e}: {wrong}")
    return found


def measure(width: int, dtype: str, repeats: int) -> list[dict[str, Any]]:
    """A row for every contender. The calls of the check are the warm-up; products are folded there."""
    module = build(width).to(DTYPES[dtype])
    rows = sum(h * w for h, w in GRIDS)
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(rows, module.in_dim, generator=generator).to(DTYPES[dtype])
    calls = contenders(module, features)
    off = errors(module, calls, features)
    module.inference = "auto"
    chosen = module.inference_path(GRIDS)
    times = cpu_times(calls, repeats)
    peer = min(times[name] for name in PEERS)
    module.train().eval()  # lets go of what is folded
    module.inference = chosen
    first = cpu_times({"first": lambda: module(features, GRIDS)}, 1)["first"]
    return [
        {
            "width": width,
            "dtype": dtype,
            "contender": name + (f" ({chosen})" if name == "uhd, auto" else ""),
            "cpu_ms": round(1e3 * seconds, 1),
            "ratio": round(peer / seconds, 2),
            "relative_error": float(f"{off[name]:.1e}"),
            "gflops": round(_counted(module, name.removeprefix("uhd, ")) / 1e9, 1) if "uhd" in name else None,
            "first_call_ms": round(1e3 * first, 1) if name == "uhd, auto" else None,
        }
        for name, seconds in times.items()
    ]


def _counted(module: PerceiverResampler, path: str) -> int:
    config = module.config
    after = 4 * len(GRIDS) * config.num_latents * config.width**2  # out_proj and proj
    return flops(module.inference_path(GRIDS) if path == "auto" else path, config, GRIDS) + after


def run(widths: list[int], dtypes: list[str], repeats: int) -> dict[str, Any]:
    """Everything that is written, as plain JSON types."""
    rows, reached = [], []
    for dtype in dtypes:
        for width in widths:
            rows += measure(width, dtype, repeats)
            half = HALF_TARGETS["float32" if machine.products()["bfloat16"] == "float32" else "native"]
            wanted = half.get(width) if dtype == "bf16" else TARGETS.get((width, dtype))
            if wanted is not None:
                ratio = next(row["ratio"] for row in reversed(rows) if row["contender"].startswith("uhd, auto"))
                reached.append(
                    {"width": width, "dtype": dtype, "wanted": wanted, "ratio": ratio, "ok": ratio >= wanted}
                )
    return {
        "about": f"{LATENTS} latents, {len(GRIDS)} views of {math.prod(GRIDS[0])} features, width {VISION_WIDTH}, "
        f"heads of {HEAD_DIM}; median process CPU time of {repeats} interleaved calls, one thread; ratio: the faster "
        "of the released layer's two ways / this",
        "versions": {"uhd": uhd.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "device": device(),
        "gemm_gflops": {name: round(gemm_rate(DTYPES[name]) / 1e9) for name in dtypes},
        "rows": rows,
        "targets": reached,
    }


def table(result: dict[str, Any]) -> str:
    """The rows, as Markdown."""
    lines = ["| width | dtype | | CPU ms | ratio | relative error |", "|---|---|---|---:|---:|---:|"]
    lines += [
        f"| {row['width']} | {row['dtype']} | {row['contender']} | {row['cpu_ms']:.0f} | {row['ratio']:.2f} | "
        f"{row['relative_error']:.1e} |"
        for row in result["rows"]
    ]
    return "\n".join(lines)


def plot(result: dict[str, Any]) -> str:
    """Ratio over width, a line for each of ours; 1 is the released layer."""
    rows = [row for row in result["rows"] if row["contender"].startswith("uhd") and "auto" not in row["contender"]]
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        name = f"{row['contender'].removeprefix('uhd, ')}, {row['dtype']}"
        series.setdefault(name, []).append((row["width"], row["ratio"]))
    x = log_axis([row["width"] for row in rows], "width of the language model")._replace(
        ticks=tuple((width, str(width)) for width in sorted({row["width"] for row in rows}))
    )
    return curves(series, x, log_axis([0.5, 10, *(row["ratio"] for row in rows)], "times faster than released"))


def main(argv: list[str] | None = None) -> int:
    """Write ``resampler.json`` and ``resampler.svg``, print the table; 1 where a contender is wrong."""
    parser = options(__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    args = parser.parse_args(argv)
    return reported(
        lambda: run(args.widths, args.dtypes, args.repeats),
        args.out / "resampler.json",
        table,
        drawings=lambda result: {"resampler.svg": plot(result)},
        circumstances=("versions", "device", "gemm_gflops"),
        verdict=lambda target: "{width} {dtype}: {ratio} of {wanted}".format_map(target),
    )


if __name__ == "__main__":
    sys.exit(main())
