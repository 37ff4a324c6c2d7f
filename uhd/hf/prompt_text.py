"""What the rules of generation read of a prompt with images: its text.

A language model's ``generate`` hands the ids of the prompt to penalties, n-gram rules, streamers, stopping criteria
and drafters. At the positions of images those ids mean nothing: :func:`reading_text` makes them read the text alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    SuppressTokensAtBeginLogitsProcessor,
)
from transformers.generation import BaseStreamer, CandidateGenerator, EosTokenCriteria

from uhd.hf.injection import starts_with

COUNTING = (
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    MaxLengthCriteria,
    MaxTimeCriteria,
    EosTokenCriteria,
)
"""Rules that count positions or look at the last id alone: they see every position."""


@dataclass(frozen=True, eq=False)
class PromptText:
    """The prompts of a batch and their text.

    Attributes:
        ids: (B, T) as the language model gets them.
        text: (B, L) without images and padding; shorter ones have their first id once more in front, which no rule
            takes for anything new.
    """

    ids: Tensor
    text: Tensor

    @classmethod
    def of(cls, ids: Tensor, visual: Tensor, attention_mask: Tensor | None) -> PromptText:
        """The text of (B, T) ids, with images where ``visual`` (B, T) is True; the mask may cover a cache as well."""
        is_text = ~visual.to(ids.device)
        if attention_mask is not None:
            is_text &= attention_mask[:, -ids.shape[1] :].bool().to(ids.device)
        rows = [row[kept] for row, kept in zip(ids, is_text, strict=True)]
        length = max(map(len, rows))
        return cls(ids, torch.stack([_filled(row, length, ids[0, :1]) for row in rows]))

    @property
    def removed(self) -> int:
        """Positions by which the text is shorter."""
        return self.ids.shape[1] - self.text.shape[1]

    def __call__(self, ids: Tensor) -> Tensor:
        """The text of ids that begin with the prompts, each repeated for its beams; other ids as they are."""
        if not starts_with(ids, self.ids):
            return ids
        text = self.text.to(ids.device).repeat_interleave(len(ids) // len(self.ids), 0)
        return torch.cat([text, ids[:, self.ids.shape[1] :]], dim=1)


def _filled(row: Tensor, length: int, default: Tensor) -> Tensor:
    first = row[:1] if len(row) else default
    return torch.cat([first.expand(length - len(row)), row])


class _TextProcessor(LogitsProcessor):
    def __init__(self, rule: Callable[..., Tensor], prompt: PromptText) -> None:
        self.rule, self.prompt = rule, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        ignored = getattr(self.rule, "prompt_ignore_length", None)
        if not (isinstance(ignored, int) and ignored >= self.prompt.ids.shape[1]):  # else it leaves the prompt out
            input_ids = self.prompt(input_ids)
        return self.rule(input_ids, scores)


class _TextCriterion(StoppingCriteria):
    def __init__(self, rule: Callable[..., Any], prompt: PromptText) -> None:
        self.rule, self.prompt = rule, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
        return self.rule(self.prompt(input_ids), scores, **kwargs)


class _TextStreamer(BaseStreamer):
    def __init__(self, streamer: BaseStreamer, prompt: PromptText) -> None:
        self.streamer, self.prompt = streamer, prompt

    def put(self, value: Tensor) -> None:
        self.streamer.put(self.prompt(value))

    def end(self) -> None:
        self.streamer.end()


class _TextCandidates(CandidateGenerator):
    """Drafts that continue the text, put behind the whole prompt."""

    def __init__(self, drafter: CandidateGenerator, prompt: PromptText) -> None:
        self.drafter, self.prompt = drafter, prompt

    def get_candidates(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        text = self.prompt(input_ids)
        drafted, logits = self.drafter.get_candidates(text, **kwargs)
        new = drafted[:, text.shape[1] :].to(input_ids.device)
        return torch.cat([input_ids, new], dim=1), logits

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        self.drafter.update_candidate_strategy(self.prompt(input_ids), scores, num_matches)


class _EarlyExits(CandidateGenerator):
    """Drafts of the first layers alone; language models that cannot run these are refused, and left whole."""

    def __init__(self, drafter: CandidateGenerator, lm: PreTrainedModel) -> None:
        self.drafter, self.config = drafter, lm.base_model.config
        self.layers = self.config.num_hidden_layers
        self.update_candidate_strategy = drafter.update_candidate_strategy

    def get_candidates(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        try:
            return self.drafter.get_candidates(input_ids, **kwargs)
        except (IndexError, RuntimeError) as problem:
            raise ValueError(
                f"this language model cannot be left after a few layers ({type(problem).__name__}: {problem}): leave "
                "assistant_early_exit out"
            ) from problem
        finally:
            self.config.num_hidden_layers = self.layers


class _ReadsText(GenerationMixin):
    """In front of a language model's own class: its generation, with rules and drafters that read the text."""

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        prompt: PromptText = vars(self)["_prompt_text"]
        if kwargs.get("model_kwargs"):  # whose mask says where padding is: the text has none
            kwargs["model_kwargs"] = {**kwargs["model_kwargs"], "attention_mask": None}
        if kwargs.get("encoder_input_ids") is not None:
            kwargs["encoder_input_ids"] = prompt.text
        rules = super()._get_logits_processor(*args, **kwargs)
        return LogitsProcessorList(
            rule if isinstance(rule, (COUNTING, _TextProcessor)) else _TextProcessor(rule, prompt) for rule in rules
        )

    def _get_candidate_generator(self, **kwargs: Any) -> CandidateGenerator:
        prompt: PromptText = vars(self)["_prompt_text"]
        if not prompt.text.shape[1]:
            prompt = replace(prompt, text=prompt.ids[:, :1])  # what drafts needs something to go on from
        config = kwargs["generation_config"]
        rules = kwargs["logits_processor"]
        kwargs["logits_processor"] = LogitsProcessorList(
            rule.rule if isinstance(rule, _TextProcessor) else rule for rule in rules
        )
        if getattr(config, "assistant_early_exit", None):  # drafted by what has seen the images
            return _EarlyExits(super()._get_candidate_generator(**kwargs), self)
        whole = dict(kwargs)
        config = copy.deepcopy(config)
        for name in ("max_length", "min_length"):
            if getattr(config, name, None) is not None:
                setattr(config, name, max(getattr(config, name) - prompt.removed, 0))
        text = prompt(kwargs["input_ids"])
        inputs = {**kwargs["model_kwargs"], "attention_mask": torch.ones_like(text)}
        for name in ("position_ids", "inputs_embeds"):
            inputs.pop(name, None)
        kwargs |= {"generation_config": config, "input_ids": text, "inputs_tensor": text, "model_kwargs": inputs}
        drafter = super()._get_candidate_generator(**kwargs)
        if getattr(drafter, "requires_model_outputs", False):  # these follow what has seen the images
            return super()._get_candidate_generator(**whole)
        return _TextCandidates(drafter, prompt)

    def get_compiled_call(self, *args: Any, **kwargs: Any) -> Any:
        return vars(self)["_whole"].get_compiled_call(*args, **kwargs)  # which keeps it for the next prompt


