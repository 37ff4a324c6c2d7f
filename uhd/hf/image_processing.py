"""Image processors in the transformers manner over the library's own planner and renderer.

Both classes make the same pixels, by Pillow unless ``pixel_backend="fast"``; they differ in the type of what they
return. The plan and the bytes of an image are the same on every device.
"""

# no `from __future__ import annotations`: transformers reads the types of the keywords below at run time

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from http.client import HTTPException
from types import MappingProxyType
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import torch
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import ImagesKwargs

from uhd.batch import SliceBatch
from uhd.encoded import EncodedImage
from uhd.hf.bare import FromPackage, auto_map, save_beside
from uhd.hf.visual_inputs import describe_plans, pad_patches, pairs
from uhd.loading import named
from uhd.pixels import DEFAULT, RESAMPLE, PixelSettings, load_image, move_borders
from uhd.pixels.settings import FILTERS
from uhd.pixels.source import read_whole
from uhd.schema.counted import named_function, own_function, slicing_from_dict
from uhd.slicing import SlicePlan, Slicing, SlicingLike, find
from uhd.slicing.config import positive_int
from uhd.slicing.sample import plan_sample

_NOT_APPLYING = ("do_resize", "do_center_crop", "do_pad", "size", "crop_size", "pad_size", "input_data_format")
"""Keywords of transformers' image processors that nothing here could heed."""

_REMOTE = ("http://", "https://")


def fetch_bytes(address: str, settings: PixelSettings = DEFAULT) -> bytes:
    """The bytes behind an http address.

    Raises:
        ValueError: It cannot be fetched, or has more bytes than a picture within the limits needs.
    """
    try:
        with urlopen(address, timeout=30) as answer:
            return read_whole(answer, settings)
    except (OSError, HTTPException, ValueError) as problem:
        if isinstance(problem, HTTPError):
            problem.close()  # it holds the connection
        raise ValueError(f"{address!r:.200} cannot be fetched: {str(problem)[:300]}") from problem


class UHDImagesKwargs(ImagesKwargs, total=False):
    """What a call may override beside transformers' own keywords.

    slicing: As in the image processor. max_slices (`int`): as many slices an image at most. max_tokens (`int`): as
    many tokens at most, for all images and videos of a sample together. multi_image (`bool`): plan several images of
    a sample as the strategy does with several. crop_to_patches (`bool`): ``False`` leaves images uncut. background
    (`list[int]`): RGB under transparent pixels. max_pixels (`int`): larger files are refused. pixel_backend (`str`):
    ``"pillow"`` or ``"fast"``, what resizes. pad_patches (`bool`): a row of ``pixel_values`` an image.
    """

    slicing: Any
    max_slices: int | None
    max_tokens: int | None
    multi_image: bool | None
    crop_to_patches: bool | None
    background: list | tuple | None
    max_pixels: int | None
    pixel_backend: str | None
    pad_patches: bool | None


UHDImageProcessorKwargs = UHDImagesKwargs
"""The name by which transformers finds the keywords of :class:`UHDImageProcessor`."""


@dataclass(frozen=True, eq=False)
class PlannedImage:
    """An upright RGB picture and its plan, which was made together with those of its sample."""

    picture: Image.Image
    plan: SlicePlan


@dataclass(frozen=True, eq=False)
class Made:
    """An image or a video of a batch whose tensors are made already."""

    batch: BatchFeature


