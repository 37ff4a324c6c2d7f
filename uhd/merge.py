"""Visual tokens into a language model's embeddings: pure, differentiable, and counted before anything is written.

>>> rows, images = [[5, 8, 6], [7]], [[torch.ones(2, 4)], []]
>>> batch = merge_samples(rows, images, embed=nn.Embedding(9, 4), image_token_id=8, pad_token_id=0)
>>> batch.labels.tolist()
[[5, -100, -100, 6], [7, -100, -100, -100]]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from uhd.schema import SeparatorIds, TokenLayout

IGNORE = -100
"""Label that PyTorch's cross entropy leaves out."""


def merge_visual(embeds: Tensor, mask: Tensor, visual: Tensor, *, counts: Sequence[int] | None = None) -> Tensor:
    """Write visual rows, in order, to the masked positions of a copy of ``embeds``.

    >>> embeds, mask = torch.zeros(1, 3, 2), torch.tensor([[False, True, False]])
    >>> merge_visual(embeds, mask, torch.ones(1, 2)).tolist()
    [[[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]]

    Args:
        embeds: (B, T, D), any float dtype.
        mask: (B, T) bool, True where a visual row goes: row-major, anywhere, in any number of runs, also none. A
            mask on the CPU is counted there; one on an accelerator costs a sync.
        visual: (M, D), M the number of masked positions. It is cast and moved to the dtype and device of ``embeds``.
        counts: Visual rows meant for each batch row. Without them, rows that swap a position go unnoticed: only the
            total is compared.

    Returns:
        (B, T, D) in the dtype of ``embeds``; gradients reach ``visual`` and the unmasked part of ``embeds``.

    Raises:
        ValueError: Shapes or the mask's dtype do not fit, or the counts differ; both counts are in the message.
        TypeError: ``embeds`` are not floating point.
    """
    if embeds.ndim != 3 or mask.shape != embeds.shape[:2] or mask.dtype != torch.bool:
        got = f"embeds {tuple(embeds.shape)} and mask {tuple(mask.shape)} of {mask.dtype}"
        raise ValueError(f"expected embeds (B, T, D) and a bool mask (B, T), got {got}")
    if not embeds.is_floating_point():
        raise TypeError(f"embeds must be floating point, got {embeds.dtype}")
    if visual.ndim != 2 or visual.shape[1] != embeds.shape[2]:
        raise ValueError(f"expected visual (M, {embeds.shape[2]}), the width of embeds, got {tuple(visual.shape)}")
    if counts is not None and mask.sum(1).tolist() != list(counts):
        raise ValueError(f"masked positions of each row: {mask.sum(1).tolist()}, visual rows meant: {list(counts)}")
    # the gradient of index_copy gathers by position; that of masked_scatter would count the mask again
    positions = mask.flatten().nonzero().squeeze(1)
    if len(positions) != len(visual):
        rows = mask.sum(1).tolist()
        raise ValueError(f"{len(positions)} masked positions but {len(visual)} visual rows; of each batch row: {rows}")
    positions = positions.to(embeds.device, non_blocking=positions.device.type == "cpu")
    merged = embeds.flatten(0, 1).index_copy(0, positions, visual.to(embeds))
    return merged.view(embeds.shape)


def assemble(
    view_tokens: Tensor | Sequence[Tensor], layout: TokenLayout, separator_embeddings: Mapping[str, Tensor]
) -> Tensor:
    """One image's rows of the language model's sequence: its views and separators, as the layout orders them.

    >>> from uhd.schema import layout
    >>> from uhd.slicing import SlicingConfig, plan
    >>> laid = layout(plan((336, 672), SlicingConfig.preset("llava-uhd", tokens_per_view=1)))
    >>> separators = {symbol: torch.zeros(1) for symbol in laid.schema.separators}
    >>> assemble(torch.tensor([[1.0], [2.0], [3.0]]), laid, separators).flatten().tolist()  # two slices, the overview
    [1.0, 0.0, 2.0, 0.0, 3.0]

    Args:
        view_tokens: In the order of ``plan.views``: (V, Q, D), or packed (sum of tokens, D), or V tensors (tokens, D).
        layout: The image's layout.
        separator_embeddings: Symbol -> (D,), for every symbol of the layout that is no view. They are cast and moved
            to the dtype and device of the views.

    Returns:
        (layout.num_tokens, D) in the dtype of the views; gradients reach views and separators.

    Raises:
        ValueError: The number or width of views, tokens or separators does not fit the layout.
    """
    views = _split_views(view_tokens, layout)
    width = views[0].shape[-1]
    separators: dict[str, Tensor] = {}
    for symbol in dict.fromkeys(entry.symbol for entry in layout.entries if entry.view is None):
        if symbol not in separator_embeddings:
            raise ValueError(f"no embedding for the symbol {symbol!r}; there are {sorted(separator_embeddings)}")
        found = separator_embeddings[symbol]
        if found.shape != (width,):
            raise ValueError(f"the embedding of {symbol!r} must be ({width},) as the views, got {tuple(found.shape)}")
        separators[symbol] = found.to(views[0]).unsqueeze(0)
    return torch.cat([separators[e.symbol] if e.view is None else views[e.view] for e in layout.entries])


