"""Floating-point operations of a vision transformer, a compressor and a language model, counted by formula.

Matrix products only, 2 for each multiply-add, attention over all pairs (a causal mask halves nothing): the convention
of ``uhd/flop_counter.py``, against which the formulas are tested. Norms, activations and softmax are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar

from uhd.settings import check_choice, unknown_name
from uhd.slicing.plan import Canvas, SlicePlan
from uhd.tables import pool_hw


@dataclass(frozen=True)
class ViTShape:
    """A pre-norm vision transformer of width D.

    Attributes:
        depth: Blocks that are run; LLaVA reads the layer before the last, so 23 of CLIP-L's 24.
        mlp: Hidden width of a block's MLP.
        prefix: Tokens that stand before a view's patches (a class token).
        compress_after: Blocks after which 2 x 2 patches become one, from 1; as in ``uhd.vision.CompressedViT``.
        compressor: ``"window"`` (LLaVA-UHD v4), ``"average"`` or ``"adaptive"`` (v3).
    """

    depth: int
    width: int
    mlp: int
    prefix: int = 0
    compress_after: tuple[int, ...] = ()
    compressor: str = "window"

    def output_hw(self, grid_hw: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the features of a view of so many patches; a ``ValueError`` where they leave a rest."""
        return _divided(grid_hw, 2 ** len(self.compress_after), "this ViT")


@dataclass(frozen=True)
class ResamplerShape:
    """A resampler of one cross-attention layer, as in LLaVA-UHD; its kinds are the classes of ``uhd.resampler``.

    Attributes:
        latents: Q, tokens of a view.
        width: D, the language model's; None takes it from the language model.
        kind: ``"perceiver"``; ``"rewrite"`` (with an FFN); ``"spatial"`` (windows); ``"pyramid"`` (windows on several
            levels, the making of which is not counted).
        levels: Of a pyramid: how many times finer each is.
    """

    latents: int = 64
    width: int | None = None
    kind: str = "perceiver"
    levels: tuple[int, ...] = (1, 2, 4)


@dataclass(frozen=True)
class MergerShape:
    """2 x 2 features become one through a two-layer MLP, ``rounds`` times: ``uhd.resampler.MergeProjector``.

    ``width``: of the tokens; None takes it from the language model.
    """

    rounds: int = 1
    width: int | None = None


