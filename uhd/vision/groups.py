"""Packed views: the check that patches and grids agree, and the order in which a ViT stores them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from uhd.grids import Grid, check_grids, group_views


@dataclass(frozen=True)
class ViewGroups:
    """The order in which views are stored inside the ViT: those of equal length side by side, prefix tokens first."""

    grids: tuple[Grid, ...]  # (rows, columns) of every view, in the caller's order
    lengths: tuple[int, ...]  # patches of every view
    members: tuple[tuple[int, ...], ...]  # views of every group
    prefix: int  # class and register tokens per view

    @classmethod
    def of(cls, grids: tuple[Grid, ...], prefix: int) -> ViewGroups:
        lengths = tuple(rows * columns for rows, columns in grids)
        return cls(grids, lengths, tuple(map(tuple, group_views(lengths).values())), prefix)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(views, tokens per view) of every group."""
        return [(len(views), self.prefix + self.lengths[views[0]]) for views in self.members]

    def arrange(self, x: Tensor, prefix: Tensor | None) -> Tensor:
        """Put views of equal length side by side, prefix tokens before each: (N, D) -> (N + V*R, D).

        Prefix tokens are (R, D) for all views, or (V, R, D).
        """
        per_view = x.split(self.lengths)
        parts = []
        for views in self.members:
            tokens = torch.stack([per_view[view] for view in views])
            if prefix is not None:
                own = (
                    prefix.expand(len(views), -1, -1)
                    if prefix.dim() == 2
                    else torch.stack([prefix[view] for view in views])
                )
                tokens = torch.cat([own, tokens], dim=1)
            parts.append(tokens.flatten(0, 1))
        return torch.cat(parts) if parts else x

    def restore(self, x: Tensor) -> Tensor:
        """Put patches back in the order of the views, without prefix tokens: (N, D)."""
        per_view = [tokens[self.prefix :] for tokens in self._per_view(x)]
        return torch.cat(per_view) if per_view else x

    def prefixes(self, x: Tensor) -> Tensor:
        """Take the prefix tokens of every view, in the order of the views: (V, R, D)."""
        per_view = [tokens[: self.prefix] for tokens in self._per_view(x)]
        return torch.stack(per_view) if per_view else x.unsqueeze(1)[:, : self.prefix]

    def _per_view(self, x: Tensor) -> list[Tensor]:
        """V times (R + patches, D), in the caller's order."""
        per_view: dict[int, Tensor] = {}
        parts = x.split([b * n for b, n in self.shapes])
        for part, views, shape in zip(parts, self.members, self.shapes, strict=True):
            per_view.update(zip(views, part.unflatten(0, shape), strict=True))
        return [per_view[view] for view in range(len(self.lengths))]


def check_packed(patches: Tensor, grids: Sequence[Grid], patch_dim: int, *, raw: bool = False) -> tuple[Grid, ...]:
    """Refuse packed patches (N, P), uint8 where `raw`, that do not fit the grids; return these as plain tuples.

    >>> check_packed(torch.zeros(6, 12), [(2, 3)], patch_dim=12)
    ((2, 3),)
    """
    grids = check_grids(grids)
    if raw and patches.dtype != torch.uint8:
        raise TypeError(f"raw patches, which mean_std is for, must be uint8; got {patches.dtype}")
    if not raw and not torch.is_floating_point(patches):
        raise TypeError(f"patches must be floating point and normalised; got {patches.dtype}")
    if patches.dim() != 2 or patches.shape[1] != patch_dim:
        raise ValueError(
            f"patches must be (N, P) with P = C*p*p = {patch_dim}; got {tuple(patches.shape)}. "
            "Plan the slices for this model's patch size and channels"
        )
    expected = sum(rows * columns for rows, columns in grids)
    if len(patches) != expected:
        raise ValueError(f"{len(grids)} grids hold {expected} patches in all; got {len(patches)} patches")
    return grids
