"""Loading data: what images cost, batches that cost nearly the same, and images to packed batches in workers.

With a ``DataLoader``::

    costs = uhd.image_costs(uhd.image_sizes_hw(paths), encoder)
    sampler = uhd.TokenBudgetSampler(costs, budget=32_768)
    loader = DataLoader(paths, batch_sampler=sampler, collate_fn=uhd.Preparation.of(encoder), num_workers=4)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image

from uhd.batch import SliceBatch
from uhd.machine import in_threads
from uhd.pixels import DEFAULT, PixelSettings, image_size_hw
from uhd.pixels.views import load_picture, move_borders
from uhd.sampling import TokenBudgetSampler
from uhd.settings import check_choice, whole
from uhd.slicing import SlicePlan, Slicing, SlicingLike, find, plan, plan_many
from uhd.slicing.sample import plan_sample

UNITS = ("patches", "tokens")
ERRORS = ("raise", "collect")

REFUSALS = (ValueError, TypeError, OSError)
"""What is raised where an image cannot be read, or is refused."""

Errors = dict[int, Exception]

_READ_TOGETHER = 1024  # images whose headers wait for a thread: a generator of many is never held whole


@dataclass(frozen=True)
class Preparation:
    """Images to an encoder's packed batches: what :meth:`uhd.VisualEncoder.prepare` does, without the weights.

    Small, picklable if ``slicing`` is, and safe in threads, so it goes to the workers of a ``DataLoader`` whatever
    their start method; where a sample is an image it is the ``collate_fn`` itself.

    >>> prepare = Preparation("llava-uhd", PixelSettings(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)), patch_size=14)
    >>> prepare([np.zeros((336, 672, 3), np.uint8)]).grids
    ((24, 24), (24, 24), (16, 33))

    Attributes:
        slicing: How images are cut: an encoder's ``slicing``, or what :func:`uhd.plan` takes.
        pixels: How pixels are made.
        patch_size: Side of a patch, px; plans have their own, a batch of no images has this one.
        inner: Order inside the patches, see :class:`uhd.batch.SliceBatch`.
        errors: ``"raise"`` where an image is refused; ``"collect"``: every call returns the batch of the others, in
            order, and ``{number in the list: error}``.
    """

    slicing: SlicingLike
    pixels: PixelSettings
    patch_size: int
    inner: str = "chw"
    errors: str = "raise"

    def __post_init__(self) -> None:
        check_choice("errors", self.errors, ERRORS)
        object.__setattr__(self, "slicing", find(self.slicing))

    @classmethod
    def of(cls, encoder: Any, *, errors: str = "raise") -> Preparation:
        """The preparation of a :class:`uhd.VisualEncoder`, as its parts are now."""
        fast = encoder.pixels.backend == "fast" and getattr(encoder.vision, "folds_pixels", False)
        return cls(encoder.slicing, encoder.pixels, encoder.vision.patch_size, "hwc" if fast else "chw", errors)

    def __call__(
        self, images: Sequence[Any], *, max_tokens: int | None = None, multi_image: bool = False
    ) -> SliceBatch | tuple[SliceBatch, Errors]:
        """Load, plan, resize and cut, as :meth:`uhd.VisualEncoder.prepare`, whose arguments these are.

        Raises:
            ValueError, TypeError, OSError: An image is refused, by its number in the list and, where it has one, its
                path; with ``errors="collect"`` only where all of them together are, as by ``max_tokens``.
        """
        if self.errors == "collect":
            return self._collecting(images, max_tokens=max_tokens, multi_image=multi_image)
        loaded = self.load(images)
        sizes = [(image.height, image.width) for image in loaded]
        settings = {"max_tokens": max_tokens, "multi_image": multi_image}
        try:
            plans = plan_sample(sizes, [], self.slicing, **settings)[0]
        except ValueError:
            for number, size_hw in enumerate(sizes):
                with named("image", number, images[number]):
                    plan(size_hw, self.slicing)
            raise  # not one of them alone: all of them, or a setting
        return self.cut(loaded, self.moved(loaded, plans))

    def _collecting(self, images: Sequence[Any], **settings: Any) -> tuple[SliceBatch, Errors]:
        """Every image by itself first: where it is refused, the others are planned without it."""

        def load(number: int, image: Any) -> Any:
            with named("image", number, image):
                picture = load_picture(image, settings=self.pixels)
                plan((picture.height, picture.width), self.slicing)
                return picture

        loaded, errors = collected(load, _listed(images))
        kept = [picture for picture in loaded if picture is not None]
        plans = plan_sample([(one.height, one.width) for one in kept], [], self.slicing, **settings)[0]
        return self.cut(kept, self.moved(kept, plans)), errors

    def load(self, images: Sequence[Any]) -> list[Any]:
        """Upright RGB pictures with ``height`` and ``width``, as :meth:`cut` takes them; errors as of a call."""

        def load(number: int, image: Any) -> Any:
            with named("image", number, image):
                return load_picture(image, settings=self.pixels)

        return in_threads(load, range(len(_listed(images))), images)

    def moved(self, loaded: Sequence[Any], plans: Sequence[SlicePlan]) -> list[SlicePlan]:
        """The plans of pictures, borders moved where the slicing says so: by :func:`uhd.pixels.move_borders`."""
        if not self.slicing.border_moves:
            return list(plans)
        return in_threads(lambda *one: move_borders(*one, self.slicing, settings=self.pixels), loaded, plans)

    def cut(self, loaded: Sequence[Any], plans: Sequence[SlicePlan]) -> SliceBatch:
        """The batch of pictures by plans of their sizes, one each."""
        how = {"settings": self.pixels, "patch_size": self.patch_size, "inner": self.inner}
        return SliceBatch.from_images(loaded, plans, **how)


def _listed(images: Any) -> Sequence[Any]:
    if not isinstance(images, (list, tuple)):
        raise TypeError(f"expected a list of images, got {type(images).__name__}: put one image into a list")
    return images


def collected(function: Callable[[int, Any], Any], items: Sequence[Any]) -> tuple[list[Any], Errors]:
    """``function(number, item)`` of every item, ``None`` where it is refused, and by which error, by number."""

    def one(number: int, item: Any) -> tuple[Any, Exception | None]:
        try:
            return function(number, item), None
        except REFUSALS as problem:
            return None, problem

    found = in_threads(one, range(len(items)), items)
    return [result for result, _ in found], {number: problem for number, (_, problem) in enumerate(found) if problem}


def image_sizes_hw(
    images: Iterable[Any], *, threads: int = 1, settings: PixelSettings = DEFAULT, errors: str = "raise"
) -> np.ndarray | tuple[np.ndarray, Errors]:
    """The sizes of many images as :func:`uhd.pixels.load_image` gives them, upright; of files the headers are read.

    >>> image_sizes_hw([np.zeros((30, 50, 3), np.uint8), Image.new("L", (8, 4))]).tolist()
    [[30, 50], [4, 8]]

    Args:
        images: Paths, bytes, arrays, tensors or Pillow images: a list, a dataset of them, a generator. A Pillow image
            is decoded, and keeps its pixels.
        threads: More than one help where files are far away.
        settings: The pixel limit, as of :func:`uhd.pixels.load_image`.
        errors: ``"raise"`` where an image is refused; ``"collect"``: its size is (0, 0), and the errors come too.

    Returns:
        (M, 2) int64, (height, width) in px; with ``errors="collect"`` these and ``{number: error}``.

    Raises:
        ValueError, TypeError, OSError: An image is refused, by its number and, where it has one, its path.
    """
    check_choice("errors", errors, ERRORS)
    threads = whole("threads", threads, least=1)
    if isinstance(images, (str, bytes, os.PathLike, Image.Image)) or getattr(images, "ndim", None) in (2, 3):
        raise TypeError(f"expected images one after the other, got one {type(images).__name__}: put it into a list")
    if not (hasattr(images, "__iter__") or hasattr(images, "__getitem__")):
        raise TypeError(f"expected images one after the other, got {type(images).__name__}")
    # a dataset need not end by an IndexError
    stream = images if hasattr(images, "__iter__") else map(images.__getitem__, range(len(images)))

    refused: Errors = {}

    def size_hw(item: tuple[int, Any]) -> tuple[int, int]:
        try:
            with named("item", *item):
                return image_size_hw(item[1], settings=settings)
        except REFUSALS as problem:
            if errors == "raise":
                raise
            refused[item[0]] = problem
            return 0, 0

    items, found = enumerate(stream), []
    with ThreadPoolExecutor(threads) as pool:
        run = pool.map if threads > 1 else map
        while some := list(islice(items, _READ_TOGETHER)):
            found += run(size_hw, some)
    sizes = np.array(found, np.int64).reshape(-1, 2)
    return sizes if errors == "raise" else (sizes, dict(sorted(refused.items())))


def image_costs(sizes_hw: np.ndarray | Sequence[Sequence[int]], slicing: Any, *, unit: str = "patches") -> np.ndarray:
    """What images of these sizes cost, each planned by itself.

    >>> image_costs([(336, 336), (1008, 672)], "llava-uhd").tolist()
    [576, 4007]
    >>> image_costs([(336, 336), (1008, 672)], "llava-uhd", unit="tokens").tolist()
    [64, 454]

    Args:
        sizes_hw: (M, 2) ints, (height, width) in px; see :func:`image_sizes_hw`.
        slicing: What :func:`uhd.plan` takes, or what has such a ``slicing``: an encoder, a :class:`Preparation`. For a
            Hugging Face processor ``processor.image_processor.plan``, which knows its ``max_slices``.
        unit: ``"patches"`` for the vision encoder, ``"tokens"`` for the language model, separators included.

    Returns:
        (M,) int64. Patches of slices whose borders move depend on the pixels: the most they can be.

    Raises:
        ValueError: The rule refuses a size, by its row; or there is no such unit.
    """
    check_choice("unit", unit, UNITS)
    planned = plan_many(sizes_hw, getattr(slicing, "slicing", slicing))
    rule = _cuts_by(slicing)
    if unit == "patches" and rule.border_moves:
        slices = planned["num_views"] - 1
        own, overview = (planned[name] // rule.patch_size for name in ("slice_hw", "overview_hw"))
        moved = rule.view_budget * rule.merge**2  # slices where none moves may have more
        return overview.prod(axis=1) + slices * np.maximum(own.prod(axis=1), moved)
    return planned[f"num_{unit}"]


def one_size(frames: Sequence[Any], number: int) -> tuple[int, int]:
    """(height, width) of the pictures of a video; a ``ValueError`` with its number where they have several or none."""
    sizes = sorted({(frame.height, frame.width) for frame in frames})
    if len(sizes) != 1:
        raise ValueError(
            f"video {number} has {len(frames)} frames of the sizes {sizes} (height, width): need one size"
        )
    return sizes[0]


def _cuts_by(slicing: Any) -> Slicing:
    """What images are cut by, also where it is the method ``plan`` of a processor or an encoder, which knows sizes
    alone."""
    owner = getattr(slicing, "__self__", None)
    own = owner.planner({}) if hasattr(owner, "planner") else getattr(owner, "slicing", None)
    return own if isinstance(own, Slicing) else find(getattr(slicing, "slicing", slicing))


@contextmanager
def named(kind: str, number: int, image: Any = None) -> Iterator[None]:
    """Errors begin with what they are about, and its path if it has one. One of opening a file tells that already."""
    try:
        yield
    except (ValueError, TypeError) as problem:
        path = f"{str(image)!r:.200}" if isinstance(image, (str, os.PathLike)) else ""
        where = f" ({path})" if path not in str(problem) else ""
        error = TypeError if isinstance(problem, TypeError) else ValueError
        raise error(f"{kind} {number}{where}: {problem}") from problem


__all__ = ["Preparation", "TokenBudgetSampler", "image_costs", "image_sizes_hw"]
