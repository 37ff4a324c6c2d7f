"""Generating through the model's own ``forward``, for those who prepare each step: PEFT's prompt learning does."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from transformers import GenerationMixin

from uhd.hf.visual_inputs import VisualInputs

_SHOWN: ContextVar[VisualInputs | None] = ContextVar("images of the prompt that is being generated from", default=None)


class StepByStep(GenerationMixin):
    """A model whose ``generate`` hands over to its language model, unless another prepares what each step sees."""

    @property
    def _steps_are_prepared(self) -> bool:
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
