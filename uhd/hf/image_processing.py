"""Image processors in the transformers manner over the library's own planner and renderer.

Both classes make the same pixels, by Pillow; they differ in the type of what they return. There is no second, GPU
resize whose result differs by a level: the plan and the bytes of an image are the same everywhere.
"""

# no `from __future__ import annotations`: transformers reads the types of the keywords below at run time

import json
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import load_image as fetch_image
from transformers.processing_utils import ImagesKwargs

from uhd.batch import SliceBatch
from uhd.pixels import RESAMPLE, PixelSettings, load_image
from uhd.slicing import SlicePlan, SlicingConfig, plan

_FILTER_NAMES = {int(value): name for name, value in RESAMPLE.items()}
_REMOTE = ("http://", "https://", "data:")


class UHDImagesKwargs(ImagesKwargs, total=False):
    """What a call may override beside transformers' own keywords.

    slicing (`dict`): of :class:`uhd.SlicingConfig`. max_slices, max_tokens (`int`): replace those of ``slicing`` for
    this call: fewer slices, or as many tokens an image. crop_to_patches (`bool`): ``False`` leaves images uncut.
    background (`list[int]`): RGB under transparent pixels. max_pixels (`int`): larger files are refused.
    """

    slicing: dict | None
    max_slices: int | None
    max_tokens: int | None
    crop_to_patches: bool | None
    background: list | tuple | None
    max_pixels: int | None


