"""A saved model for VLMEvalKit. Written by its documentation and NEVER RUN in it, for it is in no package registry.

A test calls the class with a stand-in for its base, no more.

Put this file into its folder ``vlmeval/vlm``, import the class in ``vlmeval/vlm/__init__.py``, and name it in
``vlmeval/config.py``, for example ``"uhd-mine": partial(UHD, model_path="FOLDER")``. A message is a list of
{"type": "image" or "text", "value": a path or text}, in the order in which they are shown.
"""

from __future__ import annotations

from typing import Any

import torch
from vlmeval.vlm.base import BaseModel

from uhd.evaluation.judging import OWN, encoder_with
from uhd.nano.answer import load_model


class UHD(BaseModel):
    """A folder that ``save_pretrained`` wrote, or a shipped model's name; ``strategy``: a rule in place of its own."""

    INSTALL_REQ = False
    INTERLEAVE = True

    def __init__(self, model_path: str = "nano", strategy: str = OWN, **kwargs: Any) -> None:
        super().__init__()
        self.model = load_model(model_path)
        self.model.visual = encoder_with(self.model, strategy)
        if torch.cuda.is_available():
            self.model.to("cuda")
        self.kwargs = {"max_new_tokens": 512, "do_sample": False, **kwargs}

    @torch.inference_mode()
    def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        """The answer to one message."""
        processor = self.model.processor
        images = [part["value"] for part in message if part["type"] == "image"]
        content = [
            {"type": "image"} if part["type"] == "image" else {"type": "text", "text": part["value"]}
            for part in message
        ]
        said = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        shown = {"images": [images]} if images else {}
        inputs = processor(text=[text], **shown).to(self.model.device)
        length, limit, settings = inputs["input_ids"].shape[1], self.model.config.max_positions, dict(self.kwargs)
        if limit is not None:
            settings["max_new_tokens"] = min(settings["max_new_tokens"], limit - length)
        out = self.model.generate(**inputs, **settings)
        (answer,) = processor.tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)
        return answer
