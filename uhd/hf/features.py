"""The vision side inside a model of transformers: built, initialised, and its images as they stand in a prompt."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import CONFIG_NAME, can_return_tuple

from uhd.checkpoint import own_code_named, refuse_pickled
from uhd.encoder import VisualEncoder
from uhd.hf.attach import native_side
from uhd.hf.configuration import UHDConfig
from uhd.hf.folders import MODEL_FILES, check_loaded, check_model, folder_named
from uhd.hf.placing import laid_out, schema_separators
from uhd.hf.quantized import leave_alone
from uhd.hf.recording import Recording, recorded
from uhd.hf.versions import CACHE_NAMES
from uhd.hf.visual_inputs import PlannedMedia, VisualInputs, read_images, read_videos
from uhd.parts import ROLES, own_tables
from uhd.ranks import gathered_between, unwrapped
from uhd.resampler import FeaturePacker, PerceiverResampler, PyramidResampler, RewriteResampler, SpatialResampler
from uhd.resampler.attention import LatentAttention
from uhd.schema.counted import layout_of
from uhd.slicing import SlicePlan, VideoPlan, plan
from uhd.vision import ViT
from uhd.writing import finish, read_whole

if TYPE_CHECKING:
    from typing_extensions import Self

RESAMPLERS = (PerceiverResampler, PyramidResampler, RewriteResampler, SpatialResampler)
"""Compressors with parameters of their own beside those of their layers."""

_PLACE = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download", "proxies")
"""Keywords of ``from_pretrained`` that say where files come from."""

_ASKED = ("output_hidden_states", "output_attentions")


class UHDPreTrainedModel(PreTrainedModel):
    config_class = UHDConfig
    visual: VisualEncoder
    language_model: PreTrainedModel
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["ViT", "CompressedViT", *(module.__name__ for module in RESAMPLERS)]  # noqa: RUF012
    _skip_keys_device_placement = list(CACHE_NAMES)  # noqa: RUF012
    # the language model has its own word on these; the vision side runs one attention, its own
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _loaded_from: Mapping[str, Any] = MappingProxyType({})

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (ViT, *RESAMPLERS, LatentAttention)):
            module.reset_parameters()
        if isinstance(module, FeaturePacker):
            for embedding in module.parameters():
                nn.init.normal_(embedding, std=module.width**-0.5)
        if isinstance(module, UHDVisualModel) and module.learned_separators is not None:
            nn.init.normal_(module.learned_separators, std=0.02)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None = None, *args: Any, **kwargs: Any
    ) -> Self:
        """As in transformers, with all its keywords.

        Pickled weights are read, and code that the folder brings is run, only where ``use_safetensors=False`` and
        ``trust_remote_code=True`` ask for it.

        Both sides keep the dtypes they were saved in, unless ``dtype`` says otherwise. The model's ``processor`` comes
        from the same place: same ``subfolder``, ``revision``, ``cache_dir`` and ``token``.

        Raises:
            ValueError, OSError: A local folder's file is damaged or missing, or does not fit the others; the message
                names it. Or only now was a save finished there that had been killed, see :mod:`uhd.writing`, and the
                config that was read before may be older.
        """
        folder = Path(pretrained_model_name_or_path or os.devnull, kwargs.get("subfolder") or "")
        if finish(folder) and kwargs.get("config") is not None:
            raise ValueError(f"{folder} held a save that was killed, which is finished now: load it again")
        kwargs["trust_remote_code"] = bool(kwargs.get("trust_remote_code"))
        if kwargs.get("use_safetensors") is None:
            refuse_pickled(folder, "use_safetensors=False, which reads tensors with torch.load(weights_only=True)")
            kwargs["use_safetensors"] = True
        if kwargs.get("dtype", "auto") not in ("auto", None) and kwargs.get("config") is None:
            kwargs.setdefault("visual_dtype", None)
        source = pretrained_model_name_or_path, kwargs.get("subfolder")
        check_model(*source)
        place = {name: kwargs[name] for name in _PLACE if kwargs.get(name) is not None}
        with folder_named(source[0], MODEL_FILES, source[1]), read_whole(folder, CONFIG_NAME):
            if kwargs.get("quantization_config") is not None:
                config = kwargs.get("config") or cls.config_class.from_pretrained(source[0], **place)
                kwargs["quantization_config"] = leave_alone(kwargs["quantization_config"], config.text_config)
            told = kwargs.pop("output_loading_info", False)
            model, loading = super().from_pretrained(source[0], *args, output_loading_info=True, **kwargs)
        check_loaded(model, loading["missing_keys"], *source)
        model._loaded_from = {**place, "trust_remote_code": kwargs["trust_remote_code"]}
        model._restore_tables()
        return (model, loading) if told else model

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As the language model's own class does it, embeddings that it has beside its first ones included."""
        resized = self.language_model.resize_token_embeddings(*args, **kwargs)
        self.vocab_size = self.config.get_text_config().vocab_size
        return resized

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_output_embeddings(value)


