"""What a packed ViT is made of."""

from __future__ import annotations

from dataclasses import dataclass

from uhd.grids import as_grid
from uhd.positions import BUCKET_RULES, MODES
from uhd.settings import MOST_LAYERS, Settings, check_choice, check_range, check_types

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "swiglu")


@dataclass(frozen=True, kw_only=True)
class ViTConfig(Settings):
    """What a packed ViT is made of; ValueError for values that do not fit together."""

    later = ("stem_border", "stem_hidden", "stem_grey")

    patch_size: int  # px
    width: int  # D
    depth: int  # blocks of the source model, also those beyond the selected layer
    heads: int
    mlp_width: int
    image_size: int | None = None  # native square side in px; None where the native size is not square
    channels: int = 3
    activation: str = "gelu"  # "gelu" (erf), "gelu_tanh", "quick_gelu" or "swiglu" (gate first, both halves mlp_width)
    eps: float = 1e-6  # of every LayerNorm
    class_token: bool = False
    num_registers: int = 0  # they follow the class token
    patch_bias: bool = True
    stem_border: int = 0  # px of the neighbours that a patch embedding sees on each side, see `WindowStem`; 0: none
    stem_hidden: int | None = None  # width inside that stem; None: twice the width
    stem_grey: bool = False  # that stem sees the mean of the channels
    qkv_bias: bool = True
    layer_scale: float | None = None  # initial value; None: no layer scale
    pre_norm: bool = False  # LayerNorm before the first block (CLIP)
    final_norm: bool = True  # LayerNorm on the selected layer's output
    position_grid_hw: tuple[int, int] | None = None  # grid of the learned table; None: no position embedding
    position_prefix: int = 0  # rows before the grid's: for the class token, then for registers
    interpolation: str = "bicubic"  # "bicubic", "bilinear", or "nearest": rows picked by `bucket_rule`
    antialias: bool = False
    bucket_rule: str = "integer"  # see `bucket_position_ids`; all but "integer" need a square table
    select_layer: int = -1  # index into the hidden states, embeddings first: -1 last block, -2 the one before, 0 none

    def __post_init__(self) -> None:
        check_types(self)
        if self.position_grid_hw is not None:
            as_grid(self.position_grid_hw, "position_grid_hw")
        check_range(self, ("patch_size", "width", "heads", "mlp_width", "channels", "image_size", "stem_hidden"))
        check_range(self, ("depth",), 1, MOST_LAYERS)
        check_range(self, ("num_registers", "stem_border", "eps"), 0)
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads; got {self.width} and {self.heads}")
        for name, known in (("activation", ACTIVATIONS), ("interpolation", MODES), ("bucket_rule", BUCKET_RULES)):
            check_choice(name, getattr(self, name), known)
        if self.antialias and self.interpolation == "nearest":
            raise ValueError("antialias needs interpolation 'bicubic' or 'bilinear'; got 'nearest'")
        if self.bucket_rule != "integer":
            rows, columns = self.position_grid_hw or (0, 0)
            if self.interpolation != "nearest" or rows != columns or not rows:
                raise ValueError(
                    f"bucket_rule {self.bucket_rule!r} needs interpolation='nearest' and a square position table; "
                    f"got {self.interpolation!r} and {self.position_grid_hw}"
                )
        if not 0 <= self.position_prefix <= (self.num_prefix_tokens if self.position_grid_hw else 0):
            raise ValueError(
                f"position_prefix counts table rows of class and register tokens ({self.num_prefix_tokens} here, "
                f"table grid {self.position_grid_hw}); got {self.position_prefix}"
            )
        if not -self.depth - 1 <= self.select_layer <= self.depth:
            raise ValueError(
                f"select_layer must lie in [{-self.depth - 1}, {self.depth}] for {self.depth} blocks; "
                f"got {self.select_layer}"
            )

    @property
    def patch_dim(self) -> int:
        """P = C*p*p."""
        return self.channels * self.patch_size**2

    @property
    def num_prefix_tokens(self) -> int:
        """Class token and registers, per view."""
        return int(self.class_token) + self.num_registers

    @property
    def num_blocks(self) -> int:
        """Blocks that are built and run for the selected layer."""
        return self.select_layer if self.select_layer >= 0 else self.depth + 1 + self.select_layer