class Planning(FromPackage):
    """What image and video processor have in common: a slicing, pixel settings, and how both are given and checked."""

    auto_classes: Mapping[str, str]
    """What :func:`uhd.hf.bare.auto_map` takes."""

    do_resize = None
    do_convert_rgb = True
    do_rescale = True
    do_normalize = True
    rescale_factor = 1 / 255
    image_mean = (0.5, 0.5, 0.5)
    image_std = (0.5, 0.5, 0.5)
    resample = None
    slicing = find(None).to_dict()
    max_slices = None
    max_tokens = None
    crop_to_patches = None
    background = (255, 255, 255)
    max_pixels = PixelSettings().max_pixels
    pixel_backend = PixelSettings().backend
    default_return_tensors = None

    @classmethod
    def from_settings(cls, slicing: SlicingLike, pixels: PixelSettings, **changes: Any) -> "Planning":
        """The processor of an encoder with this slicing and these pixels."""
        return cls(**_settings(slicing, pixels), **changes)

    def follow(self, slicing: SlicingLike, pixels: PixelSettings) -> None:
        """Plan and cut from now on as an encoder with this slicing and these pixels."""
        for name, value in _settings(slicing, pixels).items():
            setattr(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """What is saved, in JSON's own types; of a slicing function of the caller's own only the name."""
        found = super().to_dict()
        found["auto_map"] = auto_map(**self.auto_classes)
        if not isinstance(self.slicing, (Mapping, str)):
            found["slicing"] = find(self.slicing).to_dict()
        return json.loads(json.dumps(found))  # so that it is equal after loading: tuples come back as lists

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers.

        Raises:
            ValueError: The slicing is a function of the caller's own.
        """
        refuse_own_function(self.slicing)
        return save_beside(super().save_pretrained, save_directory, *args, **kwargs)

    def planner(self, kwargs: Mapping[str, Any]) -> Slicing:
        """What images, or frames, are planned by under a call's keywords.

        Raises:
            ValueError: ``max_slices`` or ``crop_to_patches`` does not apply to this slicing.
        """
        found, most = as_slicing(self.setting("slicing", kwargs)), self.setting("max_slices", kwargs)
        if most is not None:
            few = found.capped(positive_int("max_slices", most))
            if few is None:
                raise ValueError(
                    f"the settings of {found.name!r} have no number of slices that max_slices={most} could lower: "
                    "bound the tokens with max_tokens, or leave images uncut with crop_to_patches=False"
                )
            found = few
        return found.uncut() if self.setting("crop_to_patches", kwargs) is False else found

    def check_settings(self) -> None:
        """Raise a ``ValueError`` where what was loaded could not be used."""
        self._pixels({}, mean=self.image_mean, std=self.image_std, backend=self.pixel_backend)
        self.planner({})

    def setting(self, name: str, kwargs: Mapping[str, Any]) -> Any:
        """A call's keyword, or the processor's own where it was not given."""
        return kwargs[name] if kwargs.get(name) is not None else getattr(self, name)

    def picture(self, source: Any, kwargs: Mapping[str, Any]) -> Image.Image:
        """What :func:`uhd.pixels.load_image` takes, or an address, as an upright RGB Pillow image."""
        if isinstance(source, str) and source.startswith(_REMOTE):
            source = fetch_bytes(source, self._pixels(kwargs))
        return load_image(source, settings=self._pixels(kwargs))

    def _pixels(self, kwargs: Mapping[str, Any], **changes: Any) -> PixelSettings:
        """The pixel settings of a call; ``changes`` are those that only cutting needs."""
        background, max_pixels = self.setting("background", kwargs), self.setting("max_pixels", kwargs)
        return PixelSettings(background=tuple(background), max_pixels=max_pixels, **changes)

    def _patches(self, pictures: list[Image.Image], plans: list[SlicePlan], kwargs: Mapping[str, Any]) -> SliceBatch:
        """All views, raw or normalised as the keywords say."""
        settings = self._pixels(
            kwargs,
            mean=kwargs["image_mean"],
            std=kwargs["image_std"],
            resample=None if kwargs["resample"] is None else FILTERS[int(kwargs["resample"])],
            backend=self.setting("pixel_backend", kwargs),
        )
        side = as_slicing(self.setting("slicing", kwargs)).patch_size
        batch = SliceBatch.from_images(pictures, plans, settings=settings, patch_size=side)
        return _rescaled(batch, settings, kwargs["rescale_factor"]) if kwargs["do_normalize"] else batch

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> None:
        if bool(kwargs.get("do_rescale")) != bool(kwargs.get("do_normalize")):
            raise ValueError(
                f"got do_rescale={kwargs.get('do_rescale')} and do_normalize={kwargs.get('do_normalize')}: set both "
                "for normalised float32 patches, or neither for raw uint8 ones, which the model normalises"
            )
        if kwargs["resample"] is not None and int(kwargs["resample"]) not in FILTERS:
            raise ValueError(f"resample must be one of {FILTERS} (Pillow's numbers), got {kwargs['resample']!r}")
        given = [name for name in _NOT_APPLYING if kwargs.get(name)]
        if given:
            raise ValueError(f"{given[0]} does not apply: the plan decides every size. Leave it out")
        if kwargs.get("do_convert_rgb") is False or kwargs.get("data_format") in ("channels_last", "none"):
            raise ValueError("patches are RGB, channels first: leave do_convert_rgb and data_format out")

    def _batch(self, data: dict[str, Any], kwargs: Mapping[str, Any]) -> BatchFeature:
        """The tensors of a call, on the device that it asks for."""
        batch = BatchFeature(data, tensor_type=kwargs.get("return_tensors") or self.default_return_tensors)
        return batch if kwargs.get("device") is None else batch.to(kwargs["device"])


def _rescaled(batch: SliceBatch, settings: PixelSettings, factor: float) -> SliceBatch:
    """Normalised patches of pixels that are multiplied by another factor than 1 / 255 before."""
    batch, times = batch.normalized(settings), 255 * factor
    if abs(times - 1) <= 1e-6:
        return batch
    mean, std = map(torch.tensor, settings.mean_std())
    shift = ((times - 1) * mean / std).repeat_interleave(batch.patches.shape[1] // 3)
    return replace(batch, patches=batch.patches * times + shift)


def _settings(slicing: SlicingLike, pixels: PixelSettings) -> dict[str, Any]:
    """A processor's settings for an encoder's slicing and pixels."""
    mean, std = pixels.mean_std()
    return {
        "slicing": slicing if own_function(slicing) else find(slicing).to_dict(),
        "image_mean": mean,
        "image_std": std,
        "resample": None if pixels.resample is None else RESAMPLE[pixels.resample],
        "background": pixels.background,
        "max_pixels": pixels.max_pixels,
        "pixel_backend": pixels.backend,
    }


class UHDImageProcessorPil(Planning, PilBackend):
    """Images to packed patches, NumPy arrays unless ``return_tensors`` says otherwise.

    A call returns, for I images with V views and N patches in all:

    * ``pixel_values`` (N, P), P = 3 * p * p in the order (channel, py, px): float32, rescaled and normalised; or raw
      uint8 with ``do_rescale=False, do_normalize=False`` (a quarter of the memory; the model normalises it).
    * ``grids`` (V, 2) int64: (rows, columns) of each view in patches.
    * ``num_patches`` (I,) int64: views of each image, at least 1.
    * ``image_sizes`` (I, 2) int64: (height, width), px.
    * ``num_image_tokens`` (I,) int64: positions in the language model's sequence, separators included.
    * ``image_plans`` (I, L) uint8: the plans, see :func:`uhd.hf.plans.write_plans`.

    A nested list of images is one list a sample; in a flat one every image is a sample.

    With ``pad_patches=True`` ``pixel_values`` is (I, L, P): an image a row, zeros behind its patches, and beside it
    stand ``image_sizes`` and ``num_image_tokens`` alone. The model plans the sizes anew, by its own slicing.

    Args:
        slicing: The model's ``config.slicing_config``: the dictionary of any strategy's settings. Also those settings,
            a strategy's name, or your own function from (height, width) to a plan, which cannot be saved.
        max_slices, max_tokens, multi_image, crop_to_patches: As :class:`UHDImagesKwargs` says, for all calls.
        image_mean, image_std, resample, background, max_pixels, pixel_backend: As in :class:`uhd.PixelSettings`;
            ``resample`` is a Pillow filter's number, ``pixel_backend`` its ``backend``.
        do_rescale, do_normalize: Both or neither, see above.
        pad_patches: For trainers that cut a batch by its images, as GRPO and RLOO of TRL do; docs/training.md.

    Raises:
        ValueError: Only one of ``do_rescale`` and ``do_normalize``, a filter that is not supported, an image that
            :func:`uhd.pixels.load_image` refuses or the slicing does, a budget that not even the smallest plans fit,
            or, with ``pad_patches``, one that plans images otherwise than their sizes alone.
    """

    valid_kwargs = UHDImagesKwargs
    auto_classes = {"AutoImageProcessor": "UHDImageProcessor"}  # noqa: RUF012
    model_input_names = [  # noqa: RUF012
        "pixel_values",
        "grids",
        "num_patches",
        "image_sizes",
        "image_plans",
    ]

    multi_image = False
    pad_patches = False

    def fetch_images(self, image_url_or_urls: Any, kwargs: Mapping[str, Any] = MappingProxyType({})) -> Any:
        """What :func:`uhd.pixels.load_image` takes, or an address, as upright RGB Pillow images; nesting is kept."""
        if isinstance(image_url_or_urls, (list, tuple)):
            found = []
            for number, item in enumerate(image_url_or_urls):
                with named("sample" if isinstance(item, (list, tuple)) else "image", number, item):
                    found.append(self.fetch_images(item, kwargs))
            return found
        ready = isinstance(image_url_or_urls, (PlannedImage, EncodedImage, Made))
        return image_url_or_urls if ready else self.picture(image_url_or_urls, kwargs)

    def plan(self, image_hw: tuple[int, int], **kwargs: Any) -> SlicePlan:
        """The plan for an image of this (height, width), px, under a call's keywords."""
        return self.plan_images([image_hw], **kwargs)[0]

    def plan_images(self, sizes_hw: list[tuple[int, int]], **kwargs: Any) -> tuple[SlicePlan, ...]:
        """The plans of one sample's images, under a call's keywords; see :func:`uhd.slicing.plan_images`."""
        return plan_sample(
            sizes_hw,
            [],
            self.planner(kwargs),
            max_tokens=self.setting("max_tokens", kwargs),
            multi_image=bool(self.setting("multi_image", kwargs)),
        )[0]

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """ViT patches of an image, its rows in ``pixel_values``: what an engine splits the packed tensor by.

        Raises:
            ValueError: Borders of slices move, and with them patches, which the pixels alone tell.
        """
        if moves := self.planner(images_kwargs or {}).border_moves:
            raise ValueError(
                f"border_moves={moves}: an image's patches follow from its pixels, not from its size alone"
            )
        return self.plan((height, width), **(images_kwargs or {})).num_patches

    def _preprocess_image_like_inputs(self, images: Any, **kwargs: Any) -> BatchFeature:
        pictures, plans = [], []
        for sample in _samples(self.fetch_images(images, kwargs)):
            if all(isinstance(item, PlannedImage) for item in sample):
                pictures += [item.picture for item in sample]
                plans += [item.plan for item in sample]
            else:
                pictures += sample
                plans += self.plan_images([(picture.height, picture.width) for picture in sample], **kwargs)
        planner = self.planner(kwargs)
        plans = [move_borders(*pair, planner) for pair in zip(pictures, plans, strict=True)]
        padded = self.setting("pad_patches", kwargs)
        if padded:
            self._check_planned_by_size(plans, kwargs)
        batch = self._patches(pictures, plans, kwargs)
        data = {"pixel_values": batch.patches.numpy(), "grids": pairs(batch.grids), **describe_plans(plans)}
        return self._batch(pad_patches(data, plans) if padded else data, kwargs)

    def _check_planned_by_size(self, plans: list[SlicePlan], kwargs: Mapping[str, Any]) -> None:
        """Refuse what a model that is told the images' sizes alone would plan otherwise."""
        moves = self.planner(kwargs).border_moves
        if moves:
            raise ValueError(
                f"with pad_patches the model plans each image anew, from its size alone, and border_moves={moves} "
                "moves borders by the pixels: leave one of the two out"
            )
        joint = [name for name in ("max_tokens", "multi_image") if self.setting(name, kwargs)]
        own = as_slicing(self.slicing)
        other = [place for place, plan in enumerate(plans) if plan != own.plan(plan.image_hw)]
        if joint or other:
            raise ValueError(
                "with pad_patches the model plans each image anew, from its size alone, and "
                + (
                    f"{joint[0]} plans a sample's images together"
                    if joint
                    else f"image {other[0]} is planned otherwise"
                )
                + ": leave max_tokens, multi_image, slicing, max_slices and crop_to_patches out, and bound images by "
                "model.visual.slicing"
            )


class UHDImageProcessor(UHDImageProcessorPil):
    """The default: :class:`UHDImageProcessorPil` returning torch tensors."""

    default_return_tensors = "pt"


def as_slicing(given: Any) -> Slicing:
    """A slicing from its dictionary or name, or as it is.

    Raises:
        ValueError: Not such a dictionary, no such name, or what was saved of a function of the caller's own.
    """
    if not isinstance(given, Mapping):
        return find(given)
    if named_function(given):
        return slicing_from_dict(given)  # its function may be defined again
    return _parsed(json.dumps(given, sort_keys=True))


@lru_cache(maxsize=64)
def _parsed(slicing: str) -> Slicing:
    return slicing_from_dict(json.loads(slicing))


def refuse_own_function(slicing: Any) -> None:
    """Raise a ``ValueError`` where a slicing is, or holds, a function of the caller's own."""
    name = None if isinstance(slicing, str) else own_function(slicing)
    if name is not None:
        raise ValueError(
            f"the slicing is a function of your own, {name!r}, which cannot be saved: give it a name with "
            f"uhd.register_strategy(name, {name}), and set it as slicing by that name"
        )


def check_backbone(slicing: Any, own: Any) -> None:
    """Raise a ``ValueError`` where a call's slicing plans for another backbone than the processor's own."""
    rule, own = as_slicing(slicing), as_slicing(own)
    name = slicing if isinstance(slicing, str) else rule.name
    wanted, got = ((one.view_side, one.patch_size) for one in (own, rule))
    if all(a is None or b is None or a == b for a, b in zip(wanted, got, strict=True)):
        return
    raise ValueError(
        f"slicing {rule.name!r} plans for image_size={got[0]}, patch_size={got[1]}; this processor's model has "
        f"image_size={wanted[0]}, patch_size={wanted[1]}: fit it with uhd.strategy({name!r})"
        f".for_vision(image_size={wanted[0] or got[0]}, patch_size={wanted[1]})"
    )


def _samples(images: Any) -> list[list[Any]]:
    """Lists of the images that are planned together: a nested list's own, else every image by itself."""
    if not isinstance(images, (list, tuple)):
        return [[images]]
    return [_flat(item) if isinstance(item, (list, tuple)) else [item] for item in images]


def _flat(images: Any) -> list[Any]:
    if isinstance(images, (list, tuple)):
        return [picture for item in images for picture in _flat(item)]
    return [images]


def arrange_images(images: Any) -> tuple[list[Any], list[int] | None]:
    """All images in order, and how many each sample has; ``None`` where they are not nested by samples."""
    if images is None:
        return [], None
    if getattr(images, "ndim", None) == 4:  # an array of equally large images
        return list(images), None
    if not isinstance(images, (list, tuple)):
        return [images], None
    if not any(isinstance(item, (list, tuple)) for item in images):
        place = next((place for place, item in enumerate(images) if item is None), None)
        if place is not None:
            raise ValueError(f"image {place} is None: leave it out; a sample without images has an empty list")
        return list(images), None
    nested = [list(item) if isinstance(item, (list, tuple)) else [] if item is None else [item] for item in images]
    return [item for sample in nested for item in sample], [len(sample) for sample in nested]
