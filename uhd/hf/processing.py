"""``UHDProcessor``: text, images and videos, or encoded ones, to what the model takes."""

# no `from __future__ import annotations`: transformers reads the types of the keywords below at run time

import os
import threading
from collections.abc import Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from transformers.processing_utils import BatchFeature, MultiModalData, ProcessingKwargs, ProcessorMixin

from uhd.encoded import EncodedImage, EncodedVideo
from uhd.hf.bare import FoundByName, auto_map, save_beside
from uhd.hf.chat import (
    as_dict,
    chosen_template,
    is_message,
    kind_of,
    mark_words,
    parts_of,
    sources,
    takes_lists,
    with_token_variables,
    without_none,
)
from uhd.hf.folders import processor_checked
from uhd.hf.image_processing import (
    Made,
    PlannedImage,
    UHDImagesKwargs,
    arrange_images,
    check_backbone,
    refuse_own_function,
)
from uhd.hf.labels import LabelledBatch
from uhd.hf.versions import MARKS_WORDS, processor_defaults, without_marked_text
from uhd.hf.video_processing import (
    PlannedVideo,
    UHDVideoProcessor,
    UHDVideosKwargs,
    arrange_videos,
    same_slicing,
    size_of,
)
from uhd.hf.visual_inputs import pack_encoded, pack_encoded_videos
from uhd.hf.words import spelling, words_stay_words
from uhd.loading import named
from uhd.pixels import PixelSettings
from uhd.slicing import SlicingLike
from uhd.slicing.sample import plan_sample

if TYPE_CHECKING:
    from typing_extensions import Self

    from uhd.hf.image_processing import UHDImageProcessorPil

IMAGE_TOKEN = "<image>"
VIDEO_TOKEN = "<video>"

PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role | capitalize }}: "
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}{{ 'IMAGE_TOKEN\n' }}{% elif part.type == 'video' %}{{ 'VIDEO_TOKEN\n' }}"
    "{% elif part.type == 'text' %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""For tokenizers that bring no chat template; IMAGE_TOKEN and VIDEO_TOKEN stand for the image and video token."""

_TOKENIZING = threading.RLock()
"""A fast tokenizer keeps a call's padding and truncation as its own state, and another thread's call changes it."""

if hasattr(os, "register_at_fork"):  # a worker forked while another thread tokenizes would wait for ever
    os.register_at_fork(
        before=_TOKENIZING.acquire, after_in_parent=_TOKENIZING.release, after_in_child=_TOKENIZING.release
    )


_CHAT: ContextVar[tuple[Any, Any, dict[str, str]]] = ContextVar("chat of strings", default=(None, None, {}))
"""Of a conversation whose template takes text only: its images and videos, which transformers does not find in such
messages, and what stands there for their tokens."""


class UHDProcessorKwargs(ProcessingKwargs, total=False):
    """transformers' keywords, and those of the image and the video processor."""

    images_kwargs: UHDImagesKwargs
    videos_kwargs: UHDVideosKwargs


