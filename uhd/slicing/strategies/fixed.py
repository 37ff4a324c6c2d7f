"""Rules that give every image the same views: stretch, centre crop, pad to a square, fixed windows."""

from __future__ import annotations

from dataclasses import dataclass

from uhd.slicing.plan import Packing, SlicePlan
from uhd.slicing.strategies.base import CLIP_MEAN, GRAY, Size, StrategyConfig, by_name, padded_square, rule_of


@dataclass(frozen=True)
class StretchConfig(StrategyConfig):
    """The whole image stretched to one square view.

    ``tokens`` is what a resampler gives; ``None``: the merged patches.
    """

    tile: int = 384
    merge: int = 1
    tokens: int | None = None


@rule_of(StretchConfig)
def stretch(image_hw: Size, config: StretchConfig) -> SlicePlan:
    """Resize to ``tile`` x ``tile``, aspect ignored.

    One view, no padding, all of the image seen, distortion max(w/h, h/w).
    Source: transformers, models/siglip/image_processing_siglip.py, models/blip/, models/gemma3/.
    Models: SigLIP, BLIP-2, InstructBLIP, MiniGPT-v2, Gemma 3 without pan and scan, PaliGemma.
    Traps: 384 px with patch 14 leaves 6 px at the right and bottom that no patch sees.
    """
    return config.finish(image_hw, (config.whole(config.tokens),))


@dataclass(frozen=True)
class CenterCropConfig(StrategyConfig):
    """The middle square of the image."""

    tile: int = 336


@rule_of(CenterCropConfig)
def center_crop(image_hw: Size, config: CenterCropConfig) -> SlicePlan:
    """Resize the shorter side to ``tile``, keep the aspect, and cut the middle square out.

    No distortion, but only shorter / longer of the image is seen.
    Source: transformers, models/clip/image_processing_clip.py (``shortest_edge``, then ``center_crop``).
    Models: CLIP and what was trained with its processor.
    Traps: Hugging Face's "clip" is this, not a square resize.
    """
    height, width = image_hw
    side = config.tile
    longer = int(side * max(image_hw) / min(image_hw))
    content_hw = (longer, side) if height > width else (side, longer)
    offset = tuple(-((length - side) // 2) for length in content_hw)
    view = config.whole(content_hw=content_hw, offset=offset)
    return config.finish(image_hw, (view,))


@dataclass(frozen=True)
class SquarePadConfig(StrategyConfig):
    """The image padded to a square.

    Attributes:
        fill: RGB of the padding: the encoder's mean colour, int(255 * mean), by default CLIP's.
        newline: One learned embedding follows the view.
    """

    tile: int = 336
    fill: tuple[int, int, int] = CLIP_MEAN
    newline: bool = False

    @property
    def learned(self) -> tuple[str, ...]:
        return ("newline",) if self.newline else ()


@rule_of(SquarePadConfig)
def square_pad(image_hw: Size, config: SquarePadConfig) -> SlicePlan:
    """Pad to a square with the encoder's mean colour, the image in the middle, then resize to ``tile``.

    No distortion; 1 - shorter / longer of the view is padding, and so are as many of its tokens.
    Source: haotian-liu/LLaVA, llava/mm_utils.py ``expand2square``; LLaVA-OneVision for several images in a sample:
    transformers, models/llava_onevision/image_processing_llava_onevision.py ``pad_to_square``.
    Models: LLaVA-1.5 (CLIP), LLaVA-OneVision multi-image (SigLIP, one newline after each image).
    Traps: transformers' LLaVA processor needs ``do_pad=True`` for it; its class default stretches and crops.
    """
    side = config.token_side
    packing = Packing(view_hw=(side, side), separator="end") if config.newline else None
    canvas = padded_square(image_hw, config.tile, side * side, config.fill)
    return config.finish(image_hw, (canvas,), packing=packing)


@dataclass(frozen=True)
class WindowsConfig(StrategyConfig):
    """Fixed windows and the whole image.

    Attributes:
        grid: (rows, columns) of windows.
        tokens: Of each view (Monkey: queries of its resampler).
    """

    tile: int = 448
    grid: Size = (2, 2)
    tokens: int = 256


@rule_of(WindowsConfig)
def fixed_windows(image_hw: Size, config: WindowsConfig) -> SlicePlan:
    """Stretch the image over ``grid`` windows of ``tile`` px, cut them, and add the whole image in one view, last.

    Always the same number of views, whatever the image's size or aspect.
    Source: Yuliang-Liu/Monkey, monkey_model/visual.py ``sliding_window`` and Resize((896, 896)).
    Models: Monkey (TextMonkey keeps 896 px, with shifted windows).
    Traps: every window has its own LoRA in Monkey, so windows are not interchangeable; the overview is made from the
    stretched 896 px canvas, not from the image, and without antialiasing.
    """
    windows = config.tiles(config.grid, config.tokens)
    overview = config.whole(config.tokens, size_hw=windows.size_hw, view_filter=("bicubic", False))
    return config.finish(image_hw, (windows, overview))


STRATEGIES = by_name(
    (StretchConfig("square-stretch-384", 14, 384), "stretched to 384 px, 729 tokens; SigLIP"),
    (StretchConfig("blip2-224", 14, 224, tokens=32), "stretched to 224 px, 32 queries; BLIP-2, InstructBLIP"),
    (StretchConfig("minigpt-v2-448", 14, 448, 2), "stretched to 448 px, 4 neighbours joined; MiniGPT-v2"),
    (
        StretchConfig("gemma3-896", 14, 896, 4, resample="bilinear"),
        "stretched to 896 px, 256 tokens; Gemma 3 by default",
    ),
    (CenterCropConfig("clip-center-crop-336", 14, 336), "shorter side to 336 px, middle square; CLIP"),
    (SquarePadConfig("llava15-pad-336", 14, 336), "padded to a square, 336 px; LLaVA-1.5"),
    (
        SquarePadConfig("llava-onevision-multi-image", 14, 384, GRAY, newline=True),
        "padded to a square, 384 px, one newline; LLaVA-OneVision with several images in a sample",
    ),
    (WindowsConfig("monkey-896"), "stretched to 896 px, four 448 px windows and an overview; Monkey"),
)
ALIASES = {
    "clip": "clip-center-crop-336",
    "siglip": "square-stretch-384",
    "blip2": "blip2-224",
    "blip-2": "blip2-224",
    "instructblip": "blip2-224",
    "minigpt-v2": "minigpt-v2-448",
    "gemma3": "gemma3-896",
    "llava-1.5": "llava15-pad-336",
    "monkey": "monkey-896",
}
