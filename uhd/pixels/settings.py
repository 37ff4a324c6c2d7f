"""How pixels are made: the settings that are saved with a model."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uhd.files import read_json
from uhd.settings import Settings, check_choice

MAX_PIXELS = 3 << 24
"""Default limit on the pixels of one picture: the costliest format takes less than 1 GiB for it, see SECURITY.md."""

RESAMPLE = {"bicubic": 3, "lanczos": 1, "bilinear": 2}
"""Pillow's numbers of the filters. It widens all three when it shrinks, so none of them aliases."""

FILTERS = {number: name for name, number in RESAMPLE.items()}
"""The filters by these numbers, which image processors write."""

PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")
"""Files in which transformers keeps the settings of an image processor; the second one inside those of a processor."""

BACKENDS = ("pillow", "fast")


@dataclass(frozen=True)
class PixelSettings(Settings):
    """How pixels are made; saved with a model, because features depend on it.

    Attributes:
        mean: RGB mean that normalised pixels are centred on, in 0..1 units; ``None`` where it is not known.
        std: RGB standard deviation in 0..1 units; known exactly when ``mean`` is.
        resample: ``"bicubic"``, ``"lanczos"`` or ``"bilinear"``; ``None`` is the filter that each plan's rule was
            released with (``plan.resample``: bicubic for LLaVA-UHD and MiniCPM-V).
        background: RGB in 0..255 under transparent pixels; white, as most transparent pictures are drawn for a page.
        max_pixels: A picture with more pixels, an array too, is refused before it is decoded or converted, and so is
            a file of more than 4 bytes for each. Pillow's own ``Image.MAX_IMAGE_PIXELS`` is left alone and refuses
            from twice its value on: raise both for pictures above 179 million pixels.
        backend: What decodes and resizes. ``"pillow"``: equal to the reference's bytes under the same Pillow.
            ``"fast"``: within 2 of 255 levels of that at every pixel, several times faster; see
            :mod:`uhd.pixels.fast`.
        draft: Decode a JPEG at 1/2, 1/4 or 1/8 of its size where that divides its sides and still covers every canvas;
            only the fast backend does so, for paths and bytes. Not within 2 levels: photographs come out at most 8
            off, pictures with detail down to the pixel 41.

    Raises:
        ValueError: A setting is out of range; the message names it.

    >>> PixelSettings(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)).to_dict()["background"]
    (255, 255, 255)
    """

    later = ("draft",)

    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    resample: str | None = None
    background: tuple[int, int, int] = (255, 255, 255)
    max_pixels: int = MAX_PIXELS
    backend: str = "pillow"
    draft: bool = False

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"mean and std are given together or not at all, got mean={self.mean}, std={self.std}")
        if self.mean is not None:
            object.__setattr__(self, "mean", _three("mean", self.mean))
            object.__setattr__(self, "std", _three("std", self.std))
            if not all(0 <= value <= 1 for value in self.mean) or not all(value > 0 for value in self.std):
                got = f"mean={self.mean}, std={self.std}"
                hint = "divide both by 255 where they are in 0..255 units"
                raise ValueError(f"mean must lie in 0..1 and std above 0, got {got}: {hint}")
        if self.resample is not None:
            check_filter(self.resample)
        background = tuple(self.background)
        if len(background) != 3 or not all(type(value) is int and 0 <= value <= 255 for value in background):
            raise ValueError(f"background must be three ints in 0..255 (RGB), got {self.background!r}")
        object.__setattr__(self, "background", background)
        if type(self.max_pixels) is not int or self.max_pixels < 1:
            raise ValueError(f"max_pixels must be a positive int, got {self.max_pixels!r}")
        check_choice("backend", self.backend, BACKENDS)
        if not isinstance(self.draft, bool) or (self.draft and self.backend != "fast"):
            raise ValueError(f"draft is True or False, and True needs backend='fast'; got {self.draft!r}")

    def mean_std(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Return (mean, std), or raise a ``ValueError`` that says where to get them."""
        if self.mean is None or self.std is None:
            raise ValueError(
                "the pixel mean and std of this vision encoder are not known: take them from its checkpoint with "
                "PixelSettings.from_preprocessor(folder) or PixelSettings.from_timm(model), "
                "or give PixelSettings(mean=..., std=...)"
            )
        return self.mean, self.std

    @classmethod
    def from_preprocessor(
        cls, source: Mapping[str, Any] | str | os.PathLike[str] | Any, **changes: Any
    ) -> PixelSettings:
        """Take mean and std from a Hugging Face image processor.

        Its resize and crop rules are not taken over: the plan decides sizes. ``changes`` set the other fields.

        >>> PixelSettings.from_preprocessor({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}).std
        (0.25, 0.25, 0.25)

        Args:
            source: A folder with ``preprocessor_config.json`` or ``processor_config.json``, one such file, its
                content as a dict, or an image processor (anything with ``to_dict()``).

        Raises:
            ValueError: No ``image_mean`` and ``image_std`` there, or pixels are not rescaled by 1/255.
        """
        config = next((c for c in image_processors(source) if "image_mean" in c and "image_std" in c), None)
        if config is None:
            raise ValueError(
                f"no image_mean and image_std in {short_name(source)}: expected preprocessor_config.json or "
                "processor_config.json as an image processor saves it; else give PixelSettings(mean=, std=)"
            )
        factor = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1
        if not math.isclose(factor, 1 / 255, rel_tol=1e-3):
            raise ValueError(f"pixels are rescaled by {factor} here, not by 1/255: give PixelSettings(mean=, std=)")
        if not config.get("do_normalize", True):
            return cls(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), **changes)
        return cls(mean=config["image_mean"], std=config["image_std"], **changes)

    @classmethod
    def from_timm(cls, model_or_cfg: Any, **changes: Any) -> PixelSettings:
        """Take mean and std from a timm model, from its ``pretrained_cfg``, or from a config with one.

        ``changes`` set the other fields. A ``ValueError`` tells where there is no mean and std.
        """

        def read(holder: Any, name: str) -> Any:
            return holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)

        config = read(model_or_cfg, "pretrained_cfg") or model_or_cfg
        mean, std = read(config, "mean"), read(config, "std")
        if mean is None or std is None:
            what = short_name(model_or_cfg)
            raise ValueError(f"no mean and std in {what}, expected those of timm: give PixelSettings(mean=, std=)")
        return cls(mean=mean, std=std, **changes)


DEFAULT = PixelSettings()


def check_filter(name: Any) -> None:
    check_choice("resample", name, RESAMPLE)


def _three(name: str, values: Any) -> tuple[float, float, float]:
    try:
        result = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        result = ()
    if len(result) != 3 or not all(map(math.isfinite, result)):
        raise ValueError(f"{name} must be three finite numbers (RGB), got {values!r}")
    return result


def short_name(source: Any) -> str:
    return repr(str(source)) if isinstance(source, (str, os.PathLike)) else f"this {type(source).__name__}"


def image_processors(source: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the settings of every image processor that ``source`` means, those inside a processor's included.

    ``source`` is as of :meth:`PixelSettings.from_preprocessor`; a ``ValueError`` names a file without a JSON object.
    """
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        for file in [path / name for name in PREPROCESSORS] if path.is_dir() else [path]:
            if file.is_file():
                config = read_json(file)
                if file.name != PREPROCESSORS[1] or "image_processor" in config:
                    yield from image_processors(config)
        return
    config = source.to_dict() if hasattr(source, "to_dict") else source
    if isinstance(config, Mapping):
        settings = config.get("image_processor", config)
        if isinstance(settings, Mapping):
            yield settings
