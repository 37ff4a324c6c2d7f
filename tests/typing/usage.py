# pyright: strict
"""Uses of the public names as people write them; `.ci/run` has mypy and pyright read this file, both strict."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature

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
    again: uhd.VisualEncoder = uhd.VisualEncoder.from_pretrained(folder)
    images: list[uhd.EncodedImage] = again([photo, page_image()])
    first: Tensor = images[0].tokens
    kept, refused = again([photo, photo], errors="collect")
    others: list[uhd.EncodedImage] = [image for image in kept if image is not None]
    plan: uhd.SlicePlan = others[0].plan if not refused else images[0].plan
    uhd.save_tokens(folder / "tokens.safetensors", images, schema=encoder.schema)
    loaded: list[uhd.EncodedImage | uhd.EncodedVideo] = uhd.load_tokens(folder / "tokens.safetensors")
    return torch.cat([first, loaded[0].tokens[: plan.num_views]])


def answering(folder: Path, photo: Image.Image) -> str:
    model: uhd.UHDForConditionalGeneration = uhd.UHDForConditionalGeneration.from_pretrained(folder)
    eyes: uhd.VisualEncoder = model.visual
    processor: uhd.UHDProcessor = model.processor
    batch: BatchFeature = processor(text="<image>\nWhat is it?", images=[photo] * len(eyes([photo])))
    found = model.generate(**batch, max_new_tokens=8)
    return str(processor.tokenizer.decode(found[0]))