def separator_embeddings(
    embed: Callable[[Tensor], Tensor], ids: Mapping[str, SeparatorIds], *, device: torch.device | str | None = None
) -> dict[str, Tensor]:
    """Embed resolved separators by calling the language model's own input embedding, which may scale (Gemma).

    >>> embed = nn.Embedding.from_pretrained(torch.tensor([[0.0, 0.0], [1.0, 2.0]]))
    >>> separator_embeddings(embed, {",": SeparatorIds((1,), "given")})[","].tolist()
    [1.0, 2.0]

    Args:
        embed: ``lm.get_input_embeddings()``, or any function (1, N) int64 -> (1, N, D).
        ids: From :func:`uhd.schema.resolve_schema`; the mean is taken over several ids of one symbol.
        device: Of the ids; ``None`` is the module's, the CPU for a plain function.

    Returns:
        Symbol -> (D,), differentiable.
    """
    if not ids:
        return {}
    if device is None and isinstance(embed, nn.Module):
        device = next((parameter.device for parameter in embed.parameters()), None)
    flat = torch.tensor([list(chain.from_iterable(found.ids for found in ids.values()))], device=device)
    vectors = embed(flat)[0].split([len(found.ids) for found in ids.values()])
    return {symbol: part.mean(0) for symbol, part in zip(ids, vectors, strict=True)}


