"""Any other vision backbone behind the protocol of the packed ViT: views are grouped by shape and run as images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from uhd.grids import Grid, check_grids, map_by_grid, split_views
from uhd.settings import check_choice
from uhd.shortcuts import float_parameter

from .groups import check_packed
from .patches import unpatchify

LAYOUTS = ("NCHW", "NHWC", "NLC")


class VisionTower(nn.Module):
    """Wraps a backbone that takes images (V, C, H, W), so that it takes packed patches and gives packed features.

    Views of equal shape run as one batch, nothing is padded. A module with `forward_features` (timm) is called through
    it, any other as itself. From the result it takes the tensor, the last of `feature_maps`, `last_hidden_state`, or
    the last of a list (timm `features_only`); the map must be (V, D, h, w), (V, h, w, D), or (V, prefix + h*w, D).

    Views stay independent as far as the backbone keeps images apart: in training mode BatchNorm does not.

    Args:
        module: the backbone. Its own rules on image sizes hold: let it take any (timm `dynamic_img_size`, ...).
        patch_size: side in px of the packed patches, which is the unit of the grids. A multiple of the stride, such as
            32 for a ConvNeXt, makes every slice's size fit.
        out_dim: D of the features.
        stride: px of the image per feature, on each side; None: the patch size.
        image_size: native square side in px, if the backbone has one.
        in_channels: C of the patches.
        num_prefix_tokens: class and register tokens before the patch tokens of a (V, n, D) map; they are dropped.
        layout: "NCHW", "NHWC" or "NLC"; None: told from the shape.
        rounding: features on a side that the stride does not divide: "exact" refuses such grids, "floor" suits strided
            convolutions without padding, "ceil" models that pad the image (Swin).
        kwargs: keyword arguments for every call, such as {"interpolate_pos_encoding": True}.
        select: takes the feature map out of the backbone's result, in place of the rule above.

    Raises:
        ValueError: on construction, for sizes below 1 or an unknown layout or rounding.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        patch_size: int,
        out_dim: int,
        stride: int | None = None,
        image_size: int | None = None,
        in_channels: int = 3,
        num_prefix_tokens: int = 0,
        layout: str | None = None,
        rounding: str = "exact",
        kwargs: Mapping[str, Any] | None = None,
        select: Callable[[Any], Tensor] | None = None,
    ) -> None:
        super().__init__()
        stride = patch_size if stride is None else stride
        if min(patch_size, out_dim, stride, in_channels) < 1 or num_prefix_tokens < 0:
            raise ValueError(
                f"sizes must be positive; got {patch_size=}, {out_dim=}, {stride=}, {in_channels=}, "
                f"{num_prefix_tokens=}"
            )
        check_choice("layout", layout, (None, *LAYOUTS))
        check_choice("rounding", rounding, ("exact", "floor", "ceil"))
        self.module, self.select, self.kwargs = module, select, dict(kwargs or {})
        self.patch_size, self.stride, self.rounding = patch_size, stride, rounding
        self.image_size, self.in_channels, self.out_dim = image_size, in_channels, out_dim
        self.num_prefix_tokens, self.layout = num_prefix_tokens, layout

    def output_grids(self, grids: Sequence[Grid]) -> tuple[Grid, ...]:
        """Tell (rows, columns) of every view's features from its (rows, columns) in patches, before anything runs.

        Raises:
            ValueError: a side that the stride does not divide under rounding="exact", or one without any feature.
        """
        return tuple((self._cells(rows), self._cells(columns)) for rows, columns in check_grids(grids))

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Encode packed views: (N, P) floating point and normalised -> (N', D), row-major over `output_grids(grids)`.

        Args:
            patches: view by view, row-major, inner order (c, py, px).
            grids: V pairs (rows, columns) on the host, in patches, with sum(rows*columns) = N.

        Raises:
            ValueError: patches and grids that disagree, or a feature map of another size than `output_grids` says.
            TypeError: integer patches, grids that are not host integers, or a result with no tensor in it.
        """
        grids = check_packed(patches, grids, self.in_channels * self.patch_size**2)
        out_grids = self.output_grids(grids)
        per_view = split_views(patches, grids)

        def encode(grid: Grid, views: list[int]) -> Tensor:
            packed = torch.cat([per_view[view] for view in views])
            images = unpatchify(packed, grid, self.patch_size, channels=self.in_channels)
            return self._tokens(self._run(images), len(views), out_grids[views[0]])

        features = map_by_grid(encode, grids)
        return torch.cat(features) if features else patches.new_zeros(0, self.out_dim)

    def _cells(self, patches: int) -> int:
        """Count the features along a side of so many patches."""
        pixels = patches * self.patch_size
        if pixels % self.stride and self.rounding == "exact":
            raise ValueError(
                f"a side of {patches} patches of {self.patch_size} px is no multiple of the stride {self.stride}: "
                "plan with a patch size that is, or say how the backbone rounds (rounding='floor' or 'ceil')"
            )
        cells = -(-pixels // self.stride) if self.rounding == "ceil" else pixels // self.stride
        if cells < 1:
            raise ValueError(f"a side of {pixels} px is shorter than the stride {self.stride}: no feature is left")
        return cells

    def _run(self, images: Tensor) -> Tensor:
        """Run the backbone on images (V, C, H, W) and take its feature map."""
        call = getattr(self.module, "forward_features", self.module)
        result = call(images.to(float_parameter(self.module, images).dtype), **self.kwargs)
        if self.select is not None:
            return self.select(result)
        held = [getattr(result, name, None) for name in ("feature_maps", "last_hidden_state")]
        result = next((each for each in held if each is not None), result)
        if isinstance(result, (list, tuple)) and result:
            result = result[-1]
        if not isinstance(result, Tensor):
            raise TypeError(
                f"{type(self.module).__name__} returned {type(result).__name__}; expected a tensor, feature_maps, "
                "last_hidden_state or a list of tensors: pass select= to take the feature map out"
            )
        return result

    def _tokens(self, features: Tensor, views: int, out_hw: Grid) -> Tensor:
        """Bring a feature map in any of the three layouts to (V, h*w, D)."""
        (rows, columns), dim = out_hw, self.out_dim
        shapes = {
            "NCHW": (views, dim, rows, columns),
            "NHWC": (views, rows, columns, dim),
            "NLC": (views, self.num_prefix_tokens + rows * columns, dim),
        }
        fitting = [name for name in LAYOUTS if self.layout in (None, name) and tuple(features.shape) == shapes[name]]
        if len(fitting) != 1:
            expected = " or ".join(f"{name} {shapes[name]}" for name in LAYOUTS if self.layout in (None, name))
            raise ValueError(
                f"{type(self.module).__name__} returned a map of shape {tuple(features.shape)}; expected {expected} "
                f"for {views} views of {rows}x{columns} features. "
                + ("Both fit: pass layout=" if fitting else "Check out_dim, stride, rounding and num_prefix_tokens")
            )
        if fitting[0] == "NLC":
            return features[:, self.num_prefix_tokens :]
        return rearrange(features, "v d h w -> v (h w) d" if fitting[0] == "NCHW" else "v h w d -> v (h w) d")