@processor_defaults(
    {
        "text_kwargs": {"padding": True, "return_tensors": "pt"},
        "images_kwargs": {"return_tensors": "pt"},
        "videos_kwargs": {"return_tensors": "pt"},
    }
)
class UHDProcessor(FoundByName):
    """A tokenizer, an image processor and a video processor.

    Every image token in the text stands for one image, every video token for one video, in order; each becomes as many
    such tokens as the plan counts, separators included. Text is padded where ``tokenizer.padding_side`` says: on the
    left, as generation needs, unless the tokenizer came with a side of its own or another was set; a call may be given
    ``padding_side="right"``. Truncation that would cut an image or a video raises. ``max_tokens`` is one budget for
    all images and videos of a sample that are not encoded yet.

    With ``image_processor.pad_patches`` a batch can be cut by its images, and text is neither padded nor made tensors
    unless the call says so: trainers that cut batches pad prompts themselves.

    Chat templates that know images (and videos, where a conversation has some) are used as they are. With others each
    message becomes a string, with the token and a line break where an image or a video was.

    Args:
        image_processor: :class:`uhd.hf.UHDImageProcessor` or its Pil variant.
        tokenizer: Any tokenizer that writes ``image_token`` as one token.
        video_processor: ``None`` is a :class:`uhd.hf.UHDVideoProcessor` with the image processor's settings.
        chat_template: Replaces the tokenizer's.
        image_token: The placeholder of an image.
        video_token: The placeholder of a video; a tokenizer that does not write it as one token takes no videos.

    Raises:
        ValueError: The tokenizer has no image token, or the slicings of the two processors differ; on a call: images
            or videos and their tokens differ in number (the sample and both counts are named), or one was truncated.
    """

    valid_processor_kwargs = UHDProcessorKwargs
    tokenizer: Any  # strict checkers find half of transformers' own methods untyped
    image_processor: "UHDImageProcessorPil"
    video_processor: UHDVideoProcessor

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        video_processor: Any = None,
        chat_template: str | None = None,
        image_token: str = IMAGE_TOKEN,
        video_token: str | None = VIDEO_TOKEN,
        **kwargs: Any,
    ) -> None:
        if "padding_side" not in getattr(tokenizer, "init_kwargs", {"padding_side": None}):
            tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
        self.auto_map = auto_map(AutoProcessor="UHDProcessor")
        self.image_token = image_token
        self.image_token_id = placeholder_id(tokenizer, image_token)
        self.video_token, self.video_token_id = None, None
        if video_token is not None and _knows(tokenizer, video_token):
            self.video_token, self.video_token_id = video_token, placeholder_id(tokenizer, video_token, "video")
        video_processor = UHDVideoProcessor.of(image_processor) if video_processor is None else video_processor
        if not same_slicing(image_processor, video_processor):
            raise ValueError(
                "image and video processor have other slicings, the model has one: leave video_processor out, or make "
                "it with UHDVideoProcessor.of(image_processor)"
            )
        super().__init__(image_processor, tokenizer, video_processor, chat_template=chat_template, **kwargs)

    @property
    def pad_token_id(self) -> int | None:
        """The tokenizer's, as trainers ask what they train with."""
        return self.tokenizer.pad_token_id

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> "Self":
        """As in transformers; a ``ValueError`` or ``OSError`` names a local folder's file that is damaged."""
        with processor_checked(pretrained_model_name_or_path, kwargs.get("subfolder")) as check:
            return check(super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs))

    def follow(self, slicing: SlicingLike, pixels: PixelSettings) -> None:
        """Plan and cut from now on as an encoder with this slicing and these pixels; budgets and the rest stay."""
        self.image_processor.follow(slicing, pixels)
        self.video_processor.follow(slicing, pixels)

    @property
    def unused_input_names(self) -> list[str]:
        return ["num_image_tokens", "num_video_tokens"]

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers.

        Raises:
            ValueError: The slicing is a function of the caller's own.
        """
        refuse_own_function(self.image_processor.slicing)
        return save_beside(super().save_pretrained, save_directory, *args, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """The image token once for every position of an image."""
        return self.image_token * int(image_inputs["num_image_tokens"][image_idx])

    def replace_video_token(self, video_inputs: dict, video_idx: int, **kwargs: Any) -> str:
        """The video token once for every position of a video."""
        return self.video_token * int(video_inputs["num_video_tokens"][video_idx])

    def _get_num_multimodal_tokens(
        self,
        image_sizes: Sequence[Sequence[int]] | None = None,
        video_sizes: Sequence[Sequence[int]] | None = None,
        **kwargs: Any,
    ) -> MultiModalData:
        """Tokens, and rows of ``pixel_values``, for images of these (height, width), and tokens for videos of these
        (number of frames, height, width): from the planner alone."""
        found: dict[str, Any] = {}
        if image_sizes is not None:
            plans = [self.image_processor.plan((int(h), int(w)), **kwargs) for h, w in image_sizes]
            found["num_image_tokens"] = [item.num_tokens for item in plans]
            patches = self.image_processor.get_number_of_image_patches
            found["num_image_patches"] = [patches(int(h), int(w), kwargs) for h, w in image_sizes]
        if video_sizes is not None:
            clips = [self.video_processor.plan((int(h), int(w)), int(n), **kwargs) for n, h, w in video_sizes]
            found["num_video_tokens"] = [item.num_tokens for item in clips]
        return MultiModalData(**found)

    def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any) -> BatchFeature:
        """Text with its images and videos as the model's inputs.

        Args:
            images: One, a flat list or 4-D array, or a list of lists, one a sample: what
                :func:`uhd.pixels.load_image` takes, or encoded images.
            text: A string or a list of them, with an image token for every image and a video token for every video.
            videos: One, a flat list, or a list of lists, one a sample: lists of frames, 4-D arrays or tensors, files,
                or encoded videos; see :class:`uhd.hf.UHDVideoProcessor`.
            kwargs: Those of the tokenizer, the image processor and the video processor.

        Raises:
            ValueError: See the class; or a ``slicing`` that plans for another view or patch size than the model's.
        """
        if kwargs.pop("audio", None) is not None:
            raise ValueError(f"{type(self).__name__} takes text, images and videos, got audio")
        if images is None and videos is None:
            images, videos, _ = _CHAT.get()
        if images is None and text is None and videos is None:
            raise ValueError(f"{type(self).__name__} was given neither text nor images nor videos")
        text = [text] if isinstance(text, str) else None if text is None else list(text)
        if text is not None and not (text and all(isinstance(sample, str) for sample in text)):
            raise ValueError(f"text must be a string or a list of strings, at least one, got {text!r:.200}")
        if videos is not None and text is not None and self.video_token is None:
            raise ValueError(
                f"this processor's tokenizer ({type(self.tokenizer).__name__}) has no video token: add one with "
                f"tokenizer.add_special_tokens({{'extra_special_tokens': [{VIDEO_TOKEN!r}]}}, "
                "replace_extra_special_tokens=False) and build the processor again, or let from_vision_and_lm do it"
            )
        if self.image_processor.pad_patches and "text_kwargs" not in kwargs:
            kwargs = {"padding": False, "return_tensors": None, **kwargs}
        text = None if text is None else list(map(_with_tokens, text))
        unmarked = text  # a token in what transformers marked as the user's own words is no placeholder
        if text is not None and kwargs.get("sanitize_control_tokens"):
            unmarked = without_marked_text(text)
        flat, counts = arrange_images(images)
        clips, clip_counts = ([], None) if videos is None else arrange_videos(videos)
        counts = _per_sample(unmarked, self.image_token, len(flat), counts, "image")
        clip_counts = _per_sample(unmarked, self.video_token, len(clips), clip_counts, "video")
        if text is None:  # nothing says which of them belong together
            counts, clip_counts = counts + [0] * len(clip_counts), [0] * len(counts) + clip_counts
        given = _made(self, flat, counts, clips, clip_counts, kwargs)
        with _TOKENIZING:
            processor = spelling(self)
            batch = ProcessorMixin.__call__(processor, given[0] or None, text, given[1] or None, **kwargs)
        return LabelledBatch.of(batch, self)

    def validate_inputs(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: inputs are checked before they are planned, in the call."""

    def _process_images(self, images: list[Any], **kwargs: Any) -> tuple[dict[str, Any], list[str]]:
        data = images[0].batch if isinstance(images[0], Made) else pack_encoded(images)
        return data, [self.replace_image_token(data, index) for index in range(len(images))]

    def _process_videos(self, videos: list[Any], **kwargs: Any) -> tuple[dict[str, Any], list[str]]:
        data = videos[0].batch if isinstance(videos[0], Made) else pack_encoded_videos(videos)
        if self.video_token is None:
            return data, []
        return data, [self.replace_video_token(data, index) for index in range(len(videos))]

    def _check_special_mm_tokens(self, text: list[str], text_inputs: Any, modalities: list[str]) -> None:
        tokens = {"image": (self.image_token, self.image_token_id), "video": (self.video_token, self.video_token_id)}
        for sample, (line, ids) in enumerate(zip(text, text_inputs["input_ids"], strict=True)):
            ids, [line] = list(map(int, ids)), without_marked_text([line])
            for kind, (token, token_id) in tokens.items():
                wanted, got = (0, 0) if token is None else (line.count(token), ids.count(token_id))
                if wanted != got:
                    raise ValueError(
                        f"sample {sample} needs {wanted} positions for its {kind}s and {got} are left: truncation "
                        f"would cut {'an image' if kind == 'image' else 'a video'}. Raise max_length, turn truncation "
                        "off, or lower max_tokens or max_slices"
                    )

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """As in transformers; see the class for templates that take text only.

        A template's variables ``image_token`` and ``video_token`` are this processor's tokens unless they are given.
        """
        template = chosen_template(self.chat_template, chat_template)
        if kwargs.get("sanitize_control_tokens") and not MARKS_WORDS:
            with words_stay_words(self.tokenizer, template, conversation, kwargs) as (conversation, kwargs):
                return self.apply_chat_template(conversation, template, **kwargs)
        batched = not is_message(conversation[0])
        needed = bool(kwargs.get("tokenize"))
        conversations = [without_none(messages, needed) for messages in (conversation if batched else [conversation])]
        tokens = {"image": self.image_token, "video": self.video_token}
        template, kwargs = with_token_variables(template, tokens, kwargs)
        found = {kind_of(part) for messages in conversations for message in messages for part in parts_of(message)}
        kinds = [kind for kind in tokens if kind in found]
        if takes_lists(template, kinds, tokens, {**self.tokenizer.special_tokens_map, **kwargs}):
            found = super().apply_chat_template(conversations if batched else conversations[0], template, **kwargs)
            return self._marked(found, conversations, template, kwargs)
        images: list[list[Any]] = [[] for _ in conversations]
        videos: list[list[Any]] = [[] for _ in conversations]
        places = self._places((conversations, kwargs))
        texts = [
            [self._as_text(message, places, *media) for message in messages]
            for messages, *media in zip(conversations, images, videos, strict=True)
        ]
        stand_ins = {place: tokens[kind] for kind, place in places.items()}
        told = _CHAT.set((images if any(images) else None, videos if any(videos) else None, stand_ins))
        try:
            found = super().apply_chat_template(texts if batched else texts[0], template, **kwargs)
            if kwargs.get("tokenize"):
                words = [[{**m, "content": _with_tokens(m["content"] or "")} for m in chat] for chat in texts]
                return self._marked(found, words, template, kwargs)
            return _with_tokens(found) if isinstance(found, str) else list(map(_with_tokens, found))
        finally:
            _CHAT.reset(told)

    def _marked(self, found: Any, conversations: list[Any], template: str, kwargs: dict[str, Any]) -> Any:
        visual = {self.image_token_id, self.video_token_id}
        with _TOKENIZING:
            return mark_words(found, self.tokenizer, conversations, template, kwargs, visual)

    def _places(self, written: Any) -> dict[str, str]:
        """What stands for the image and the video token in messages: letters that nobody has written.

        As long as the token, so that places in the text stay the same.
        """
        words = repr(written)
        free = (letter for letter in map(chr, range(0xE0F0, 0xE200)) if repr(letter)[1:-1] not in words)
        tokens = {"image": self.image_token, "video": self.video_token}
        return {kind: next(free) * len(token) for kind, token in tokens.items() if token is not None}

    @staticmethod
    def _as_text(message: Any, places: dict[str, str], images: list[Any], videos: list[Any]) -> dict[str, Any]:
        """A message with its content as one string; its images and videos are appended to the lists."""
        message = as_dict(message)
        content = message.get("content")
        if content is None or isinstance(content, str):
            return message
        parts: list[str] = []
        for part in parts_of(message):
            kind = kind_of(part)
            if kind == "text":
                parts.append(part["text"])
            elif kind == "image":
                parts.append(places[kind] + "\n")
                images += sources(part, "image", "url", "path", "base64", "image_url")
            elif kind == "video" and kind in places:
                parts.append(places[kind] + "\n")
                videos += sources(part, "video", "url", "path")
            else:
                raise ValueError(f"a message's content is of images, videos and text, got type {kind!r}")
        return {**message, "content": "".join(parts)}


