"""Released models in and out: the visual side of LLaVA-UHD, MiniCPM-V, LLaVA-1.5, -NeXT and -OneVision checkpoints.

    encoder = uhd.pretrained.load("a folder with a release")
    uhd.pretrained.save(encoder, "a new folder", like="the folder it came from")

Only visual tensors are read from disk, whatever else is in the files; nothing is downloaded. docs/family.md lists
what every family does, and where the released code differs from its paper.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from huggingface_hub.errors import StrictDataclassError

from uhd.checkpoint import Checkpoint
from uhd.encoder import VisualEncoder
from uhd.pretrained import llava, llava_uhd, minicpm
from uhd.pretrained.recipe import Recipe, build
from uhd.pretrained.writing import write
from uhd.resampler import MergeProjector
from uhd.vision import CompressedViT

FAMILIES: dict[str, str] = {
    "llava-uhd-2024-03": "LLaVA-UHD, the release of March 2024: CLIP, perceiver of 64 latents",
    "llava-uhd": "LLaVA-UHD, the release of the ECCV paper: CLIP, 144 latents with a window each",
    "minicpm-v-2.0": "MiniCPM-V 2.0: timm's SigLIP with resized positions, perceiver of 64 latents",
    "minicpm-v-2.5": "MiniCPM-Llama3-V 2.5: SigLIP with position buckets, perceiver of 96 latents",
    "minicpm-v-2.6": "MiniCPM-V 2.6: the same with 64 latents and numbered images",
    "minicpm-v-4.6": "MiniCPM-V 4.6: SigLIP with a compressor inside, merger; 16 or 4 patches a token",
    "llava-1.5": "LLaVA-1.5 in transformers: one square view, MLP",
    "llava-next": "LLaVA-NeXT (1.6) in transformers: AnyRes, MLP, newlines",
    "llava-onevision": "LLaVA-OneVision in transformers: AnyRes with a bound, MLP, newlines, several images, videos",
}
"""Every family by name, and one line about it."""


def load(
    folder: str | os.PathLike[str],
    *,
    family: str | None = None,
    downsample: str | None = None,
    vision_tower: str | os.PathLike[str] | None = None,
    pickled: bool = False,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> VisualEncoder:
    """Load the encoder that reproduces a released model's visual tokens, from image to embedding.

    Its slicing, schema, pixels and learned newlines are the model's; ``encoder(images)`` gives what the model's own
    ``get_image_features`` does.

    Args:
        folder: With ``config.json``, weights, and for transformers' models the image processor's file.
        family: One of :data:`FAMILIES`; ``None`` finds it in the config. The two LLaVA-UHD releases are told apart by
            ``mm_projector_type`` and the number of latents.
        downsample: ``"16x"`` or ``"4x"``, in place of what the config of MiniCPM-V 4.6 says.
        vision_tower: For LLaVA-UHD: the folder of its CLIP, where the checkpoint does not hold it.
        pickled: Read ``pytorch_model.bin`` too, tensors only. Safetensors come first.
        dtype: Of the encoder; ``None`` keeps the file's. A part in several dtypes gets the one that holds them all.
        device: Where the weights go.

    Returns:
        An encoder in eval mode. ``encoder.note`` is set where the released code cannot be meant.

    Raises:
        FileNotFoundError: Something is missing in the folder, such as a shard with a visual tensor.
        ValueError: Another kind of model; a setting that has no counterpart; tensors that are missing or left over,
            listed; quantised ones; only pickled weights; a damaged file.
        TypeError: ``dtype`` is no floating ``torch.dtype``.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating torch.dtype, such as torch.bfloat16, or None; got {dtype!r}")
    checkpoint = Checkpoint(folder, pickled=pickled)
    with _folder_named(checkpoint):
        encoder = build(_recipe(checkpoint, family, downsample, vision_tower, pickled), device)
    return encoder if dtype is None else encoder.to(dtype)