@dataclass(frozen=True)
class LMShape:
    """A decoder-only language model of width D with a gated MLP.

    ``kv_width``: key-value heads * head dimension, ``width`` without grouped queries; ``vocab``: rows of the head.
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
    "siglip-so400m-v4": ViTShape(27, 1152, 4304, compress_after=(6,)),
}
LMS: dict[str, LMShape] = {
    "llama-7b": LMShape(32, 4096, 11008, 4096, 32000),
    "llama-13b": LMShape(40, 5120, 13824, 5120, 32000),
    "llama-3-8b": LMShape(32, 4096, 14336, 1024, 128256),
    "qwen2.5-7b": LMShape(28, 3584, 18944, 512, 152064),
}
RESAMPLERS: dict[str, ResamplerShape | MergerShape] = {
    "perceiver-64": ResamplerShape(64),
    "perceiver-144": ResamplerShape(144),
    "spatial-144": ResamplerShape(144, kind="spatial"),
    "rewrite-64": ResamplerShape(64, kind="rewrite"),
    "pyramid-144": ResamplerShape(144, kind="pyramid"),
    "merge-4": MergerShape(1),
    "merge-16": MergerShape(2),
}

_Shape = TypeVar("_Shape")


def named(shape: str | _Shape, known: Mapping[str, _Shape]) -> _Shape:
    """The shape of this name; a shape as it is. An unknown name is a ``ValueError``."""
    if not isinstance(shape, str):
        return shape
    if shape not in known:
        raise unknown_name("model", shape, known, f"There are {', '.join(known)}; or give its shape")
    return known[shape]


def vit_flops(patches: int, vit: ViTShape | str, *, patch_size: int = 14, channels: int = 3) -> int:
    """One view of ``patches`` patches. With n = patches + prefix:

    ``2 * patches * channels * p^2 * D + depth * (2 * n * (4 D^2 + 2 D * mlp) + 4 * n^2 * D)``; after a compressor
    (see :func:`window_flops`) a quarter of the patches.

    >>> f"{vit_flops(576, 'clip-l') / 1e9:.0f} GFLOPs"
    '366 GFLOPs'
    """
    return _vit_flops(patches, named(vit, VITS), patch_size, channels)


@lru_cache(maxsize=4096)
def _vit_flops(patches: int, vit: ViTShape, patch_size: int, channels: int) -> int:
    total = 2 * patches * channels * patch_size**2 * vit.width
    for block in range(1, vit.depth + 1):
        n = patches + vit.prefix
        total += 2 * n * (4 * vit.width**2 + 2 * vit.width * vit.mlp) + 4 * n * n * vit.width
        if block in vit.compress_after:
            total += window_flops(patches, vit)
            patches //= 4
    return total


def window_flops(patches: int, vit: ViTShape | str) -> int:
    """One compressor inside a ViT, on n patches of one view.

    ``"window"``: ``8 n D^2 + 16 n D`` (attention inside windows) ``+ 10 n D * mlp``; ``"adaptive"``: ``6 n D^2``;
    ``"average"``: none.
    """
    vit = named(vit, VITS)
    d, n = vit.width, patches
    known = {"window": 8 * n * d * d + 16 * n * d + 10 * n * d * vit.mlp, "adaptive": 6 * n * d * d, "average": 0}
    check_choice("compressor", vit.compressor, known)
    return known[vit.compressor]


def resampler_flops(patches: int, vision_width: int, resampler: ResamplerShape | str, *, width: int) -> int:
    """One view of ``patches`` features, n, through Q latents of width D, all of which see all features.

    ``2 n D_v D`` (features to width D) ``+ 4 n D^2`` (keys, values) ``+ 2 Q D^2`` (queries) ``+ 4 Q n D`` (attention)
    ``+ 4 Q D^2`` (output and last projection); the rewrite has ``8 Q D^2`` (FFN) in place of the last projection.

    Raises:
        ValueError: The resampler works on windows: see :func:`spatial_flops` and :func:`pyramid_flops`.

    >>> f"{resampler_flops(576, 1024, 'perceiver-64', width=4096) / 1e9:.0f} GFLOPs"
    '51 GFLOPs'
    """
    resampler = named(resampler, RESAMPLERS)
    check_choice("kind", resampler.kind, ("perceiver", "rewrite"))
    after = 4 if resampler.kind == "perceiver" else 10
    q, d, n = resampler.latents, resampler.width or width, patches
    return 2 * n * vision_width * d + 4 * n * d * d + 2 * q * d * d + 4 * q * n * d + after * q * d * d


def spatial_flops(grid_hw: tuple[int, int], vision_width: int, resampler: ResamplerShape | str, *, width: int) -> int:
    """One view of n = rows * columns features through Q latents, each of which sees m pooled keys of its window.

    As :func:`resampler_flops` with ``4 Q m D`` for attention, and the pooling of keys and values (:func:`pool_flops`).
    """
    resampler = named(resampler, RESAMPLERS)
    q, d, n = resampler.latents, resampler.width or width, math.prod(grid_hw)
    pooled = 2 * pool_flops(grid_hw, math.isqrt(q), d) + 4 * q * math.prod(pool_hw(grid_hw)) * d
    return 2 * n * vision_width * d + 4 * n * d * d + 6 * q * d * d + pooled


def pyramid_flops(grid_hw: tuple[int, int], vision_width: int, resampler: ResamplerShape | str, *, width: int) -> int:
    """One view through four sets of Q latents, each of which sees its window on every level of a pyramid.

    For each level of n features ``2 n D_v D``, the pooling of keys and values, and with m pooled keys ``4 Q m D^2``
    (keys, values) ``+ 16 Q m D`` (attention); then ``26 Q D^2`` (queries, outputs, joining, last projection).
    """
    resampler = named(resampler, RESAMPLERS)
    q, d, m = resampler.latents, resampler.width or width, math.prod(pool_hw(grid_hw))
    total = 26 * q * d * d
    for scale in resampler.levels:
        level_hw = (grid_hw[0] * scale, grid_hw[1] * scale)
        total += 2 * math.prod(level_hw) * vision_width * d + 2 * pool_flops(level_hw, math.isqrt(q), d)
        total += 4 * q * m * d * d + 16 * q * m * d
    return total


def pool_flops(grid_hw: tuple[int, int], side: int, width: int) -> int:
    """Pooling a map to g x g windows of a x b keys, a matrix along each side: ``2 g a h w D + 2 (g a) (g b) w D``.

    RoI alignment by gathering needs fewer; this is what ``uhd.resampler`` does.
    """
    (h, w), (a, b) = grid_hw, pool_hw(grid_hw)
    return 2 * side * a * h * w * width + 2 * side * a * side * b * w * width


def merge_flops(grid_hw: tuple[int, int], vision_width: int, merger: MergerShape | str, *, width: int) -> int:
    """2 x 2 features become one, ``2 n / 4 * (16 D_v^2 + 4 D_v D_out)`` a round; only the last has another width."""
    merger = named(merger, RESAMPLERS)
    _divided(grid_hw, 2**merger.rounds, "this merger")
    total, n = 0, math.prod(grid_hw)
    for last in range(1, merger.rounds + 1):
        out, n = (merger.width or width) if last == merger.rounds else vision_width, n // 4
        total += 2 * n * (16 * vision_width**2 + 4 * vision_width * out)
    return total


def compressor_flops(
    grid_hw: tuple[int, int], vision_width: int, compressor: ResamplerShape | MergerShape | str, *, width: int
) -> int:
    """One view of (rows, columns) features through any of the above."""
    compressor = named(compressor, RESAMPLERS)
    if isinstance(compressor, MergerShape):
        return merge_flops(grid_hw, vision_width, compressor, width=width)
    windows = {"spatial": spatial_flops, "pyramid": pyramid_flops}
    if compressor.kind in windows:
        return windows[compressor.kind](grid_hw, vision_width, compressor, width=width)
    return resampler_flops(math.prod(grid_hw), vision_width, compressor, width=width)


def _divided(grid_hw: tuple[int, int], factor: int, what: str) -> tuple[int, int]:
    rows, columns = grid_hw
    if rows % factor or columns % factor:
        raise ValueError(
            f"{what} joins {factor} x {factor} features, a view has {(rows, columns)}: plan with a multiple of "
            f"merge={factor}"
        )
    return rows // factor, columns // factor


def mlp_flops(features: int, vision_width: int, *, width: int) -> int:
    """LLaVA-1.5's projector, two layers: ``2 n (D_v D + D^2)``.

    >>> f"{mlp_flops(576, 1024, width=4096) / 1e9:.0f} GFLOPs"
    '24 GFLOPs'
    """
    return 2 * features * (vision_width * width + width * width)


def lm_flops(tokens: int, lm: LMShape | str, *, head: bool = False) -> int:
    """Prefill of T positions; ``head`` adds the output head on all of them.

    ``depth * (2 T (2 D^2 + 2 D * kv_width + 3 D * mlp) + 4 T^2 D) + [2 T D * vocab]``

    >>> f"{lm_flops(576, 'llama-7b') / 1e12:.1f} TFLOPs"
    '7.6 TFLOPs'
    """
    lm = named(lm, LMS)
    block = 2 * tokens * (2 * lm.width**2 + 2 * lm.width * lm.kv_width + 3 * lm.width * lm.mlp)
    block += 4 * tokens * tokens * lm.width
    return lm.depth * block + (2 * tokens * lm.width * lm.vocab if head else 0)


@dataclass(frozen=True)
class Flops:
    """FLOPs of one image, by part; ``total`` is their sum."""

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
    resampler: ResamplerShape | MergerShape | str | None = None,
    lm: LMShape | str = "llama-13b",
    head: bool = False,
) -> Flops:
    """What a plan costs a given system: every view through the ViT and the compressor, its tokens through the LM.

    Attention stays inside a view. ``resampler=None`` is LLaVA-1.5's two-layer MLP over the plan's visual tokens. The
    LM reads ``plan.num_tokens`` positions, whatever the compressor. A perceiver has the latents of a canvas with
    ``latents_hw``.

    Raises:
        ValueError: No such model; a view that the ViT or the merger cannot halve as often as it does.

    >>> from uhd.slicing import plan
    >>> f"{plan_flops(plan((1008, 672)), resampler='perceiver-64').total / 1e12:.1f} TFLOPs"
    '14.8 TFLOPs'
    """
    vit, lm = named(vit, VITS), named(lm, LMS)
    encoder = compressor = 0
    for canvas in plan.canvases:
        count = len(canvas.tiles)
        grid_hw = (canvas.view_hw[0] // plan.patch_size, canvas.view_hw[1] // plan.patch_size)
        features_hw = vit.output_hw(grid_hw)
        encoder += count * _vit_flops(grid_hw[0] * grid_hw[1], vit, plan.patch_size, 3)
        if resampler is not None:
            own = _fitted(named(resampler, RESAMPLERS), canvas)
            compressor += count * compressor_flops(features_hw, vit.width, own, width=lm.width)
    if resampler is None:
        compressor = mlp_flops(plan.num_visual_tokens, vit.width, width=lm.width)
    return Flops(encoder, compressor, lm_flops(plan.num_tokens, lm, head=head))


def _fitted(resampler: ResamplerShape | MergerShape, canvas: Canvas) -> ResamplerShape | MergerShape:
    """A perceiver with as many latents as a canvas asks for."""
    if canvas.latents_hw is None or not isinstance(resampler, ResamplerShape) or resampler.kind != "perceiver":
        return resampler
    return replace(resampler, latents=canvas.tokens_per_view)
