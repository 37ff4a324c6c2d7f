"""Encoded images and videos in a file: their tokens, and the plans and schema that say what these are."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from uhd.encoded import EncodedImage, EncodedVideo
from uhd.files import damage_named
from uhd.schema import SpatialSchema, TokenLayout
from uhd.schema.counted import checked_layout, layout_of, video_layout
from uhd.settings import Settings
from uhd.slicing import SlicePlan, VideoPlan
from uhd.writing import check_place, new_file


@dataclass(frozen=True)
class _Item(Settings):
    """What a file says of one image or video."""

    name: str
    plan: dict[str, Any]


def save_tokens(
    path: str | os.PathLike,
    encoded: Sequence[EncodedImage | EncodedVideo],
    *,
    schema: SpatialSchema,
    names: Sequence[str] | None = None,
    note: str = "",
) -> None:
    """Write encoded images or videos to one safetensors file: ``tokens`` (all their tokens, D), the rest in metadata.

    Args:
        path: The file; its folder must exist.
        encoded: What :class:`VisualEncoder` or its ``encode_videos`` returned.
        schema: The encoder's.
        names: Where each of them came from.
        note: Free text for whoever reads the file, e.g. that the weights are untrained.

    Raises:
        ValueError: Nothing to save, another schema's layouts, a note that is no string, or no such place.
        OSError: The file cannot be written; what stood there before is unchanged.
    """
    if not encoded:
        raise ValueError("no images to save")
    if not isinstance(note, str):
        raise ValueError(f"note must be a string, got {note!r:.80}")
    names = [""] * len(encoded) if names is None else list(names)
    if len(names) != len(encoded):
        raise ValueError(f"got {len(encoded)} encoded images and {len(names)} names")
    for number, item in enumerate(encoded):
        if _layout_under(schema, item.plan).symbols != item.layout.symbols:
            raise ValueError(f"image {number} was laid out by another schema than {schema.name!r}: give the encoder's")
    images = [{"name": name, "plan": item.plan.to_dict()} for name, item in zip(names, encoded, strict=True)]
    tokens = torch.cat([item.tokens.detach().cpu() for item in encoded])
    metadata = {"format": "uhd-tokens-1", "images": json.dumps(images), "schema": json.dumps(schema.to_dict())}
    if note:
        metadata["note"] = note
    _check_name(path)
    with new_file(path) as new:
        save_file({"tokens": tokens.contiguous()}, new, metadata=metadata)


def _layout_under(schema: SpatialSchema, plan: SlicePlan | VideoPlan) -> TokenLayout:
    return video_layout(plan, schema) if isinstance(plan, VideoPlan) else layout_of(plan, schema)


def check_output(path: str | os.PathLike) -> None:
    """Raise what :func:`save_tokens` would where it could not write, before any work is done."""
    check_place(path)
    _check_name(path)


def _check_name(path: str | os.PathLike) -> None:
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"tokens are written to a .safetensors file, got {os.fspath(path)!r}")


def load_tokens(path: str | os.PathLike) -> list[EncodedImage | EncodedVideo]:
    """The inverse of :func:`save_tokens`.

    Raises:
        ValueError: Not such a file, or damaged: a field is missing or of another type, plans contradict themselves or
            the schema, or their counts are not those of the tokens; the message names the file.
    """
    with damage_named(Path(path)):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != "uhd-tokens-1":
                raise ValueError(f"format {metadata.get('format')!r}, so not written by `uhd encode`")
            tokens = file.get_tensor("tokens")
        if tokens.dim() != 2 or not tokens.is_floating_point():
            raise ValueError(f"tokens is {tuple(tokens.shape)} of {tokens.dtype}, expected (n, D) of floats")
        schema = SpatialSchema.from_dict(json.loads(metadata["schema"]))
        items = [_Item.from_dict(item) for item in json.loads(metadata["images"])]
        plans = [(VideoPlan if "plans" in item.plan else SlicePlan).from_dict(item.plan) for item in items]
        for number, p in enumerate(plans):
            for frame in p.plans if isinstance(p, VideoPlan) else (p,):
                checked_layout(frame, schema, where=f"image {number}", advice="its plan or its schema is another's")
        layouts = [_layout_under(schema, p) for p in plans]
        counts = [laid.num_visual_tokens for laid in layouts]
        if sum(counts) != len(tokens):
            raise ValueError(f"it holds {len(tokens)} tokens, its {len(plans)} plans count {sum(counts)}")
    return [
        (EncodedVideo if isinstance(p, VideoPlan) else EncodedImage)(part, p, laid)
        for part, p, laid in zip(tokens.split(counts), plans, layouts, strict=True)
    ]
