"""``UHDModel`` and ``UHDForConditionalGeneration``: eyes for a causal language model, which is held whole.

The language model keeps its head, its softcaps and its way of generating; only what it embeds at image positions is
replaced. ``generate`` encodes the images once and hands over to the language model's own ``generate``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.utils import PROCESSOR_NAME, can_return_tuple

from uhd.encoder import VisualEncoder
from uhd.hf.attach import attach
from uhd.hf.configuration import UHDConfig
from uhd.hf.conversation import cached_length
from uhd.hf.features import UHDVisualModel
from uhd.hf.generation import GeneratesByLanguageModel
from uhd.hf.image_processing import refuse_own_function
from uhd.hf.injection import inject
from uhd.hf.labels import count_without_visual, ignore_visual, refuse_counted
from uhd.hf.outputs import with_media
from uhd.hf.packing import check_packed, mixing, samples_in_rows
from uhd.hf.placing import match_new
from uhd.hf.processing import UHDProcessor
from uhd.hf.quantized import refuse_unsaved, take_over
from uhd.hf.versions import cache_name, take_cache
from uhd.hf.visual_inputs import VisualInputs, read_images, read_videos
from uhd.merge import merge_visual
from uhd.parts import ROLES, check_described
from uhd.ranks import is_sharded, unwrapped
from uhd.saving import EncoderDescription, add_note
from uhd.slicing import SlicePlan, VideoPlan
from uhd.torch_private import shared_view
from uhd.vision.int8 import refuse_int8
from uhd.writing import new_files

_WEIGHTS = r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
NEW_SEPARATORS = "the learned separators have new, UNTRAINED weights"


@dataclass(frozen=True, eq=False)
class _Prompt:
    """Text, images and videos of a batch, ready for the language model.

    ``ids`` (B, T) hold the fill token at visual positions; ``visual`` (B, T) bool on the CPU says where those are;
    ``new_ids`` are those that no cache holds yet; ``change`` turns their embeddings into the prompt's, ``None`` where
    they are it. ``media`` are the fields of the output, there after ``change``.
    """

    ids: Tensor
    new_ids: Tensor
    visual: Tensor
    change: Callable[[Tensor], Tensor] | None
    media: dict[str, Any]


@dataclass(frozen=True, eq=False)
class _Seen:
    """Images or videos of a batch as visual tokens (M, D), before they are laid out.

    ``mask`` (B, T) bool on the CPU is their positions among the new ids, ``counts`` those of each row, ``indices``
    their numbers in their samples, and ``recording`` what was recorded of the vision encoder.
    """

    kind: str
    mask: Tensor
    counts: list[int]
    tokens: Tensor
    plans: tuple[SlicePlan | VideoPlan, ...]
    indices: list[int]
    recording: dict[str, Any]


class UHDModel(UHDVisualModel):
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

    def _read(
        self,
        input_ids: Tensor,
        visual: VisualInputs,
        attention_mask: Tensor | None = None,
        *,
        cached: int = 0,
        samples: Tensor | None = None,
        asked: Mapping[str, bool] | None = None,
    ) -> _Prompt:
        """Match images and videos with their positions, encode them, and say how the embeddings change.

        Of the first ``cached`` positions, which a cache holds, images may be left out, and are not encoded again.
        Where rows are packed, ``samples`` (B, T) numbers the sample of each position. ``asked``: see ``_encoded``.

        Raises:
            ValueError: A sample's image or video positions are not those of its images or videos, or it is longer than
                the language model's positions; the message names the sample and both counts.
        """
        positions = self._positions_of(input_ids)
        together = torch.stack(list(positions.values())).any(0)
        if samples is None:
            self._check_length(input_ids, attention_mask, together.sum(1).tolist())
        seen: list[_Seen] = []
        encoded = 0
        for kind, mask in positions.items():
            new = mask[:, cached:]
            counts = new.sum(1).tolist()
            if kind not in visual.kinds:
                if any(counts):
                    sample = next(place for place, count in enumerate(counts) if count)
                    raise ValueError(f"sample {sample} has {counts[sample]} {kind} positions and there are 0 {kind}s")
                continue
            planned = (read_images if kind == "image" else read_videos)(self.visual, visual)
            numbered = self.visual.schema.image_id is not None
            of_samples = mask.sum(1) if samples is None else torch.bincount(samples[mask], minlength=1)
            old = mask[:, :cached].sum(1).tolist() if samples is None else [0] * len(of_samples)
            kept, indices = match_new(of_samples.tolist(), old, planned.lengths, kind, numbered=numbered)
            if kept:
                encoded += planned.tokens is None
                tokens, recording = self._encoded(planned, kept, asked)
                seen.append(_Seen(kind, new, counts, tokens, planned.chosen(kept), indices, recording))
        ids = input_ids.masked_fill(together.to(input_ids.device), self.config.fill_token_id)
        sharded = self._has_ranks() and is_sharded(self)
        idle = self._idle(encoded, sharded)
        if not (seen or idle or sharded):
            return _Prompt(ids, ids[:, cached:], together, None, {})
        separators = None if self._embeds_inside else self._separators()
        media: dict[str, Any] = {}
        change = partial(self._with_media, media, seen, separators, idle, sharded)
        return _Prompt(ids, ids[:, cached:], together, change, media)

    def _with_media(
        self,
        media: dict[str, Any],
        seen: Sequence[_Seen],
        separators: Mapping[str, Tensor] | None,
        idle: Sequence[Tensor],
        sharded: bool,
        embeds: Tensor,
    ) -> Tensor:
        """Put what was encoded into the embeddings (B, T, D) of the new ids, and the output's fields into ``media``.

        ``separators`` are ``None`` where only the running language model can embed them. Sharded, they have gradients
        even where no image needs any: ranks meet in every call, forwards and backwards.
        """
        separators = self._separators() if separators is None else separators
        if sharded:
            idle = [*idle, *(separator.sum() for separator in separators.values())]
        for one in seen:
            rows = self._laid(one.tokens, one.plans, one.indices, separators, embeds)
            media[f"{one.kind}_outputs"] = BaseModelOutputWithPooling(pooler_output=rows, **one.recording)
            media[f"{one.kind}_hidden_states"] = tuple(rows)
            embeds = merge_visual(embeds, one.mask, torch.cat(rows), counts=one.counts)
        return embeds + 0 * sum(part.to(embeds.device, embeds.dtype) for part in idle) if idle else embeds

    def _call(
        self,
        lm: Callable[..., ModelOutput],
        *,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        visual: VisualInputs,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[ModelOutput, dict[str, Any]]:
        """Run the language model (or its trunk) on text, images and videos; what is ``None`` is not passed on.

        Returns:
            Its output, and the images and videos as they were laid out.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds, with or without images")
        asked = self._asked(**kwargs)
        cache = take_cache(kwargs, cache_name(lm))
        samples = samples_in_rows(position_ids, attention_mask)
        if samples is not None:
            check_packed(self.language_model, attention_mask, position_ids, cache)
            attention_mask, kwargs["use_cache"] = None, False  # either would let samples see each other
        elif position_ids is not None and is_sharded(self.language_model):
            mixing(self.language_model)  # another rank may have packed rows, and all try at once
        if position_ids is None:
            length = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
            position_ids = self._positions(attention_mask, length, cache)
        passed = {"attention_mask": attention_mask, "position_ids": position_ids, cache_name(lm): cache}
        passed = {name: value for name, value in {**passed, **kwargs}.items() if value is not None}
        decoding = cache is not None and input_ids is not None and input_ids.shape[1] == 1
        prompt = None
        if visual.any or (input_ids is not None and not decoding) or self._ranks_embed(inputs_embeds, cache):
            ids = self._ids_of(inputs_embeds) if input_ids is None else input_ids
            wanted = asked if any(asked.values()) else None
            prompt = self._read(ids, visual, attention_mask, samples=samples, asked=wanted)
            if labels is not None and prompt.visual.any() and visual.any:
                kept = ignore_visual(labels, prompt.visual.to(labels.device), self)
                if kept is not labels and "num_items_in_batch" in passed:
                    passed["num_items_in_batch"] = count_without_visual(passed["num_items_in_batch"], labels, kept)
                labels = kept
        if labels is not None:
            passed["labels"] = labels
        if prompt is None or prompt.change is None:
            text = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
            return lm(**text, return_dict=True, **passed), {}
        embed = self.get_input_embeddings()
        if inputs_embeds is not None or (self.config.injection_mode == "embeds" and not self._embeds_inside):
            embeds = embed(prompt.ids) if inputs_embeds is None else inputs_embeds
            return lm(inputs_embeds=prompt.change(embeds), return_dict=True, **passed), prompt.media
        with inject(embed, prompt.ids, prompt.change):
            return lm(input_ids=prompt.ids, return_dict=True, **passed), prompt.media

    def _ranks_embed(self, inputs_embeds: Tensor | None, cache: Any) -> bool:
        """Whether text alone, embedded already, needs the work of images that other ranks may have beside theirs."""
        return inputs_embeds is not None and cache is None and self._has_ranks() and is_sharded(self)

    def _positions(self, attention_mask: Tensor | None, length: int, cache: Any) -> Tensor | None:
        """(B, length) positions of the inputs that do not count padding, as ``generate`` makes them.

        ``None`` where the language model takes none, or the mask does not cover the cache and the inputs.
        """
        if attention_mask is None or attention_mask.dim() != 2:
            return None
        cached = cached_length(cache)
        if cached is not None and attention_mask.shape[1] != cached + length:
            return None
        if "position_ids" not in inspect.signature(unwrapped(self.language_model).forward).parameters:
            return None
        positions = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 0)
        return positions[:, -length:]

    @property
    def _runs(self) -> PreTrainedModel:
        """The part of the language model that :meth:`forward` runs."""
        return self.language_model.base_model

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Any = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """The language model on text and images.

        Args:
            input_ids: (B, T), the image or video token at every position of an image or a video. They are taken in
                order, row by row.
            pixel_values, pixel_values_videos: See :class:`uhd.hf.visual_inputs.VisualInputs`, whose other fields are
                keywords here too; none of them without images and videos.
            attention_mask: (B, T). Without ``position_ids`` and cache, positions are counted along it, so a
                left-padded row gives what it gives alone.
            inputs_embeds: (B, T, D) instead of ``input_ids``. Images go where the image token's embedding stands: the
                language model must embed it, and ``config.injection_mode`` be ``"embeds"``.
            position_ids: (B, T). Where they start again at 0 rows are packed, see :mod:`uhd.hf.packing`.
            labels: (B, T); image and video positions count as -100, with one warning where they hold something else.
            output_hidden_states, output_attentions: Of the language model and of the vision encoder.
            cache and the rest: As the language model takes them, the cache also as ``past_key_values``.

        Returns:
            What the language model returns, under its own names, ``loss`` (with labels) and ``logits`` first, then
            the fields of :data:`uhd.hf.outputs.MEDIA`.

        Raises:
            ValueError: A sample's image positions are not those of its images, inputs of images are missing or
                disagree, a sample is too long, or ``num_items_in_batch`` counts image positions of other batches.
        """
        visual = VisualInputs.take(kwargs, pixel_values=pixel_values, pixel_values_videos=pixel_values_videos)
        if isinstance(logits_to_keep, Tensor) or logits_to_keep:
            kwargs["logits_to_keep"] = logits_to_keep
        output, media = self._call(
            self._runs,
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            visual=visual,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            labels=labels,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            **kwargs,
        )
        return with_media(output, media)


