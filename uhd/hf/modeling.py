"""``UHDModel`` and ``UHDForConditionalGeneration``: eyes for a causal language model, which is held whole.

The language model keeps its head, its softcaps and its way of generating; only what it embeds at image positions is
replaced. ``generate`` encodes the images once and hands over to the language model's own ``generate``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.utils import PROCESSOR_NAME, can_return_tuple

from uhd.encoded import EncodedImage, EncodedVideo
from uhd.encoder import VisualEncoder
from uhd.hf.attach import attach, native_side
from uhd.hf.configuration import UHDConfig
from uhd.hf.image_processing import refuse_own_function
from uhd.hf.injection import inject
from uhd.hf.outputs import with_media
from uhd.hf.placing import Media, match
from uhd.hf.processing import UHDProcessor
from uhd.hf.versions import CACHE_NAMES, cache_name, take_cache
from uhd.hf.visual_inputs import VISUAL_INPUTS, by_name, kinds_given, read_images, read_videos
from uhd.merge import IGNORE, assemble, merge_visual, separator_embeddings
from uhd.parts import rebuild_part
from uhd.resampler import (
    FeaturePacker,
    PerceiverResampler,
    PyramidResampler,
    RewriteResampler,
    SpatialResampler,
)
from uhd.resampler.attention import LatentAttention
from uhd.schema.counted import layout_of
from uhd.slicing import plan
from uhd.vision import ViT
from uhd.vision.int8 import refuse_int8

RESAMPLERS = (PerceiverResampler, PyramidResampler, RewriteResampler, SpatialResampler)
"""Compressors with parameters of their own beside those of their layers."""


@dataclass(frozen=True, eq=False)
class _Prompt:
    """Text, images and videos of a batch, ready for the language model.

    ``ids`` (B, T) hold the fill token at visual positions; ``visual`` (B, T) bool on the CPU says where those are;
    ``change`` turns the embeddings of ``ids`` into the prompt's, ``None`` where they are it. ``media`` are the fields
    of the output.
    """

    ids: Tensor
    visual: Tensor
    change: Callable[[Tensor], Tensor] | None
    media: dict[str, tuple[Tensor, ...]]


class UHDPreTrainedModel(PreTrainedModel):
    config_class = UHDConfig
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["ViT", "CompressedViT", *(module.__name__ for module in RESAMPLERS)]  # noqa: RUF012
    _skip_keys_device_placement = list(CACHE_NAMES)  # noqa: RUF012
    # the language model has its own word on these; the vision side runs one attention, its own
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (ViT, *RESAMPLERS, LatentAttention)):
            module.reset_parameters()
        if isinstance(module, FeaturePacker):
            for embedding in module.parameters():
                nn.init.normal_(embedding, std=module.width**-0.5)
        if isinstance(module, UHDModel) and module.learned_separators is not None:
            nn.init.normal_(module.learned_separators, std=0.02)

    @classmethod
    def from_pretrained(cls, source: Any, *args: Any, **kwargs: Any) -> UHDPreTrainedModel:
        """As in transformers. Both sides keep the dtypes they were saved in, unless ``dtype`` says otherwise."""
        if kwargs.get("dtype", "auto") not in ("auto", None) and kwargs.get("config") is None:
            kwargs.setdefault("visual_dtype", None)
        return super().from_pretrained(source, *args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_output_embeddings(value)


class UHDModel(UHDPreTrainedModel):
    """The vision side and the language model; :meth:`forward` gives the hidden states of its trunk.

    Args:
        config: See :class:`UHDConfig`.
        visual, language_model: Ready-made parts for the config's; they are taken as they are.

    Attributes:
        visual: A :class:`uhd.VisualEncoder`.
        language_model: The whole causal language model.
        learned_separators: (S, D) for a schema with S learned symbols, else ``None``.
        encode_without_images: In training, encode a blank patch and add it with weight 0 where a batch has no image,
            so that every visual parameter has a gradient in every data-parallel rank. ``None``: where
            ``torch.distributed`` is initialised.
    """

    def __init__(
        self,
        config: UHDConfig,
        *,
        visual: VisualEncoder | None = None,
        language_model: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.language_model = language_model  # first: a model's dtype and device are those of its first parameter
        self.visual = _build_visual(config) if visual is None else visual
        config.text_config = language_model.config  # one object, so that resizing the vocabulary is seen here too
        self.supports_gradient_checkpointing = language_model.supports_gradient_checkpointing
        learned = self.visual.schema.learned
        width = self.visual.out_dim or language_model.config.get_text_config().hidden_size
        self.learned_separators = nn.Parameter(0.02 * torch.randn(len(learned), width)) if learned else None
        self.encode_without_images: bool | None = None
        self.post_init()

    def get_image_features(
        self,
        pixel_values: Tensor | None = None,
        grids: Tensor | None = None,
        num_patches: Tensor | None = None,
        slice_grids: Tensor | None = None,
        image_sizes: Tensor | None = None,
        image_tokens: Tensor | Sequence[EncodedImage] | None = None,
        view_tokens: Tensor | None = None,
        image_plans: Tensor | None = None,
        image_indices: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Each image as it stands in the language model's sequence, separators included.

        Args:
            pixel_values: (N, P) uint8 raw or floating normalised patches of all views.
            grids: (V, 2) (rows, columns) of each view in patches.
            num_patches: (I,) views of each image.
            slice_grids: (I, 2) (rows, columns) of slices, (0, 0) for an uncut image; ``None`` plans ``image_sizes``.
            image_sizes: (I, 2) (height, width) in px.
            image_tokens: Instead of pixels: what :func:`uhd.load_tokens` gives, or packed (M, D) with ``view_tokens``
                (V,) or ``image_plans``, as the processor makes of that.
            image_plans: (I, L) uint8, see :func:`uhd.hf.plans.write_plans`; ``None``: the adaptive planner's are told
                by the grids, those of other strategies are made anew of ``image_sizes``.
            image_indices: (I,) number of each image in its sample, for schemas that write it; ``None``: all 0.

        Returns:
            ``pooler_output``: I tensors (T_i, D) in the dtype and on the device of the language model's embeddings;
            ``last_hidden_state``: (M, D) visual tokens of all views, packed, without separators.

        Raises:
            ValueError: Inputs are missing, or do not agree with each other or with the model's strategy.
        """
        values = pixel_values, grids, num_patches, slice_grids, image_sizes, image_tokens, view_tokens, image_plans
        media = read_images(self.visual, by_name(*values))
        return self._features(media, [0] * len(media.items) if image_indices is None else image_indices)

    def get_video_features(
        self,
        pixel_values_videos: Tensor | None = None,
        video_grids: Tensor | None = None,
        video_plans: Tensor | None = None,
        video_tokens: Tensor | Sequence[EncodedVideo] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Each video as it stands in the language model's sequence; as :meth:`get_image_features`.

        Args:
            pixel_values_videos: (N, P) patches of all frames' views.
            video_grids: (V, 2) (rows, columns) of each view in patches.
            video_plans: (K, L) uint8, see :func:`uhd.hf.plans.write_plans`.
            video_tokens: Instead of pixels: encoded videos, or packed (M, D).
        """
        given = pixel_values_videos, video_grids, video_plans, video_tokens
        media = read_videos(self.visual, dict(zip(VISUAL_INPUTS[-4:], given, strict=True)))
        return self._features(media, [0] * len(media.items))

    def num_image_tokens(self, image_sizes: Sequence[Sequence[int]]) -> list[int]:
        """Positions that images of these (height, width), px, take in the language model's sequence."""
        plans = [plan((int(h), int(w)), self.visual.slicing) for h, w in image_sizes]
        return [layout_of(item, self.visual.schema).num_tokens for item in plans]

    def _features(self, media: Media, indices: Sequence[int]) -> BaseModelOutputWithPooling:
        separators = self._separators()
        fill = torch.tensor([[self.config.fill_token_id]], device=self._embedding_device())
        like = self.get_input_embeddings()(fill)
        tokens = media.tokens * self.config.visual_scale
        parts = tokens.to(like.device, like.dtype).split([item.rows for item in media.items])
        features = [
            assemble(part, item.layout(index), separators)
            for part, item, index in zip(parts, media.items, indices, strict=True)
        ]
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=features)

    def _separators(self) -> dict[str, Tensor]:
        """Symbol -> (D,), with gradients to the language model's embeddings or to the learned ones."""
        embed = self.get_input_embeddings()
        found = separator_embeddings(embed, self.config.separators, device=self._embedding_device())
        if self.learned_separators is not None:
            like = next(iter(found.values()), self.learned_separators)
            learned = self.learned_separators.to(like.device, like.dtype)
            found.update(zip(self.visual.schema.learned, learned, strict=True))
        return found

    def _embedding_device(self) -> torch.device:
        """Where ids go; offloaded embeddings are on no device and move their ids themselves."""
        found = next((p.device for p in self.get_input_embeddings().parameters()), self.device)
        return torch.device("cpu") if found.type == "meta" else found

    def _read(self, input_ids: Tensor, visual: Mapping[str, Any], attention_mask: Tensor | None = None) -> _Prompt:
        """Match images and videos with their positions, encode them, and say how the embeddings change.

        Raises:
            ValueError: A sample's image or video positions are not those of its images or videos, or it is longer than
                the language model's positions; the message names the sample and both counts.
        """
        positions = self._positions_of(input_ids)
        together = torch.stack(list(positions.values())).any(0)
        self._check_length(input_ids, attention_mask, together.sum(1).tolist())
        visual = {name: visual.get(name) for name in VISUAL_INPUTS}
        given = kinds_given(visual)
        media: dict[str, tuple[Tensor, ...]] = {}
        places: list[tuple[Tensor, list[int], Tensor]] = []
        for kind, mask in positions.items():
            counts = mask.sum(1).tolist()
            if kind not in given:
                if any(counts):
                    sample = next(place for place, count in enumerate(counts) if count)
                    raise ValueError(f"sample {sample} has {counts[sample]} {kind} positions and there are 0 {kind}s")
                continue
            found = read_images(self.visual, visual) if kind == "image" else read_videos(self.visual, visual)
            features = self._features(found, match(counts, found.lengths, kind)).pooler_output
            media[f"{kind}_hidden_states"] = tuple(features)
            places.append((mask, counts, torch.cat(features)))
        encoded = visual["pixel_values"] is not None or visual["pixel_values_videos"] is not None
        idle = self._idle(encoded)
        if not places and idle is None:
            return _Prompt(input_ids, together, None, media)

        def change(embeds: Tensor) -> Tensor:
            for mask, counts, rows in places:
                embeds = merge_visual(embeds, mask, rows, counts=counts)
            return embeds if idle is None else embeds + idle.to(embeds.device, embeds.dtype)

        ids = input_ids.masked_fill(together.to(input_ids.device), self.config.fill_token_id)
        return _Prompt(ids, together, change, media)

    def _positions_of(self, input_ids: Tensor) -> dict[str, Tensor]:
        """(B, T) bool on the CPU for images and for videos."""
        ids = input_ids.cpu()
        image, video = self.config.image_token_id, self.config.video_token_id
        none = torch.zeros_like(ids, dtype=torch.bool)
        return {"image": ids == image, "video": none if video is None else ids == video}

    def _idle(self, encoded: bool) -> Tensor | None:
        """0 with a gradient to every visual parameter that may have none in this batch, where that is wanted."""
        wanted = self.encode_without_images
        if wanted is None:
            wanted = dist.is_available() and dist.is_initialized()
        if not (wanted and self.training and torch.is_grad_enabled()):
            return None
        learned = [] if self.visual.packer is None else list(self.visual.packer.parameters())
        learned += [] if self.learned_separators is None else [self.learned_separators]
        parts = [embedding.sum() for embedding in learned if embedding.requires_grad]
        if not encoded and any(p.requires_grad for p in self.visual.parameters()):
            parts.append(self._encoded_blank().sum())
        return 0 * sum(part.to(parts[-1]) for part in parts) if parts else None

    def _encoded_blank(self) -> Tensor:
        """The tokens of the smallest blank view that every part takes."""
        vision, slicing = self.visual.vision, self.visual.slicing
        grid = slicing.least_view if isinstance(vision, ViT) else None
        if grid is None:
            side = native_side(self.visual)
            grid = self.visual.plan((side, side)).views[0].patches_hw
        patches = torch.zeros(grid[0] * grid[1], getattr(vision, "in_channels", 3) * vision.patch_size**2)
        return self.visual.encode_packed(patches, [grid])[0]

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

    def _call(
        self,
        lm: Callable[..., ModelOutput],
        *,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        visual: Mapping[str, Any],
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[ModelOutput, dict[str, tuple[Tensor, ...]]]:
        """Run the language model (or its trunk) on text, images and videos; what is ``None`` is not passed on.

        Returns:
            Its output, and the images and videos as they were laid out.
        """
        visual = {name: visual[name] for name in VISUAL_INPUTS if visual.get(name) is not None}
        if (input_ids is None) == (inputs_embeds is None) or (visual and input_ids is None):
            raise ValueError("pass either input_ids, with or without images, or inputs_embeds alone")
        cache = take_cache(kwargs)
        if position_ids is None:
            length = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
            position_ids = self._positions(attention_mask, length, cache)
        passed = {"attention_mask": attention_mask, "position_ids": position_ids, cache_name(lm): cache}
        passed = {name: value for name, value in {**passed, **kwargs}.items() if value is not None}
        decoding = cache is not None and input_ids is not None and input_ids.shape[1] == 1
        prompt = None
        if input_ids is not None and (visual or not decoding):
            prompt = self._read(input_ids, visual, attention_mask)
            if labels is not None and prompt.media:
                labels = labels.masked_fill(prompt.visual.to(labels.device), IGNORE)
        if labels is not None:
            passed["labels"] = labels
        if prompt is None or prompt.change is None:
            text = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
            return lm(**text, return_dict=True, **passed), {}
        embed = self.get_input_embeddings()
        if self.config.injection_mode == "embeds":
            return lm(inputs_embeds=prompt.change(embed(prompt.ids)), return_dict=True, **passed), prompt.media
        with inject(embed, prompt.ids, prompt.change):
            return lm(input_ids=prompt.ids, return_dict=True, **passed), prompt.media

    def _positions(self, attention_mask: Tensor | None, length: int, cache: Any) -> Tensor | None:
        """(B, length) positions of the inputs that do not count padding, as ``generate`` makes them.

        ``None`` where the language model takes none, or the mask does not cover the cache and the inputs.
        """
        if attention_mask is None or attention_mask.dim() != 2:
            return None
        cached = _cached_length(cache)
        if cached is not None and attention_mask.shape[1] != cached + length:
            return None
        if "position_ids" not in inspect.signature(self.language_model.forward).parameters:
            return None
        positions = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 0)
        return positions[:, -length:]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        grids: Tensor | None = None,
        num_patches: Tensor | None = None,
        slice_grids: Tensor | None = None,
        image_sizes: Tensor | None = None,
        image_tokens: Tensor | Sequence[EncodedImage] | None = None,
        view_tokens: Tensor | None = None,
        image_plans: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grids: Tensor | None = None,
        video_plans: Tensor | None = None,
        video_tokens: Tensor | Sequence[EncodedVideo] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """Arguments and errors as in :meth:`UHDForConditionalGeneration.forward`; no head, so no labels."""
        images = pixel_values, grids, num_patches, slice_grids, image_sizes, image_tokens, view_tokens, image_plans
        visual = by_name(*images, pixel_values_videos, video_grids, video_plans, video_tokens)
        found, media = self._call(
            self.language_model.base_model,
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            visual=visual,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            use_cache=use_cache,
            **kwargs,
        )
        return with_media(found, media)


