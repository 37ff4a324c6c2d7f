"""Where the images and videos of a batch stand in a prompt, counted before anything is merged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from uhd.encoded import EncodedImage, EncodedVideo, num_rows
from uhd.merge import assemble, separator_embeddings
from uhd.schema import SeparatorIds, SpatialSchema
from uhd.schema.counted import planned_layout
from uhd.slicing import SlicePlan, VideoPlan


def laid_out(
    tokens: Tensor,
    plans: Sequence[SlicePlan | VideoPlan],
    schema: SpatialSchema,
    separators: Mapping[str, Tensor],
    indices: Sequence[int] | None = None,
) -> list[Tensor]:
    """(T_i, D) of each image, the ``indices``-th of its sample (``None``: all the first), or video.

    ``tokens`` (M, D) are of all of them, ``separators`` as :func:`schema_separators` gives them.
    """
    parts = tokens.split(list(map(num_rows, plans)))
    indices = [0] * len(plans) if indices is None else indices
    layouts = [planned_layout(plan, schema, index) for plan, index in zip(plans, indices, strict=True)]
    return [assemble(part, layout, separators) for part, layout in zip(parts, layouts, strict=True)]


def schema_separators(
    embed: Callable[[Tensor], Tensor],
    ids: Mapping[str, SeparatorIds],
    schema: SpatialSchema,
    learned: Tensor | None,
    device: torch.device,
) -> dict[str, Tensor]:
    """Symbol -> (D,): a language model's own embeddings of their ids, and the schema's ``learned`` ones (S, D)."""
    found = separator_embeddings(embed, ids, device=device)
    if learned is not None:
        like = next(iter(found.values()), learned)
        found.update(zip(schema.learned, learned.to(like.device, like.dtype), strict=True))
    return found


def check_schemas(items: Sequence[EncodedImage | EncodedVideo], schema: SpatialSchema) -> None:
    """Raise a ``ValueError`` where encoded images or videos were laid out by another schema than the model's."""
    for place, item in enumerate(items):
        wanted = planned_layout(item.plan, schema).schema
        if item.layout.schema.replace(name=wanted.name) != wanted:
            kind = "video" if isinstance(item, EncodedVideo) else "image"
            raise ValueError(
                f"encoded {kind} {place} is laid out by schema {item.layout.schema.name!r}, the model by "
                f"{schema.name!r}: encode it again with model.visual"
            )


def match_new(
    counts: Sequence[int], cached: Sequence[int], lengths: Sequence[int], kind: str = "image", *, numbered: bool
) -> tuple[list[int], list[int]]:
    """Which images (or videos) a cache does not hold yet, and the number of each of these in its sample.

    Args:
        counts: Positions of images in each sample.
        cached: How many of these the cache holds.
        lengths: Positions of each image that was given: of those that are new, or of all.
        kind: What they are called in errors.
        numbered: Whether the schema writes their numbers, which need all of them.

    Raises:
        ValueError: They are neither the new ones nor all, or an image is in the cache in part.
    """
    new = [count - old for count, old in zip(counts, cached, strict=True)]
    if not any(cached) or sum(lengths) == sum(new):
        if any(cached) and numbered:
            raise ValueError(
                f"this schema numbers the {kind}s of a sample: give those in the cache as well, they are not encoded "
                "again"
            )
        return list(range(len(lengths))), match(new, lengths, kind)
    indices = match(counts, lengths, kind)
    kept, sample, end = [], -1, 0
    for place, (index, length) in enumerate(zip(indices, lengths, strict=True)):
        if index == 0:
            sample = next(i for i in range(sample + 1, len(counts)) if counts[i])
            end = 0
        if end < cached[sample] < end + length:
            raise ValueError(
                f"the cache ends within {kind} {index} of sample {sample}: it is not of this conversation"
            )
        if end >= cached[sample]:
            kept.append(place)
        end += length
    return kept, [indices[place] for place in kept]


def match(counts: Sequence[int], lengths: Sequence[int], kind: str = "image") -> list[int]:
    """Number of each image (or video) in its sample, where samples of so many positions take some of these lengths."""
    indices: list[int] = []
    for sample, wanted in enumerate(counts):
        first, got = len(indices), 0
        while got < wanted and len(indices) < len(lengths):
            got += lengths[len(indices)]
            indices.append(len(indices) - first)
        if got != wanted:
            taken = lengths[first : len(indices)]
            raise ValueError(
                f"sample {sample} has {wanted} {kind} positions, its {len(taken)} {kind}s take {sum(taken)} "
                f"({list(taken)}); the batch has {sum(counts)} positions and {len(lengths)} {kind}s of "
                f"{sum(lengths)}. Prompts come from the processor, with its slicing that of the model, and are never "
                "cut"
            )
    if len(indices) < len(lengths):
        raise ValueError(
            f"the batch has {len(lengths)} {kind}s, its samples' {kind} positions ({list(counts)}) take "
            f"{len(indices)} of them: every {kind} needs its place in a prompt"
        )
    return indices
