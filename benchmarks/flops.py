"""What every member of the family costs on the same images: encoder, compressor and language model, in FLOPs.

    python benchmarks/flops.py --out benchmarks/results

Counted by the formulas of ``uhd.slicing.flops`` (2 for each multiply-add, matrix products only), which are first held
against ``torch.utils.flop_counter`` on models of the real sizes, whose tensors have shapes but no memory. Nothing is
timed and no image is opened; where a formula is off, nothing is reported and the exit status is 1. All members are
given the same language model, so that rows differ by what they do to the image.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import uhd
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

IMAGES = ((336, 336), (1008, 672), (1080, 1920), (300, 1500), (3000, 4000))
"""(height, width), px."""

CHECKED = (1008, 672)
"""The image on which formulas and counter are compared."""

LM, HEADS = "qwen2.5-7b", 28
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
    from torch._subclasses.fake_tensor import FakeTensorMode

    found: dict[str, dict[str, list[int]]] = {}
    by_tokens: dict[int, int] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        lm = _language_model()
        for name, member in MEMBERS.items():
            plan = uhd.plan(CHECKED, member.rule)
            tokens = plan.num_tokens
            counts = {part: _counted(forward) for part, forward in _forwards(plan, member).items()}
            if tokens not in by_tokens:
                by_tokens[tokens] = _counted(lambda tokens=tokens: lm(tokens))
            counts["lm"] = by_tokens[tokens]
            found[name] = {part: [flops, counts[part]] for part, flops in cost(plan, member).items()}
    wrong = {
        f"{name}, {part}": pair for name, parts in found.items() for part, pair in parts.items() if pair[0] != pair[1]
    }
    if wrong:
        raise RuntimeError(f"formulas differ from torch's counter, [formula, counted]: {wrong}")
    return found


def _forwards(plan: SlicePlan, member: Member) -> dict[str, Callable[[], object]]:
    """The forward passes of a member's encoder and compressor, at their real sizes."""
    import torch

    grids = [view.patches_hw for view in plan.views]
    vit = _hollow(lambda: _vit(member.vit))
    patches = torch.empty(sum(map(math.prod, grids)), vit.config.patch_dim)
    features = vit.output_grids(grids)
    packed = torch.empty(sum(map(math.prod, features)), member.vit.width)
    return {"encoder": lambda: vit(patches, grids), "compressor": _compressor(member, packed, features)}


def _language_model() -> Callable[[int], object]:
    """The trunk on so many positions."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

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
    trunk = _hollow(lambda: Qwen2ForCausalLM(config)).model
    return lambda tokens: trunk(torch.zeros(1, tokens, dtype=torch.long), use_cache=False)


def _hollow(make: Callable[[], Any]) -> Any:
    """A module in eval mode whose tensors are made anew, without values: fake ones where a fake mode is on."""
    import torch

    with torch.device("meta"):
        module = make().eval()
    for part in module.modules():
        for name, tensor in part._parameters.items():
            if tensor is not None:
                part._parameters[name] = torch.nn.Parameter(torch.empty(tensor.shape), requires_grad=False)
        for name, tensor in part._buffers.items():
            if tensor is not None:
                part._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
    return module


def _vit(shape: ViTShape) -> Any:
    from uhd.vision import CompressedViT, CompressedViTConfig, ViT, ViTConfig

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
        return ViT(ViTConfig(**settings))
    return CompressedViT(CompressedViTConfig(**settings, compress_after=shape.compress_after))


def _compressor(member: Member, features: Any, grids: Any) -> Callable[[], object]:
    from uhd import resampler as parts

    width, vision_width, shape = LMS[LM].width, member.vit.width, member.compressor
    if shape is None:
        module = _hollow(lambda: parts.MLPProjector(vision_width, width))
    elif isinstance(shape, MergerShape):
        module = _hollow(lambda: parts.MergeProjector(vision_width, width, rounds=shape.rounds))
    else:
        sizes = {"width": width, "vision_width": vision_width, "num_heads": HEADS, "num_latents": shape.latents}
        if shape.kind in ("perceiver", "rewrite"):
            return _attention_of_torch(shape, sizes, features, grids)
        make = {
            "spatial": lambda: parts.SpatialResampler(parts.SpatialConfig(**sizes)),
            "pyramid": lambda: parts.PyramidResampler(
                parts.PyramidConfig(**sizes, levels=shape.levels, upsample=True)
            ),
        }[shape.kind]
        module = _hollow(make)
    # one view at a time, as released: views of one call share the projection of the latents here
    return lambda: [module(view, [grid]) for view, grid in zip(_views(features, grids), grids, strict=True)]


def _views(features: Any, grids: Any) -> Any:
    return features.split([h * w for h, w in grids])


def _attention_of_torch(shape: ResamplerShape, sizes: dict, features: Any, grids: Any) -> Callable[[], object]:
    """The same layers around ``torch.nn.MultiheadAttention``: the library's own kernel is not what is counted."""
    import torch
    from torch import nn

    width, hidden = sizes["width"], 2 * sizes["width"]
    into = _hollow(lambda: nn.Linear(sizes["vision_width"], width, bias=False))
    attention = _hollow(lambda: nn.MultiheadAttention(width, sizes["num_heads"], batch_first=True))
    if shape.kind == "rewrite":
        last = _hollow(lambda: nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)))
    else:
        last = _hollow(lambda: nn.Linear(width, width, bias=False))
    queries = torch.empty(1, shape.latents, width)

    def forward() -> None:
        for view in _views(features, grids):
            keys = into(view)[None]
            last(attention(queries, keys, keys, need_weights=False)[0])

    return forward


def _counted(forward: Callable[[], object]) -> int:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward()
    return counter.get_total_flops()


def run() -> dict[str, Any]:
    """Everything that is written, as plain JSON types."""
    import torch
    import transformers

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
        "validation": {"about": f"[formula, torch.utils.flop_counter] at {CHECKED} (height, width)", **checked},
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
