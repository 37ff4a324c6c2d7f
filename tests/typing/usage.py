# pyright: strict
"""Uses of the public names as people write them; `.ci/run` has mypy and pyright read this file, both strict."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature
from typing_extensions import assert_type

import uhd
from uhd.demo import page_image, untrained_encoder


def planning(photo: Image.Image) -> int:
    plan: uhd.SlicePlan = uhd.plan((1080, 1920))
    rows, columns = plan.grid or (1, 1)
    other = uhd.plan((photo.height, photo.width), "llava-next")
    config: uhd.SlicingConfig = uhd.SlicingConfig(max_slices=9)
    tokens = uhd.layout(uhd.plan((300, 400), config=config), uhd.SpatialSchema())
    names: list[str] = list(uhd.strategies())
    many = uhd.plan_many(np.array([[300, 400], [500, 200]]))
    return rows * columns + other.num_views + tokens.num_tokens + len(names) + len(many)


def encoding(folder: Path, photo: Image.Image) -> Tensor:
    encoder: uhd.VisualEncoder = untrained_encoder()
    encoder.save_pretrained(folder)
    again = uhd.VisualEncoder.from_pretrained(folder)
    images = again([photo, page_image()])
    first: Tensor = images[0].tokens
    kept, refused = again([photo, photo], errors="collect")
    others: list[uhd.EncodedImage] = [image for image in kept if image is not None]
    assert_type(images, list[uhd.EncodedImage])  # what is Any would be any type
    assert_type(kept, list[uhd.EncodedImage | None])
    assert_type(again, uhd.VisualEncoder)
    plan: uhd.SlicePlan = others[0].plan if not refused else images[0].plan
    uhd.save_tokens(folder / "tokens.safetensors", images, schema=encoder.schema)
    loaded: list[uhd.EncodedImage | uhd.EncodedVideo] = uhd.load_tokens(folder / "tokens.safetensors")
    return torch.cat([first, loaded[0].tokens[: plan.num_views]])


def answering(folder: Path, photo: Image.Image) -> str:
    model = uhd.UHDForConditionalGeneration.from_pretrained(folder)
    eyes: uhd.VisualEncoder = model.visual
    processor: uhd.UHDProcessor = model.processor
    batch = processor(text="<image>\nWhat is it?", images=[photo] * len(eyes([photo])))
    assert_type(model, uhd.UHDForConditionalGeneration)
    assert_type(model.processor, uhd.UHDProcessor)
    assert_type(uhd.UHDProcessor.from_pretrained(folder), uhd.UHDProcessor)
    assert_type(batch, BatchFeature)
    found = model.generate(**batch, max_new_tokens=8)
    return str(processor.tokenizer.decode(found[0]))