def _with_tokens(text: str) -> str:
    """A rendered chat with the tokens in place of their stand-ins."""
    for stand_in, token in _CHAT.get()[2].items():
        text = text.replace(stand_in, token)
    return text


def _made(
    processor: UHDProcessor,
    images: list[Any],
    image_counts: list[int],
    videos: list[Any],
    video_counts: list[int],
    kwargs: dict[str, Any],
) -> tuple[list[Any], list[Any]]:
    """All tensors of images and videos, those of a sample planned together; what is encoded stays as it is."""
    encoded = _all_encoded(images, EncodedImage, "images"), _all_encoded(videos, EncodedVideo, "videos")
    if all(encoded):
        return images, videos
    merged = processor._merge_kwargs(
        processor.valid_processor_kwargs, tokenizer_init_kwargs=processor.tokenizer.init_kwargs, **kwargs
    )
    for_images, for_videos = merged["images_kwargs"], merged["videos_kwargs"]
    for given in (for_images.get("slicing"), for_videos.get("slicing")):
        if given is not None:
            check_backbone(given, processor.image_processor.slicing)
    pictures = []
    for number, item in enumerate([] if encoded[0] else images):
        with named("image", number, item):
            pictures.append(processor.image_processor.fetch_images(item, for_images))
    loaded = [] if encoded[1] else processor.video_processor.load_all(videos, for_videos)
    settings = {
        "slicing": processor.image_processor.planner(for_images),
        "video_slicing": processor.video_processor.planner(for_videos),
        "frames": processor.video_processor.setting("frames", for_videos),
        "max_tokens": _budget(processor, for_images, for_videos),
        "multi_image": bool(processor.image_processor.setting("multi_image", for_images)),
    }
    none = [0] * len(image_counts)
    rows = zip(none if encoded[0] else image_counts, none if encoded[1] else video_counts, strict=True)
    still, moving = iter(pictures), iter(loaded)
    found, clips = [], []
    for number, (num_images, num_videos) in enumerate(rows):
        sample = [next(still) for _ in range(num_images)]
        frames = [next(moving) for _ in range(num_videos)]
        sizes = [(item.height, item.width) for item in sample]
        with named("sample", number):
            plans, video_plans = plan_sample(sizes, list(map(size_of, frames)), **settings)
        found += map(PlannedImage, sample, plans)
        clips += map(PlannedVideo, frames, video_plans)
    return (
        # transformers counts these lists; each entry is the whole batch
        images if encoded[0] else [Made(processor.image_processor(found, **for_images))] * len(found),
        videos if encoded[1] else [Made(processor.video_processor(clips, **for_videos))] * len(clips),
    )


