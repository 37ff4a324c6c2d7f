"""A saved model in vLLM: our vision side, and vLLM's own implementation of the language model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    StageMissingLayer,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from uhd.hf import UHDConfig
from uhd.hf.features import built_encoder
from uhd.hf.placing import laid_out, schema_separators
from uhd.hf.visual_inputs import VisualInputs, read_images, read_videos
from uhd.serving.vllm_inputs import Dummies, Info, Processor, check_config

_VISUAL = "visual."


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=Dummies)
class UHDForVLLM(nn.Module, SupportsMultiModal):
    """What vLLM runs of a saved :class:`uhd.hf.UHDForConditionalGeneration`; its weights keep their names.

    Raises:
        ValueError: Images reach the language model by a hook on its ids, or the schema numbers images.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: UHDConfig = vllm_config.model_config.hf_config
        check_config(config)
        self.config = config
        text = config.text_config.get_text_config()
        tokens = [token for token in (config.image_token_id, config.video_token_id) if token is not None]
        self.configure_mm_token_handling(text.vocab_size, tokens)
        with self._mark_tower_model(vllm_config, {"image", "video"}):
            self.visual = built_encoder(config)
        learned = config.schema.learned
        self.learned_separators = nn.Parameter(torch.empty(len(learned), text.hidden_size)) if learned else None
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config, hf_config=config.text_config, prefix=maybe_prefix(prefix, "language_model")
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return f"<{modality}>"

    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        """Each image, then each video, as it stands in the prompt: (T_i, D), separators included."""
        for name in ("image_plans", "video_plans"):
            if isinstance(kwargs.get(name), list):  # of different lengths
                kwargs[name] = nn.utils.rnn.pad_sequence([row.flatten() for row in kwargs[name]], batch_first=True)
        visual = VisualInputs.take(kwargs)
        found: list[Tensor] = []
        for kind, read in (("image", read_images), ("video", read_videos)):
            if kind in visual.kinds:
                found += self._embedded(read(self.visual, visual))
        return found

    def _embedded(self, planned: Any) -> list[Tensor]:
        device = next(self.language_model.parameters()).device

        def embed(ids: Tensor) -> Tensor:
            return self.language_model.embed_input_ids(ids[0])[None]

        schema = self.config.schema
        separators = schema_separators(embed, self.config.separators, schema, self.learned_separators, device)
        like = embed(torch.tensor([[self.config.fill_token_id]], device=device))
        tokens = (planned.encode() * self.config.visual_scale).to(like.device, like.dtype)
        return laid_out(tokens, planned.plans, schema, separators)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Hidden states of the language model."""
        return self.language_model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """As the language model's own."""
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a saved model's weights; the vision side must have all of its own."""
        seen: dict[str, Tensor] = {}

        def others() -> Iterable[tuple[str, Tensor]]:
            for name, weight in weights:
                if name.startswith(_VISUAL):
                    seen[name.removeprefix(_VISUAL)] = weight
                else:
                    yield name, weight

        loaded = AutoWeightsLoader(self).load_weights(others())
        if not isinstance(self.visual, StageMissingLayer):
            self.visual.load_state_dict(seen)
        return loaded | {_VISUAL + name for name in seen}
