"""How a model with eyes generates: images are encoded once, then its language model's own ``generate`` takes over.

Only where another prepares each step, as PEFT's prompt learning does, generation runs through the model's ``forward``.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from uhd.hf.conversation import cached_columns, cached_length, is_filled, remember
from uhd.hf.injection import inject
from uhd.hf.looking import DRAFTS, generate_looking
from uhd.hf.prompt_text import PromptText, reading_text
from uhd.hf.versions import cache_name, take_cache
from uhd.hf.visual_inputs import VisualInputs
from uhd.ranks import gather_for, is_sharded, is_unit

_SHOWN: ContextVar[VisualInputs | None] = ContextVar("images of the prompt that is being generated from", default=None)


class GeneratesByLanguageModel(GenerationMixin):
    """What :class:`uhd.hf.modeling.UHDModel` needs to generate."""

    @property
    def steps_are_prepared(self) -> bool:
        """Whether ``prepare_inputs_for_generation`` was replaced on this very model, as PEFT does."""
        return "prepare_inputs_for_generation" in vars(self)

    def prepare_inputs_for_generation(self, *args: Any, is_first_iteration: bool = False, **kwargs: Any) -> Any:
        """As in transformers, with the images beside every whole prompt."""
        found = super().prepare_inputs_for_generation(*args, is_first_iteration=is_first_iteration, **kwargs)
        shown = _SHOWN.get()
        if shown is not None and (is_first_iteration or not kwargs.get("use_cache", True)):
            found.update(shown.given())
        return found

    def _generate_by_steps(self, visual: VisualInputs, **kwargs: Any) -> Any:
        """Generate as transformers does with any model, images beside the prompt; they are encoded for each prompt."""
        told = _SHOWN.set(visual)
        try:
            return GenerationMixin.generate(self, **kwargs)
        finally:
            _SHOWN.reset(told)

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """The language model's own ``generate`` on text and images, which are encoded once.

        To go on from a cache that an earlier call returned, give it with the ids of the whole conversation, and either
        all its images, of which only those are encoded that the cache does not hold, or just these.

        Args:
            inputs: ``input_ids`` (B, T), as the processor gives them; also by that name.
            generation_config: ``None`` is ``self.generation_config``.
            kwargs: The processor's other outputs, and everything the language model's ``generate`` takes: beams,
                sampling, streamers, caches, assistants. Where parameters are spread over ranks, all call ``generate``,
                and ``synced_gpus`` is on unless told. What reads ids (penalties, n-gram rules, streamers, stopping
                criteria, prompt look-up, assistant models) reads the prompt's text, without the positions of images.

        Returns:
            As the language model's ``generate``: prompts and new ids, with the image token at image positions.
            ``return_visual_attention=True`` adds where each new token looked: :mod:`uhd.hf.looking` says how.

        Raises:
            ValueError: As in :meth:`forward`; a sample and its new tokens must fit the language model's positions;
                new images cannot be given with ``prefill_chunk_size``; the cache is not one of this conversation.
        """
        if is_unit(self) and "generate" not in vars(self):
            gather_for(self, "generate")
            return self.generate(inputs, generation_config, **kwargs)
        if is_sharded(self):
            kwargs.setdefault("synced_gpus", True)  # ranks that are done go on until all are
        asked = _Asked(generation_config or self.generation_config, kwargs)
        if kwargs.pop("return_visual_attention", False):
            return generate_looking(self, asked, inputs, generation_config, kwargs)
        visual = VisualInputs.take(kwargs)
        if self.steps_are_prepared:
            return self._generate_by_steps(visual, inputs=inputs, generation_config=generation_config, **kwargs)
        lm = self.language_model
        lm.generation_config = self.generation_config
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if input_ids is None and not visual.any:
            return lm.generate(generation_config=generation_config, **kwargs)
        if input_ids is None or (visual.any and kwargs.get("inputs_embeds") is not None):
            raise ValueError("pass either input_ids, with or without images, or inputs_embeds alone")
        if visual.any and asked("prefill_chunk_size"):
            raise ValueError("a prompt with images is fed at once: leave prefill_chunk_size out")
        mask, cache = kwargs.get("attention_mask"), take_cache(kwargs)
        if cache is not None:
            kwargs[cache_name(lm)] = cache
        cached = cached_columns(input_ids, mask, cache)
        visual_positions = self.visual_positions(input_ids).sum(1).tolist()
        self._check_length(input_ids, mask, visual_positions, new_tokens=asked.new_tokens(input_ids.shape[1]))
        prompt = self._read(input_ids, visual, mask, cached=cached)
        if not any(visual_positions) and prompt.change is None:
            return lm.generate(input_ids, generation_config=generation_config, **kwargs)
        found, length = self._run(prompt, mask, cache, generation_config, kwargs, asked)
        ids = found if isinstance(found, Tensor) else found.sequences
        whole = input_ids.repeat_interleave(len(ids) // len(input_ids), 0).to(ids.device)
        ids = torch.cat([whole, ids[:, length:]], dim=1)
        remember((None if isinstance(found, Tensor) else take_cache(dict(found))) or cache, input_ids, ids)
        if isinstance(found, Tensor):
            return ids
        found.sequences = ids
        return found

    def _run(
        self,
        prompt: Any,
        mask: Tensor | None,
        cache: Any,
        generation_config: Any,
        kwargs: dict[str, Any],
        asked: _Asked,
    ) -> tuple[Any, int]:
        """The language model's own answer to a prompt with images, and how many columns of ids it was given."""
        text = PromptText.of(prompt.ids, prompt.visual, mask)
        fed, held = prompt.ids, cached_length(cache)
        if held is None:  # transformers cuts off what a cache holds, but not for a state
            fed = prompt.new_ids
            if self.config.injection_mode == "embeds" and is_filled(cache):
                rows = self._advance(prompt, cache)
                kwargs["inputs_embeds"], prompt, fed = rows, replace(prompt, change=None), fed[:, -1:]
            mask = None if mask is None else mask[:, -fed.shape[1] :]
        kwargs["attention_mask"] = torch.ones_like(fed) if mask is None else mask
        lm = reading_text(self.language_model, replace(text, ids=fed), kwargs)
        run = partial(lm.generate, fed, generation_config=generation_config, **kwargs)
        embed = self.get_input_embeddings()
        if prompt.change is None:
            return run(), fed.shape[1]
        # without a cache the prompt is embedded again in each step, and drafts are checked with ids
        inside = asked.reads_ids or self._embeds_inside
        if self.config.injection_mode == "embeds" and held == 0 and not inside:
            return run(inputs_embeds=prompt.change(embed(prompt.ids))), fed.shape[1]
        with inject(embed, prompt.new_ids, prompt.change):
            return run(), fed.shape[1]

    def _advance(self, prompt: Any, state: Any) -> Tensor:
        """Bring a state up to the last id, whose embedding (B, 1, D) is left.

        In steps of one: some models forget what they have seen where they are given more at once.
        """
        embeds = self.get_input_embeddings()(prompt.new_ids)
        embeds = embeds if prompt.change is None else prompt.change(embeds)
        told = {cache_name(self.language_model): state, "use_cache": True}
        for place in range(embeds.shape[1] - 1):
            self.language_model(inputs_embeds=embeds[:, place : place + 1], **told)
        return embeds[:, -1:]


@dataclass(frozen=True)
class _Asked:
    """What ``generate`` goes by: its keywords, else the generation config."""

    config: Any
    kwargs: Mapping[str, Any]

    def __call__(self, name: str) -> Any:
        return self.kwargs.get(name, getattr(self.config, name, None))

    @property
    def reads_ids(self) -> bool:
        """Whether the language model is called on the prompt's ids again, or with others behind them."""
        return self("use_cache") is False or any(map(self, DRAFTS))

    def new_tokens(self, length: int) -> int:
        """How many tokens are surely asked for; 0 where that is left to the language model."""
        if self("max_new_tokens") is not None:
            return self("max_new_tokens")
        return max((self("max_length") or length) - length, 0)
