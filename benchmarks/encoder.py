"""The packed vision encoder against transformers' SigLIP2, which pads views and masks the padding; one CPU thread.

    python benchmarks/encoder.py [--depth 4] [--dtypes fp32 bf16] [--repeats 5] [--out FOLDER]

ViT-B/16 of native size 384, equal weights, equal patches: four images of different shapes, cut by LLaVA-UHD's rule.
The peer gets all views as one batch, padded, with a mask; also a batch for each image, eager and compiled. Blocks cost
the same, so the first four of the twelve are run.
Nothing is timed before every contender is right: in float32 equal to the peer but for rounding, in bfloat16 at most
twice as far from float32 as the peer in bfloat16; int8 is further away, and the table says how far. Times are process
CPU time, contenders interleaved, medians.
"""

from __future__ import annotations

import copy
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from einops import rearrange
from reporting import DTYPES, ROUNDING, SLACK, cpu_times, device, gemm_rate, options, relative, reported
from torch import Tensor, nn
from transformers import Siglip2VisionConfig, Siglip2VisionModel

import uhd
from uhd.charts import bars
from uhd.encoder import VisualEncoder
from uhd.slicing import SlicePlan, SlicingConfig
from uhd.vision import vit_from

IMAGES = ((672, 1008), (1080, 1920), (480, 640), (900, 500))
"""(height, width) of the batch, px."""
SIDE, PATCH = 384, 16
PEER, BY_IMAGE = "transformers, a batch", "transformers, by image"
COMPILED_PEER = "transformers, by image, compiled"
TARGETS = {
    "fp32": (("uhd", PEER, 1.15),),
    "bf16": (("uhd, compiled", PEER, 1.25), ("uhd, compiled", BY_IMAGE, 1.1), ("uhd, compiled", COMPILED_PEER, 1.1)),
}
"""By dtype: a contender, a peer, and how many times as fast it must be."""