class UHDImageProcessorPil(PilBackend):
    """Images to packed patches, NumPy arrays unless ``return_tensors`` says otherwise.

    A call returns, for I images with V views and N patches in all:

    * ``pixel_values`` (N, P), P = 3 * p * p in the order (channel, py, px): float32, rescaled and normalised; or raw
      uint8 with ``do_rescale=False, do_normalize=False`` (a quarter of the memory; the model normalises it).
    * ``grids`` (V, 2) int64: (rows, columns) of each view in patches.
    * ``num_patches`` (I,) int64: views of each image, at least 1.
    * ``slice_grids`` (I, 2) int64: (rows, columns) of slices, (0, 0) for an uncut image.
    * ``image_sizes`` (I, 2) int64: (height, width), px.
    * ``num_image_tokens`` (I,) int64: positions in the language model's sequence, separators included.

    Args:
        slicing: Dict of :class:`uhd.SlicingConfig`; the model's ``config.slicing_config``.
        image_mean, image_std, resample, background, max_pixels: As in :class:`uhd.PixelSettings`; ``resample`` is a
            Pillow filter's number.
        do_rescale, do_normalize: Both or neither, see above.

    Raises:
        ValueError: Only one of ``do_rescale`` and ``do_normalize``, another ``rescale_factor`` than 1/255, a filter
            that is not supported, or an image that :func:`uhd.pixels.load_image` refuses.
    """

    valid_kwargs = UHDImagesKwargs
    model_input_names = [  # noqa: RUF012
        "pixel_values",
        "grids",
        "num_patches",
        "slice_grids",
        "image_sizes",
    ]

    do_resize = None
    do_convert_rgb = True
    do_rescale = True
    do_normalize = True
    rescale_factor = 1 / 255
    image_mean = (0.5, 0.5, 0.5)
    image_std = (0.5, 0.5, 0.5)
    resample = int(Image.Resampling.BICUBIC)
    slicing = SlicingConfig.preset("llava-uhd-safe").to_dict()
    max_slices = None
    max_tokens = None
    crop_to_patches = None
    background = (255, 255, 255)
    max_pixels = PixelSettings().max_pixels
    default_return_tensors = None

    @classmethod
    def from_settings(cls, slicing: SlicingConfig, pixels: PixelSettings) -> "UHDImageProcessorPil":
        """The processor of an encoder with this slicing and these pixels."""
        mean, std = pixels.mean_std()
        return cls(
            slicing=slicing.to_dict(),
            image_mean=mean,
            image_std=std,
            resample=int(RESAMPLE[pixels.resample]),
            background=pixels.background,
            max_pixels=pixels.max_pixels,
        )

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """What :func:`uhd.pixels.load_image` takes, or an address, as upright RGB Pillow images; nesting is kept."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(item) for item in image_url_or_urls]
        if isinstance(image_url_or_urls, str) and image_url_or_urls.startswith(_REMOTE):
            image_url_or_urls = fetch_image(image_url_or_urls)
        return load_image(image_url_or_urls, settings=self._pixels(self.background, self.max_pixels))

    def plan(self, image_hw: tuple[int, int], **kwargs: Any) -> SlicePlan:
        """The plan for an image of this (height, width), px, under a call's keywords."""
        return plan(image_hw, self._slicing(kwargs))

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """ViT patches of an image, its rows in ``pixel_values``: what an engine splits the packed tensor by."""
        return self.plan((height, width), **(images_kwargs or {})).num_patches

    def _slicing(self, kwargs: dict[str, Any]) -> SlicingConfig:
        given = {name: kwargs[name] if kwargs.get(name) is not None else getattr(self, name) for name in _PLANNING}
        config = _parsed(json.dumps(given["slicing"], sort_keys=True))
        changes = {name: given[name] for name in ("max_slices", "max_tokens") if given[name] is not None}
        if given["crop_to_patches"] is False:
            if config.rule != "released":
                raise ValueError(
                    f"crop_to_patches=False needs the slicing rule 'released', this one is {config.rule!r}"
                )
            changes["max_slices"] = 1
        return config.replace(**changes) if changes else config

    def _pixels(self, background: Any, max_pixels: int, **changes: Any) -> PixelSettings:
        return PixelSettings(background=tuple(background), max_pixels=max_pixels, **changes)

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> None:
        if bool(kwargs.get("do_rescale")) != bool(kwargs.get("do_normalize")):
            raise ValueError(
                f"got do_rescale={kwargs.get('do_rescale')} and do_normalize={kwargs.get('do_normalize')}: set both "
                "for normalised float32 patches, or neither for raw uint8 ones, which the model normalises"
            )
        if kwargs.get("do_rescale") and abs(kwargs.get("rescale_factor") * 255 - 1) > 1e-6:
            raise ValueError(f"pixels are rescaled by 1/255, got rescale_factor={kwargs.get('rescale_factor')}")
        if int(kwargs["resample"]) not in _FILTER_NAMES:
            raise ValueError(f"resample must be one of {_FILTER_NAMES} (Pillow's numbers), got {kwargs['resample']!r}")
        for name in ("do_resize", "do_center_crop", "do_pad"):
            if kwargs.get(name):
                raise ValueError(f"{name} does not apply: the plan decides every size. Leave it out")

    def _preprocess_image_like_inputs(self, images: Any, **kwargs: Any) -> BatchFeature:
        pictures = _flat(self.fetch_images(images))
        settings = self._pixels(
            kwargs["background"],
            kwargs["max_pixels"],
            mean=kwargs["image_mean"],
            std=kwargs["image_std"],
            resample=_FILTER_NAMES[int(kwargs["resample"])],
        )
        plans = [self.plan((picture.height, picture.width), **kwargs) for picture in pictures]
        batch = SliceBatch.from_images(pictures, plans, settings=settings, patch_size=self._slicing(kwargs).patch_size)
        if kwargs["do_normalize"]:
            batch = batch.normalized(settings)
        data = {"pixel_values": batch.patches.numpy(), "grids": _pairs(batch.grids), **describe_plans(plans)}
        return BatchFeature(data, tensor_type=kwargs.get("return_tensors") or self.default_return_tensors)


class UHDImageProcessor(UHDImageProcessorPil):
    """The default: :class:`UHDImageProcessorPil` returning torch tensors."""

    default_return_tensors = "pt"


_PLANNING = ("slicing", "max_slices", "max_tokens", "crop_to_patches")


def describe_plans(plans: list[SlicePlan]) -> dict[str, np.ndarray]:
    """The per-image keys of a batch: ``num_patches``, ``slice_grids``, ``image_sizes`` and ``num_image_tokens``."""
    return {
        "num_patches": np.array([item.num_views for item in plans], np.int64),
        "slice_grids": _pairs([item.grid or (0, 0) for item in plans]),
        "image_sizes": _pairs([item.image_hw for item in plans]),
        "num_image_tokens": np.array([item.num_tokens for item in plans], np.int64),
    }


def _pairs(pairs: Any) -> np.ndarray:
    return np.array(list(pairs), np.int64).reshape(-1, 2)


@lru_cache(maxsize=64)
def _parsed(slicing: str) -> SlicingConfig:
    return SlicingConfig.from_dict(json.loads(slicing))


def _flat(images: Any) -> list[Any]:
    if isinstance(images, (list, tuple)):
        return [picture for item in images for picture in _flat(item)]
    return [images]