def reading_text(lm: PreTrainedModel, prompt: PromptText, kwargs: dict[str, Any]) -> PreTrainedModel:
    """The language model, as a second object of the same parts, whose ``generate`` shows the prompt's text to rules.

    Logits processors (``generate``'s and the caller's), stopping criteria, streamers, prompt look-up and assistant
    models get ids without the positions of images; rules that count positions see them all.

    Args:
        lm: A language model whose class has transformers' ``generate``.
        prompt: What it is going to be asked.
        kwargs: Of ``generate``; the caller's streamer and stopping criteria in it are replaced.
    """
    if kwargs.get("streamer") is not None:
        kwargs["streamer"] = _TextStreamer(kwargs["streamer"], prompt)
    if kwargs.get("stopping_criteria"):
        kwargs["stopping_criteria"] = StoppingCriteriaList(
            rule if isinstance(rule, COUNTING) else _TextCriterion(rule, prompt)
            for rule in kwargs["stopping_criteria"]
        )
    if not isinstance(lm, GenerationMixin):
        return lm  # wrapped by another library, with a generate of its own
    view = object.__new__(_reading_class(type(lm)))
    vars(view).update(vars(lm), _prompt_text=prompt, _whole=lm)
    return view


@cache
def _reading_class(kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
    # transformers tells some model types by the names of their classes
    return type(kind.__name__, (_ReadsText, kind), {"__module__": kind.__module__})
