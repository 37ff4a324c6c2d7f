"""What every member of the family costs on the same images: encoder, compressor and language model, in FLOPs.

    python benchmarks/flops.py --out benchmarks/results

Counted by the formulas of ``uhd.slicing.flops`` (2 for each multiply-add, matrix products only), which are first held
against the products that models of the real sizes multiply (``uhd/flop_counter.py``); their tensors have shapes but no
memory. Nothing is timed and no image is opened; where a formula is off, nothing is reported and the exit status is 1.
All members are given the same language model, so that rows differ by what they do to the image.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2Model

import uhd
from uhd import resampler as parts
from uhd.flop_counter import count_flops
from uhd.slicing import SlicePlan, SlicingConfig
from uhd.slicing.flops import (
    LMS,
    RESAMPLERS,
    MergerShape,
    ResamplerShape,
    ViTShape,
    compressor_flops,
    lm_flops,
    mlp_flops,
    vit_flops,
)
from uhd.vision import CompressedViT, CompressedViTConfig, ViT, ViTConfig

IMAGES = ((336, 336), (1008, 672), (1080, 1920), (300, 1500), (3000, 4000))
"""(height, width), px."""

CHECKED = (1008, 672)
"""The image on which formulas and counter are compared."""

LM, HEADS = "qwen2.5-7b", 28
Grids = Sequence[tuple[int, int]]
CLIP = ViTShape(23, 1024, 4096, prefix=1)
SIGLIP = ViTShape(27, 1152, 4304)
SIGLIP_26 = replace(SIGLIP, depth=26)
PERCEIVER_96 = ResamplerShape(96)


@dataclass(frozen=True)
class Member:
    """A system: how it cuts, what it encodes and compresses with. ``compressor=None`` is LLaVA's MLP on features."""

    rule: SlicingConfig | str
    vit: ViTShape
    compressor: ResamplerShape | MergerShape | None
    note: str


def _adaptive(schema: str, tokens: int | None) -> SlicingConfig:
    """The slicing that goes with a schema, its separators counted."""
    return uhd.SpatialSchema.preset(schema).slicing_config().replace(tokens_per_view=tokens)


def _named(name: str) -> ResamplerShape | MergerShape:
    return RESAMPLERS[name]


MEMBERS: dict[str, Member] = {
    "LLaVA-1.5": Member("llava-1.5", CLIP, None, "one padded view, MLP"),
    "LLaVA-NeXT": Member("llava-next", CLIP, None, "AnyRes, MLP"),
    "LLaVA-OneVision": Member("llava-onevision", SIGLIP_26, None, "AnyRes bounded to 9 tiles, MLP"),
    "LLaVA-UHD, March 2024": Member(_adaptive("llava-uhd-paper", 64), CLIP, _named("perceiver-64"), "perceiver"),
    "LLaVA-UHD, ECCV": Member(_adaptive("llava-uhd", 144), CLIP, _named("spatial-144"), "windows"),
    "LLaVA-UHD slices, MLP": Member(_adaptive("llava-uhd", None), CLIP, None, "nothing compressed, for comparison"),
    "LLaVA-UHD, rewrite": Member(_adaptive("llava-uhd-better", 64), CLIP, _named("rewrite-64"), "perceiver and FFN"),
    "LLaVA-UHD v2": Member(_adaptive("llava-uhd", 144), CLIP, _named("pyramid-144"), "upsampler not counted"),
    "MiniCPM-V 2.0": Member(_adaptive("minicpm-v-2.0", 64), SIGLIP_26, _named("perceiver-64"), "perceiver"),
    "MiniCPM-V 2.5": Member(_adaptive("minicpm-v-2.5", 96), SIGLIP, PERCEIVER_96, "perceiver"),
    "MiniCPM-V 2.6": Member(_adaptive("minicpm-v-2.6", 64), SIGLIP, _named("perceiver-64"), "perceiver"),
    "MiniCPM-V 4.6": Member(
        "minicpm-v-4.6", replace(SIGLIP, compress_after=(7,)), _named("merge-4"), "compressor after 7 blocks, merger"
    ),
    "MiniCPM-V 4.6, 4x": Member("minicpm-v-4.6-4x", SIGLIP, _named("merge-4"), "merger alone"),
    "LLaVA-UHD v4": Member(
        "minicpm-v-4.6", replace(SIGLIP, compress_after=(6,)), _named("merge-4"), "compressor after 6 blocks, merger"
    ),
    "v4's tokens, merged at the end": Member(
        "minicpm-v-4.6", SIGLIP, _named("merge-16"), "two rounds behind the ViT, for comparison"
    ),
}


