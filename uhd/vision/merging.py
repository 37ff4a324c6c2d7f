"""Merging inside the ViT: after chosen blocks every 2 x 2 patches of a view become one, so later blocks see fewer.

Source: LLaVA-UHD v4 (arXiv 2605.08985, section 3) and MiniCPM-V 4.6 (transformers, models/minicpmv4_6); the two
poolings are those of LLaVA-UHD v3 (its class `WTC`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from uhd.grids import Grid, join_blocks, shrink_grids
from uhd.settings import check_choice
from uhd.shortcuts import at_its_fastest, float_parameter
from uhd.weights import check_weights, draw_linear

from .blocks import MLP, Attention, Block
from .config import ViTConfig
from .groups import ViewGroups
from .vit import ViT

COMPRESSORS = ("window", "average", "adaptive")

_SOURCE_NAMES = {
    "norm1": ("layer_norm1",),
    "attn.qkv": tuple(f"self_attn.{part}_proj" for part in "qkv"),
    "attn.proj": ("self_attn.out_proj",),
    "norm2": ("pre_norm",),
    "mlp.fc1": ("linear_1",),
    "mlp.fc2": ("linear_2",),
}


@dataclass(frozen=True, kw_only=True)
class CompressedViTConfig(ViTConfig):
    """What a `CompressedViT` is made of: a `ViTConfig`, and where and how it compresses."""

    compress_after: tuple[int, ...]  # numbers of blocks run before, from 1, ascending; transformers' layer 6 is 7 here
    compressor: str = "window"  # "window" (LLaVA-UHD v4), "average" or "adaptive" (v3)

    def __post_init__(self) -> None:
        super().__post_init__()
        places = self.compress_after
        if not places or list(places) != sorted(set(places)) or places[0] < 1 or places[-1] > self.num_blocks:
            raise ValueError(
                f"compress_after must be ascending numbers of blocks from 1 to {self.num_blocks}, those that the "
                f"selected layer needs; got {places}"
            )
        check_choice("compressor", self.compressor, COMPRESSORS)


class CompressedViT(ViT):
    """A packed `ViT` whose blocks after each compressor see a quarter of the patches.

    Class and register tokens pass by. Views stay apart, as everywhere in the ViT: no 2 x 2 window has patches of two.
    The patch embedding and its positions are untouched; nothing new says where the joined patches lie. Of the hidden
    states, one after a block that is followed by a compressor is what goes into it.

    Attributes:
        compressors: one module for each of `config.compress_after`, under that number as a string.

    Both sides of every grid must be multiples of 2 ** (number of compressors): plan slices with `merge` set to that,
    times what comes after the ViT (`SlicingConfig.merge`).
    """

    config: CompressedViTConfig

    def __init__(self, config: CompressedViTConfig, *, stem: nn.Module | None = None) -> None:
        super().__init__(config, stem=stem)
        self._factor = 2 ** len(config.compress_after)
        self.stride = config.patch_size * self._factor
        self.compressors = nn.ModuleDict({str(place): make_compressor(config) for place in config.compress_after})

    def output_grids(self, grids: Sequence[Grid]) -> tuple[Grid, ...]:
        """(rows, columns) of every view's features; ValueError: a side cannot be halved once for each compressor."""
        factor = self._factor
        advice = (
            f"the ViT halves them after the blocks {self.config.compress_after}, so plan with merge={factor}, times "
            "what the compressor behind it joins"
        )
        return shrink_grids(grids, factor, advice)

    def _after_block(self, number: int, x: Tensor, groups: ViewGroups) -> tuple[Tensor, ViewGroups]:
        if str(number) not in self.compressors:
            return x, groups
        compressor = at_its_fastest(self.compressors[str(number)], x)
        dtype = float_parameter(compressor, x).dtype
        tokens = compressor(groups.restore(x).to(dtype), groups.grids).to(x.dtype)
        prefix = groups.prefixes(x) if groups.prefix else None
        smaller = ViewGroups.of(tuple((rows // 2, columns // 2) for rows, columns in groups.grids), groups.prefix)
        return smaller.arrange(tokens, prefix), smaller


class WindowMerger(nn.Module):
    """Base of what makes one token of the four of every 2 x 2 window."""

    def forward(self, x: Tensor, grids: Sequence[Grid]) -> Tensor:
        """(N, D) packed, patches row-major -> (N / 4, D)."""
        return self.merge(join_blocks(x, grids, 2))

    def merge(self, windows: Tensor) -> Tensor:
        """(n, 4, D) -> (n, D)."""
        raise NotImplementedError


class WindowCompressor(WindowMerger):
    """Lets the four patches of every 2 x 2 window attend to each other, then joins them to one.

        y = x + attn(norm1(x))    out = mlp(norm2([y_1 | y_2 | y_3 | y_4])) + mean of the y

    Source: `MiniCPMV4_6ViTWindowAttentionMerger` of transformers. Arguments as in `ViTConfig`; `mlp_width` is that of
    the neighbouring block's MLP, and the one here has four times that.
    """

    def __init__(
        self, width: int, heads: int, mlp_width: int, *, activation: str, eps: float = 1e-6, qkv_bias: bool = True
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads, bias=qkv_bias)
        self.norm2 = nn.LayerNorm(4 * width, eps=eps)
        self.mlp = MLP(4 * width, 4 * mlp_width, activation=activation, out=width)
        for layer in (self.attn.qkv, self.attn.proj, self.mlp.fc1, self.mlp.fc2):
            draw_linear(layer)

    def merge(self, windows: Tensor) -> Tensor:
        tokens = windows.flatten(0, 1)
        y = tokens + self.attn(self.norm1(tokens), [(len(windows), 4)] if len(windows) else [])
        return self.join(y.unflatten(0, (-1, 4)) if len(windows) else windows)

    def join(self, y: Tensor) -> Tensor:
        """Patches that have looked at each other, (n, 4, D) -> (n, D)."""
        return self.mlp(self.norm2(y.flatten(1))) + y.mean(1)

    @torch.no_grad()
    def reuse(self, block: Block) -> None:
        """Take over a block's weights: its attention as it is, its MLP on each of the four patches, then their mean.

        The first linear layer is block-diagonal, the second four times a quarter of the block's, biases and norms are
        repeated. A block's layer scale goes into the linear layers before it. Source: LLaVA-UHD v4, section 3.
        ValueError: a block of another width, MLP or activation.
        """
        theirs = block.mlp
        got = (self.norm1.normalized_shape[0], self.mlp.fc2.in_features, self.mlp.activation)
        wanted = (block.norm1.normalized_shape[0], 4 * theirs.fc2.in_features, theirs.activation)
        if got != wanted:
            raise ValueError(f"a compressor of (width, hidden width, activation) {got} cannot reuse a block: {wanted}")
        self.norm1.load_state_dict(block.norm1.state_dict())
        self.attn.load_state_dict(block.attn.state_dict())
        self.norm2.weight.copy_(block.norm2.weight.repeat(4))
        self.norm2.bias.copy_(block.norm2.bias.repeat(4))
        parts = 2 if theirs.activation == "swiglu" else 1
        weights, biases = theirs.fc1.weight.chunk(parts), theirs.fc1.bias.chunk(parts)
        self.mlp.fc1.weight.copy_(torch.cat([torch.block_diag(*[weight] * 4) for weight in weights]))
        self.mlp.fc1.bias.copy_(torch.cat([bias.repeat(4) for bias in biases]))
        self.mlp.fc2.weight.copy_(theirs.fc2.weight.repeat(1, 4) / 4)
        self.mlp.fc2.bias.copy_(theirs.fc2.bias)
        for layer, scale in ((self.attn.proj, block.scale1), (self.mlp.fc2, block.scale2)):
            if scale is not None:
                layer.weight.mul_(scale[:, None])
                layer.bias.mul_(scale)

    @torch.no_grad()
    def load_source_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy weights that have the names of transformers' `vit_merger`, without that prefix; ValueError if not."""
        ours = self.to_source_state_dict()
        check_weights(state, ours, "a window compressor")
        for name, tensor in ours.items():
            tensor.copy_(state[name])

    def to_source_state_dict(self) -> dict[str, Tensor]:
        """Give the weights under the names that `load_source_state_dict` reads; the tensors share memory."""
        state = {}
        for name, tensor in self.state_dict().items():
            module, _, ending = name.rpartition(".")
            sources = [f"{source}.{ending}" for source in _SOURCE_NAMES[module]]
            state.update(zip(sources, tensor.detach().chunk(len(sources)), strict=True))
        return state


class AverageCompressor(WindowMerger):
    """Replaces every 2 x 2 window by its mean; nothing is learned."""

    def merge(self, windows: Tensor) -> Tensor:
        return windows.mean(1)


class AdaptiveCompressor(WindowMerger):
    """Replaces every 2 x 2 window by a weighted mean, weighted by channel from the patch and the window's mean.

        weights = softmax over the four of down(gelu(up([x_i | mean])))

    Starts as the plain mean, `down` being zero. LLaVA-UHD v3 sets `up` to zero as well, where no gradient reaches
    either layer.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(2 * width, width), nn.Linear(width, width)
        draw_linear(self.up)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def merge(self, windows: Tensor) -> Tensor:
        seen = torch.cat([windows, windows.mean(1, keepdim=True).expand_as(windows)], dim=-1)
        weights = self.down(nn.functional.gelu(self.up(seen))).softmax(1)
        return (windows * weights).sum(1)


def make_compressor(config: CompressedViTConfig) -> nn.Module:
    """Make a new compressor of the kind and sizes that the config asks for."""
    if config.compressor == "average":
        return AverageCompressor()
    if config.compressor == "adaptive":
        return AdaptiveCompressor(config.width)
    flags = {"activation": config.activation, "eps": config.eps, "qkv_bias": config.qkv_bias}
    return WindowCompressor(config.width, config.heads, config.mlp_width, **flags)


def compress_vit(
    vit: ViT, after: int | Sequence[int], *, compressor: str = "window", weights: Mapping[str, Tensor] | None = None
) -> CompressedViT:
    """Give a plain ViT compressors; those of kind "window" start from the weights of the block before them.

    >>> sizes = {"image_size": 56, "patch_size": 14, "width": 8, "depth": 3, "heads": 2, "mlp_width": 16}
    >>> vit = ViT(ViTConfig(**sizes, position_grid_hw=(4, 4)))
    >>> compressed = compress_vit(vit, after=2)
    >>> compressed(torch.zeros(16, 3 * 14 * 14), [(4, 4)]).shape  # a quarter of the patches
    torch.Size([4, 8])

    Args:
        vit: as `vit_from` and `load_vit` make them, or your own.
        after: number of blocks to run before each, from 1. LLaVA-UHD v4 puts one after layer 6; `insert_layer_id` 6 of
            transformers counts from 0, so that MiniCPM-V 4.6 has it after 7.
        compressor: "window", "average" or "adaptive".
        weights: of one window compressor, under the names of transformers' `vit_merger`, in place of the block's.

    Returns:
        A `CompressedViT` with its own copy of the weights, in the same dtype, device and training mode.

    Raises:
        TypeError: something else than a plain ViT.
        ValueError: places outside the blocks, or weights that do not fit.
    """
    if type(vit) is not ViT:
        raise TypeError(f"compress_vit takes a plain ViT, all places at once; got {type(vit).__name__}")
    places = (after,) if isinstance(after, int) else tuple(after)
    config = CompressedViTConfig(**vit.config.to_dict(), compress_after=places, compressor=compressor)
    if weights is not None and (compressor != "window" or len(places) != 1):
        raise ValueError(f"weights are for one window compressor; got {len(places)} of kind {compressor!r}")
    with torch.device("meta"):
        result = CompressedViT(config, stem=None if vit.own_stem else copy.deepcopy(vit.stem))
    anchor = vit.blocks[0].norm1.weight
    for place in places:
        module = make_compressor(config).to(anchor)
        if weights is not None:
            module.load_source_state_dict(weights)
        elif compressor == "window":
            module.reuse(vit.blocks[place - 1])
        result.compressors[str(place)] = module
    copied = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    result.load_state_dict({**result.compressors.state_dict(prefix="compressors."), **copied}, assign=True)
    for name, parameter in vit.named_parameters():
        result.get_parameter(name).requires_grad_(parameter.requires_grad)
    return result.train(vit.training)
