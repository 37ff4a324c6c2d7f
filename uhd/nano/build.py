"""The nano model's parts: a small packed ViT, the shared resampler, a small Llama, a character tokenizer."""

from __future__ import annotations

import string
from dataclasses import dataclass, replace
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from uhd.encoder import VisualEncoder
from uhd.hf import UHDForConditionalGeneration
from uhd.pixels import PixelSettings
from uhd.resampler import PerceiverConfig, PerceiverResampler
from uhd.schema import SpatialSchema
from uhd.slicing import PRESETS, SeparatorCount, SlicingConfig, SlicingLike
from uhd.vision import ViT, ViTConfig

PAD, BEGIN, END, IMAGE = "<pad>", "<begin>", "<end>", "<image>"
CHAT_TEMPLATE = (
    f"{BEGIN}{{% for message in messages %}}{{% if message.content is string %}}{{{{ message.content }}}}{{% else %}}"
    f"{{% for part in message.content %}}{{% if part.type == 'image' %}}{IMAGE}"
    "{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    f"{{% if message.role == 'assistant' %}}{END}{{% endif %}}{{% endfor %}}"
)
"""The image, then the question; the model has seen one question at a time."""


@dataclass(frozen=True, kw_only=True)
class NanoConfig:
    """Sizes of a nano model. The defaults are those of ``nano``: 1.56 M parameters."""

    side: int = 32  # of the square that a view has as many pixels as, px
    patch_size: int = 8  # px
    max_slices: int = 4
    latents: int = 9  # tokens per view, a square number
    width: int = 128  # of the ViT, the resampler and the language model
    vision_depth: int = 3  # blocks
    vision_heads: int = 4
    vision_mlp: int = 384  # hidden width
    latent_heads: int = 4
    text_depth: int = 4
    text_heads: int = 4
    text_mlp: int = 384

    @property
    def slicing(self) -> SlicingConfig:
        """LLaVA-UHD's rule for this size, with sides rounded to the nearest patch: 4 patches are too few to floor."""
        return SlicingConfig(
            name="nano",
            image_size=self.side,
            patch_size=self.patch_size,
            max_slices=self.max_slices,
            rounding="round",
            clamp=True,
            tokens_per_view=self.latents,
            separators=SeparatorCount(per_slice=1),
        )


def plus_parts(base: NanoConfig | None = None) -> dict[str, Any]:
    """What :func:`build_nano` takes for a nano model of the rule ``uhd-plus``: tables for one view of four times the
    pixels, and 64 learned latents, which are fitted to it.

    >>> build_nano(**plus_parts()).visual.plan((24, 96)).num_views
    1
    """
    base, rule = base or NanoConfig(), PRESETS["uhd-plus"]
    options = {name: getattr(rule, name) for name in rule.later}
    return {
        "config": replace(base, side=2 * base.side, latents=64),
        "slicing": base.slicing.replace(name="nano-plus", **options),
        "fitted_position": "direct",
    }


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character: printable ASCII, space and line break, and four special tokens."""
    characters = [*string.digits, *string.ascii_letters, *string.punctuation, " ", "\n"]
    vocabulary = {token: number for number, token in enumerate([PAD, BEGIN, END, IMAGE, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        extra_special_tokens=[IMAGE],
        clean_up_tokenization_spaces=False,
    )


def build_nano(
    config: NanoConfig | None = None,
    *,
    slicing: SlicingLike | None = None,
    schema: SpatialSchema | str = "llava-uhd",
    fitted_position: str = "interpolated",
    seed: int = 0,
) -> UHDForConditionalGeneration:
    """An untrained nano model from the public parts; the caller's random state is left as it was.

    Args:
        config: Its sizes.
        slicing, schema: As of :class:`uhd.VisualEncoder`; ``None`` is the config's own slicing.
        fitted_position: As of :class:`uhd.resampler.PerceiverConfig`.
        seed: Of the weights.
    """
    config = config or NanoConfig()
    tokenizer = character_tokenizer()
    latents = {
        "num_heads": config.latent_heads,
        "num_latents": config.latents,
        "fitted_position": fitted_position,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = VisualEncoder(
            _vision(config),
            PerceiverResampler(PerceiverConfig(width=config.width, vision_width=config.width, **latents)),
            slicing=config.slicing if slicing is None else slicing,
            schema=schema,
            pixels=PixelSettings(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
            check_image_size=False,
        )
        lm = _language_model(config, tokenizer)
        said = {"image_token": IMAGE, "chat_template": CHAT_TEMPLATE}
        return UHDForConditionalGeneration.from_vision_and_lm(
            encoder, lm, tokenizer, mode="embeds", match_scale=False, **said
        )


def _vision(config: NanoConfig) -> ViT:
    side = config.side // config.patch_size
    return ViT(
        ViTConfig(
            patch_size=config.patch_size,
            image_size=config.side,
            width=config.width,
            depth=config.vision_depth,
            heads=config.vision_heads,
            mlp_width=config.vision_mlp,
            position_grid_hw=(side, side),
            stem_border=config.patch_size // 2,
            stem_grey=True,
        )
    )


def _language_model(config: NanoConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    lm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.width,
            intermediate_size=config.text_mlp,
            num_hidden_layers=config.text_depth,
            num_attention_heads=config.text_heads,
            num_key_value_heads=config.text_heads,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            **special,
        )
    )
    # visual tokens leave a LayerNorm with an RMS near 1; characters begin at the same scale
    nn.init.normal_(lm.get_input_embeddings().weight, std=1.0)
    return lm