@dataclass(frozen=True)
class MergedBatch:
    """A padded batch, ready for ``lm(inputs_embeds=..., attention_mask=..., position_ids=..., labels=...)``.

    Attributes:
        inputs_embeds: (B, T, D).
        attention_mask: (B, T) int64, 0 at padding.
        position_ids: (B, T) int64, 0, 1, ... along each row's own tokens, 0 at padding.
        labels: (B, T) int64, -100 at visual positions and padding.
        input_ids: (B, T) int64, the pad token at visual positions and padding.
        visual_mask: (B, T) bool, True at visual positions.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor
    input_ids: Tensor
    visual_mask: Tensor


def merge_samples(
    input_ids: Sequence[Sequence[int] | Tensor],
    images: Sequence[Sequence[Tensor]],
    *,
    embed: Callable[[Tensor], Tensor],
    image_token_id: int,
    pad_token_id: int,
    labels: Sequence[Sequence[int] | Tensor] | None = None,
    padding_side: str = "right",
    device: torch.device | str | None = None,
) -> MergedBatch:
    """Build a padded batch from rows of text in which ONE placeholder stands for each image. Nothing is truncated.

    :class:`uhd.hf.UHDProcessor` writes one for every position of an image instead, see :func:`merge_visual`.

    Args:
        input_ids: B rows of ids; a row without placeholders is text alone and takes no image.
        images: For every row its images in order, each (tokens, D) as :func:`assemble` gives them.
        embed: ``lm.get_input_embeddings()``, or any function (B, T) int64 -> (B, T, D). It is called once.
        image_token_id: The placeholder. It is never embedded.
        pad_token_id: An id that ``embed`` knows, for padding and below the images.
        labels: B rows as long as those of ``input_ids``; ``None`` takes the ids. A placeholder's label is not used.
        padding_side: ``"right"`` for training, ``"left"`` for generation.
        device: Of the batch; ``None`` is that of the first image, or of the first row of ids, or the CPU.

    Raises:
        ValueError: There are no rows, a row and its images or labels differ in number (the message names the row and
            both numbers), an image is not (tokens, D), or a setting is unknown.
    """
    if pad_token_id == image_token_id:
        raise ValueError(f"pad_token_id and image_token_id are both {pad_token_id}: the placeholder is never embedded")
    if padding_side not in ("right", "left"):
        raise ValueError(f"padding_side must be 'right' or 'left', got {padding_side!r}")
    rows = _matched(input_ids, input_ids if labels is None else labels, images)
    spread = [_spread_row(row, *parts, image_token_id) for row, parts in enumerate(rows)]
    flat = [picture for pictures in images for picture in pictures]
    if device is None:
        device = next((item.device for item in [*flat, *input_ids] if isinstance(item, Tensor)), None)
    ids, targets, masks = zip(*spread, strict=True)

    def padded(rows: Sequence[Tensor], fill: int) -> Tensor:
        return pad_sequence(list(rows), batch_first=True, padding_value=fill, padding_side=padding_side)

    mask, attention = padded(masks, 0), padded([torch.ones_like(row) for row in ids], 0)
    ids = padded(ids, pad_token_id).masked_fill(mask, pad_token_id).to(device)
    embeds = embed(ids)
    widths = sorted({picture.shape[1] for picture in flat})
    if widths not in ([], [embeds.shape[-1]]):
        raise ValueError(f"images are {widths} wide, embed gives {embeds.shape[-1]}: their widths must be equal")
    tokens = torch.cat(flat) if flat else embeds.new_zeros(0, embeds.shape[-1])
    return MergedBatch(
        inputs_embeds=merge_visual(embeds, mask, tokens),
        attention_mask=attention.to(ids.device),
        position_ids=((attention.cumsum(1) - 1) * attention).to(ids.device),
        labels=padded(targets, IGNORE).masked_fill(mask, IGNORE).to(ids.device),
        input_ids=ids,
        visual_mask=mask.to(ids.device),
    )


def _matched(
    input_ids: Sequence[Any], labels: Sequence[Any], images: Sequence[Sequence[Tensor]]
) -> Iterator[tuple[Tensor, Tensor, Sequence[Tensor]]]:
    if not len(input_ids) or len(images) != len(input_ids):
        raise ValueError(f"{len(input_ids)} rows of ids and images for {len(images)}: need as many, at least one")
    if len(labels) != len(input_ids):
        raise ValueError(f"got {len(input_ids)} rows of ids and {len(labels)} rows of labels")
    return zip(map(_ids, input_ids), map(_ids, labels), images, strict=True)


def _spread_row(
    row: int, ids: Tensor, labels: Tensor, images: Sequence[Tensor], image_token_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, labels, True where visual) of one row after every placeholder got its image's length."""
    visual = ids == image_token_id
    if (count := int(visual.sum())) != len(images):
        raise ValueError(f"row {row} has {count} placeholders (id {image_token_id}) and {len(images)} images")
    if len(labels) != len(ids):
        raise ValueError(f"row {row} has {len(ids)} ids and {len(labels)} labels")
    for place, image in enumerate(images):
        if image.ndim != 2:
            raise ValueError(f"image {place} of row {row} must be (tokens, D), got {tuple(image.shape)}")
    lengths = torch.ones_like(ids)
    lengths[visual] = torch.tensor([len(image) for image in images], dtype=torch.long)
    return ids.repeat_interleave(lengths), labels.repeat_interleave(lengths), visual.repeat_interleave(lengths)


def _split_views(view_tokens: Tensor | Sequence[Tensor], layout: TokenLayout) -> Sequence[Tensor]:
    wanted = list(layout.tokens_per_view)
    if isinstance(view_tokens, Tensor) and view_tokens.ndim == 2:
        if len(view_tokens) != sum(wanted):
            raise ValueError(f"layout of {sum(wanted)} visual tokens {wanted}, got {len(view_tokens)} packed rows")
        return view_tokens.split(wanted)
    views = list(view_tokens)
    got = [tuple(view.shape) for view in views]
    if any(len(shape) != 2 or shape[1] != got[0][1] for shape in got):
        raise ValueError(f"every view must be (tokens, D) with the same D, got {got}")
    if (lengths := [shape[0] for shape in got]) != wanted:
        raise ValueError(f"the layout has {len(wanted)} views of {wanted} tokens, got {len(got)} of {lengths}")
    return views


def _ids(row: Sequence[int] | Tensor) -> Tensor:
    if isinstance(row, Tensor) and row.ndim != 1:
        raise ValueError(f"a row of ids is one-dimensional, got {tuple(row.shape)}: split the batch into rows")
    return torch.as_tensor(row, dtype=torch.long, device="cpu")
