"""What vLLM asks of a prompt with images and videos: their ids, their tensors by item, and the largest of them.

vLLM keeps what an item was made into, and puts prompts together from such parts. So an item's tensors and its number
of tokens come from that item alone, and what plans several of a sample together is refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import vllm
from torch import Tensor
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import DictEmbeddingItems, MultiModalDataItems, MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)

from uhd.encoded import EncodedImage, EncodedVideo, frames_of, num_rows
from uhd.hf import UHDConfig, UHDProcessor
from uhd.hf.image_processing import Planning
from uhd.hf.placing import check_schemas
from uhd.hf.plans import read_plans
from uhd.hf.visual_inputs import pack_encoded, pack_encoded_videos
from uhd.schema.counted import planned_layout
from uhd.slicing import Slicing, SlicingConfig

if not hasattr(BaseMultiModalProcessor, "_finalize_hf_mm_data"):
    raise ImportError(f"vLLM {vllm.__version__} asks processors otherwise than 0.32, which this plug-in is made for")

JOINT = ("max_tokens", "multi_image")
MOST_FRAMES = 32  # of a video that memory is kept for, as many as vLLM takes of one unless told
_TIMES = (0.25, 0.5, 1, 2, 3, 4, 5, 6, 8, 12)  # sides that are tried for the costliest image, in those of a view


def check_config(config: UHDConfig) -> None:
    """Raise a ``ValueError`` where vLLM cannot run a model of this description."""
    if config.injection_mode != "embeds":
        kind = config.text_config.model_type
        raise ValueError(
            f"this model gives images to its language model ({kind}) by injection_mode {config.injection_mode!r}, and "
            "vLLM by inputs_embeds alone: serve it with uhd serve"
        )
    if config.schema.image_id is not None:
        raise ValueError(
            f"schema {config.schema.name!r} numbers the images of a prompt, and vLLM keeps what it makes of an image "
            "for whatever place it has: serve it with uhd serve, or train with a schema that has no image_id"
        )


def refuse_joint(given: Mapping[str, Any] | Planning) -> None:
    """Raise a ``ValueError`` where settings, or keywords, plan a sample's images together."""
    for name in JOINT:
        value = given.get(name) if isinstance(given, Mapping) else getattr(given, name, None)
        if value:
            raise ValueError(
                f"{name}={value} plans all images of a prompt together, and vLLM keeps what it makes of each alone: "
                "leave it out, and bound each image with max_slices, or max_tokens of the model's slicing"
            )


@lru_cache(maxsize=16)
def costliest_hw(slicing: Slicing) -> tuple[int, int]:
    """(height, width) of an image that no other costs more tokens than: by the adaptive rule, else of those tried.

    Other rules, and latents that are fitted to views, tell no such image, so thousands of sizes are tried, and then
    those around the costliest.
    """
    if isinstance(slicing, SlicingConfig) and not slicing.fits_latents:
        return slicing.worst_case().image_hw
    side, plans = slicing.view_side or 448, {}

    def costliest(sizes: Iterable[Sequence[float]]) -> tuple[int, int]:
        for size in {tuple(max(round(length), 1) for length in pair) for pair in sizes} - plans.keys():
            with suppress(ValueError):  # a rule may refuse an aspect
                plans[size] = slicing.plan(size)
        return max(plans, key=lambda size: (plans[size].num_tokens, plans[size].num_patches, size))

    regular = itertools.product([side * times for times in _TIMES], repeat=2)
    anywhere = np.exp(np.random.default_rng(0).uniform(np.log(16), np.log(side * max(_TIMES)), (4000, 2)))
    height, width = costliest([*regular, *anywhere.tolist()])
    near = np.linspace(0.7, 1.3, 31)
    return costliest((height * a, width * b) for a, b in itertools.product(near, near))


