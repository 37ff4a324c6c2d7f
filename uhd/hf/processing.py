"""``UHDProcessor``: text and images, or text and encoded images, to what the model takes."""

# no `from __future__ import annotations`: transformers reads the types of the keywords below at run time

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from transformers.processing_utils import BatchFeature, MultiModalData, ProcessingKwargs, ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from uhd.encoder import EncodedImage
from uhd.hf.image_processing import UHDImagesKwargs, describe_plans
from uhd.schema.layout import OVERVIEW

IMAGE_TOKEN = "<image>"

PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role | capitalize }}: "
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}{{ 'IMAGE_TOKEN\n' }}{% elif part.type == 'text' %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""For tokenizers that bring no chat template; IMAGE_TOKEN stands for the image token."""


class UHDProcessorKwargs(ProcessingKwargs, total=False):
    """transformers' keywords, and those of the image processor."""

    images_kwargs: UHDImagesKwargs


class UHDProcessor(ProcessorMixin):
    """A tokenizer and an image processor.

    Every image token in the text stands for one image and becomes as many image tokens as the plan counts, separators
    included. Text is padded on the left, as generation needs; pass ``padding_side="right"`` for training. Truncation
    that would cut an image raises.

    Chat templates that know images are used as they are. One that takes text only is given each message as a string,
    with the image token and a line break where an image was.

    Args:
        image_processor: :class:`uhd.hf.UHDImageProcessor` or its Pil variant.
        tokenizer: Any tokenizer that writes ``image_token`` as one token.
        chat_template: Replaces the tokenizer's.
        image_token: The placeholder of an image.

    Raises:
        ValueError: The tokenizer has no image token; on a call: images and image tokens differ in number (the sample
            and both counts are named), or an image was truncated.
    """

    valid_processor_kwargs = UHDProcessorKwargs
    text_kwargs = {"padding": True, "padding_side": "left", "return_tensors": "pt"}  # noqa: RUF012
    images_kwargs = {"return_tensors": "pt"}  # noqa: RUF012

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_token: str = IMAGE_TOKEN,
        **kwargs: Any,
    ) -> None:
        self.image_token = image_token
        self.image_token_id = image_token_id(tokenizer, image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)

    @property
    def unused_input_names(self) -> list[str]:
        return ["num_image_tokens"]

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "image_tokens", "view_tokens"]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """The image token once for every position of an image."""
        return self.image_token * int(image_inputs["num_image_tokens"][image_idx])

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[Sequence[int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Tokens, and rows of ``pixel_values``, for images of these (height, width): from the planner alone."""
        if image_sizes is None:
            return MultiModalData()
        plans = [self.image_processor.plan((int(h), int(w)), **kwargs) for h, w in image_sizes]
        return MultiModalData(
            num_image_tokens=[item.num_tokens for item in plans],
            num_image_patches=[item.num_patches for item in plans],
        )

    def prepare_inputs_layout(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> tuple[Any, Any, Any, Any]:
        if text is not None:
            text = [text] if isinstance(text, str) else list(text)
        if images is None:
            return None, text, videos, audio
        per_sample = isinstance(images, (list, tuple)) and any(isinstance(item, (list, tuple)) for item in images)
        nested = [list(item) if isinstance(item, (list, tuple)) else [item] for item in images] if per_sample else None
        if nested is not None and text is not None:
            self._check_samples(text, [len(item) for item in nested])
        flat = [item for sample in nested for item in sample] if nested is not None else images
        flat = list(flat) if isinstance(flat, (list, tuple)) else [flat]
        encoded = [isinstance(item, EncodedImage) for item in flat]
        if any(encoded) and not all(encoded):
            raise ValueError(f"got {sum(encoded)} encoded images among {len(flat)}: encode all of them, or none")
        if not any(encoded):
            flat = [self.image_processor.fetch_images(item) for item in flat]
        return flat or None, text, videos, audio

    def validate_inputs(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> None:
        if videos is not None or audio is not None:
            raise ValueError(f"{type(self).__name__} takes text and images, got videos or audio")
        if images is None and text is None:
            raise ValueError(f"{type(self).__name__} was given neither text nor images")
        if text is None:
            return
        if not all(isinstance(sample, str) for sample in text):
            raise ValueError("text must be a string or a list of strings")
        counts, left = [sample.count(self.image_token) for sample in text], len(images or [])
        if sum(counts) == left:
            return
        for sample, count in enumerate(counts):
            if count > left:
                raise ValueError(
                    f"sample {sample} has {count} {self.image_token} and {left} images are left for it; in all "
                    f"{sum(counts)} {self.image_token} and {len(images or [])} images"
                )
            left -= count
        raise ValueError(
            f"the {len(text)} samples have {sum(counts)} {self.image_token} (per sample: {counts}) and there are "
            f"{len(images)} images: each image needs its own {self.image_token} in the text"
        )

    def _check_samples(self, text: list[str], images: list[int]) -> None:
        if len(text) != len(images):
            raise ValueError(f"got {len(text)} texts and lists of images for {len(images)}: need as many")
        for sample, (line, count) in enumerate(zip(text, images, strict=True)):
            if line.count(self.image_token) != count:
                raise ValueError(
                    f"sample {sample} has {line.count(self.image_token)} {self.image_token} and {count} images"
                )

    def _process_images(self, images: list[Any], **kwargs: Any) -> tuple[dict[str, Any], list[str]]:
        encoded = isinstance(images[0], EncodedImage)
        data = pack_encoded(images) if encoded else self.image_processor(images, **kwargs)
        return data, [self.replace_image_token(data, index) for index in range(len(images))]

    def _check_special_mm_tokens(self, text: list[str], text_inputs: Any, modalities: list[str]) -> None:
        for sample, (line, ids) in enumerate(zip(text, text_inputs["input_ids"], strict=True)):
            wanted, got = line.count(self.image_token), list(map(int, ids)).count(self.image_token_id)
            if wanted != got:
                raise ValueError(
                    f"sample {sample} needs {wanted} positions for its images and {got} are left: truncation would "
                    "cut an image. Raise max_length, turn truncation off, or lower max_tokens or max_slices"
                )

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """As in transformers; see the class for templates that take text only."""
        template = self._resolve_chat_template(chat_template)
        if _writes_images(template, self.image_token, json.dumps(self.tokenizer.special_tokens_map)):
            return super().apply_chat_template(conversation, template, **kwargs)
        conversations, batched = self._normalize_conversations(conversation)
        flattened = [[self._as_text(message) for message in messages] for messages in conversations]
        images = [[image for _, found in messages for image in found] for messages in flattened]
        texts = [[message for message, _ in messages] for messages in flattened]
        if kwargs.get("tokenize") and any(images):
            given = dict(kwargs.get("processor_kwargs") or {})
            kwargs["processor_kwargs"] = {**given, "images": images if batched else images[0]}
        return super().apply_chat_template(texts if batched else texts[0], template, **kwargs)

    def _as_text(self, message: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
        """A message with its content as one string, and the images that were in it."""
        content = message.get("content")
        if content is None or isinstance(content, str):
            return message, []
        parts, images = [], []
        for part in content:
            if part["type"] == "image":
                images += [part[key] for key in ("image", "url", "path", "base64") if key in part]
                parts.append(self.image_token + "\n")
            elif part["type"] == "text":
                parts.append(part["text"])
            else:
                raise ValueError(f"a message's content is of images and text, got type {part['type']!r}")
        return {**message, "content": "".join(parts)}, images


def image_token_id(tokenizer: Any, image_token: str) -> int:
    """Id of the image token.

    Raises:
        ValueError: The tokenizer does not write it as one token.
    """
    found = tokenizer.convert_tokens_to_ids(image_token)
    unknown = found is None or found == getattr(tokenizer, "unk_token_id", None)
    if unknown or list(tokenizer.encode(image_token, add_special_tokens=False)) != [found]:
        raise ValueError(
            f"this tokenizer ({type(tokenizer).__name__}) has no image token {image_token!r}: add it with "
            f"tokenizer.add_special_tokens({{'extra_special_tokens': [{image_token!r}]}}, "
            "replace_extra_special_tokens=False), or let from_vision_and_lm do it"
        )
    return found


def pack_encoded(images: Sequence[EncodedImage]) -> dict[str, Any]:
    """Encoded images as the model's tensors, and the per-image keys of :class:`uhd.hf.UHDImageProcessor`.

    ``image_tokens`` (M, D): visual tokens of each image, its slices row-major and then its overview, whatever order
    they were encoded in. ``view_tokens`` (V,) int64: the tokens of each view.

    Raises:
        ValueError: A plan has more than slices on one canvas and an overview, so the model cannot lay it out again.
    """
    for place, image in enumerate(images):
        rows, cols = image.plan.grid or (0, 0)
        if image.plan.num_views != rows * cols + 1 or image.plan.overview_hw is None:
            raise ValueError(
                f"encoded image {place} has {image.plan.num_views} views for a {rows}x{cols} grid: only plans of "
                f"{rows * cols} slices and one overview can be laid out"
            )
    views = [
        (tokens, view.num_tokens)
        for image in images
        for view, tokens in sorted(
            zip(image.plan.views, image.views, strict=True), key=lambda pair: pair[0].kind == OVERVIEW
        )
    ]
    described = describe_plans([image.plan for image in images])
    described["num_image_tokens"] = np.array([image.layout.num_tokens for image in images], np.int64)
    return {
        "image_tokens": torch.cat([tokens for tokens, _ in views]),
        "view_tokens": torch.tensor([count for _, count in views], dtype=torch.long),
        **{name: torch.from_numpy(values) for name, values in described.items()},
    }


@lru_cache(maxsize=32)
def _writes_images(template: str, image_token: str, special_tokens: str) -> bool:
    """Whether a chat template renders a list of an image and text with exactly one image token."""
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}
    try:
        [text], _ = render_jinja_template(
            conversations=[[message]], chat_template=template, **json.loads(special_tokens)
        )
    except Exception:  # templates raise what they like on content that they do not know
        return False
    return text.count(image_token) == 1


__all__ = ["BatchFeature", "UHDProcessor", "UHDProcessorKwargs", "image_token_id", "pack_encoded"]
