"""What ``from_vision_and_lm`` decides once: the image token, separators, injection and scale of a pair."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from uhd.encoder import VisualEncoder
from uhd.hf.configuration import INJECTION_MODES, UHDConfig, encoder_fields
from uhd.hf.image_processing import UHDImageProcessor, refuse_own_function
from uhd.hf.injection import choose_injection, evaluating
from uhd.hf.processing import IMAGE_TOKEN, PLAIN_CHAT_TEMPLATE, VIDEO_TOKEN, UHDProcessor, placeholder_id
from uhd.parts import ROLES, check_rebuilt
from uhd.saving import EncoderDescription, refuse_shared
from uhd.schema import SeparatorIds, resolve_schema

OTHER_IMAGE_TOKEN, OTHER_VIDEO_TOKEN = "<|image_pad|>", "<|video_pad|>"
"""The placeholders where a schema has a marker of the usual name."""

SAMPLED_IDS = 4096
"""Embeddings that are read for the language model's RMS, spread over its vocabulary."""


def attach(
    encoder: VisualEncoder,
    lm: PreTrainedModel,
    tokenizer: Any,
    *,
    mode: str = "auto",
    match_scale: bool = True,
    image_token: str | None = None,
    video_token: str | None = None,
    separator_ids: Mapping[str, int | Sequence[int]] | None = None,
    numbered_images: int = 10,
    chat_template: str | None = None,
    unsaved: bool = False,
) -> tuple[UHDConfig, UHDProcessor]:
    """The config and the processor of a vision encoder and a language model; neither of them is changed.

    Arguments and errors as in :meth:`uhd.hf.UHDForConditionalGeneration.from_vision_and_lm`.
    """
    _check_parts(encoder, lm, unsaved=unsaved)
    if mode not in ("auto", *INJECTION_MODES):
        raise ValueError(f"mode must be 'auto' or one of {INJECTION_MODES}, got {mode!r}")
    text = lm.config.get_text_config()
    tokenizer, image_token = with_image_token(tokenizer, image_token, encoder.schema.separators)
    tokenizer, video_token = with_video_token(tokenizer, video_token, (*encoder.schema.separators, image_token))
    check_ids(tokenizer, text.vocab_size)
    fill = _fill_token_id(tokenizer, text)
    width = lm.get_input_embeddings()(_ids([fill], lm)).shape[-1]
    if encoder.out_dim not in (None, width):
        raise ValueError(
            f"the encoder gives tokens of width {encoder.out_dim}, the language model embeds in {width}: build the "
            f"encoder with out_dim={width}"
        )
    separators = resolve_schema(
        tokenizer, encoder.schema, image_token=image_token, num_images=numbered_images, given=separator_ids
    )
    _check_separators(separators, text.vocab_size)
    implementations = lm.config._attn_implementation, lm.config._experts_implementation
    config = UHDConfig(
        **encoder_fields(EncoderDescription.of(encoder)),
        text_config=lm.config,
        image_token=image_token,
        image_token_id=placeholder_id(tokenizer, image_token),
        video_token=video_token,
        video_token_id=placeholder_id(tokenizer, video_token, "video"),
        fill_token_id=fill,
        separator_ids={symbol: list(found.ids) for symbol, found in separators.items()},
        injection_mode=choose_injection(lm) if mode == "auto" else mode,
        visual_scale=_scale(encoder, lm) if match_scale else 1.0,
        dtype=lm.dtype,
    )
    # a new config resets those of the configs inside it
    lm.config._attn_implementation, lm.config._experts_implementation = implementations
    plain = PLAIN_CHAT_TEMPLATE.replace("IMAGE_TOKEN", image_token).replace("VIDEO_TOKEN", video_token)
    template = chat_template or tokenizer.chat_template or plain
    images = UHDImageProcessor.from_settings(encoder.slicing, encoder.pixels)
    tokens = {"image_token": image_token, "video_token": video_token}
    return config, UHDProcessor(images, tokenizer, chat_template=template, **tokens)


def _check_separators(separators: Mapping[str, SeparatorIds], vocab_size: int) -> None:
    for symbol, separator in separators.items():
        if max(separator.ids) >= vocab_size:
            raise ValueError(
                f"the separator {symbol!r} has the ids {separator.ids}, the language model embeds {vocab_size}: "
                f"choose with separator_ids={{{symbol!r}: id}}, or resize its embeddings"
            )


def _check_parts(encoder: VisualEncoder, lm: PreTrainedModel, *, unsaved: bool) -> None:
    if not isinstance(encoder, VisualEncoder):
        raise TypeError(
            f"the encoder must be a uhd.VisualEncoder, got {type(encoder).__name__}: put your parts in one"
        )
    if not isinstance(lm, PreTrainedModel):
        raise TypeError(
            f"the language model must be a transformers PreTrainedModel, got {type(lm).__name__}: attach the plain "
            "model and wrap the result (PEFT, DDP, torch.compile)"
        )
    if type(lm.config) not in MODEL_FOR_CAUSAL_LM_MAPPING or not lm.can_generate():
        raise ValueError(
            f"{type(lm).__name__} is not a causal language model of AutoModelForCausalLM: load it with that class, or "
            "register yours with AutoModelForCausalLM.register"
        )
    if not unsaved:
        refuse_own_function(encoder.slicing)
        refuse_shared(encoder)
        for role in ROLES:
            check_rebuilt(getattr(encoder, role), role)


