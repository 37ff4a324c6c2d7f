"""What a resampler is made of: the settings that all share, and those of the perceiver."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TypeVar

_Settings = TypeVar("_Settings", bound="Settings")


class Settings:
    """Base of the frozen dataclasses that describe a compressor."""

    def to_dict(self) -> dict[str, object]:
        """Plain values, ready for JSON; `from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls: type[_Settings], values: Mapping[str, object]) -> _Settings:
        """Raises a ValueError on a name that is not a field."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"{cls.__name__} has no {unknown}; its fields are {sorted(known)}")
        return cls(**values)


def check_sizes(settings: Settings, names: tuple[str, ...]) -> None:
    """Raises a ValueError unless the named fields are at least 1 and the heads divide the width."""
    for name in names:
        if getattr(settings, name) < 1:
            raise ValueError(f"{name}={getattr(settings, name)}: must be at least 1")
    if settings.width % settings.num_heads:
        raise ValueError(f"width={settings.width} cannot be divided among num_heads={settings.num_heads}")


KEY_POSITIONS = ("interpolated", "direct", "none")

# What sets the published layers apart. Sizes are not part of a variant; "minicpm-v-2.6" also reads 2.5 (96 latents).
VARIANTS: dict[str, dict[str, object]] = {
    "paper": {"query_position": True, "key_position": "interpolated"},
    "minicpm-v-2.0": {"query_position": True, "key_position": "direct"},
    "minicpm-v-2.6": {"query_position": False, "key_position": "direct"},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerceiverConfig(Settings):
    """Shape and flags of a `PerceiverResampler`. The defaults are the paper's layer.

    Raises:
        ValueError: a size does not fit another; the message says which.
    """

    width: int  # of the latents and of the output: the language model's
    vision_width: int  # of the features
    num_heads: int  # divides the width
    num_latents: int = 64  # tokens per view; a square where the latents have positions
    query_position: bool = True  # latents get the sincos table of their own square grid
    key_position: str = "interpolated"  # that table resized to the view's grid; "direct": the view's own; "none"
    depth: int = 1  # cross-attention layers; the published ones have 1
    ffn_ratio: float = 0.0  # hidden width of an FFN after each layer, as a multiple of the width; 0 for none
    eps: float = 1e-6  # of every LayerNorm

    def __post_init__(self) -> None:
        check_sizes(self, ("width", "vision_width", "num_heads", "num_latents", "depth"))
        if self.key_position not in KEY_POSITIONS:
            raise ValueError(f"key_position={self.key_position!r}: choose one of {list(KEY_POSITIONS)}")
        if self.ffn_ratio < 0 or (self.ffn_ratio and self.ffn_width < 1):
            raise ValueError(
                f"ffn_ratio={self.ffn_ratio}: must be 0 for no FFN, or leave a hidden width of at least 1"
            )
        if (self.query_position or self.key_position != "none") and self.width % 4:
            raise ValueError(f"width={self.width}: 2D sincos positions need a multiple of 4")
        if self.has_latent_table and math.isqrt(self.num_latents) ** 2 != self.num_latents:
            raise ValueError(
                f"num_latents={self.num_latents} is not a square, and the latents' positions are a square grid: take "
                "64 or 144, say, or query_position=False with key_position='direct' or 'none'"
            )

    @classmethod
    def preset(cls, variant: str, **fields: object) -> PerceiverConfig:
        """A published layer by name ("paper", "minicpm-v-2.0", "minicpm-v-2.6"), with sizes and changes as keywords.

        Raises:
            ValueError: no such variant.
        """
        if variant not in VARIANTS:
            raise ValueError(f"variant={variant!r} is unknown; choose one of {list(VARIANTS)}")
        return cls(**{**VARIANTS[variant], **fields})

    @property
    def has_latent_table(self) -> bool:
        """Whether a table over the latents' own grid is used, and so saved as `pos_embed`."""
        return self.query_position or self.key_position == "interpolated"

    @property
    def ffn_width(self) -> int:
        return round(self.ffn_ratio * self.width)
