"""Outputs that follow the language model: its own fields under its own names, and the images and videos after them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from transformers.modeling_outputs import ModelOutput

MEDIA = ("image_outputs", "video_outputs", "image_hidden_states", "video_hidden_states")
"""What ``get_image_features`` and ``get_video_features`` return, the vision encoder's states only where asked for; and
of that (T_i, D) for each image, as it was laid out, and for each video."""

LEADING = ("loss", "logits")
"""What comes first where the language model returns it, as trainers read outputs by position."""


def with_media(output: ModelOutput, media: Mapping[str, Any]) -> ModelOutput:
    """The language model's output with the fields of :data:`MEDIA` last.

    The result is of a dataclass made for the language model's own output type, so that ``DistributedDataParallel``,
    FSDP, pytrees and pickle take it apart and build it again.

    Raises:
        TypeError: The language model did not return a ``ModelOutput``.
    """
    if not isinstance(output, ModelOutput):
        raise TypeError(
            f"the language model returned a {type(output).__name__}, expected a transformers ModelOutput: its forward "
            "must heed return_dict=True"
        )
    return _output_type(type(output), _undeclared(type(output), output))(**output, **media)


@cache
def _output_type(lm_type: type[ModelOutput], undeclared: tuple[str, ...]) -> type[ModelOutput]:
    names = sorted([*_declared(lm_type), *undeclared], key=lambda name: (*LEADING, name).index(name))
    return dataclasses.make_dataclass(
        "_and_".join([f"UHD{lm_type.__name__}", *undeclared]),
        [(name, Any, None) for name in (*names, *MEDIA)],
        bases=(ModelOutput,),
        namespace={"__module__": lm_type.__module__, "__reduce__": lambda self: (_rebuilt, (lm_type, dict(self)))},
    )


def _declared(lm_type: type[ModelOutput]) -> tuple[str, ...]:
    fields = dataclasses.fields(lm_type) if dataclasses.is_dataclass(lm_type) else ()
    return tuple(field.name for field in fields if field.name not in MEDIA)


def _undeclared(lm_type: type[ModelOutput], items: Iterable[str]) -> tuple[str, ...]:
    return tuple(key for key in items if key not in (*_declared(lm_type), *MEDIA))


def _rebuilt(lm_type: type[ModelOutput], items: dict[str, Any]) -> ModelOutput:
    return _output_type(lm_type, _undeclared(lm_type, items))(**items)