class UHDForConditionalGeneration(UHDModel, GeneratesByLanguageModel, GenerationMixin):
    """Any causal language model of transformers, with eyes: :class:`UHDModel` with the language model's own head.

    Both have the same parameters under the same names. :meth:`from_vision_and_lm` is the way to attach eyes.
    """

    def __init__(
        self, config: UHDConfig, *, visual: VisualEncoder | None = None, language_model: PreTrainedModel | None = None
    ) -> None:
        super().__init__(config, visual=visual, language_model=language_model)
        self._processor: UHDProcessor | None = None
        self._followed = self.visual.slicing, self.visual.pixels  # what the processor plans and cuts by
        self.register_forward_pre_hook(refuse_counted, with_kwargs=True)

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
        unsaved: bool = False,
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
            unsaved: Take parts and a slicing that cannot be saved, for a model that never will be.

        Raises:
            TypeError, ValueError: Parts that do not fit or could not be saved, ids outside the embeddings, a separator
                the tokenizer cannot write, a scale that is 0 or infinite, a language model that takes images in
                neither way.
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
            unsaved=unsaved,
        )
        with no_init_weights():
            model = cls(config, visual=encoder, language_model=lm)
        model.generation_config = lm.generation_config
        take_over(model, lm)
        model._processor = processor
        add_note(encoder, NEW_SEPARATORS if encoder.schema.learned else "")
        return model.train(lm.training)

    @property
    def processor(self) -> UHDProcessor:
        """The model's processor: with the tokenizer that was attached, or loaded from the model's folder.

        Where another slicing or other pixels are set on ``visual``, it plans and cuts by those; what is set on the
        processor itself stays until then.

        Raises:
            ValueError: There is none.
        """
        if self._processor is None:
            if not self.config.name_or_path:
                raise ValueError("this model has no processor: load one with AutoProcessor.from_pretrained(folder)")
            self._processor = UHDProcessor.from_pretrained(self.config.name_or_path, **self._loaded_from)
        if self._followed != (self.visual.slicing, self.visual.pixels):
            self._followed = self.visual.slicing, self.visual.pixels
            self._processor.follow(*self._followed)
        return self._processor

    @property
    def base_model(self) -> UHDModel:
        """The same modules under a forward that ends at the trunk's ``last_hidden_state``.

        Hooks and wrappers of this model's own ``forward`` stay with it.
        """
        return shared_view(self, UHDModel)

    @property
    def _runs(self) -> PreTrainedModel:
        return self.language_model

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether ``num_items_in_batch`` and the like may be passed; read by ``Trainer``."""
        parameters = inspect.signature(unwrapped(self.language_model).forward).parameters.values()
        return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers, and the processor beside it where there is one, all at once; see :mod:`uhd.writing`.

        Raises:
            ValueError: A part, or the slicing, is the caller's own, so that it could not be built again; the encoder
                is quantised, or the language model by a library whose weights transformers does not save.
        """
        refuse_own_function(self.visual.slicing)
        for role in ROLES:
            check_described(getattr(self.visual, role), role)
        refuse_int8(self.visual)
        refuse_unsaved(self)
        encoder = EncoderDescription.of(self.visual)
        seen = next((str(p.dtype).removeprefix("torch.") for p in self.visual.parameters()), None)
        self.config.visual_dtype = None if seen == str(self.dtype).removeprefix("torch.") else seen
        self.config.describe(encoder)
        text = self.config.text_config  # serving engines build the language model by its class's name
        text.architectures = text.architectures or [type(unwrapped(self.language_model)).__name__.removeprefix("FSDP")]
        loaded_from = Path(self.config.name_or_path) / self._loaded_from.get("subfolder", "")
        if self._processor is None and (loaded_from / PROCESSOR_NAME).is_file():
            self._processor = self.processor  # loaded on first use, which may not have been
        # ranks that write one checkpoint together cannot do so in a folder of each one's own
        together = kwargs.get("distributed_checkpoint", False)
        with nullcontext(save_directory) if together else new_files(save_directory, one_of=_WEIGHTS) as new:
            super().save_pretrained(str(new), *args, **kwargs)
            if self._processor is not None and kwargs.get("is_main_process", True):
                self.processor.save_pretrained(str(new))
        # ranks that transformers made wait were let go before the files were in place
        self.barrier_after_gathered_checkpoint_save(getattr(self.config, "distributed_config", None))