class Info(BaseProcessingInfo):
    """What is known of a model before any prompt."""

    def __init__(self, ctx: Any) -> None:
        super().__init__(ctx)
        check_config(self.get_hf_config())

    def get_hf_config(self) -> UHDConfig:
        return self.ctx.get_hf_config(UHDConfig)

    def get_hf_processor(self, **kwargs: object) -> UHDProcessor:
        processor = self.ctx.get_hf_processor(UHDProcessor)
        refuse_joint(processor.image_processor)
        refuse_joint(processor.video_processor)
        processor.image_processor.pad_patches = False  # that form is of trainers
        return processor

    def get_data_parser(self) -> MultiModalDataParser:
        parser = Parser(expected_hidden_size=self._get_expected_hidden_size())
        parser.schema = self.get_hf_config().schema
        return parser

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        kinds = ("image", "video") if self.get_hf_processor().video_token is not None else ("image",)
        return dict.fromkeys(kinds)

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        image_hw, frames = self.costliest(seq_len)
        processor = self.get_hf_processor()
        most = {
            "image": lambda: self.costliest_tokens(image_hw),
            "video": lambda: processor.video_processor.plan(image_hw, frames).num_tokens,
        }
        return {kind: min(most[kind](), seq_len) for kind in mm_counts}

    def costliest_tokens(self, image_hw: tuple[int, int]) -> int:
        """The tokens of an image of this size; by the adaptive rule, those that none exceeds."""
        images = self.get_hf_processor().image_processor
        planner = images.planner({})
        bound = planner.worst_case().num_tokens if isinstance(planner, SlicingConfig) else 0
        return max(bound, images.plan(image_hw).num_tokens)

    def costliest(self, seq_len: int) -> tuple[tuple[int, int], int]:
        """(height, width) of the costliest image, and how many such frames a video may have here."""
        processor = self.get_hf_processor()
        image_hw = costliest_hw(processor.image_processor.planner({}))
        each = processor.video_processor.plan(image_hw, 1).num_tokens
        return image_hw, min(max(seq_len // each, 1), MOST_FRAMES)


class Parser(MultiModalDataParser):
    """Images and videos as vLLM takes them, and those that were encoded before (``uhd.load_tokens``)."""

    schema: Any = None

    def _parse_image_data(self, data: Any) -> Any:
        return self._parsed(data, "image", EncodedImage, pack_encoded, super()._parse_image_data)

    def _parse_video_data(self, data: Any) -> Any:
        return self._parsed(data, "video", EncodedVideo, pack_encoded_videos, super()._parse_video_data)

    def _parsed(self, data: Any, kind: str, encoded: type, pack: Any, plain: Any) -> Any:
        if self.is_embeddings(data):
            raise ValueError(
                f"{kind} embeddings without their plans cannot be laid out: give what uhd.load_tokens returns, "
                f"or the encoder makes ({encoded.__name__})"
            )
        items = data if isinstance(data, (list, tuple)) else [data]
        if not any(isinstance(item, encoded) for item in items):
            return plain(data)
        if not all(isinstance(item, encoded) for item in items):
            raise ValueError(f"some {kind}s of this prompt are encoded and some are not: encode all of them, or none")
        check_schemas(items, self.schema)
        tensors = {name: value.detach().cpu() for name, value in pack(items).items()}
        return DictEmbeddingItems(_by_item(tensors), kind, {f"{kind}_tokens", f"{kind}_plans"}, _fields)


class Dummies(BaseDummyInputsBuilder[Info]):
    """The costliest images and videos, for vLLM to see how much memory they take."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        processor = self.info.get_hf_processor()
        tokens = {"image": processor.image_token, "video": processor.video_token}
        return "".join(token * mm_counts.get(kind, 0) for kind, token in tokens.items() if token)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]) -> Any:
        (height, width), frames = self.info.costliest(seq_len)
        size = {"height": height, "width": width}
        images, videos = mm_counts.get("image", 0), mm_counts.get("video", 0)
        return {
            "image": self._get_dummy_images(**size, num_images=images, overrides=mm_options.get("image")),
            "video": self._get_dummy_videos(
                **size, num_frames=frames, num_videos=videos, overrides=mm_options.get("video")
            ),
        }


class Processor(BaseMultiModalProcessor[Info]):
    """The model's own processor, on an image or a video at a time; prompts grow by what it counts."""

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]) -> Any:
        kwargs = self.info.ctx.get_merged_mm_kwargs(hf_kwargs)
        for scope in (kwargs, kwargs.get("images_kwargs", {}), kwargs.get("videos_kwargs", {})):
            refuse_joint(scope)
        raw = {"do_rescale": False, "do_normalize": False}  # the model normalises
        return self.info.get_hf_processor()(**hf_data, **{**raw, **kwargs, "return_tensors": "pt"})

    def _postprocess_hf_mm_data(self, mm_inputs: Any, hf_processor_mm_kwargs: Any, processed_data: Any) -> Any:
        processed_data.update(_by_item(processed_data))
        return processed_data

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return _fields(hf_inputs)

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptReplacement]:
        config = self.info.get_hf_config()
        tokens = {"image": config.image_token_id, "video": config.video_token_id}

        def replaced(kind: str, token: int) -> PromptReplacement:
            def positions(place: int) -> list[int]:
                (plan,) = read_plans(out_mm_kwargs[kind][place][f"{kind}_plans"].data[None])
                return [token] * planned_layout(plan, config.schema).num_tokens

            return PromptReplacement(modality=kind, target=[token], replacement=positions)

        return [replaced(kind, tokens[kind]) for kind in mm_items if kind in tokens]


def _by_item(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """A batch whose plans have no padding, which depends on the other items of the call."""
    found = dict(tensors)
    for name in ("image_plans", "video_plans"):
        if isinstance(found.get(name), Tensor):
            found[name] = [row[: int(row.count_nonzero())] for row in found[name]]  # its text holds no zero
    return found


def _fields(tensors: Mapping[str, Any]) -> dict[str, MultiModalFieldConfig]:
    """How each tensor of a batch is cut by images and videos."""
    found = {}
    for kind, patches, grids in (("image", "pixel_values", "grids"), ("video", "pixel_values_videos", "video_grids")):
        rows = tensors.get(f"{kind}_plans")
        if rows is None:
            continue
        plans = [read_plans(row[None])[0] for row in rows]
        views = [sum(len(frame.views) for frame in frames_of(plan)) for plan in plans]
        flat = {
            patches: [plan.num_patches for plan in plans],
            grids: views,
            f"{kind}_tokens": list(map(num_rows, plans)),
        }
        for name, counts in flat.items():
            found[name] = MultiModalFieldConfig.flat_from_sizes(kind, torch.tensor(counts), keep_on_cpu=name == grids)
        batched = [f"{kind}_plans"] + ["num_patches", "image_sizes"] * (kind == "image")
        found.update({name: MultiModalFieldConfig.batched(kind, keep_on_cpu=True) for name in batched})
    return found