def with_image_token(tokenizer: Any, image_token: str | None, symbols: Sequence[str]) -> tuple[Any, str]:
    """A copy of the tokenizer that has an image token, and a padding token where it can have one."""
    if image_token in symbols:
        raise ValueError(f"the schema writes {image_token!r} itself ({list(symbols)}): choose another image_token")
    known = (image_token, getattr(tokenizer, "image_token", None), IMAGE_TOKEN, OTHER_IMAGE_TOKEN)
    tokenizer, image_token = _with_token(tokenizer, known, symbols)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer, image_token


def with_video_token(tokenizer: Any, video_token: str | None, symbols: Sequence[str]) -> tuple[Any, str]:
    """A copy of the tokenizer that has a video token beside its image token."""
    if video_token in symbols:
        raise ValueError(f"{video_token!r} stands for something else already ({list(symbols)}): choose another")
    known = (video_token, getattr(tokenizer, "video_token", None), VIDEO_TOKEN, OTHER_VIDEO_TOKEN)
    return _with_token(tokenizer, known, symbols)


def _with_token(tokenizer: Any, names: Sequence[str | None], symbols: Sequence[str]) -> tuple[Any, str]:
    """A copy of the tokenizer that has the first of these tokens that is none of the schema's symbols."""
    tokenizer, token = copy.deepcopy(tokenizer), next(name for name in names if name and name not in symbols)
    try:
        placeholder_id(tokenizer, token)
    except ValueError:
        tokenizer.add_special_tokens({"extra_special_tokens": [token]}, replace_extra_special_tokens=False)
    return tokenizer, token


def check_ids(tokenizer: Any, vocab_size: int) -> None:
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= vocab_size:
        raise ValueError(
            f"the tokenizer pads with id {tokenizer.pad_token_id} ({tokenizer.pad_token!r}), the language model "
            f"embeds {vocab_size} ids: resize its embeddings to the tokenizer, or set another pad_token"
        )


def _fill_token_id(tokenizer: Any, text: Any) -> int:
    """An id that the language model embeds: its padding where it has some, never the image token's."""
    found = (getattr(text, "pad_token_id", None), tokenizer.pad_token_id, getattr(text, "eos_token_id", None))
    # per-layer embeddings may cover a part of the vocabulary only
    limit = getattr(text, "vocab_size_per_layer_input", None) or text.vocab_size
    return next((value for value in found if isinstance(value, int) and 0 <= value < limit), 0)


def _scale(encoder: VisualEncoder, lm: PreTrainedModel) -> float:
    """RMS of the language model's embeddings over RMS of the encoder's tokens on a picture of ramps and noise."""
    side = native_side(encoder)
    ramp = np.linspace(0, 255, side)
    picture = np.stack([np.tile(ramp, (side, 1)), np.tile(ramp[:, None], (1, side)), np.full((side, side), 128)], -1)
    picture += np.random.default_rng(0).normal(0, 32, picture.shape)
    with torch.no_grad(), evaluating(encoder):
        tokens = _rms(encoder([picture.clip(0, 255).astype(np.uint8)])[0].tokens)
    embeddings = embedding_rms(lm)
    scale = embeddings / tokens if tokens > 0 else float("nan")
    if not 0 < scale < float("inf"):
        raise ValueError(
            f"the RMS of the language model's embeddings is {embeddings}, that of the encoder's tokens {tokens}: "
            "their scales cannot be matched. Check the weights, or pass match_scale=False"
        )
    return scale


def native_side(encoder: VisualEncoder) -> int:
    """Side of a square image that the encoder sees in its own size, px."""
    vision = encoder.vision
    return encoder.slicing.view_side or getattr(vision, "image_size", None) or 16 * vision.patch_size


def embedding_rms(lm: PreTrainedModel) -> float:
    """RMS of what the language model's input embedding returns, over ids spread over the vocabulary."""
    vocab_size = lm.config.get_text_config().vocab_size
    ids = torch.linspace(0, vocab_size - 1, min(vocab_size, SAMPLED_IDS)).long().tolist()
    with torch.no_grad():
        return _rms(lm.get_input_embeddings()(_ids(ids, lm)))


def _rms(x: Tensor) -> float:
    return x.float().pow(2).mean().sqrt().item()


def _ids(ids: list[int], lm: nn.Module) -> Tensor:
    device = next((p.device for p in lm.get_input_embeddings().parameters()), None)
    return torch.tensor([ids], device=device)
