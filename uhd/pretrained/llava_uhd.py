"""LLaVA-UHD's first two releases, in the layout of LLaVA's own code: March 2024, and the one of the ECCV paper.

Both keep the compressor as ``model.mm_projector.*``, and CLIP beside it only where CLIP was trained: otherwise CLIP is
a folder of its own, which ``mm_vision_tower`` names.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from uhd.checkpoint import Checkpoint, transformers_config
from uhd.pixels import PixelSettings
from uhd.pixels.settings import image_processors
from uhd.pretrained.recipe import Names, Prefixes, Recipe, resampler_of
from uhd.resampler import PerceiverResampler, SpatialResampler
from uhd.schema import SpatialSchema
from uhd.slicing import SlicingConfig
from uhd.vision import config_from_hf

PREFIXES = Prefixes(
    vision=("model.vision_tower.vision_tower.", "model.vision_tower.vision_tower.vision_model."),
    compressor=("model.mm_projector.",),
    other=("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head."),
)

HEADS = 8
"""Attention heads of the resampler of March 2024, which its weights do not say."""

CLIP = PixelSettings(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))
UNCHANGED = PixelSettings(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

SPATIAL = ("adapt_spatial_resampler_v1", "uhd_v1_query64")
"""What the code of the ECCV release, or its later versions, call its resampler."""

_KNOWN_TOWER = "clip-vit-large-patch14-336"
_ITS_SIZES = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}


def kind_of(checkpoint: Checkpoint) -> str:
    """Tell the releases apart, which use the same names: by ``mm_projector_type``, else by 144 latents."""
    query = "model.mm_projector.query"
    if query not in checkpoint.files:
        raise ValueError(f"it has no {query}, so it is no LLaVA-UHD: convert other LLaVAs to transformers")
    checkpoint.check([query])
    latents = checkpoint.shapes([query])[query][0]
    spatial = checkpoint.config.get("mm_projector_type") in SPATIAL or latents == 144
    return "llava-uhd" if spatial else "llava-uhd-2024-03"


def recipe(checkpoint: Checkpoint, family: str, vision_tower: str | os.PathLike[str] | None, pickled: bool) -> Recipe:
    """Read the recipe from the settings in a folder; CLIP may be in ``vision_tower``, and ``pickled``."""
    config, names = checkpoint.config, PREFIXES.sort(checkpoint, family)
    settings, tower = _tower(checkpoint, names, vision_tower)
    feature = config.get("mm_vision_select_feature", "patch")
    if feature != "patch":
        raise ValueError(f"mm_vision_select_feature must be 'patch', the patches of one layer; got {feature!r}")
    layer = config.get("mm_vision_select_layer", -2)
    vit = config_from_hf(settings, select_layer=layer, final_norm=False)
    first = family == "llava-uhd-2024-03"
    preset = "llava-uhd-paper" if first else "llava-uhd"
    preprocessor = checkpoint.preprocessor
    if preprocessor is None and tower is not None:
        preprocessor = next(image_processors(tower), None)
    pixels = CLIP if preprocessor is None else PixelSettings.from_preprocessor(preprocessor)
    perceiver = partial(PerceiverResampler.from_state_dict, variant="paper", num_heads=HEADS)
    return Recipe(
        checkpoint,
        names,
        vit=vit,
        vit_names="clip",
        compressor=perceiver if first else resampler_of(SpatialResampler),
        slicing=SlicingConfig.preset(preset).for_vision(image_size=vit.image_size, patch_size=vit.patch_size),
        schema=SpatialSchema.preset(preset),
        pixels=UNCHANGED if first else pixels,  # the training of the first never normalised
        tower=None if names.vision else Checkpoint(tower, pickled=pickled),
        note=_FIRST_NOTE if first else "",
    )


_FIRST_NOTE = (
    "the code that these weights were trained with mixed up its slices (docs/family.md): the tokens are those of the "
    "paper's method"
)


def _tower(
    checkpoint: Checkpoint, names: Names, vision_tower: str | os.PathLike[str] | None
) -> tuple[Any, Path | None]:
    """Find CLIP's config, and its folder where there is one."""
    from transformers import CLIPVisionConfig

    told = str(checkpoint.config.get("mm_vision_tower", ""))
    places = [Path(told), checkpoint.folder / told] if told else []
    places = places if vision_tower is None else [Path(vision_tower)]
    tower = next((path for path in places if (path / "config.json").is_file()), None)
    if tower is not None:
        return transformers_config(tower), tower
    if vision_tower is not None:
        raise FileNotFoundError(f"vision_tower {vision_tower} is no folder with a config.json")
    if names.vision and Path(told).name == _KNOWN_TOWER:
        return CLIPVisionConfig(**_ITS_SIZES, image_size=336, patch_size=14), None
    raise FileNotFoundError(
        f"{checkpoint.folder} {'does not say what its CLIP is' if names.vision else 'has no CLIP in it'}, "
        f"mm_vision_tower is {told!r}: pass vision_tower=, the folder of that model"
    )