def cost(plan: SlicePlan, member: Member) -> dict[str, int]:
    """FLOPs of one image by part."""
    width, grids = LMS[LM].width, [view.patches_hw for view in plan.views]
    features = [member.vit.output_hw(grid) for grid in grids]
    if member.compressor is None:
        compressor = mlp_flops(sum(map(math.prod, features)), member.vit.width, width=width)
    else:
        compressor = sum(compressor_flops(grid, member.vit.width, member.compressor, width=width) for grid in features)
    return {
        "encoder": sum(vit_flops(math.prod(grid), member.vit, patch_size=plan.patch_size) for grid in grids),
        "compressor": compressor,
        "lm": lm_flops(plan.num_tokens, LM),
    }


def validate() -> dict[str, dict[str, list[int]]]:
    """[formula, counted] of every part of every member on one image.

    Raises:
        RuntimeError: Two numbers differ; the message says which.
    """
    found: dict[str, dict[str, list[int]]] = {}
    with torch.device("meta"):
        lm = _language_model()
        for name, member in MEMBERS.items():
            plan = uhd.plan(CHECKED, member.rule)
            counts = {part: count_flops(forward) for part, forward in _forwards(plan, member).items()}
            counts["lm"] = lm(plan.num_tokens)
            found[name] = {part: [flops, counts[part]] for part, flops in cost(plan, member).items()}
    wrong = {
        f"{name}, {part}": pair for name, parts in found.items() for part, pair in parts.items() if pair[0] != pair[1]
    }
    if wrong:
        raise RuntimeError(f"formulas differ from what is multiplied, [formula, counted]: {wrong}")
    return found


def _forwards(plan: SlicePlan, member: Member) -> dict[str, Callable[[], object]]:
    """The forward passes of a member's encoder and compressor, at their real sizes."""
    grids = [view.patches_hw for view in plan.views]
    vit = _vit(member.vit)
    patches = torch.empty(sum(map(math.prod, grids)), vit.config.patch_dim)
    features = vit.output_grids(grids)
    packed = torch.empty(sum(map(math.prod, features)), member.vit.width)
    return {"encoder": lambda: vit(patches, grids), "compressor": _compressor(member, packed, features)}


def _language_model() -> Callable[[int], int]:
    """What the trunk multiplies on so many positions."""
    shape = LMS[LM]
    config = Qwen2Config(
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.depth,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS * shape.kv_width // shape.width,
        vocab_size=shape.vocab,
        attn_implementation="eager",
    )
    trunk = Qwen2Model(config).eval()

    @functools.cache
    def count(tokens: int) -> int:
        ids = torch.zeros(1, tokens, dtype=torch.long)
        mask = torch.ones(1, 1, tokens, tokens)  # given, since the model would look at values to make one
        # rotary angles are products in some releases of transformers and not in others; the formula leaves them out
        angles = count_flops(lambda: trunk.rotary_emb(mask, torch.arange(tokens)[None]))
        return count_flops(lambda: trunk(ids, attention_mask=mask, use_cache=False)) - angles

    return count


def _vit(shape: ViTShape) -> ViT | CompressedViT:
    settings = {
        "patch_size": 14,
        "width": shape.width,
        "depth": shape.depth,
        "heads": 16,
        "mlp_width": shape.mlp,
        "class_token": bool(shape.prefix),
        "position_grid_hw": (24, 24),
    }
    if not shape.compress_after:
        return ViT(ViTConfig(**settings)).eval()
    return CompressedViT(CompressedViTConfig(**settings, compress_after=shape.compress_after)).eval()


