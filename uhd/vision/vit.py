"""A pre-norm vision transformer over packed views of any grids, with no padding between them.

One module covers the encoders of CLIP, SigLIP, SigLIP2, DINOv2 and timm's plain ViTs; `uhd.vision.weights` fills it.
The residual stream is one (tokens, D) matrix: linear layers never see view borders, attention runs once per group of
views of equal length, and the layers beyond the selected one are not built.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from uhd.grids import Grid, check_grids, sent
from uhd.pixels.normalize import fold_pixels
from uhd.positions import bucket_position_ids, interpolate_pos_embed
from uhd.shortcuts import is_plain
from uhd.weights import draw_linear

from .blocks import Block
from .compiled import BlockRunner, FastBlocks
from .config import ViTConfig
from .groups import ViewGroups, check_packed
from .stem import WindowStem

MeanStd = tuple[tuple[float, ...], tuple[float, ...]]


class ViT(nn.Module):
    """Encodes packed patches of many views into packed features; class and register tokens live inside only.

    Args:
        config: what to build.
        stem: replaces the patch embedding: any module (N, P) -> (N, D), called with the grids too where it has a true
            `needs_grids`. The default is a Linear over patches of inner order (c, py, px), equal to a `Conv2d` weight
            flattened, or the config's `WindowStem`.

    Attributes:
        patch_size, image_size: side in px of a patch, and of the native square; None where the native size is none.
        stride: px between neighbouring features.
        in_channels, out_dim: C of the patches, and D of the features.
        gradient_checkpointing: recompute every block in the backward pass while training.

    >>> vit = ViT(ViTConfig(patch_size=4, width=16, depth=2, heads=2, mlp_width=32, position_grid_hw=(6, 6)))
    >>> patches = torch.zeros(2 * 3 + 5 * 4, 3 * 4 * 4)  # two views, of 2 x 3 and 5 x 4 patches
    >>> vit(patches, [(2, 3), (5, 4)]).shape
    torch.Size([26, 16])
    """

    def __init__(self, config: ViTConfig, *, stem: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        self.patch_size = self.stride = config.patch_size
        self.image_size, self.in_channels, self.out_dim = config.image_size, config.channels, config.width
        self.gradient_checkpointing = False
        width = config.width
        self.own_stem = stem is None
        self.stem = _make_stem(config) if stem is None else stem
        self.class_token = nn.Parameter(torch.zeros(1, width)) if config.class_token else None
        self.registers = nn.Parameter(torch.zeros(config.num_registers, width)) if config.num_registers else None
        self.positions = None
        if config.position_grid_hw is not None:
            rows, columns = config.position_grid_hw
            self.positions = nn.Parameter(torch.zeros(config.position_prefix + rows * columns, width))
        self.pre_norm = nn.LayerNorm(width, eps=config.eps) if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_blocks))
        self.norm = nn.LayerNorm(width, eps=config.eps) if config.final_norm else nn.Identity()
        self._fast_blocks = FastBlocks()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw matrices, tokens and positions from a normal (std 0.02), zero biases; leave a given stem alone."""
        for module in (self.blocks, self.stem) if self.own_stem else (self.blocks,):
            for layer in module.modules():
                if isinstance(layer, nn.Linear):
                    draw_linear(layer)
        for parameter in (self.class_token, self.registers, self.positions):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)

    def output_grids(self, grids: Sequence[Grid]) -> tuple[Grid, ...]:
        """(rows, columns) of every view's features: here the grids themselves."""
        return check_grids(grids)

    @property
    def folds_pixels(self) -> bool:
        """Whether `forward` takes `inner` and `mean_std`: the patch embedding is one plain linear layer.

        Other stems must be called, and so must a layer that a hook, LoRA, quantisation or offloading waits for.
        """
        return self.own_stem and is_plain(self.stem, nn.Linear) and type(self.stem.weight.data) is Tensor

    def forward(
        self,
        patches: Tensor,
        grids: Sequence[Grid],
        *,
        hidden_states: bool = False,
        inner: str = "chw",
        mean_std: MeanStd | None = None,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        """Encode packed views.

        Args:
            patches: (N, P) floating point, normalised; view by view, row-major. uint8 where `mean_std` is given.
            inner: order of a patch's values: "chw" is (c, py, px), "hwc" is (py, px, c). Only where `folds_pixels`.
            mean_std: C means and standard deviations in 0..1 units, for raw pixels: `(x / 255 - mean) / std` is folded
                into the patch embedding, in its dtype: meant for float32. Only where `folds_pixels`.
            grids: V pairs (rows, columns) on the host, in patches, with sum(rows*columns) = N.
            hidden_states: also return the packed patch features after the embedding and after every block, in the
                order of transformers' `hidden_states`, before the final norm.

        Returns:
            (N', D) features of the selected layer, view by view, row-major over `output_grids(grids)`; or that and a
            tuple of `num_blocks + 1` tensors, each of as many rows as there are patches at its depth.

        Raises:
            ValueError: patches and grids that disagree, another P, or a stem that returns another shape.
            TypeError: integer patches without `mean_std` or others with it, or grids that are not host integers.
        """
        grids = check_packed(patches, grids, self.config.patch_dim, raw=mean_std is not None)
        self.output_grids(grids)  # refuse them before anything runs
        x = self._embed(patches, grids, inner, mean_std)
        groups = ViewGroups.of(grids, self.config.num_prefix_tokens)
        x = self.pre_norm(groups.arrange(x, self._prefix()))
        states, dtype = [groups.restore(x)] if hidden_states else [], x.dtype
        run = self._block_runner(x, own_modules=hidden_states)
        for number in range(1, len(self.blocks) + 1):
            x = run(number - 1, x, groups.shapes)
            if hidden_states:
                states.append(groups.restore(x))
            x, groups = self._after_block(number, x, groups)
        features = self.norm(groups.restore(x).to(dtype))
        return (features, tuple(states)) if hidden_states else features

    def compile_blocks(self, backend: str | None = "inductor") -> None:
        """Run the blocks by compiled layers at inference from now on, see `uhd.vision.compiled`.

        `backend` is one of `torch.compile`; "none" for the same layers uncompiled; None undoes.
        """
        self._fast_blocks = FastBlocks(backend)

    @property
    def compiled(self) -> bool:
        """Whether `compile_blocks` is in force."""
        return self._fast_blocks.backend is not None

    def _block_runner(self, x: Tensor, *, own_modules: bool) -> BlockRunner:
        """Give a function (number, x, shapes) -> x: faster layers where they would give the same."""
        run = None if own_modules else self._fast_blocks.runner(self.blocks, x)
        if run is not None:
            return run
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()

        def run(number: int, x: Tensor, shapes: Sequence[Grid]) -> Tensor:
            block = self.blocks[number]
            return checkpoint(block, x, shapes, use_reentrant=False) if recompute else block(x, shapes)

        return run

    def position_embedding(self, grid_hw: Grid) -> Tensor:
        """Resize the position table to a view's grid by the config's rule: (h*w, D), row-major; differentiable.

        ValueError: the model has no position table, or the grid is not usable.
        """
        config = self.config
        if self.positions is None or config.position_grid_hw is None:
            raise ValueError("this ViT has no position embedding (position_grid_hw is None)")
        table = self.positions[config.position_prefix :]
        if config.bucket_rule != "integer":
            ids = bucket_position_ids(grid_hw, config.position_grid_hw[0], config.bucket_rule)
            return table[sent(ids, table.device)]
        return interpolate_pos_embed(table, config.position_grid_hw, grid_hw, config.interpolation, config.antialias)

    def _embed(self, patches: Tensor, grids: tuple[Grid, ...], inner: str, mean_std: MeanStd | None) -> Tensor:
        """Embed patches and add their positions: (N, P) -> (N, D)."""
        if inner == "chw" and mean_std is None:
            x = self._run_stem(patches, grids)
        elif self.folds_pixels:
            weight, bias = fold_pixels(self.stem.weight, self.stem.bias, inner, mean_std)
            x = F.linear(patches.to(weight.dtype), weight, bias)
        else:
            raise ValueError("this patch embedding takes normalised patches of inner order 'chw' only")
        if self.positions is None or not grids:
            return x
        tables = {grid: self.position_embedding(grid) for grid in dict.fromkeys(grids)}
        return x + torch.cat([tables[grid] for grid in grids])

    def _run_stem(self, patches: Tensor, grids: tuple[Grid, ...]) -> Tensor:
        parameter = next(self.stem.parameters(), patches)
        patches = patches.to(parameter.dtype if parameter.is_floating_point() else patches.dtype)
        x = self.stem(patches, grids) if getattr(self.stem, "needs_grids", False) else self.stem(patches)
        if x.shape != (len(patches), self.config.width):
            raise ValueError(
                f"the stem must return (N, D) = {(len(patches), self.config.width)}; got {tuple(x.shape)}"
            )
        return x

    def _after_block(self, number: int, x: Tensor, groups: ViewGroups) -> tuple[Tensor, ViewGroups]:
        """Do what comes after `number` blocks: nothing here; `uhd.vision.CompressedViT` merges patches."""
        return x, groups

    def _prefix(self) -> Tensor | None:
        """Class token and registers with their rows of the position table, (R, D); None without any."""
        tokens = [token for token in (self.class_token, self.registers) if token is not None]
        if not tokens:
            return None
        prefix = torch.cat(tokens)
        rows = self.config.position_prefix
        return torch.cat([prefix[:rows] + self.positions[:rows], prefix[rows:]]) if rows else prefix


def _make_stem(config: ViTConfig) -> nn.Module:
    if not config.stem_border:
        return nn.Linear(config.patch_dim, config.width, bias=config.patch_bias)
    hidden = config.stem_hidden or 2 * config.width
    return WindowStem(
        config.patch_size, config.stem_border, hidden, config.width, channels=config.channels, grey=config.stem_grey
    )
