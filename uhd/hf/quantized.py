"""Language models, and whole models, whose weights another library keeps in few bits.

transformers quantizes every linear layer of a model but those that its quantization config names. Names are counted
from the model that is saved, so they are set anew where a quantized language model is given eyes.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers import AutoQuantizationConfig

LEFT_ALONE = ("visual.vision.stem", "visual.compressor")
"""Parts that keep their precision unless asked: one sees raw pixels, one every visual token; both are small."""

_MARKS = ("is_loaded_in_8bit", "is_8bit_serializable", "is_loaded_in_4bit", "is_4bit_serializable", "is_quantized")
_MARKS += ("quantization_method",)


def take_over(model: PreTrainedModel, lm: PreTrainedModel) -> None:
    """Make a language model's quantization the whole model's, which saves and loads by it; nothing if it has none.

    One that cannot be told what to spare stays the language model's, and :func:`refuse_unsaved` refuses to save it.
    """
    quantizer = getattr(lm, "hf_quantizer", None)
    if quantizer is None or _skip_field(quantizer.quantization_config) is None:
        return
    config = copy.deepcopy(quantizer.quantization_config)
    linear = {name: module for name, module in lm.named_modules() if type(module) is nn.Linear}
    whole = [name for name, module in linear.items() if type(module.weight) is nn.Parameter]
    setattr(config, _skip_field(config), ["visual", *(f"language_model.{name}" for name in whole)])
    model.hf_quantizer = copy.copy(quantizer)
    model.hf_quantizer.quantization_config = config
    model.config.quantization_config = config
    for name in _MARKS:
        if name in vars(lm):
            setattr(model, name, getattr(lm, name))


def leave_alone(quantization_config: Any, text_config: Any) -> Any:
    """A quantization config that also spares the ViT's stem, the compressor and the language model's head.

    As it is where it names what to spare itself, or knows no such names; a dictionary becomes a config.
    """
    if isinstance(quantization_config, dict):
        quantization_config = AutoQuantizationConfig.from_dict(quantization_config)
    field = _skip_field(quantization_config)
    if field is None or getattr(quantization_config, field) is not None:
        return quantization_config
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(text_config, trust_remote_code=False)
    heads = [f"language_model.{name}" for name, module in lm.named_modules() if module is lm.get_output_embeddings()]
    config = copy.deepcopy(quantization_config)
    setattr(config, field, [*LEFT_ALONE, *heads])
    return config


def refuse_unsaved(model: PreTrainedModel) -> None:
    """Raise a ``ValueError`` where transformers cannot save the quantized weights, or not load them with eyes."""
    quantizer = getattr(model, "hf_quantizer", None) or getattr(model.language_model, "hf_quantizer", None)
    if quantizer is None:
        return
    if not quantizer.is_serializable() or _skip_field(quantizer.quantization_config) is None:
        method = quantizer.quantization_config.quant_method
        raise ValueError(
            f"the model is quantized with {getattr(method, 'value', method)}, which cannot be saved with eyes: save "
            "the vision side with model.visual.save_pretrained(folder) and attach it again to the language model that "
            "you load, or quantize with torchao or bitsandbytes"
        )


def _skip_field(config: Any) -> str | None:
    names = ("modules_to_not_convert", "llm_int8_skip_modules", "skip_modules")
    return next((name for name in names if hasattr(config, name)), None)