def _budget(processor: UHDProcessor, for_images: dict[str, Any], for_videos: dict[str, Any]) -> int | None:
    """The one bound on a sample's tokens."""
    given = {
        processor.image_processor.setting("max_tokens", for_images),
        processor.video_processor.setting("max_tokens", for_videos),
    } - {None}
    if len(given) > 1:
        raise ValueError(
            f"max_tokens is {sorted(given)} for images and videos: it bounds both of a sample together, so give "
            "one number"
        )
    return next(iter(given), None)


def placeholder_id(tokenizer: Any, token: str, kind: str = "image") -> int:
    """Id of the image token, or of the video token.

    Raises:
        ValueError: The tokenizer does not write it as one token.
    """
    found = tokenizer.convert_tokens_to_ids(token)
    if not _knows(tokenizer, token) or list(tokenizer.encode(token, add_special_tokens=False)) != [found]:
        raise ValueError(
            f"this tokenizer ({type(tokenizer).__name__}) has no {kind} token {token!r}: add it with "
            f"tokenizer.add_special_tokens({{'extra_special_tokens': [{token!r}]}}, "
            "replace_extra_special_tokens=False), or let from_vision_and_lm do it"
        )
    return found


def _knows(tokenizer: Any, token: str) -> bool:
    return tokenizer.convert_tokens_to_ids(token) not in (None, getattr(tokenizer, "unk_token_id", None))


