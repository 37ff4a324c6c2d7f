"""Rules that keep the whole image in one view at (nearly) its own size and aspect."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from uhd.slicing.plan import SlicePlan
from uhd.slicing.strategies.base import BLACK, Size, StrategyConfig, by_name, ceil_div, rule_of, single
from uhd.slicing.strategies.selectors import smart_resize


def _view(image_hw: Size, config: StrategyConfig, size_hw: Size, unit: int, **canvas: Any) -> SlicePlan:
    """One view of this size, a token for every ``unit`` x ``unit`` px."""
    tokens = (size_hw[0] // unit) * (size_hw[1] // unit)
    return config.finish(image_hw, (single("overview", size_hw, tokens, **canvas),))


@dataclass(frozen=True)
class SmartResizeConfig(StrategyConfig):
    """Qwen's native resolution and its descendants.

    Attributes:
        min_pixels, max_pixels: Range of the view's pixels.
        frames: An image counts as this many frames against the range.
        enlarge: Before anything else, sides below ``patch_size * merge`` are enlarged: ``"both"`` by one factor,
            truncated, ``"each"`` in turn, rounded, or ``"none"``.
    """

    merge: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    frames: int = 1
    enlarge: str = "none"

    choices: ClassVar = {"enlarge": ("none", "both", "each")}


@rule_of(SmartResizeConfig)
def native_smart_resize(image_hw: Size, config: SmartResizeConfig) -> SlicePlan:
    """Round each side to a multiple of patch * merge, then scale into a range of pixels.

    Source: transformers, models/qwen2_vl/image_processing_qwen2_vl.py ``smart_resize``; models/glm46v/,
    models/paddleocr_vl/, models/hunyuan_vl/, models/minimax_m3_vl/, models/ernie4_5_vl_moe/.
    Models: Qwen2-VL, Qwen2.5-VL, Qwen3-VL, GLM-4.1V to 4.6V, PaddleOCR-VL, HunYuan-VL, MiniMax-M3-VL, ERNIE-4.5-VL.
    Traps: aspects above 200 are refused; class defaults differ from checkpoints (Qwen2.5: 16384 tokens, not 1280); in
    transformers 5 ``shortest_edge`` and ``longest_edge`` are numbers of pixels.
    """
    unit = config.patch_size * config.merge
    height, width = image_hw
    if config.enlarge == "both" and min(image_hw) < unit:
        scale = max(unit / height, unit / width)
        height, width = int(height * scale), int(width * scale)
    elif config.enlarge == "each":
        if height < unit:
            height, width = unit, round((width * unit) / height)
        if width < unit:
            height, width = round((height * unit) / width), unit
    try:
        size_hw = smart_resize((height, width), unit, config.min_pixels, config.max_pixels, frames=config.frames)
    except ValueError as problem:
        raise config.refuse(image_hw, str(problem)) from None
    return _view(image_hw, config, size_hw, unit)


@dataclass(frozen=True)
class NaFlexConfig(StrategyConfig):
    """SigLIP2 NaFlex. ``max_patches``: most patches of a view."""

    patch_size: int = 16
    max_patches: int = 256
    resample: str = field(default="bilinear", kw_only=True)


@rule_of(NaFlexConfig)
def naflex(image_hw: Size, config: NaFlexConfig) -> SlicePlan:
    """The largest scale at which both sides, rounded up to patches, hold at most ``max_patches``, by bisection.

    Source: transformers, models/siglip2/image_processing_siglip2.py ``get_image_size_for_max_num_patches``.
    Models: SigLIP2 NaFlex.
    Traps: small images are enlarged; the model pads the sequence to ``max_patches``, tokens here are the patches.
    """
    low, high = 1e-5 / 10, 100.0
    while high - low >= 1e-5:
        middle = (low + high) / 2
        size_hw = _naflex_size(image_hw, middle, config.patch_size)
        if (size_hw[0] / config.patch_size) * (size_hw[1] / config.patch_size) <= config.max_patches:
            low = middle
        else:
            high = middle
    return _view(image_hw, config, _naflex_size(image_hw, low, config.patch_size), config.patch_size)


def _naflex_size(image_hw: Size, scale: float, patch: int) -> Size:
    return tuple(max(patch, math.ceil(length * scale / patch) * patch) for length in image_hw)


@dataclass(frozen=True)
class PixtralConfig(StrategyConfig):
    """Pixtral and Mistral-Small. ``longest``: longest side, px."""

    patch_size: int = 16
    longest: int = 1024
    merge: int = 1


@rule_of(PixtralConfig)
def pixtral(image_hw: Size, config: PixtralConfig) -> SlicePlan:
    """Shrink to the longest side allowed, floor, then stretch each side up to a multiple of patch * merge.

    Source: transformers, models/pixtral/image_processing_pixtral.py ``get_resize_output_image_size``.
    Models: Pixtral, Mistral-Small 3.1 and later, LightOnOCR.
    Traps: a side floored to 0 px is refused; in the text a break follows each row but the last, an end the last, so
    text tokens of w x h and h x w differ.
    """
    ratio = max(image_hw) / config.longest
    unit = config.patch_size * config.merge
    shrunk = image_hw if ratio <= 1 else tuple(math.floor(length / ratio) for length in image_hw)
    if min(shrunk) < 1:
        raise config.refuse(image_hw, f"shrunk it would be {shrunk[0]}x{shrunk[1]} px")
    return _view(image_hw, config, tuple(ceil_div(length, unit) * unit for length in shrunk), unit)


@dataclass(frozen=True)
class FuyuConfig(StrategyConfig):
    """Fuyu. ``largest_hw``: (height, width) that an image is shrunk into, px."""

    patch_size: int = 30
    largest_hw: Size = (1080, 1920)
    resample: str = field(default="bilinear", kw_only=True)


@rule_of(FuyuConfig)
def fuyu(image_hw: Size, config: FuyuConfig) -> SlicePlan:
    """Shrink into 1080 x 1920, pad right and bottom to whole patches.

    Source: transformers, models/fuyu/image_processing_fuyu.py ``resize``.
    Models: Fuyu-8B.
    Traps: the bounds do not turn with the image, a portrait page is limited to 1080 px of height; a newline follows
    every row in the text; padding has the pixel value 1 of 255; a side truncated to 0 px is refused.
    """
    content_hw = image_hw
    if image_hw[0] > config.largest_hw[0] or image_hw[1] > config.largest_hw[1]:
        scale = min(config.largest_hw[0] / image_hw[0], config.largest_hw[1] / image_hw[1])
        content_hw = (int(image_hw[0] * scale), int(image_hw[1] * scale))
    if min(content_hw) < 1:
        raise config.refuse(image_hw, f"shrunk it would be {content_hw[0]}x{content_hw[1]} px")
    size_hw = tuple(ceil_div(length, config.patch_size) * config.patch_size for length in content_hw)
    return _view(image_hw, config, size_hw, config.patch_size, content_hw=content_hw, fill=(1, 1, 1))


@dataclass(frozen=True)
class Gemma4Config(StrategyConfig):
    """Gemma 4. ``max_tokens``: most tokens of an image; ``pool``: patches pooled per side."""

    patch_size: int = 16
    max_tokens: int = 280
    pool: int = 3


@rule_of(Gemma4Config)
def gemma4(image_hw: Size, config: Gemma4Config) -> SlicePlan:
    """Scale the image, up or down, to the token budget; sides are floored to multiples of 48 px.

    Source: transformers, models/gemma4/image_processing_gemma4.py ``get_aspect_ratio_preserving_size``.
    Models: Gemma 4 (budgets of 70, 140, 280, 560 and 1120 tokens).
    Traps: a thumbnail costs as much as a photo; a side that would be 0 becomes 48 px and the other one is capped.
    """
    height, width = image_hw
    unit = config.patch_size * config.pool
    pixels = config.max_tokens * unit**2
    scale = math.sqrt(pixels / (height * width))
    rows, cols = math.floor(scale * height / unit), math.floor(scale * width / unit)
    if rows == cols == 0:
        raise config.refuse(image_hw, f"max_tokens={config.max_tokens} leaves it no patch")
    if rows == 0:
        rows, cols = 1, min(width // height, config.max_tokens)
    elif cols == 0:
        rows, cols = min(height // width, config.max_tokens), 1
    if rows * cols > config.max_tokens:
        raise config.refuse(image_hw, f"{rows}x{cols} tokens exceed max_tokens={config.max_tokens}")
    return _view(image_hw, config, (rows * unit, cols * unit), unit)


@dataclass(frozen=True)
class KimiConfig(StrategyConfig):
    """Kimi-K2.5. ``max_patches``: of an image; ``max_side``: patches per side."""

    merge: int = 2
    max_patches: int = 16384
    max_side: int = 512


@rule_of(KimiConfig)
def kimi(image_hw: Size, config: KimiConfig) -> SlicePlan:
    """Shrink within bounds on patches in all and per side, then pad right and bottom to multiples of 28 px.

    Source: transformers, models/kimi_k25/image_processing_kimi_k25.py ``navit_resize``.
    Models: Kimi-K2.5, Kimi-VL (MoonViT).
    Traps: the padding comes after the bound, so an image may have 4 % more patches than ``max_patches``.
    """
    height, width = image_hw
    patch, side = config.patch_size, config.max_side * config.patch_size
    patches = max(1.0, height // patch) * max(1.0, width // patch)
    scale = min(1.0, math.sqrt(config.max_patches / patches), side / height, side / width)
    content_hw = tuple(min(max(1, int(length * scale)), side) for length in image_hw)
    unit = patch * config.merge
    size_hw = tuple(ceil_div(length, unit) * unit for length in content_hw)
    return _view(image_hw, config, size_hw, unit, content_hw=content_hw, fill=BLACK)


@dataclass(frozen=True)
class NemotronConfig(StrategyConfig):
    """Nemotron-H-Omni. ``min_patches``, ``max_patches``: range of a view."""

    patch_size: int = 16
    merge: int = 2
    min_patches: int = 1024
    max_patches: int = 13312


@rule_of(NemotronConfig)
def nemotron(image_hw: Size, config: NemotronConfig) -> SlicePlan:
    """The image's own patch grid, scaled into a range of patches, its sides made multiples of ``merge``.

    Source: transformers, models/nemotron_h_omni/image_processing_nemotron_h_omni.py ``get_patch_grid_size``.
    Models: Nemotron-H-Omni.
    Traps: sides are round(x / 16 + 0.5), half to even: 336 px give 22 patches, 320 px give 20; tokens are not
    monotonic in size; an image whose grid is scaled to 0 rows is refused.
    """
    rows, cols = (round(length / config.patch_size + 0.5) for length in image_hw)
    scale = min(math.sqrt(config.max_patches / (rows * cols)), 1.0)
    rows, cols = math.floor(scale * rows), math.floor(scale * cols)
    if min(rows, cols) < 1:
        raise config.refuse(image_hw, f"its grid would be {rows}x{cols} patches")
    if config.max_patches > config.min_patches and rows * cols < config.min_patches:
        scale = math.sqrt(config.min_patches / (rows * cols))
        rows, cols = math.ceil(scale * rows), math.ceil(scale * cols)
    rows = _mergeable(rows, cols, config)
    cols = _mergeable(cols, rows, config)
    size_hw = (rows * config.patch_size, cols * config.patch_size)
    return _view(image_hw, config, size_hw, config.patch_size * config.merge)


def _mergeable(count: int, other: int, config: NemotronConfig) -> int:
    """``count`` raised to a multiple of ``merge``, or lowered where that would exceed the cap."""
    rest = count % config.merge
    if not rest:
        return count
    raised = count + config.merge - rest
    return raised if raised * other <= config.max_patches else max(config.merge, count - rest)


@dataclass(frozen=True)
class MuseConfig(StrategyConfig):
    """Muse-Glimmer. ``max_tokens``: most tokens of an image."""

    merge: int = 2
    max_tokens: int = 4096
    resample: str = field(default="lanczos", kw_only=True)


@rule_of(MuseConfig)
def muse(image_hw: Size, config: MuseConfig) -> SlicePlan:
    """Of the four grids around the ideal one (floor and ceiling of each side), the closest in aspect under the cap.

    Source: transformers, models/muse_glimmer/image_processing_muse_glimmer.py ``smart_resize``.
    Models: Muse-Glimmer.
    Traps: grids of equal aspect tie, as for every square; the release then takes whichever its set yields first.
    """
    height, width = image_hw
    unit = config.patch_size * config.merge
    ideal_rows, ideal_cols = height / unit, width / unit
    if ideal_rows * ideal_cols > config.max_tokens:
        aspect = ideal_cols / ideal_rows
        ideal_rows = (config.max_tokens / aspect) ** 0.5
        ideal_cols = ideal_rows * aspect
    around = ((math.floor(ideal), math.ceil(ideal)) for ideal in (ideal_rows, ideal_cols))
    pairs = itertools.product(*around)
    # a set, as in the release: its order decides ties, and is the same in every CPython
    grids = [pair for pair in set(pairs) if min(pair) >= 1 and math.prod(pair) <= config.max_tokens]
    if not grids:
        grids = [(max(1, round(ideal_rows)), max(1, round(ideal_cols)))]
    rows, cols = min(grids, key=lambda grid: abs(grid[0] / grid[1] - height / width))
    return _view(image_hw, config, (rows * unit, cols * unit), unit)


_SMART = (  # name, side of a patch, range of pixels, tokens, models, other settings
    ("qwen2-vl-classdefault", 14, (56 * 56, 28 * 28 * 1280), "up to 1280", "Qwen2-VL's class default", {}),
    ("qwen2-5-vl-ckpt", 14, (56 * 56, 28 * 28 * 16384), "up to 16384", "Qwen2-VL and Qwen2.5-VL checkpoints", {}),
    ("qwen3-vl-ckpt", 16, (65536, 16777216), "64 to 16384", "Qwen3-VL", {}),
    ("glm46v", 14, (112 * 112, 28 * 28 * 15000), "up to 7500", "GLM-4.6V", {"frames": 2, "enlarge": "both"}),
    ("paddleocr-vl", 14, (384 * 384, 1536 * 1536), "188 to 3009", "PaddleOCR-VL", {"enlarge": "each"}),
    ("hunyuan-vl", 16, (512 * 512, 2048 * 2048), "256 to 4096", "HunYuan-VL", {}),
    ("minimax-m3-vl", 14, (56 * 56, 451584), "up to 576", "MiniMax-M3-VL", {}),
    ("ernie4-5-vl-moe", 14, (56 * 56, 28 * 28 * 6177), "up to 6177", "ERNIE-4.5-VL", {}),
)
STRATEGIES = by_name(
    *(
        (SmartResizeConfig(name, patch, 2, *pixels, **more), f"multiples of {2 * patch} px, {tokens} tokens; {models}")
        for name, patch, pixels, tokens, models, more in _SMART
    ),
    *(
        (NaFlexConfig(f"siglip2-naflex-{most}", max_patches=most), f"native aspect, {most} patches; SigLIP2 NaFlex")
        for most in (256, 576, 784, 1024)
    ),
    (PixtralConfig("pixtral-1024-p16"), "longest side 1024 px, multiples of 16 px; Pixtral"),
    (
        PixtralConfig("mistral-small-3-1540-p14-merge2", 14, 1540, 2),
        "longest side 1540 px, multiples of 28 px; Mistral-Small 3.1 and later",
    ),
    (FuyuConfig("fuyu-1080x1920"), "shrunk into 1080 x 1920 px, 30 px patches; Fuyu"),
    *(
        (Gemma4Config(f"gemma4-{most}", max_tokens=most), f"scaled up or down to {most} tokens; Gemma 4")
        for most in (70, 140, 280, 560, 1120)
    ),
    (KimiConfig("kimi-k25"), "shrunk to 16384 patches, padded to 28 px; Kimi-K2.5"),
    (NemotronConfig("nemotron-h-omni"), "1024 to 13312 patches of 16 px; Nemotron-H-Omni"),
    (MuseConfig("muse-glimmer"), "closest aspect in whole 28 px tokens, up to 4096; Muse-Glimmer"),
)
ALIASES = {
    "qwen2-vl": "qwen2-5-vl-ckpt",
    "qwen2.5-vl": "qwen2-5-vl-ckpt",
    "qwen3-vl": "qwen3-vl-ckpt",
    "glm-4.6v": "glm46v",
    "ernie-4.5-vl": "ernie4-5-vl-moe",
    "siglip2-naflex": "siglip2-naflex-256",
    "pixtral": "pixtral-1024-p16",
    "mistral-small": "mistral-small-3-1540-p14-merge2",
    "fuyu": "fuyu-1080x1920",
    "gemma4": "gemma4-280",
    "kimi": "kimi-k25",
    "nemotron": "nemotron-h-omni",
    "muse": "muse-glimmer",
}
