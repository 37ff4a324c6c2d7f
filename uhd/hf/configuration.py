"""``UHDConfig``: the vision encoder, the compressor and any causal language model, in one ``config.json``."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from uhd.checkpoint import check_described
from uhd.files import damage_named
from uhd.hf.bare import FromPackage, auto_map, save_beside
from uhd.hf.outputs import MEDIA
from uhd.hf.versions import CACHE_NAMES
from uhd.parts import completed
from uhd.pixels import PixelSettings
from uhd.resampler import PerceiverConfig
from uhd.saving import EncoderDescription
from uhd.schema import SeparatorIds, SpatialSchema
from uhd.schema.counted import named_function, slicing_from_dict
from uhd.settings import check_fields, check_range
from uhd.slicing import Slicing, find
from uhd.vision import CompressedViTConfig, ViTConfig

if TYPE_CHECKING:
    from typing_extensions import Self

FORMAT = 1
"""Version of what is written to ``config.json``; another one is refused, never guessed at."""

INJECTION_MODES = ("embeds", "hook")

_VIT_CONFIGS = {"vit": ViTConfig, "compressed_vit": CompressedViTConfig}


class UHDVisionConfig(PreTrainedConfig):
    """The fields of :class:`uhd.vision.ViTConfig`, and which kind of vision encoder they are for.

    ``kind`` is ``"vit"``, ``"compressed_vit"`` for a :class:`uhd.vision.CompressedViT`, whose two fields follow the
    ViT's, or the name that :func:`uhd.register_vision` gave a class: that is built of ``settings``, and of the other
    fields only sizes hold. ``"custom"`` is a module that only its maker can build again. The defaults are CLIP
    ViT-L/14 at 336 px, read at the layer before the last.
    """

    later = ("stem_border", "stem_hidden", "stem_grey", "compress_after", "compressor", "settings", "class_name")
    model_type = "uhd_vision"
    base_config_key = "vision_config"
    attribute_map = {  # noqa: RUF012 - read by transformers as it stands
        "hidden_size": "width",
        "num_hidden_layers": "depth",
        "num_attention_heads": "heads",
        "intermediate_size": "mlp_width",
        "num_channels": "channels",
        "layer_norm_eps": "eps",
    }

    kind: str = "vit"
    patch_size: int = 14
    width: int = 1024
    depth: int = 24
    heads: int = 16
    mlp_width: int = 4096
    image_size: int | None = 336
    channels: int = 3
    activation: str = "quick_gelu"
    eps: float = 1e-5
    class_token: bool = True
    num_registers: int = 0
    patch_bias: bool = False
    stem_border: int = 0
    stem_hidden: int | None = None
    stem_grey: bool = False
    qkv_bias: bool = True
    layer_scale: float | None = None
    pre_norm: bool = True
    final_norm: bool = False
    position_grid_hw: tuple[int, int] | list[int] | None = (24, 24)
    position_prefix: int = 1
    interpolation: str = "bicubic"
    antialias: bool = False
    bucket_rule: str = "integer"
    select_layer: int = -2
    compress_after: tuple[int, ...] | list[int] | None = None
    compressor: str = "window"
    settings: dict[str, Any] | None = None
    class_name: str | None = None

    @classmethod
    def from_vit(cls, config: ViTConfig) -> UHDVisionConfig:
        """The inverse of :meth:`to_vit`."""
        kind = next(kind for kind, config_class in _VIT_CONFIGS.items() if type(config) is config_class)
        return cls(kind=kind, **config.to_dict())

    def to_vit(self) -> ViTConfig:
        """What :class:`uhd.vision.ViT`, or :class:`uhd.vision.CompressedViT`, is built from.

        Raises:
            ValueError: The vision encoder is the caller's own, or its values do not fit together.
        """
        if self.kind not in _VIT_CONFIGS:
            raise ValueError(
                f"the vision encoder is of kind {self.kind!r}: only its maker can build it. Build it, put it in a "
                "VisualEncoder and attach that with from_vision_and_lm, or register its class before it is saved "
                "(uhd.register_vision)"
            )
        config_class = _VIT_CONFIGS[self.kind]
        return config_class(**{field.name: getattr(self, field.name) for field in dataclasses.fields(config_class)})


class UHDResamplerConfig(PreTrainedConfig):
    """The compressor: ``kind`` is one of those that :class:`uhd.VisualEncoder` can build again, those that
    :func:`uhd.register_compressor` names included, or ``"custom"``.

    ``settings`` are its constructor's (for the perceiver :class:`uhd.resampler.PerceiverConfig`'s); ``None`` is a
    perceiver of 64 latents between the vision encoder's width and the language model's.
    """

    later = ("class_name",)
    model_type = "uhd_resampler"
    base_config_key = "resampler_config"

    kind: str = "perceiver"
    settings: dict[str, Any] | None = None
    class_name: str | None = None


class UHDConfig(FromPackage, PreTrainedConfig):
    """A vision encoder, a compressor, and the causal language model they see for.

    Attributes:
        vision_config, resampler_config, text_config: The parts; ``text_config`` is any ``AutoConfig``.
        slicing_config, schema_config, pixel_config: Dicts of :class:`uhd.SlicingConfig` (or any other strategy's
            settings, as :func:`uhd.schema.counted.slicing_from_dict` reads them), :class:`uhd.SpatialSchema` and
            :class:`uhd.PixelSettings`; :attr:`slicing`, :attr:`schema` and :attr:`pixels` are those objects. A slicing
            function of your own has no such dictionary: only its name is here, and :attr:`slicing` raises.
        packer_config: Of :class:`uhd.resampler.FeaturePacker`, where the slicing's packing has learned embeddings.
        check_image_size: As in :class:`uhd.VisualEncoder`.
        image_token, image_token_id: The placeholder. Its id is replaced before the language model sees it, so it may
            lie outside the vocabulary.
        video_token, video_token_id: The same for videos; an id of ``None``: the model takes no videos.
        fill_token_id: What the language model's ids hold at image positions: its padding token where it has one.
        separator_ids: Symbol -> ids; the symbol's vector is the mean of their embeddings.
        injection_mode: ``"embeds"``: visual rows go into ``inputs_embeds``. ``"hook"``: ids flow, and a hook on the
            input embedding replaces its rows.
        visual_scale: Visual tokens are multiplied by it, so that their RMS is that of the language model's
            embeddings; 1.0 changes nothing. Set by ``from_vision_and_lm``.
        visual_dtype: Of the vision side where it is not the language model's, e.g. ``"float32"``.
        encoder_note: As ``note`` in :class:`uhd.VisualEncoder`.
        uhd_format: Version of this description.

    Raises:
        ValueError: ``uhd_format`` or a setting is not known; the message names it.
    """

    later = ("packer_config", "video_token", "video_token_id")
    model_type = "uhd"
    sub_configs = {  # noqa: RUF012 - read by transformers as it stands
        "text_config": AutoConfig,
        "vision_config": UHDVisionConfig,
        "resampler_config": UHDResamplerConfig,
    }

    vision_config: dict | PreTrainedConfig | None = None
    resampler_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    slicing_config: dict[str, Any] | None = None
    packer_config: dict[str, Any] | None = None
    schema_config: dict[str, Any] | None = None
    pixel_config: dict[str, Any] | None = None
    check_image_size: bool = True
    image_token: str = "<image>"
    image_token_id: int | None = None
    video_token: str = "<video>"
    video_token_id: int | None = None
    fill_token_id: int = 0
    separator_ids: dict[str, list[int]] | None = None
    injection_mode: str = "embeds"
    visual_scale: float = 1.0
    visual_dtype: str | None = None
    encoder_note: str = ""
    tie_word_embeddings: bool = False
    uhd_format: int = FORMAT

    def __post_init__(self, **kwargs: Any) -> None:
        if self.uhd_format != FORMAT:
            raise ValueError(
                f"this UHDConfig has uhd_format {self.uhd_format!r}, this version of uhd reads and writes {FORMAT}: "
                "install the version of uhd that wrote it, or save the model again with this one"
            )
        if self.injection_mode not in INJECTION_MODES:
            raise ValueError(
                f"injection_mode must be one of {INJECTION_MODES}, got {self.injection_mode!r}: from_vision_and_lm "
                'chooses with mode="auto"'
            )
        for name, config_class in self.sub_configs.items():
            setattr(self, name, _built(config_class, getattr(self, name)))
        super().__post_init__(**kwargs)
        for part in (self, self.vision_config, self.resampler_config):
            check_fields(part, type(part).__annotations__)
        check_range(self, ("image_token_id", "video_token_id", "fill_token_id", "visual_scale"), 0)
        text = self.text_config.get_text_config()
        if not hasattr(text, "vocab_size"):
            raise ValueError(
                f"text_config is a {type(text).__name__} without a vocab_size, expected a language model's"
            )
        vocab, ids = text.vocab_size, (self.separator_ids or {}).values()
        if beyond := [one for one in (self.fill_token_id, *itertools.chain(*ids)) if not 0 <= one < vocab]:
            raise ValueError(f"fill_token_id and separator_ids lie in 0..{vocab - 1}, got {beyond[0]}")
        if self.visual_dtype is not None and not _is_floating(self.visual_dtype):
            raise ValueError(
                f"visual_dtype must be a floating dtype of torch, such as 'float32', got {self.visual_dtype!r}"
            )
        if self.slicing_config is None or not named_function(self.slicing_config):
            self.slicing_config = self.slicing.to_dict()
        self.schema_config = self.schema.to_dict()
        self.pixel_config = self.pixels.to_dict()
        if self.resampler_config.kind == "perceiver" and self.resampler_config.settings is None:
            width, vision_width = text.hidden_size, self.vision_config.width
            new = PerceiverConfig.for_new(width, vision_width, fits_latents=self.slicing.fits_latents)
            self.resampler_config.settings = new.to_dict()
        elif self.resampler_config.settings is not None:  # what code leaves out; a file has all
            self.resampler_config.settings = completed(self.resampler_config.kind, self.resampler_config.settings)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Self:
        """As in transformers; a save that was killed is finished first, see :mod:`uhd.writing`.

        Raises:
            FileNotFoundError: A local folder has no ``config.json``, which transformers reads as an empty one.
            ValueError: As :meth:`from_dict`.
        """
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        if folder.is_dir():
            check_described(folder)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, of a whole ``config.json``.

        Raises:
            ValueError: It names what is missing or wrong; or it has code of the hub as its attention, where no keyword
                ``attn_implementation`` asks for another.
        """
        asked = {} if kwargs.get("attn_implementation") is None else {"attn_implementation": None}
        _refuse_kernels({**config_dict, **asked})
        with damage_named(Path(config_dict.get("_name_or_path") or "", "config.json")):
            _check_whole(cls, config_dict, "")
            for name, part in (("vision_config", UHDVisionConfig), ("resampler_config", UHDResamplerConfig)):
                _check_whole(part, config_dict[name], f"{name}.")
            if "model_type" not in config_dict["text_config"]:
                raise ValueError("missing text_config.model_type")
            return super().from_dict(config_dict, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers, with what a process without uhd imported needs, see :mod:`uhd.hf.bare`."""
        self.auto_map = auto_map(
            AutoConfig="UHDConfig",
            AutoModel="UHDModel",
            AutoModelForImageTextToText="UHDForConditionalGeneration",
            AutoModelForMultimodalLM="UHDForConditionalGeneration",
            AutoProcessor="UHDProcessor",
        )
        save_beside(super().save_pretrained, save_directory, *args, **kwargs)

    def describe(self, encoder: EncoderDescription) -> None:
        """Take an encoder's description, part by part."""
        for name, value in encoder_fields(encoder).items():
            setattr(self, name, value)

    @property
    def encoder(self) -> EncoderDescription:
        """The encoder's description.

        Raises:
            ValueError: The vision encoder is the caller's own, and not registered.
        """
        vision, compressor = self.vision_config, self.resampler_config
        own = vision.kind not in (*_VIT_CONFIGS, "custom")
        settings = vision.settings if own else vision.to_vit().to_dict()
        return EncoderDescription(
            vision=_described(vision, settings),
            compressor=_described(compressor, compressor.settings),
            slicing=self.slicing_config,
            schema=self.schema_config,
            pixels=self.pixel_config,
            packer=self.packer_config,
            check_image_size=self.check_image_size,
            note=self.encoder_note,
        )

    @property
    def slicing(self) -> Slicing:
        """How images are cut."""
        if self.slicing_config is not None:
            return slicing_from_dict(self.slicing_config)
        return find(None).for_vision(
            image_size=self.vision_config.image_size, patch_size=self.vision_config.patch_size
        )

    @property
    def schema(self) -> SpatialSchema:
        """How tokens are laid out."""
        if self.schema_config is None:
            return SpatialSchema.preset("llava-uhd")
        return SpatialSchema.from_dict(self.schema_config)

    @property
    def pixels(self) -> PixelSettings:
        """Mean, std and filter; without any, the mean and std of 0.5 that SigLIP has."""
        if self.pixel_config is None:
            return PixelSettings(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        return PixelSettings.from_dict(self.pixel_config)

    @property
    def separators(self) -> dict[str, SeparatorIds]:
        """What :func:`uhd.merge.separator_embeddings` takes."""
        return {symbol: SeparatorIds(tuple(ids), "given") for symbol, ids in (self.separator_ids or {}).items()}

    @property
    def keys_to_ignore_at_inference(self) -> list[str]:
        """Fields of the output that are no predictions: the language model's, and images and videos."""
        text = self.text_config.get_text_config()
        return list(dict.fromkeys([*getattr(text, "keys_to_ignore_at_inference", []), *CACHE_NAMES, *MEDIA]))

    @property
    def max_positions(self) -> int | None:
        """The language model's longest sequence, ``None`` where its config tells none."""
        return max_positions(self.text_config)


def encoder_fields(encoder: EncoderDescription) -> dict[str, Any]:
    """The fields of a :class:`UHDConfig` that describe an encoder."""
    compressor = encoder.compressor
    return {
        "vision_config": _vision_config(encoder.vision),
        "resampler_config": UHDResamplerConfig(
            kind=compressor["kind"], settings=compressor.get("config", {}), class_name=compressor.get("class")
        ),
        "slicing_config": encoder.slicing,
        "schema_config": encoder.schema,
        "pixel_config": encoder.pixels,
        "packer_config": encoder.packer,
        "check_image_size": encoder.check_image_size,
        "encoder_note": encoder.note,
    }


def _vision_config(described: Mapping[str, Any]) -> UHDVisionConfig:
    kind, settings = described["kind"], described.get("config", {})
    if kind in (*_VIT_CONFIGS, "custom"):
        return UHDVisionConfig(kind=kind, **settings)
    sizes = {"patch_size": described.get("patch_size"), "width": described.get("out_dim")}
    sizes = {name: size for name, size in sizes.items() if size is not None}
    told = {"class_name": described.get("class"), "image_size": described.get("image_size")}
    return UHDVisionConfig(kind=kind, settings=settings, **told, **sizes)


def _described(config: UHDVisionConfig | UHDResamplerConfig, settings: dict[str, Any] | None) -> dict[str, Any]:
    """A part's description, without what its class is called where none is."""
    named = {} if config.class_name is None else {"class": config.class_name}
    return {"kind": config.kind, "config": settings, **named}


def _check_whole(config_class: type, given: Mapping[str, Any], where: str) -> None:
    """Refuse settings without a field that was always written: its default is another model's."""
    known = config_class.__annotations__
    if missing := [where + name for name in known if name not in given and name not in config_class.later]:
        raise ValueError(f"missing {', '.join(missing)}")


def _is_floating(name: str) -> bool:
    dtype = getattr(torch, name, None)
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


def _built(config_class: type, given: dict[str, Any] | PreTrainedConfig | None) -> PreTrainedConfig:
    """A part's config from its dictionary, or as it is; a language model of no type is a Llama."""
    if isinstance(given, PreTrainedConfig):
        return given
    given = dict(given or {})
    if config_class is AutoConfig:
        return AutoConfig.for_model(given.pop("model_type", "llama"), **given)
    return config_class(**given)


def _refuse_kernels(given: Mapping[str, Any]) -> None:
    """Refuse attention whose code transformers would download, where a file names it and no caller."""
    for name, value in given.items():
        attention = "attn_implementation" in str(name)
        if isinstance(value, Mapping) and not attention:
            _refuse_kernels(value)
        if attention and "/" in str(value):
            raise ValueError(
                f"this configuration names the code of {value!r:.200} as its {name}, which would be downloaded and "
                "run: leave it out, and give attn_implementation to from_pretrained if you trust it"
            )


def max_positions(config: PreTrainedConfig) -> int | None:
    """A language model's longest sequence, its rope's scaling counted, ``None`` where its config tells none."""
    text = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
    found = (getattr(text, name, None) for name in names)
    limit = next((value for value in found if isinstance(value, int) and value > 0), None)
    return limit if limit is None else max(limit, *_scaled(getattr(text, "rope_parameters", None), limit))


def _scaled(rope: Any, limit: int) -> Iterator[int]:
    """What scaled rotary positions, of all layers or by kind of layer, stretch a longest sequence to."""
    yield limit
    for parameters in (rope, *rope.values()) if isinstance(rope, Mapping) else ():
        if isinstance(parameters, Mapping) and isinstance(parameters.get("factor"), (int, float)):
            yield int(parameters["factor"] * (parameters.get("original_max_position_embeddings") or limit))