def _all_encoded(items: list[Any], kind: type, name: str) -> bool:
    encoded = [isinstance(item, kind) for item in items]
    if any(encoded) and not all(encoded):
        raise ValueError(f"got {sum(encoded)} encoded {name} among {len(items)}: encode all of them, or none")
    return all(encoded)


def _per_sample(
    text: list[str] | None, token: str | None, given: int, nested: list[int] | None, kind: str
) -> list[int]:
    """How many images or videos each sample has: as nested, else as their tokens are in the text.

    Raises:
        ValueError: The text has other numbers of their tokens.
    """
    if text is None:
        return [1] * given if nested is None else nested
    counts = [0 if token is None else sample.count(token) for sample in text]
    rule = f"the {token} tokens in the prompts should be the same as the number of {kind}s, in each sample: "
    if nested is not None:
        if len(text) != len(nested):
            raise ValueError(f"{rule}got {len(text)} texts and lists of {kind}s for {len(nested)}: need as many")
        for sample, (count, number) in enumerate(zip(counts, nested, strict=True)):
            if count != number:
                raise ValueError(f"{rule}sample {sample} has {count} {token} and {number} {kind}s")
        return counts
    left = given
    if sum(counts) == given:
        return counts
    for sample, count in enumerate(counts):
        if count > left:
            raise ValueError(
                f"{rule}sample {sample} has {count} {token} and {left} {kind}s are left for it; in all "
                f"{sum(counts)} {token} and {given} {kind}s"
            )
        left -= count
    raise ValueError(
        f"{rule}the {len(text)} samples have {sum(counts)} {token} (per sample: {counts}) and there are "
        f"{given} {kind}s: each {kind} needs its own {token} in the text"
    )


__all__ = ["UHDProcessor", "UHDProcessorKwargs", "pack_encoded", "pack_encoded_videos", "placeholder_id"]
