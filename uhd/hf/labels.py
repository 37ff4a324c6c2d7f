"""Image and video positions are never targets: labels there are set to ignore, wherever they come in.

Labels come in with a processor's batch (:class:`LabelledBatch`), which is before a trainer counts targets, or with a
model's forward, which is behind it: there the count is made right where it is this batch's own, and refused otherwise.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from transformers.processing_utils import BatchFeature

from uhd.merge import IGNORE

ADVICE = (
    'put them into the processor\'s batch (batch["labels"] = labels does the rest), or set them to -100 where '
    "input_ids are the image or the video token"
)
_WARNED: WeakSet[Any] = WeakSet()
"""Models and processors that have warned."""


def labels_of(batch: Mapping[str, Any], processor: Any) -> Tensor:
    """Labels of a batch, or of one sample: its ids, and -100 at padding, images and videos.

    Where the batch has ``assistant_masks``, as ``apply_chat_template(..., return_assistant_tokens_mask=True)`` gives
    them, or a ``completion_mask``, everything outside is -100 too.

    Args:
        batch: ``input_ids`` (..., T) and its masks, tensors or lists.
        processor: Which knows the image and the video token.

    Returns:
        (..., T) int64.
    """
    ids = torch.as_tensor(batch["input_ids"]).long()
    kept = ~is_visual(ids, processor)
    for name in ("attention_mask", "assistant_masks", "completion_mask"):
        if batch.get(name) is not None:
            kept &= torch.as_tensor(batch[name]).view_as(ids).bool()
    return ids.masked_fill(~kept, IGNORE)


def is_visual(ids: Tensor, processor: Any) -> Tensor:
    """Where ids are the image or the video token; a processor may have no video token."""
    visual = ids == processor.image_token_id
    return visual if processor.video_token_id is None else visual | (ids == processor.video_token_id)


def ignore_visual(labels: Tensor, visual: Tensor, owner: Any) -> Tensor:
    """``labels`` (B, T) with -100 at ``visual`` (B, T) positions; ``owner`` warns the first time that some differ.

    Returns:
        A copy, or the very labels where they hold -100 there already.
    """
    if not (visual & (labels != IGNORE)).any():
        return labels
    if owner not in _WARNED:
        _WARNED.add(owner)
        warnings.warn(
            "labels were given at positions of images or videos, which are no targets: they are set to -100 there, "
            "now and from here on",
            stacklevel=2,
        )
    return labels.masked_fill(visual, IGNORE)


def count_without_visual(num_items: Any, given: Tensor, kept: Tensor) -> Any:
    """``num_items_in_batch``, which a trainer counted in the ``given`` labels, as the ``kept`` ones have it.

    Raises:
        ValueError: It is not the count of these labels: a step has other batches too, on this rank or on others.
    """
    for first in (1, 0):  # shifted labels are counted, by transformers before 5.19 all of them
        before, after = (int((labels[..., first:] != IGNORE).sum()) for labels in (given, kept))
        for count in (before, after):
            if bool((torch.as_tensor(num_items) == count).all()):
                return num_items - (count - after)
    raise ValueError(
        f"num_items_in_batch is {float(num_items):g}, and counts image or video positions of several batches: labels "
        f"must hold -100 there before a trainer counts them; {ADVICE}"
    )


def refuse_counted(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """A model's forward pre-hook: TRL computes losses around the forward, from labels that the forward never sees.

    Raises:
        ValueError: Such labels have targets at image or video positions.
    """
    labels, ids = kwargs.get("labels"), kwargs.get("input_ids")
    if not kwargs.get("fused_lm_head") or labels is None or ids is None:
        return
    visual = model.visual_positions(ids).to(labels.device)
    if (visual & (labels != IGNORE)).any():
        raise ValueError(
            f"labels have targets at image or video positions, and TRL has counted them already: {ADVICE}"
        )


class LabelledBatch(BatchFeature):
    """A processor's batch: ``batch["labels"] = labels`` sets them to -100 at image and video positions, in place.

    Labels that share memory with ``input_ids`` are copied first.
    """

    _processor: Any = None

    @classmethod
    def of(cls, batch: BatchFeature, processor: Any) -> LabelledBatch:
        """The batch that ``processor`` made."""
        found = cls(batch.data, skip_tensor_conversion=batch.skip_tensor_conversion)
        found._processor = processor
        return found

    def __setitem__(self, name: str, value: Any) -> None:
        ids = self.data.get("input_ids")
        tensors = isinstance(value, Tensor) and isinstance(ids, Tensor) and value.shape == ids.shape
        if name == "labels" and self._processor is not None and tensors:
            kept = ignore_visual(value, is_visual(ids, self._processor).to(value.device), self._processor)
            shared = value.untyped_storage().data_ptr() == ids.untyped_storage().data_ptr()
            value = kept if shared or kept is value else value.copy_(kept)
        super().__setitem__(name, value)
