"""What a resampler is made of: the settings that all share, and those of the perceiver."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from uhd.settings import MOST_LAYERS, Settings, check_choice, check_range, check_types

MOST_NUMBERS = 1 << 26
"""In the latents; their position table is made at once, with whatever weights."""


@dataclass(frozen=True, kw_only=True)
class ResamplerConfig(Settings):
    """What the settings of all resamplers have in common.

    Raises:
        ValueError: a size does not fit another; the message says which.
    """

    width: int  # of the latents and of the output: the language model's; a multiple of 4 where there are positions
    vision_width: int  # of the features
    num_heads: int  # divides the width
    num_latents: int = 64  # tokens per view; a square where the latents have positions
    eps: float = 1e-6  # of every LayerNorm

    counts: ClassVar[tuple[str, ...]] = ("width", "vision_width", "num_heads", "num_latents")
    has_positions: ClassVar[bool] = True
    has_latent_table: ClassVar[bool] = True  # a table over the latents' own square grid
    square_advice: ClassVar[str] = "take 64 or 144, say"

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, self.counts)
        check_range(self, ("eps",), 0)
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} cannot be divided among num_heads={self.num_heads}")
        if self.has_positions and self.width % 4:
            raise ValueError(f"width={self.width}: 2D sincos positions need a multiple of 4")
        if self.has_latent_table and self.side**2 != self.num_latents:
            raise ValueError(f"num_latents={self.num_latents} is not a square: {self.square_advice}")
        if self.num_latents * self.width > MOST_NUMBERS:
            raise ValueError(
                f"num_latents={self.num_latents} of width={self.width} are more than {MOST_NUMBERS} numbers a view"
            )

    @property
    def side(self) -> int:
        """Latents along each side of their square grid."""
        return math.isqrt(self.num_latents)


def default_heads(width: int) -> int:
    """Choose how many attention heads a width gets: heads of 128 as released, or wider ones that divide it.

    >>> default_heads(4096), default_heads(576), default_heads(100)
    (32, 4, 1)
    """
    return next(heads for heads in range(max(width // 128, 1), 0, -1) if width % heads == 0)


KEY_POSITIONS = ("interpolated", "direct", "none")
FITTED_POSITIONS = ("interpolated", "direct")

# What sets the published layers apart. Sizes are not part of a variant; "minicpm-v-2.6" also reads 2.5 (96 latents).
VARIANTS: dict[str, dict[str, object]] = {
    "paper": {"query_position": True, "key_position": "interpolated"},
    "minicpm-v-2.0": {"query_position": True, "key_position": "direct"},
    "minicpm-v-2.6": {"query_position": False, "key_position": "direct"},
}


@dataclass(frozen=True, kw_only=True)
class PerceiverConfig(ResamplerConfig):
    """Shape and flags of a `PerceiverResampler`. The defaults are the paper's layer."""

    query_position: bool = True  # latents get the sincos table of their own square grid
    key_position: str = "interpolated"  # that table resized to the view's grid; "direct": the view's own; "none"
    depth: int = 1  # cross-attention layers; the published ones have 1
    ffn_ratio: float = 0.0  # hidden width of an FFN after each layer, as a multiple of the width; 0 for none
    fitted_position: str = "interpolated"  # latents in another grid: that table resized to it; "direct": its own

    later: ClassVar[tuple[str, ...]] = ("fitted_position",)
    square_advice: ClassVar[str] = (
        "the latents' positions are a square grid, so take 64 or 144, say, or query_position=False with "
        "key_position='direct' or 'none'"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, ("depth",), 1, MOST_LAYERS)
        check_choice("key_position", self.key_position, KEY_POSITIONS)
        check_choice("fitted_position", self.fitted_position, FITTED_POSITIONS)
        if self.ffn_ratio < 0 or (self.ffn_ratio and self.ffn_width < 1):
            raise ValueError(
                f"ffn_ratio={self.ffn_ratio}: must be 0 for no FFN, or leave a hidden width of at least 1"
            )

    @classmethod
    def preset(cls, variant: str, **fields: object) -> PerceiverConfig:
        """Take the flags of a published layer, "paper", "minicpm-v-2.0" or "minicpm-v-2.6"; sizes are keywords.

        Raises:
            ValueError: no such variant.
        """
        check_choice("variant", variant, VARIANTS)
        return cls(**{**VARIANTS[variant], **fields})

    @classmethod
    def for_new(
        cls, width: int, vision_width: int, *, fits_latents: bool = False, **fields: object
    ) -> PerceiverConfig:
        """Settings of a layer that is still to be trained: heads by width, and, where its slicing fits latents,
        positions of the fitted grids.

        >>> PerceiverConfig.for_new(4096, 1024, fits_latents=True).fitted_position
        'direct'
        """
        position = "direct" if fits_latents else "interpolated"
        given = {"num_heads": default_heads(width), "fitted_position": position, **fields}
        return cls(width=width, vision_width=vision_width, **given)

    @property
    def has_positions(self) -> bool:
        return self.query_position or self.key_position != "none"

    @property
    def has_latent_table(self) -> bool:
        """Whether a table over the latents' own grid is used, and so saved as `pos_embed`."""
        return self.query_position or self.key_position == "interpolated"

    @property
    def ffn_width(self) -> int:
        return round(self.ffn_ratio * self.width)
