"""The front ends of transformers that `end_to_end.py` compares with: their released geometry, random weights."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)
from transformers.models.llava_next.image_processing_llava_next import LlavaNextImageProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_llava_onevision import LlavaOnevisionImageProcessor
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.minicpmv4_6 import MiniCPMV4_6Config, MiniCPMV4_6ForConditionalGeneration
from transformers.models.minicpmv4_6.image_processing_minicpmv4_6 import MiniCPMV4_6ImageProcessor
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

LM_WIDTH, HEAD_DIM, PATCH = 1024, 64, 14
EXACT_WAY = "Pillow"
"""The way whose pixels are those of our exact backend."""

Parts = tuple[nn.Module, Any, Any]
"""A model, its processor on torchvision, its processor on Pillow."""


@dataclass
class Peer:
    """A model of transformers, its ways from JPEGs to pixels, and the folder in which it is saved for us to read."""

    name: str
    model: nn.Module
    ways: dict[str, Callable[[list[bytes]], Any]]
    folder: Path

    def tokens(self, images: list[bytes], way: str) -> list[Tensor]:
        """(n, LM_WIDTH) of every image."""
        return self.see(self.ways[way](images))

    def see(self, pixels: Any) -> list[Tensor]:
        """The same of what a processor made of the images."""
        model = self.model.model
        weight = next(model.parameters())
        pixels = pixels.to(weight.device, weight.dtype)
        if "target_sizes" not in pixels:
            return list(model.get_image_features(pixels.pixel_values, pixels.image_sizes).pooler_output)
        views = iter(model.get_image_features(pixels.pixel_values, pixels.target_sizes).pooler_output)
        return [torch.cat([next(views) for _ in range(count)]) for count in pixels.num_patches_per_image]

    def patches(self, images: list[bytes]) -> int:
        """How many its ViT computes, whatever the processor pads."""
        (stem,) = (m for name, m in self.model.named_modules() if name.endswith("embeddings.patch_embedding"))
        seen: list[int] = []
        handle = stem.register_forward_hook(lambda module, args, out: seen.append(out[:, 0].numel()))
        try:
            self.tokens(images, EXACT_WAY)
        finally:
            handle.remove()
        return sum(seen)


def make_peer(name: str, width: int, depth: int, folder: Path) -> Peer:
    """A peer with a ViT of this size and random weights, saved in a folder."""
    torch.manual_seed(0)
    vision = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": depth}
    vision |= {"num_attention_heads": width // HEAD_DIM, "patch_size": PATCH}
    text = {"hidden_size": LM_WIDTH, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 8}
    text |= {"num_key_value_heads": 1, "vocab_size": 320, "eos_token_id": 319, "pad_token_id": 318}
    model, fast, pillow = MAKERS[name](vision, text)
    scatter(model)
    model.save_pretrained(folder)
    pillow.save_pretrained(folder)
    return Peer(name, model, _ways(fast, pillow), folder)


@torch.no_grad()
def scatter(model: nn.Module) -> None:
    """No parameter at a special value, and activations of about 1 at any depth; for inference."""
    for parameter in model.eval().requires_grad_(False).parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:
            parameter.add_(0.1 * torch.randn_like(parameter))


def _llava_next(vision: dict[str, Any], text: dict[str, Any]) -> Parts:
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**vision, image_size=336),
        text_config=LlamaConfig(**text),
        image_token_index=310,
        vision_feature_layer=-1,  # see the head of end_to_end.py
    )
    settings = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    processors = LlavaNextImageProcessor(**settings), LlavaNextImageProcessorPil(**settings)
    return LlavaNextForConditionalGeneration(config), *processors


def _llava_onevision(vision: dict[str, Any], text: dict[str, Any]) -> Parts:
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**vision, image_size=384, vision_use_head=False),
        text_config=Qwen2Config(**text),
        image_token_index=310,
        video_token_index=311,
    )
    means = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    processors = LlavaOnevisionImageProcessor(**means), LlavaOnevisionImageProcessorPil(**means)
    return LlavaOnevisionForConditionalGeneration(config), *processors


def _minicpm(vision: dict[str, Any], text: dict[str, Any]) -> Parts:
    config = MiniCPMV4_6Config(
        vision_config={**vision, "image_size": 980},
        text_config=Qwen3Config(**text, head_dim=64).to_dict(),
        insert_layer_id=max(round(vision["num_hidden_layers"] / 4) - 1, 0),  # released: 6, after 7 of 27 blocks
        patch_size=PATCH,
        image_token_id=310,
        video_token_id=311,
    )
    return MiniCPMV4_6ForConditionalGeneration(config), MiniCPMV4_6ImageProcessor(), MiniCPMV4_6ImageProcessorPil()


MAKERS: dict[str, Callable[[dict[str, Any], dict[str, Any]], Parts]] = {
    "LLaVA-NeXT": _llava_next,
    "LLaVA-OneVision": _llava_onevision,
    "MiniCPM-V 4.6": _minicpm,
}


def _ways(fast: Any, pillow: Any) -> dict[str, Callable[[list[bytes]], Any]]:
    """By processor, and by who decodes."""
    return {
        "torchvision": lambda images: fast([_decoded(data) for data in images], return_tensors="pt"),
        "torchvision, Pillow decodes": lambda images: fast(_opened(images), return_tensors="pt"),
        EXACT_WAY: lambda images: pillow(_opened(images), return_tensors="pt"),
    }


def _decoded(data: bytes) -> Tensor:
    """(3, h, w) uint8, by torchvision."""
    from torchvision.io import ImageReadMode, decode_jpeg

    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)


def _opened(images: list[bytes]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(data)) for data in images]
