"""Floating-point operations of a vision transformer, a perceiver resampler and a language model, counted by formula.

Matrix products only, 2 for each multiply-add, attention over all pairs (a causal mask halves nothing): the convention
of ``torch.utils.flop_counter``, against which the formulas are tested. Norms, activations and softmax are left out.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from uhd.slicing.plan import SlicePlan


@dataclass(frozen=True)
class ViTShape:
    """A pre-norm vision transformer.

    Attributes:
        depth: Blocks that are run; LLaVA reads the layer before the last, so 23 of CLIP-L's 24.
        width: D.
        mlp: Hidden width of a block's MLP.
        prefix: Tokens that stand before a view's patches (a class token).
    """

    depth: int
    width: int
    mlp: int
    prefix: int = 0


@dataclass(frozen=True)
class ResamplerShape:
    """A perceiver resampler of one cross-attention layer, as in LLaVA-UHD.

    Attributes:
        latents: Q, tokens of a view.
        width: D, the language model's; None takes it from the language model.
    """

    latents: int = 64
    width: int | None = None


@dataclass(frozen=True)
class LMShape:
    """A decoder-only language model with a gated MLP.

    Attributes:
        depth: Blocks.
        width: D.
        mlp: Hidden width of a block's MLP.
        kv_width: Key-value heads * head dimension; equal to ``width`` without grouped queries.
        vocab: Rows of the output head.
    """

    depth: int
    width: int
    mlp: int
    kv_width: int
    vocab: int


VITS: dict[str, ViTShape] = {
    "clip-l": ViTShape(23, 1024, 4096, prefix=1),
    "siglip-so400m": ViTShape(27, 1152, 4304),
    "dinov2-l": ViTShape(24, 1024, 4096, prefix=1),
    "siglip-b": ViTShape(12, 768, 3072),
}
LMS: dict[str, LMShape] = {
    "llama-7b": LMShape(32, 4096, 11008, 4096, 32000),
    "llama-13b": LMShape(40, 5120, 13824, 5120, 32000),
    "llama-3-8b": LMShape(32, 4096, 14336, 1024, 128256),
    "qwen2.5-7b": LMShape(28, 3584, 18944, 512, 152064),
}
RESAMPLERS: dict[str, ResamplerShape] = {"perceiver-64": ResamplerShape(64), "perceiver-144": ResamplerShape(144)}

_Shape = TypeVar("_Shape")


def named(shape: str | _Shape, known: Mapping[str, _Shape]) -> _Shape:
    """The shape of this name; a shape as it is.

    Raises:
        ValueError: No such name; the message lists those there are.
    """
    if not isinstance(shape, str):
        return shape
    if shape not in known:
        near = difflib.get_close_matches(shape, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"no model named {shape!r}: {hint}There are {', '.join(known)}; or give its shape")
    return known[shape]


def vit_flops(patches: int, vit: ViTShape | str, *, patch_size: int = 14, channels: int = 3) -> int:
    """One view of ``patches`` patches. With n = patches + prefix:

    ``2 * patches * channels * p^2 * D + depth * (2 * n * (4 D^2 + 2 D * mlp) + 4 * n^2 * D)``
    """
    vit = named(vit, VITS)
    n = patches + vit.prefix
    embed = 2 * patches * channels * patch_size**2 * vit.width
    block = 2 * n * (4 * vit.width**2 + 2 * vit.width * vit.mlp) + 4 * n * n * vit.width
    return embed + vit.depth * block


def resampler_flops(patches: int, vision_width: int, resampler: ResamplerShape | str, *, width: int) -> int:
    """One view of ``patches`` features, n, through Q latents of width D.

    ``2 n D_v D`` (features to width D) ``+ 4 n D^2`` (keys, values) ``+ 2 Q D^2`` (queries) ``+ 4 Q n D`` (attention)
    ``+ 4 Q D^2`` (output and last projection).
    """
    resampler = named(resampler, RESAMPLERS)
    q, d, n = resampler.latents, resampler.width or width, patches
    return 2 * n * vision_width * d + 4 * n * d * d + 2 * q * d * d + 4 * q * n * d + 4 * q * d * d


def mlp_flops(features: int, vision_width: int, *, width: int) -> int:
    """LLaVA-1.5's projector, two layers: ``2 n (D_v D + D^2)``."""
    return 2 * features * (vision_width * width + width * width)


def lm_flops(tokens: int, lm: LMShape | str, *, head: bool = False) -> int:
    """Prefill of T positions; ``head`` adds the output head on all of them.

    ``depth * (2 T (2 D^2 + 2 D * kv_width + 3 D * mlp) + 4 T^2 D) + [2 T D * vocab]``
    """
    lm = named(lm, LMS)
    block = 2 * tokens * (2 * lm.width**2 + 2 * lm.width * lm.kv_width + 3 * lm.width * lm.mlp)
    block += 4 * tokens * tokens * lm.width
    return lm.depth * block + (2 * tokens * lm.width * lm.vocab if head else 0)


@dataclass(frozen=True)
class Flops:
    """Of one image, by part; ``total`` is their sum."""

    encoder: int
    compressor: int
    lm: int

    @property
    def total(self) -> int:
        return self.encoder + self.compressor + self.lm


def plan_flops(
    plan: SlicePlan,
    *,
    vit: ViTShape | str = "clip-l",
    resampler: ResamplerShape | str | None = None,
    lm: LMShape | str = "llama-13b",
    head: bool = False,
) -> Flops:
    """What a plan costs a given system: every view through the ViT and the compressor, its tokens through the LM.

    Attention stays inside a view. ``resampler=None`` is LLaVA-1.5's two-layer MLP over the plan's visual tokens. The
    LM reads ``plan.num_tokens`` positions, whatever the compressor.
    """
    vit, lm = named(vit, VITS), named(lm, LMS)
    encoder = compressor = 0
    for canvas in plan.canvases:
        count = len(canvas.tiles)
        patches = (canvas.view_hw[0] // plan.patch_size) * (canvas.view_hw[1] // plan.patch_size)
        encoder += count * vit_flops(patches, vit, patch_size=plan.patch_size)
        if resampler is not None:
            compressor += count * resampler_flops(patches, vit.width, resampler, width=lm.width)
    if resampler is None:
        compressor = mlp_flops(plan.num_visual_tokens, vit.width, width=lm.width)
    return Flops(encoder, compressor, lm_flops(plan.num_tokens, lm, head=head))
