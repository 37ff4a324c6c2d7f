"""How many tokens a view gets, and in what grid, where latents follow the view's size and shape: integers alone."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

from uhd.slicing.plan import Canvas


@lru_cache(maxsize=65_536)
def latent_grid(tokens: int, patches_hw: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of at most so many latents over a view of (rows, columns) patches.

    The latents' cells divide the view; their longer side is as short as it can be. Of grids that are equal in this the
    one of the most latents is taken, then that of fewer rows.

    >>> latent_grid(64, (24, 24)), latent_grid(64, (16, 36)), latent_grid(9, (2, 7)), latent_grid(7, (4, 4))
    ((8, 8), (5, 12), (2, 4), (2, 3))
    """
    height, width = patches_hw
    rows = max(math.isqrt(tokens * height // width), 1)  # near where cells are square
    while rows > 1 and height * (tokens // rows) < width * rows:
        rows -= 1
    while rows < tokens and height * (tokens // (rows + 1)) >= width * (rows + 1):
        rows += 1
    options = [(rows, tokens // rows)]  # cells no wider than high, where there are such
    if rows < tokens:
        columns = tokens // (rows + 1)
        options.append((tokens // columns, columns))  # no higher than wide
    sides = [max(height * c, width * r) * math.prod(options[-1 - at]) for at, (r, c) in enumerate(options)]
    return min(zip(sides, options, strict=True), key=lambda pair: (pair[0], -math.prod(pair[1]), pair[1]))[1]


def shared_latents(
    tokens: int, slices: int, slice_hw: tuple[int, int], overview_hw: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Grids of latents for each slice and for the overview, of at most ``tokens`` in all, by their patches.

    With n patches in a slice and P in all views, a slice has the :func:`latent_grid` of ``tokens * n // P``, and the
    overview that of what the slices leave.

    Args:
        tokens: At least one a view.
        slices: Number of slices, all of one size; 0 where the image is not cut.
        slice_hw, overview_hw: (rows, columns) of patches of a slice, which is not looked at without one, and of the
            overview.

    >>> shared_latents(45, 4, (4, 4), (4, 4)), shared_latents(36, 3, (4, 4), (2, 7))
    (((3, 3), (3, 3)), ((3, 3), (2, 4)))
    """
    if not slices:
        slice_hw = overview_hw
    of_slice, all_patches = math.prod(slice_hw), slices * math.prod(slice_hw) + math.prod(overview_hw)
    own = latent_grid(max(tokens * of_slice // all_patches, 1), slice_hw)
    return own, latent_grid(tokens - slices * math.prod(own), overview_hw)


def with_latents(canvas: Canvas, latents_hw: tuple[int, int]) -> Canvas:
    """The canvas with this grid of tokens for each of its tiles."""
    return replace(canvas, tokens_per_view=math.prod(latents_hw), latents_hw=latents_hw)


def fitted(patch_size: int, tokens_per_view: int, canvases: tuple[Canvas, ...]) -> tuple[tuple[Canvas, ...], int]:
    """The overview's canvas, and the slices' where there are some, with shared latents; and the tokens in all."""
    seen = {c.kind: (c.view_hw[0] // patch_size, c.view_hw[1] // patch_size) for c in canvases}
    slices = sum(len(c.tiles) for c in canvases if c.kind == "slice")
    grids = shared_latents((slices + 1) * tokens_per_view, slices, seen.get("slice", (0, 0)), seen["overview"])
    found = tuple(with_latents(c, grids[c.kind == "overview"]) for c in canvases)
    return found, sum(len(c.tiles) * c.tokens_per_view for c in found)