def build_peer(depth: int, width: int = 768) -> Siglip2VisionModel:
    """With random weights, none at a special value."""
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 64}
    config = Siglip2VisionConfig(
        num_hidden_layers=depth,
        patch_size=PATCH,
        num_patches=(SIDE // PATCH) ** 2,
        vision_use_head=False,
        attn_implementation="sdpa",
        **sizes,
    )
    model = Siglip2VisionModel(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def peer_call(model: Siglip2VisionModel, patches: Tensor, batches: Sequence[Sequence[tuple[int, int]]]) -> Callable:
    """Packed patches (N, P) of the views of all batches -> (N, D), each batch padded to its longest view."""
    prepared, first = [], 0
    for grids in batches:
        counts = [h * w for h, w in grids]
        views = patches[first : first + sum(counts)].split(counts)
        pixels = nn.utils.rnn.pad_sequence(list(views), batch_first=True)
        mask = (torch.arange(max(counts)) < torch.tensor(counts)[:, None]).to(patches.device)
        prepared.append((pixels, mask, torch.tensor(grids)))
        first += sum(counts)

    def call() -> Tensor:
        out = [
            model(pixel_values=pixels, pixel_attention_mask=mask, spatial_shapes=shapes).last_hidden_state[mask]
            for pixels, mask, shapes in prepared
        ]
        return torch.cat(out)

    return call


def contenders(
    depth: int, dtype: torch.dtype, width: int = 768, *, compiled: bool = True
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, int]]:
    """Name -> call that gives (N, D), and what was encoded."""
    peer = build_peer(depth, width)
    by_image = [[view.patches_hw for view in plans(hw).views] for hw in IMAGES]
    grids = [grid for image in by_image for grid in image]
    drawn = torch.Generator().manual_seed(1)
    patches = torch.randn(sum(h * w for h, w in grids), 3 * PATCH**2, generator=drawn).to(dtype)
    theirs = rearrange(patches, "n (c k) -> n (k c)", c=3).contiguous()
    pixels = uhd.PixelSettings(mean=(0.5,) * 3, std=(0.5,) * 3)
    vit = vit_from(peer).eval().requires_grad_(False).to(dtype)
    peer = peer.to(dtype)
    calls = {PEER: peer_call(peer, theirs, [grids]), BY_IMAGE: peer_call(peer, theirs, by_image)}
    ours: dict[str, Callable[[VisualEncoder], object]] = {
        "uhd, all at once": lambda encoder: setattr(encoder, "max_patches_per_step", len(patches)),
        "uhd": lambda encoder: None,
        "uhd, int8": lambda encoder: encoder.quantize(),
    }
    if compiled:
        calls[COMPILED_PEER] = peer_call(torch.compile(copy.deepcopy(peer), dynamic=True), theirs, by_image)
        ours["uhd, compiled"] = lambda encoder: encoder.compile()
        ours["uhd, int8, compiled"] = lambda encoder: encoder.quantize().compile()
    for name, change in sorted(ours.items()):
        encoder = VisualEncoder(copy.deepcopy(vit), Packed(width), pixels=pixels).eval()
        change(encoder)
        calls[name] = lambda encoder=encoder: encoder.encode_packed(patches, grids)[0]
    padded = len(grids) * max(h * w for h, w in grids)
    about = {"images": len(IMAGES), "views": len(grids), "patches": len(patches), "patches, padded": padded}
    return calls, {**about, "gflops": round(vit_flops(depth, width, grids) / 1e9)}


def plans(image_hw: tuple[int, int]) -> SlicePlan:
    """By the rule that an encoder takes where it is given none."""
    return uhd.plan(image_hw, SlicingConfig().for_vision(image_size=SIDE, patch_size=PATCH))


class Packed(nn.Module):
    """A compressor that leaves features as they are: only the ViT is measured."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_dim = self.out_dim = width

    def forward(self, features: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        return features

    def output_lengths(self, grids: Sequence[tuple[int, int]]) -> list[int]:
        return [h * w for h, w in grids]


def vit_flops(depth: int, width: int, grids: Sequence[tuple[int, int]]) -> int:
    """Of the products: two for each multiplication and addition."""
    counts = [h * w for h, w in grids]
    dense = sum(counts) * width * (12 * width * depth + 3 * PATCH**2)
    return 2 * dense + 4 * depth * width * sum(n * n for n in counts)


def errors(calls: dict[str, Callable[[], Tensor]], truth: Tensor, dtype: str) -> dict[str, float]:
    """Relative error of every contender.

    Raises:
        RuntimeError: One of ours that is not int8 is wrong.
    """
    found = {name: relative(call(), truth) for name, call in calls.items()}
    bound = ROUNDING if dtype == "fp32" else SLACK * found[PEER]
    wrong = {name: off for name, off in found.items() if "uhd" in name and "int8" not in name and not off <= bound}
    if wrong:
        raise RuntimeError(f"errors above {bound:.1e}: {wrong}")
    return found


def run(depth: int, dtypes: Sequence[str], repeats: int, width: int = 768, *, compiled: bool = True) -> dict[str, Any]:
    """Everything that is written, as plain JSON types."""
    truth, rows, reached = contenders(depth, torch.float32, width, compiled=False)[0][PEER](), [], []
    peaks: dict[str, float] = {}
    for dtype in dtypes:
        calls, about = contenders(depth, DTYPES[dtype], width, compiled=compiled)
        off = errors(calls, truth, dtype)
        peak = peaks[dtype] = gemm_rate(DTYPES[dtype])
        times = cpu_times(calls, repeats)
        rows += [
            {
                "dtype": dtype,
                "contender": name,
                "cpu_ms": round(1e3 * seconds, 1),
                "ratio": round(times[PEER] / seconds, 2),
                "gflops_a_second": round(about["gflops"] / seconds, 1),
                "share_of_peak": None if "int8" in name else round(1e9 * about["gflops"] / seconds / peak, 2),
                "relative_error": float(f"{off[name]:.1e}"),
            }
            for name, seconds in times.items()
        ]
        for name, peer, wanted in TARGETS[dtype]:
            if name in times and peer in times:
                ratio = round(times[peer] / times[name], 2)
                target = {"dtype": dtype, "contender": name, "peer": peer, "wanted": wanted, "ratio": ratio}
                reached.append({**target, "ok": ratio >= wanted})
    versions = {"uhd": uhd.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "about": f"ViT of width {width}, {depth} blocks, patches of {PATCH} px; median process CPU time of {repeats} "
        f"interleaved calls, one thread; ratio: {PEER} / this",
        "work": {**about, "sizes_hw": [list(hw) for hw in IMAGES]},
        "versions": {**versions, "python": platform.python_version()},
        "device": device(),
        "gemm_gflops": {name: round(peak / 1e9) for name, peak in peaks.items()},
        "rows": rows,
        "targets": reached,
    }


def table(result: dict[str, Any]) -> str:
    """The rows, as Markdown."""
    lines = [
        "| dtype | | CPU ms | ratio | GFLOP/s | of the peak | relative error |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        share = "" if row["share_of_peak"] is None else f"{100 * row['share_of_peak']:.0f} %"
        lines.append(
            f"| {row['dtype']} | {row['contender']} | {row['cpu_ms']:.0f} | {row['ratio']:.2f} | "
            f"{row['gflops_a_second']:.0f} | {share} | {row['relative_error']:.1e} |"
        )
    return "\n".join(lines)


def plot(result: dict[str, Any]) -> str:
    """A bar for every contender and dtype."""
    groups: dict[str, dict[str, float]] = {}
    for row in result["rows"]:
        groups.setdefault(row["contender"], {})[row["dtype"]] = row["ratio"]
    return bars(groups, f"times faster than {PEER}", reference=1)


def main(argv: list[str] | None = None) -> int:
    """Write ``encoder.json`` and ``encoder.svg``, print the table; 1 where a contender is wrong."""
    parser = options(__doc__)
    parser.add_argument("--depth", type=int, default=4, help="blocks; default 4")
    parser.add_argument("--width", type=int, default=768, help="default 768")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--eager", action="store_true", help="without the compiled contenders")
    args = parser.parse_args(argv)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # inside torch.compile
        return reported(
            lambda: run(args.depth, args.dtypes, args.repeats, args.width, compiled=not args.eager),
            args.out / "encoder.json",
            table,
            drawings=lambda result: {"encoder.svg": plot(result)},
            circumstances=("versions", "device", "gemm_gflops", "work"),
            verdict=lambda target: "{dtype}, {contender} against {peer}: {ratio} of {wanted}".format_map(target),
        )


if __name__ == "__main__":
    sys.exit(main())