def save(
    encoder: VisualEncoder,
    folder: str | os.PathLike[str],
    *,
    like: str | os.PathLike[str],
    family: str | None = None,
    vision_tower: str | os.PathLike[str] | None = None,
    pickled: bool = False,
    visual_only: bool = False,
) -> None:
    """Write an encoder back into its release's format, after training for instance.

    Everything else comes from ``like``: the language model's tensors, visual ones that the encoder does not have
    (blocks past the selected layer), settings, tokenizer, code. Weights are written as safetensors, in the encoder's
    dtype, under the names that ``like`` has.

    Args:
        encoder: From :func:`load`, or any that equals one in shape and settings.
        folder: A new folder, or one with files of the same names, which are replaced.
        like: The checkpoint that the encoder came from, or another one of the same kind.
        family, vision_tower, pickled: As in :func:`load`.
        visual_only: Leave the language model out.

    Raises:
        FileNotFoundError, ValueError: As in :func:`load`; the encoder has other parts or settings than the format can
            say; ``folder`` is ``like``, or holds weights in files of other names.
        TypeError: ``encoder`` is something else.
    """
    if not isinstance(encoder, VisualEncoder):
        raise TypeError(f"expected a VisualEncoder, got a {type(encoder).__name__}: a whole model has it as .visual")
    checkpoint = Checkpoint(like, pickled=pickled)
    mode = None
    if isinstance(encoder.compressor, MergeProjector):
        mode = "16x" if isinstance(encoder.vision, CompressedViT) else "4x"
    with _folder_named(checkpoint):
        recipe = _recipe(checkpoint, family, mode, vision_tower, pickled)
    write(encoder, folder, recipe, visual_only=visual_only)


@contextmanager
def _folder_named(checkpoint: Checkpoint) -> Iterator[None]:
    """Make every ``ValueError`` say which folder it is about, those of transformers' own checks included."""
    try:
        yield
    except (ValueError, StrictDataclassError) as problem:
        if isinstance(problem, ValueError) and str(checkpoint.folder) in str(problem):
            raise
        raise ValueError(f"{checkpoint.folder}: {problem}") from problem


def _recipe(
    checkpoint: Checkpoint,
    family: str | None,
    downsample: str | None,
    vision_tower: str | os.PathLike[str] | None,
    pickled: bool,
) -> Recipe:
    """Read a folder's recipe by its family."""
    if family is not None and family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}; got {family!r}")
    family = _family_of(checkpoint) if family is None else family
    if downsample is not None and family != "minicpm-v-4.6":
        raise ValueError(f"downsample is a mode of minicpm-v-4.6, this is {family}")
    if vision_tower is not None and not family.startswith("llava-uhd"):
        raise ValueError(f"vision_tower is for llava-uhd, whose CLIP is a folder of its own; this is {family}")
    if family in llava.KINDS:
        return llava.recipe(checkpoint, family)
    if family == "minicpm-v-4.6":
        return minicpm.recipe_4_6(checkpoint, family, downsample)
    if family.startswith("minicpm"):
        return minicpm.recipe_2(checkpoint, family)
    return llava_uhd.recipe(checkpoint, family, vision_tower, pickled)


def _family_of(checkpoint: Checkpoint) -> str:
    kind, version = checkpoint.config.get("model_type"), checkpoint.config.get("version")
    if "mm_vision_tower" in checkpoint.config:
        return llava_uhd.kind_of(checkpoint)
    families = {theirs: ours for ours, theirs in llava.KINDS.items()} | {"minicpmv4_6": "minicpm-v-4.6"}
    family = families.get(kind, "")
    if kind == "minicpmv":
        # 2.0 and 2.5 do not say their version; 2.0's vision encoder is timm's
        unsaid = "2.0" if any(name.startswith("vpm.blocks.") for name in checkpoint.files) else "2.5"
        family = f"minicpm-v-{unsaid if version is None else version}"
    if family not in FAMILIES:
        raise ValueError(
            f"{checkpoint.folder} holds a model of type {kind!r} (version {version!r}); known are "
            f"{', '.join(FAMILIES)}: name one with family= where it is of that kind. VisualEncoder.from_pretrained "
            "takes its vision encoder alone"
        )
    return family


__all__ = ["FAMILIES", "load", "save"]