class UHDVisualModel(UHDPreTrainedModel):
    """The vision side and the language model, with images and videos on their way from one to the other.

    Arguments and attributes as in :class:`UHDModel`.
    """

    def __init__(
        self, config: UHDConfig, *, visual: VisualEncoder | None = None, language_model: PreTrainedModel | None = None
    ) -> None:
        super().__init__(config)
        if language_model is None:
            with own_code_named("text_config", "load the language model yourself, and attach it"):
                language_model = AutoModelForCausalLM.from_config(config.text_config, trust_remote_code=False)
        self.language_model = language_model  # first: a model's dtype and device are those of its first parameter
        self._tables: dict[str, Tensor] = {}
        if visual is None:
            visual = built_encoder(config)
            own = {role: own_tables(getattr(visual, role), role) for role in ROLES}
            self._tables = {f"{role}.{name}": table for role, some in own.items() for name, table in some.items()}
        self.visual = visual
        config.text_config = language_model.config  # one object, so that resizing the vocabulary is seen here too
        self.supports_gradient_checkpointing = language_model.supports_gradient_checkpointing
        learned = self.visual.schema.learned
        width = self.visual.out_dim or language_model.config.get_text_config().hidden_size
        self.learned_separators = nn.Parameter(0.02 * torch.randn(len(learned), width)) if learned else None
        self.encode_without_images: bool | None = None
        self.post_init()
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = set(self._no_split_modules) & present  # accelerate looks each of them up

    def _restore_tables(self) -> None:
        """Put back what parts of the caller's own computed on construction and no file holds: loading empties it."""
        for name, table in self._tables.items():
            module, _, buffer = name.rpartition(".")
            empty = self.visual.get_buffer(name)
            setattr(self.visual.get_submodule(module), buffer, table.to(empty.device, empty.dtype))
        self._tables = {}

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor | None = None,
        *,
        image_indices: Sequence[int] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Each image as it stands in the language model's sequence, separators included.

        Args:
            pixel_values: (N, P) uint8 raw or floating normalised patches of all views.
            image_indices: (I,) number of each image in its sample, for schemas that write it; ``None``: all 0.
            output_hidden_states, output_attentions: Return those of the vision encoder, where it is a
                :class:`uhd.vision.ViT`; ``None``: as ``config.vision_config`` says.
            kwargs: The other fields of :class:`uhd.hf.visual_inputs.VisualInputs` that are of images.

        Returns:
            ``pooler_output``: I tensors (T_i, D) in the dtype and on the device of the language model's embeddings;
            ``last_hidden_state``: (N', D_v) features of the vision encoder, packed, ``None`` for encoded images;
            ``hidden_states``: of as many rows, after the embedding and after every block; ``attentions``: for every
            block one (heads, T_v, T_v) for each view, class and register tokens first, without gradients.

        Raises:
            ValueError: Inputs are missing, or do not agree with each other or with the model's strategy.
        """
        planned = read_images(self.visual, VisualInputs.take({"pixel_values": pixel_values, **kwargs}))
        asked = self._asked(output_hidden_states=output_hidden_states, output_attentions=output_attentions)
        return self._features(planned, image_indices, asked)

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: Tensor | None = None,
        *,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Each video as it stands in the language model's sequence; as :meth:`get_image_features`."""
        visual = VisualInputs.take({"pixel_values_videos": pixel_values_videos, **kwargs})
        planned = read_videos(self.visual, visual)
        asked = self._asked(output_hidden_states=output_hidden_states, output_attentions=output_attentions)
        return self._features(planned, None, asked)

    def _asked(self, **given: bool | None) -> dict[str, bool]:
        """Which of the vision encoder's hidden states and attentions are wanted: as given, else by its config."""
        config = self.config.vision_config
        wanted = {name: getattr(config, name) if given.get(name) is None else given[name] for name in _ASKED}
        return {name.removeprefix("output_"): bool(value) for name, value in wanted.items()}

    def _positions_of(self, input_ids: Tensor) -> dict[str, Tensor]:
        """(B, T) bool on the CPU for images and for videos."""
        ids = input_ids.cpu()
        image, video = self.config.image_token_id, self.config.video_token_id
        none = torch.zeros_like(ids, dtype=torch.bool)
        return {"image": ids == image, "video": none if video is None else ids == video}

    def _check_length(
        self, input_ids: Tensor, attention_mask: Tensor | None, visual_positions: Sequence[int], *, new_tokens: int = 0
    ) -> None:
        """Raise where a sample (and what is to be generated) is longer than the language model's positions."""
        limit = self.config.max_positions
        if limit is None or input_ids.shape[1] + new_tokens <= limit:
            return
        lengths = [input_ids.shape[1]] * len(input_ids)
        if attention_mask is not None and attention_mask.shape == input_ids.shape:
            lengths = attention_mask.sum(1).tolist()
        for sample, (length, visual) in enumerate(zip(lengths, visual_positions, strict=True)):
            if length + new_tokens > limit:
                asked = f" and {new_tokens} new ones" if new_tokens else ""
                raise ValueError(
                    f"sample {sample} has {length} positions ({visual} of them images or videos){asked}, the language "
                    f"model has {limit}: lower max_tokens or max_slices of the images, shorten the text, or raise "
                    "config.text_config.max_position_embeddings if the model can take more"
                )

    def _ids_of(self, inputs_embeds: Tensor) -> Tensor:
        """(B, T) ids that hold an image's (and a video's) token where its embedding stands, else the fill token.

        Raises:
            ValueError: The language model reads the ids themselves, or does not embed the image token.
        """
        if self._embeds_inside:
            raise ValueError(
                "images with inputs_embeds need the embedding before the language model runs, and FSDP gathers this "
                "one inside it: pass input_ids, or shard the language model's layers and the whole model only"
            )
        text = self.config.text_config.get_text_config()
        tokens = [token for token in (self.config.image_token_id, self.config.video_token_id) if token is not None]
        if self.config.injection_mode == "hook" or min(tokens) >= text.vocab_size:
            why = "reads the ids beside their embeddings"
            if self.config.injection_mode != "hook":
                why = f"embeds {text.vocab_size} ids and not the image token {self.config.image_token_id}"
            raise ValueError(
                f"images with inputs_embeds go where the image token's embedding stands, and this language model {why}"
                ": pass input_ids" + ("" if "beside" in why else ", or resize_token_embeddings to the tokenizer first")
            )
        found = torch.full(inputs_embeds.shape[:2], self.config.fill_token_id, device=inputs_embeds.device)
        for token in tokens:
            if token < text.vocab_size:
                [[row]] = self.get_input_embeddings()(torch.tensor([[token]], device=self._embedding_device()))
                found[(inputs_embeds == row.to(inputs_embeds)).all(-1)] = token
        return found

    def num_image_tokens(self, image_sizes: Sequence[Sequence[int]]) -> list[int]:
        """Positions that images of these (height, width), px, take in the language model's sequence."""
        plans = [plan((int(h), int(w)), self.visual.slicing) for h, w in image_sizes]
        return [layout_of(item, self.visual.schema).num_tokens for item in plans]

    def visual_positions(self, input_ids: Tensor) -> Tensor:
        """(B, T) bool on the CPU: where ``input_ids`` (B, T) hold the image or the video token."""
        return torch.stack(list(self._positions_of(input_ids).values())).any(0)

    def _features(
        self, planned: PlannedMedia, indices: Sequence[int] | None, asked: Mapping[str, bool]
    ) -> BaseModelOutputWithPooling:
        """Encode images or videos and lay them out, see :meth:`get_image_features`."""
        tokens, seen = self._encoded(planned, None, asked)
        fill = torch.tensor([[self.config.fill_token_id]], device=self._embedding_device())
        like, separators = self.get_input_embeddings()(fill), self._separators()
        return BaseModelOutputWithPooling(
            pooler_output=self._laid(tokens, planned.plans, indices, separators, like), **seen
        )

    def _encoded(
        self, planned: PlannedMedia, kept: Sequence[int] | None, asked: Mapping[str, bool] | None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Scaled visual tokens (M, D) of those of the numbers ``kept``, and what was recorded of the vision encoder.

        ``asked`` is ``None`` where nothing of it will be read: what is recorded stays in memory.
        """
        whole = self.training and torch.is_grad_enabled() and self._has_ranks()

        def work() -> Tensor:  # scaled here, as FSDP2 wants no view of another tensor from a module
            return planned.encode(kept, whole=whole) * self.config.visual_scale

        if planned.tokens is not None:
            return work(), {} if asked is None else Recording().output()
        if asked is None:
            return self.visual(work), {}
        with recorded(self.visual.vision, **asked) as recording:
            tokens = self.visual(work)
        return tokens, recording.output()

    def _laid(
        self,
        tokens: Tensor,
        plans: Sequence[SlicePlan | VideoPlan],
        indices: Sequence[int] | None,
        separators: Mapping[str, Tensor],
        like: Tensor,
    ) -> list[Tensor]:
        """As :func:`uhd.hf.placing.laid_out`, in ``like``'s dtype and device."""
        return laid_out(tokens.to(like.device, like.dtype), plans, self.visual.schema, separators, indices)

    def _separators(self) -> dict[str, Tensor]:
        """Symbol -> (D,), with gradients to the language model's embeddings or to the learned ones."""
        ids, device = self.config.separators, self._embedding_device()
        return schema_separators(self.get_input_embeddings(), ids, self.visual.schema, self.learned_separators, device)

    @property
    def _embeds_inside(self) -> bool:
        """Whether the embedding has its weights only while the language model runs, which is then given ids."""
        return gathered_between(self.language_model, self.get_input_embeddings())

    def _embedding_device(self) -> torch.device:
        """Where ids go; offloaded embeddings are on no device and move their ids themselves."""
        found = next((p.device for p in self.get_input_embeddings().parameters()), self.device)
        return torch.device("cpu") if found.type == "meta" else found

    def _has_ranks(self) -> bool:
        """Whether ranks may hold other kinds of batches, and all must give gradients to the same parameters."""
        ranks = dist.is_available() and dist.is_initialized()
        return ranks if self.encode_without_images is None else self.encode_without_images

    def _idle(self, encoded: int, sharded: bool) -> list[Tensor]:
        """What is to be added with weight 0 to a batch of which ``encoded`` kinds of media were encoded.

        It gives every visual parameter a gradient that may have none in this batch. Where parameters are spread over
        ranks, all of them gather together, so there every kind that is missing is encoded blank, in evaluation too.
        """
        if not self._has_ranks():
            return []
        trains = self.training and torch.is_grad_enabled()
        blanks = int(trains and not encoded and any(p.requires_grad for p in self.visual.parameters()))
        if sharded:
            blanks = (1 if self.config.video_token_id is None else 2) - encoded
        idle = [self.visual(self._blank).sum() for _ in range(blanks)]
        learned = self.learned_separators
        # behind the visual work, as where there are images: ZeRO-2 reduces gradients in the order in which they come
        return [*idle, learned.sum()] if trains and learned is not None and learned.requires_grad else idle

    def _blank(self) -> Tensor:
        """The tokens of the smallest blank view that every part takes, and the packing's learned embeddings."""
        vision, slicing = self.visual.vision, self.visual.slicing
        grid = slicing.least_view if isinstance(unwrapped(vision), ViT) else None
        if grid is None:
            side = native_side(self.visual)
            grid = self.visual.plan((side, side)).views[0].patches_hw
        patches = torch.zeros(grid[0] * grid[1], getattr(vision, "in_channels", 3) * vision.patch_size**2)
        tokens = self.visual.encode_packed(patches, [grid])[0].flatten()
        learned = {} if self.visual.packer is None else self.visual.packer()
        return torch.cat([tokens, *(embedding.to(tokens) for embedding in learned.values())])


def built_encoder(config: UHDConfig) -> VisualEncoder:
    """The encoder that a config describes, with new weights."""
    described = config.encoder
    visual = VisualEncoder(**described.arguments(), packer=described.made_packer())
    dtype = torch.get_default_dtype() if config.visual_dtype is None else getattr(torch, config.visual_dtype)
    return visual.to(dtype)  # tables too, which are computed in float32