def _compressor(member: Member, features: Tensor, grids: Grids) -> Callable[[], object]:
    width, vision_width, shape = LMS[LM].width, member.vit.width, member.compressor
    if shape is None:
        module = parts.MLPProjector(vision_width, width)
    elif isinstance(shape, MergerShape):
        module = parts.MergeProjector(vision_width, width, rounds=shape.rounds)
    else:
        sizes = {"width": width, "vision_width": vision_width, "num_heads": HEADS, "num_latents": shape.latents}
        if shape.kind in ("perceiver", "rewrite"):
            return _attention_of_torch(shape, sizes, features, grids)
        if shape.kind == "spatial":
            module = parts.SpatialResampler(parts.SpatialConfig(**sizes))
        else:
            module = parts.PyramidResampler(parts.PyramidConfig(**sizes, levels=shape.levels, upsample=True))
    module.eval().to("meta")  # some tables are made from arrays
    # one view at a time, as released: views of one call share the projection of the latents here
    return lambda: [module(view, [grid]) for view, grid in zip(_views(features, grids), grids, strict=True)]


def _views(features: Tensor, grids: Grids) -> Sequence[Tensor]:
    return features.split([h * w for h, w in grids])


def _attention_of_torch(
    shape: ResamplerShape, sizes: dict[str, int], features: Tensor, grids: Grids
) -> Callable[[], object]:
    """The same layers around ``torch.nn.MultiheadAttention``: the library's own kernel is not what is counted."""
    width, hidden = sizes["width"], 2 * sizes["width"]
    into = nn.Linear(sizes["vision_width"], width, bias=False)
    attention = nn.MultiheadAttention(width, sizes["num_heads"], batch_first=True)
    if shape.kind == "rewrite":
        last = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
    else:
        last = nn.Linear(width, width, bias=False)
    queries = torch.empty(1, shape.latents, width)

    def forward() -> None:
        for view in _views(features, grids):
            keys = into(view)[None]
            last(attention(queries, keys, keys, need_weights=False)[0])

    return forward


def run() -> dict[str, Any]:
    """Everything that is written, as plain JSON types."""
    checked = validate()
    rows = []
    for name, member in MEMBERS.items():
        for image_hw in IMAGES:
            plan = uhd.plan(image_hw, member.rule)
            parts = cost(plan, member)
            rows.append(
                {
                    "member": name,
                    "image_hw": image_hw,
                    "views": plan.num_views,
                    "patches": plan.num_patches,
                    "tokens": plan.num_tokens,
                    **{f"{part}_gflops": round(flops / 1e9, 1) for part, flops in parts.items()},
                    "total_gflops": round(sum(parts.values()) / 1e9, 1),
                }
            )
    return {
        "about": f"FLOPs of one image, 2 for each multiply-add; the language model is {LM} for all, on the image's "
        "positions alone, without its output head",
        "versions": {
            "uhd": uhd.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "device": "none: shapes only, nothing is timed",
        "members": {name: member.note for name, member in MEMBERS.items()},
        "validation": {"about": f"[formula, counted] at {CHECKED} (height, width)", **checked},
        "rows": rows,
    }


def table(result: dict[str, Any], image_hw: tuple[int, int] = CHECKED) -> str:
    """One image's rows, as Markdown."""
    lines = [
        f"| {image_hw[1]} x {image_hw[0]} px | views | positions | encoder | compressor | LM | total, GFLOPs |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        if tuple(row["image_hw"]) == image_hw:
            parts = " | ".join(f"{row[f'{part}_gflops']:.0f}" for part in ("encoder", "compressor", "lm", "total"))
            lines.append(f"| {row['member']} | {row['views']} | {row['tokens']} | {parts} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Write ``flops.json`` and print a table for every image; 1 where a formula is off."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    try:
        result = run()
    except RuntimeError as problem:
        print(f"nothing is reported: {problem}", file=sys.stderr)
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "flops.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(", ".join(f"{key} {value}" for key, value in result["versions"].items()))
    print(result["about"])
    for image_hw in IMAGES:
        print(f"\n{table(result, image_hw)}")
    print(f"wrote {args.out / 'flops.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
