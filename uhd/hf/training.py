"""Training in stages: functions that choose what trains, and at which learning rate.

A stage sets ``requires_grad`` on the whole model and returns parameter groups for any optimizer. That is all: the
loop, ``Trainer`` or PEFT is yours. The rates are those of published recipes, all for AdamW without weight decay, on a
cosine schedule after 3 % warm-up:

* :func:`align`: connector 1e-3. LLaVA-UHD (thunlp/LLaVA-UHD, ``scripts/pretrain.sh``) and LLaVA-OneVision
  (LLaVA-VL/LLaVA-NeXT, ``scripts/train/pretrain_siglip.sh``).
* :func:`tune`: connector and language model 2e-5. LLaVA-UHD (``scripts/finetune.sh``), whose ViT never trains.
* :func:`tune_all`: connector and language model 1e-5, vision encoder 2e-6. LLaVA-OneVision
  (``scripts/train/finetune_onevision.sh``: ``learning_rate``, ``mm_vision_tower_lr``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from uhd.hf.modeling import UHDModel

PARTS = ("connector", "language", "vision")


def split_parameters(model: UHDModel) -> dict[str, dict[str, nn.Parameter]]:
    """Every parameter by its name, under the part it belongs to; each is in exactly one.

    ``"vision"`` is the vision encoder; ``"connector"`` what stands between it and the language model: the compressor,
    and learned separators and newlines where there are any; ``"language"`` the language model, whose embeddings are
    also those of "," and "\\n".

    Raises:
        TypeError: The model is wrapped; the message says how to get at the one inside.
    """
    if not isinstance(model, UHDModel):
        raise TypeError(
            f"need the UHD model itself, got {type(model).__name__}: choose what trains before DDP or torch.compile "
            "wrap it; inside PEFT it is model.get_base_model()"
        )
    found: dict[str, dict[str, nn.Parameter]] = {part: {} for part in PARTS}
    for name, parameter in model.named_parameters():
        part = "connector"
        if name.startswith("language_model."):
            part = "language"
        elif name.startswith("visual.vision."):
            part = "vision"
        found[part][name] = parameter
    return found


def set_trainable(model: UHDModel, *parts: str) -> None:
    """Train these parts of :data:`PARTS` and freeze the others.

    Raises:
        ValueError: A part is not known.
        TypeError: As :func:`split_parameters`.
    """
    _check_parts(parts)
    for part, parameters in split_parameters(model).items():
        for parameter in parameters.values():
            parameter.requires_grad_(part in parts)


def parameter_groups(model: UHDModel, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """What trains now, as one optimizer group a part; nothing is frozen or thawed.

    Args:
        model: Its ``requires_grad`` says what trains: set by a stage, by PEFT (pass ``model.get_base_model()``), or by
            hand.
        rates: Learning rate of each part that trains.

    Returns:
        Groups with ``name``, ``params`` and ``lr``, for parts that train.

    Raises:
        ValueError: A part trains and has no rate, nothing trains, or a rate is not a positive number.
        TypeError: As :func:`split_parameters`.
    """
    _check_parts(tuple(rates))
    groups = []
    for part, parameters in split_parameters(model).items():
        trained = [parameter for parameter in parameters.values() if parameter.requires_grad]
        if not trained:
            continue
        if part not in rates:
            raise ValueError(
                f"{len(trained)} parameters of the {part} train and have no learning rate, given are "
                f"{dict(rates)}: add {part!r}, or freeze it with set_trainable"
            )
        if not (math.isfinite(rates[part]) and rates[part] > 0):
            raise ValueError(f"the {part} trains, its learning rate must be above 0, got {rates[part]}")
        groups.append({"name": part, "params": trained, "lr": rates[part]})
    if not groups:
        raise ValueError("no parameter of this model trains: call a stage or set_trainable first")
    return groups


def align(model: UHDModel, *, lr: float = 1e-3) -> list[dict[str, Any]]:
    """First stage: only the connector trains, so that its tokens come to mean something to a frozen language model.

    Separators that are the language model's own "," and "\\n" stay as they are; learned ones train.

    Returns:
        As :func:`parameter_groups`: one group.

    Raises:
        ValueError, TypeError: As :func:`parameter_groups`.
    """
    set_trainable(model, "connector")
    return parameter_groups(model, {"connector": lr})


def tune(model: UHDModel, *, lr: float = 2e-5) -> list[dict[str, Any]]:
    """Second stage: connector and language model train, the vision encoder is frozen. Returns and raises as
    :func:`align`."""
    set_trainable(model, "connector", "language")
    return parameter_groups(model, {"connector": lr, "language": lr})


def tune_all(model: UHDModel, *, lr: float = 1e-5, vision_lr: float = 2e-6) -> list[dict[str, Any]]:
    """Last stage: everything trains, the vision encoder at a smaller rate. Returns and raises as :func:`align`.

    LLaVA-OneVision takes a fifth of the rate for the vision encoder; keep the ratio when changing ``lr``.
    """
    set_trainable(model, *PARTS)
    return parameter_groups(model, {"connector": lr, "language": lr, "vision": vision_lr})


def _check_parts(parts: tuple[str, ...]) -> None:
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise ValueError(f"a model has the parts {PARTS}, got {', '.join(map(repr, unknown))}")