class UHDForConditionalGeneration(UHDModel, GenerationMixin):
    """Any causal language model of transformers, with eyes: :class:`UHDModel` with the language model's own head.

    Both have the same parameters under the same names. :meth:`from_vision_and_lm` is the way to attach eyes.
    """

    def __init__(
        self,
        config: UHDConfig,
        *,
        visual: VisualEncoder | None = None,
        language_model: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config, visual=visual, language_model=language_model)
        self._processor: UHDProcessor | None = None

    @classmethod
    def from_vision_and_lm(
        cls,
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
    ) -> UHDForConditionalGeneration:
        """Attach a vision encoder to a loaded language model; both are used as they are, on their devices.

        Args:
            encoder: Its tokens are as wide as the language model's embeddings. Its slicing, of any strategy, is the
                model's and the processor's.
            lm: From ``AutoModelForCausalLM``. Its embeddings are not resized: an image token that is new to the
                tokenizer is never embedded.
            tokenizer: Of the language model. It is copied; the copy gets the image and the video token, and where it
                has no padding token the end-of-sequence token for that. See :attr:`processor`.
            mode: How visual rows reach the language model: ``"embeds"``, ``"hook"``, or ``"auto"``, which tries, see
                :func:`uhd.hf.choose_injection`. Saved as ``config.injection_mode``.
            match_scale: Multiply visual tokens by ``config.visual_scale``, so that their RMS is that of the language
                model's embeddings. Off for an encoder that was trained with this language model.
            image_token: Placeholder of an image; ``None`` takes the tokenizer's, or ``"<image>"``.
            video_token: Placeholder of a video; ``None`` takes the tokenizer's, or ``"<video>"``.
            separator_ids: Ids chosen by hand, by symbol; the others are looked up in the tokenizer.
            numbered_images: For schemas that number images: how many a sample, or frames a video, may have.
            chat_template: Replaces the tokenizer's.

        Raises:
            TypeError, ValueError: Parts that do not fit, ids outside the embeddings, a separator the tokenizer cannot
                write, a scale that is 0 or infinite, a language model that takes images in neither way.
        """
        config, processor = attach(
            encoder,
            lm,
            tokenizer,
            mode=mode,
            match_scale=match_scale,
            image_token=image_token,
            video_token=video_token,
            separator_ids=separator_ids,
            numbered_images=numbered_images,
            chat_template=chat_template,
        )
        with no_init_weights():
            model = cls(config, visual=encoder, language_model=lm)
        model.generation_config = lm.generation_config
        model._processor = processor
        return model.train(lm.training)

    @property
    def processor(self) -> UHDProcessor:
        """Of the tokenizer it was attached with, or from the folder it was loaded from.

        Raises:
            ValueError: There is none.
        """
        if self._processor is None:
            if not self.config.name_or_path:
                raise ValueError("this model has no processor: load one with AutoProcessor.from_pretrained(folder)")
            self._processor = UHDProcessor.from_pretrained(self.config.name_or_path)
        return self._processor

    @property
    def base_model(self) -> UHDModel:
        """The same modules under a forward that ends at the trunk's ``last_hidden_state``.

        Hooks and wrappers of this model's own ``forward`` stay with it.
        """
        trunk = object.__new__(UHDModel)
        nn.Module.__init__(trunk)
        state = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training"}
        own = {"forward", *vars(trunk)} - state
        vars(trunk).update({name: value for name, value in vars(self).items() if name not in own})
        return trunk

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether ``num_items_in_batch`` and the like may be passed; read by ``Trainer``."""
        parameters = inspect.signature(self.language_model.forward).parameters.values()
        return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers, and the processor beside it where there is one.

        Raises:
            ValueError: A part, or the slicing, is the caller's own, so that it could not be built again; or the
                encoder is quantised.
        """
        refuse_own_function(self.visual.slicing)
        refuse_int8(self.visual)
        kinds = {"vision": self.config.vision_config.kind, "compressor": self.config.resampler_config.kind}
        for role, kind in kinds.items():
            if kind == "custom":
                part = getattr(self.visual, role)
                raise ValueError(
                    f"the {role} is a {type(part).__name__}, which uhd cannot build again: save its weights yourself, "
                    "and attach again with from_vision_and_lm"
                )
        seen = next((str(p.dtype).removeprefix("torch.") for p in self.visual.parameters()), None)
        self.config.visual_dtype = None if seen == str(self.dtype).removeprefix("torch.") else seen
        self.config.encoder_note = self.visual.note
        if self._processor is None and (Path(self.config.name_or_path) / PROCESSOR_NAME).is_file():
            self._processor = self.processor  # loaded on first use, which may not have been
        super().save_pretrained(save_directory, *args, **kwargs)
        if self._processor is not None and kwargs.get("is_main_process", True):
            self._processor.save_pretrained(save_directory)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        grids: Tensor | None = None,
        num_patches: Tensor | None = None,
        slice_grids: Tensor | None = None,
        image_sizes: Tensor | None = None,
        image_tokens: Tensor | Sequence[EncodedImage] | None = None,
        view_tokens: Tensor | None = None,
        image_plans: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grids: Tensor | None = None,
        video_plans: Tensor | None = None,
        video_tokens: Tensor | Sequence[EncodedVideo] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Any = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """The language model on text and images.

        Args:
            input_ids: (B, T), the image token at every position of an image, the video token at every position of a
                video. Images and videos are taken in order, row by row.
            pixel_values ... image_plans: As in :meth:`UHDModel.get_image_features`; none at all without images.
            pixel_values_videos ... video_tokens: As in :meth:`UHDModel.get_video_features`.
            attention_mask: (B, T). Without ``position_ids`` and cache, positions are counted along it, so a
                left-padded row gives what it gives alone.
            inputs_embeds: Instead of ``input_ids`` and images.
            labels: (B, T); image positions count as -100 whatever they hold. ``Trainer`` counts targets before that:
                give it labels that hold -100 there (docs/training.md).
            past_key_values, cache: The language model's cache, under either name.
            logits_to_keep and the rest: As the language model takes them.

        Returns:
            What the language model returns, under its own names, ``loss`` (with labels) and ``logits`` first, then
            ``image_hidden_states`` and ``video_hidden_states``: (T_i, D) for each image or video, as laid out.

        Raises:
            ValueError: A sample's image positions are not those of its images, inputs of images are missing or
                disagree, or a sample is longer than the language model's positions.
        """
        images = pixel_values, grids, num_patches, slice_grids, image_sizes, image_tokens, view_tokens, image_plans
        visual = by_name(*images, pixel_values_videos, video_grids, video_plans, video_tokens)
        if isinstance(logits_to_keep, Tensor) or logits_to_keep:
            kwargs["logits_to_keep"] = logits_to_keep
        found, media = self._call(
            self.language_model,
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            visual=visual,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            labels=labels,
            use_cache=use_cache,
            **kwargs,
        )
        return with_media(found, media)

    def _check_prefill(self, generation_config: Any, kwargs: dict[str, Any]) -> None:
        """Images are merged into the whole prompt at once: refuse, before they are encoded, what splits it."""
        if kwargs.get("prefill_chunk_size", getattr(generation_config, "prefill_chunk_size", None)):
            raise ValueError("a prompt with images is fed at once: leave prefill_chunk_size out")
        cached = _cached_length(take_cache(dict(kwargs)))
        if cached != 0 and self.config.injection_mode == "hook":
            raise ValueError(
                f"the cache holds {'some' if cached is None else cached} positions, and this language model takes "
                "images by a hook on the whole prompt: give the whole conversation and no cache"
            )

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """The language model's own ``generate`` on text and images, which are encoded once.

        Args:
            inputs: ``input_ids`` (B, T), as the processor gives them; also by that name.
            generation_config: ``None`` is ``self.generation_config``.
            kwargs: The processor's other outputs, and everything the language model's ``generate`` takes: beams,
                sampling, streamers, caches.

        Returns:
            As the language model's ``generate``: prompts and new ids, with the image token at image positions.

        Raises:
            ValueError: As in :meth:`forward`; a sample and its new tokens must fit the language model's positions;
                images cannot be given with ``prefill_chunk_size``, nor, where they go in by hook, with a filled cache.
        """
        visual = {name: kwargs.pop(name) for name in VISUAL_INPUTS if name in kwargs}
        if any(value is not None for value in visual.values()):
            self._check_prefill(generation_config or self.generation_config, kwargs)
        lm = self.language_model
        lm.generation_config = self.generation_config
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if input_ids is None and not visual:
            return lm.generate(generation_config=generation_config, **kwargs)
        if input_ids is None or (visual and kwargs.get("inputs_embeds") is not None):
            raise ValueError("pass either input_ids, with or without images, or inputs_embeds alone")
        mask = kwargs.get("attention_mask")
        positions = sum(mask.sum(1) for mask in self._positions_of(input_ids).values()).tolist()
        new = _new_tokens(generation_config or self.generation_config, kwargs, input_ids.shape[1])
        self._check_length(input_ids, mask, positions, new_tokens=new)
        prompt = self._read(input_ids, visual, mask)
        if prompt.change is None:
            return lm.generate(input_ids, generation_config=generation_config, **kwargs)
        kwargs["attention_mask"] = torch.ones_like(input_ids) if mask is None else mask
        embed = self.get_input_embeddings()
        settings = kwargs.get("use_cache", getattr(generation_config or self.generation_config, "use_cache", True))
        # without a cache the prompt is embedded again in each step, which inputs_embeds cannot do
        if self.config.injection_mode == "embeds" and settings is not False:
            kwargs["inputs_embeds"] = prompt.change(embed(prompt.ids))
            found = lm.generate(prompt.ids, generation_config=generation_config, **kwargs)
        else:
            with inject(embed, prompt.ids, prompt.change):
                found = lm.generate(prompt.ids, generation_config=generation_config, **kwargs)
        ids = found if isinstance(found, Tensor) else found.sequences
        ids[:, : input_ids.shape[1]] = input_ids.repeat_interleave(len(ids) // len(input_ids), 0).to(ids.device)
        return found


def _cached_length(cache: Any) -> int | None:
    """Positions that a cache holds already; ``None`` where it cannot tell, as the states of attention-free models."""
    if cache is None:
        return 0
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError):
        return None


def _build_visual(config: UHDConfig) -> VisualEncoder:
    vision = config.vision_config
    described = {"kind": config.resampler_config.kind, "config": config.resampler_config.settings}
    visual = VisualEncoder(
        rebuild_part({"kind": vision.kind, "config": vision.to_vit().to_dict()}, "vision"),
        rebuild_part(described, "compressor"),
        slicing=config.slicing,
        schema=config.schema,
        pixels=config.pixels,
        packer=config.packer_config and FeaturePacker(**config.packer_config),
        check_image_size=config.check_image_size,
        note=config.encoder_note,
    )
    dtype = torch.get_default_dtype() if config.visual_dtype is None else getattr(torch, config.visual_dtype)
    return visual.to(dtype)  # tables too, which are computed in float32


def _new_tokens(config: Any, kwargs: Mapping[str, Any], length: int) -> int:
    """How many tokens are surely asked for; 0 where that is left to the language model."""
    new = kwargs.get("max_new_tokens", getattr(config, "max_new_tokens", None))
    if new is not None:
        return new
    total = kwargs.get("max_length", getattr(config, "max_length", None))
    return max(total - length, 0) if total is not None else 0
