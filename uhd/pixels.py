"""Pixels: from a picture in any shape to the uint8 views of its plan, and from a view to patches.

The plan decides every size; here the image is made upright RGB, each canvas is resized once as a whole and then cut,
and a view is folded into patches. Everything stays uint8: mean and std are applied on the device, by
:func:`uhd.batch.normalize`. NumPy and Pillow only; a torch tensor is understood without importing torch.
"""

from __future__ import annotations

import io
import json
import math
import os
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from einops import rearrange
from PIL import Image, UnidentifiedImageError

if TYPE_CHECKING:
    from uhd.slicing.plan import Canvas, SlicePlan

MAX_PIXELS = 178_956_970
"""Default limit on the pixels of one file: where an unchanged Pillow refuses too (it warns from half of that on)."""

RESAMPLE = {
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
}
"""Filters by name. Pillow widens all three when it shrinks, so none of them aliases."""

_TAPS: dict[str, tuple[int, Callable[[np.ndarray], np.ndarray]]] = {
    "bilinear": (1, lambda x: 1 - x),
    "bicubic": (2, lambda x: np.where(x < 1, (1.25 * x - 2.25) * x**2 + 1, ((-0.75 * x + 3.75) * x - 6) * x + 3)),
    "lanczos": (3, lambda x: np.sinc(x) * np.sinc(x / 3)),
}
"""Without widening: pixels to either side that count, and their weight by distance; as PyTorch's, a = -0.75."""

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_CHANNELS = (1, 3, 4)


@dataclass(frozen=True)
class PixelSettings:
    """How pixels are made; saved with a model, because features depend on it.

    Attributes:
        mean: RGB mean that normalised pixels are centred on, in 0..1 units; ``None`` is not known, never guessed.
        std: RGB standard deviation in 0..1 units; known exactly when ``mean`` is.
        resample: ``"bicubic"``, ``"lanczos"`` or ``"bilinear"``; ``None`` is the filter that each plan's rule was
            released with (``plan.resample``: bicubic for LLaVA-UHD and MiniCPM-V).
        background: RGB in 0..255 under transparent pixels; white, as most transparent pictures are drawn for a page.
        max_pixels: A file with more pixels is refused before it is decoded. Pillow's own ``Image.MAX_IMAGE_PIXELS``
            is left alone and refuses from twice its value on: raise both for larger pictures.
        backend: What resizes. ``"pillow"``: uint8 RGB, equal to the reference's bytes under the same Pillow.

    Raises:
        ValueError: A setting is out of range; the message names it.
    """

    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    resample: str | None = None
    background: tuple[int, int, int] = (255, 255, 255)
    max_pixels: int = MAX_PIXELS
    backend: str = "pillow"

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"mean and std are given together or not at all, got mean={self.mean}, std={self.std}")
        if self.mean is not None:
            object.__setattr__(self, "mean", _three("mean", self.mean))
            object.__setattr__(self, "std", _three("std", self.std))
            if not all(0 <= value <= 1 for value in self.mean) or not all(value > 0 for value in self.std):
                raise ValueError(
                    f"mean must lie in 0..1 and std above 0, got mean={self.mean}, std={self.std}: "
                    "divide both by 255 where they are in 0..255 units"
                )
        if self.resample is not None:
            _check_filter(self.resample)
        background = tuple(self.background)
        if len(background) != 3 or not all(type(value) is int and 0 <= value <= 255 for value in background):
            raise ValueError(f"background must be three ints in 0..255 (RGB), got {self.background!r}")
        object.__setattr__(self, "background", background)
        if type(self.max_pixels) is not int or self.max_pixels < 1:
            raise ValueError(f"max_pixels must be a positive int, got {self.max_pixels!r}")
        if self.backend != "pillow":
            raise ValueError(f"backend must be 'pillow', got {self.backend!r}")

    def mean_std(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """(mean, std), or a ``ValueError`` that says where to get them."""
        if self.mean is None or self.std is None:
            raise ValueError(
                "the pixel mean and std of this vision encoder are not known: take them from its checkpoint with "
                "PixelSettings.from_preprocessor(folder) or PixelSettings.from_timm(model), "
                "or give PixelSettings(mean=..., std=...)"
            )
        return self.mean, self.std

    @classmethod
    def from_preprocessor(cls, source: Mapping[str, Any] | str | os.PathLike | Any, **changes: Any) -> PixelSettings:
        """Mean and std of a Hugging Face image processor.

        Its resize and crop rules are not taken over: the plan decides sizes. ``changes`` set the other fields.

        Args:
            source: A folder with ``preprocessor_config.json`` or ``processor_config.json``, one such file, its
                content as a dict, or an image processor (anything with ``to_dict()``).

        Raises:
            ValueError: No ``image_mean`` and ``image_std`` there, or pixels are not rescaled by 1/255.
        """
        found = next((c for c in _preprocessor_configs(source) if "image_mean" in c and "image_std" in c), None)
        if found is None:
            raise ValueError(
                f"no image_mean and image_std in {_short(source)}: expected preprocessor_config.json or "
                "processor_config.json as an image processor saves it; else give PixelSettings(mean=, std=)"
            )
        factor = found.get("rescale_factor", 1 / 255) if found.get("do_rescale", True) else 1
        if not math.isclose(factor, 1 / 255, rel_tol=1e-3):
            raise ValueError(
                f"this preprocessor rescales pixels by {factor}, not 1/255: give PixelSettings(mean=, std=)"
            )
        if not found.get("do_normalize", True):
            return cls(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), **changes)
        return cls(mean=found["image_mean"], std=found["image_std"], **changes)

    @classmethod
    def from_timm(cls, model_or_cfg: Any, **changes: Any) -> PixelSettings:
        """Mean and std of a timm model, of its ``pretrained_cfg`` (dict or object), or of a config that holds one.

        ``changes`` set the other fields.

        Raises:
            ValueError: No mean and std there.
        """
        config = getattr(model_or_cfg, "pretrained_cfg", model_or_cfg)
        if isinstance(config, Mapping):
            config = config.get("pretrained_cfg", config)
        if not isinstance(config, Mapping):
            config = {key: getattr(config, key, None) for key in ("mean", "std")}
        if config.get("mean") is None or config.get("std") is None:
            raise ValueError(
                f"no mean and std in {_short(model_or_cfg)}: expected a timm model or its pretrained_cfg; "
                "else give PixelSettings(mean=, std=)"
            )
        return cls(mean=config["mean"], std=config["std"], **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; :meth:`from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PixelSettings:
        """The inverse of :meth:`to_dict`, also after JSON text; an unknown key raises ``ValueError``."""
        unknown = sorted(set(data) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"unknown pixel settings {unknown}; known are {[f.name for f in fields(cls)]}")
        return cls(**data)


DEFAULT = PixelSettings()


def load_image(source: Any, *, settings: PixelSettings = DEFAULT, frame: int | None = None) -> Image.Image:
    """Any picture as an upright RGB Pillow image of 8 bits a channel.

    * Files, bytes and Pillow images: the EXIF orientation is applied (a value outside 1..8 is upright). Transparency
      is composited on ``settings.background``. 16-bit gray (and Pillow's mode ``I``) is scaled from 0..65535; mode
      ``F`` is read as a float array is. Embedded ICC profiles are ignored, CMYK included, as in the reference.
    * Arrays and tensors: (h, w) is gray; (h, w, c) or (c, h, w) with c = 1 gray, 3 RGB or 4 RGBA. The axis of such a
      length is the channels; where both ends have one, as in (3, h, 3) or (1, w, 3), the shape is refused. uint8 as it
      is, bool as 0 and 255, uint16 scaled from 0..65535, floats from 0..1, each to the nearest level.

    Loading the result again changes nothing. A Pillow image that is upright RGB already is returned itself.

    Args:
        source: Pillow image, path, ``bytes``, NumPy array or torch tensor.
        settings: Background and pixel limit.
        frame: Of an animation or a multi-page file, from 0. ``None``: the first, or where a Pillow image stands.

    Raises:
        FileNotFoundError: No such file (or another ``OSError`` of opening it).
        ValueError: Not an image, damaged, too many pixels, no such frame, an ambiguous shape or a range that is not
            stated above.
        TypeError: ``source`` is none of the accepted types.
    """
    array = _as_array(source)
    if array is not None:
        _check_frame(frame, 1, "an array")
        return _rgb(_image_from_array(array), settings)
    name = _name(source)
    with _opened(source, name) as image:
        _check_pixels(image, settings, name)
        result = _rgb(_upright_frame(image, frame, name), settings)
        # a file that was opened here is closed after this: hand out a plain image
        return result.copy() if result is image and image is not source else result


def image_size_hw(source: Any) -> tuple[int, int]:
    """(height, width) in px of what :func:`load_image` would return, without decoding a file's pixels.

    Of an animation or a multi-page file, the first frame. Arguments and errors as in :func:`load_image`.
    """
    array = _as_array(source)
    if array is not None:
        return _channels_last(array).shape[:2]
    name = _name(source)
    with _opened(source, name) as image, _pillow_errors(name):
        if image is source:
            image.load()  # it will be decoded anyway, and only then do all formats agree on size and orientation
            (width, height), exif = image.size, image.getexif()
        elif image.format == "TIFF":
            # newer Pillow turns a TIFF's size on opening, older on loading: the tags are what the file says
            width, height, exif = image.tag_v2[256], image.tag_v2[257], image.tag_v2
        else:
            (width, height), exif = image.size, _header_exif(image)
        orientation = exif.get(_ORIENTATION, 1)
    return (width, height) if orientation in (5, 6, 7, 8) else (height, width)


def render(image: Any, plan: SlicePlan, *, settings: PixelSettings = DEFAULT) -> list[np.ndarray]:
    """The views of a plan, in the order of ``plan.views``.

    Every canvas is resized from the original image as a whole and then cut, so neighbouring slices share their
    filter's support across the cut. It is resized once, or twice where it has a ``first_hw``; a tile whose size is not
    ``view_hw`` once more.

    Args:
        image: Anything :func:`load_image` takes; its size must be ``plan.image_hw``.
        plan: From :func:`uhd.slicing.plan` or any strategy.
        settings: Its filter, or the plan's where it names none. Whether that antialiases is the plan's.

    Returns:
        One (h, w, 3) uint8 array a view, (h, w) = ``view.size_hw``; each owns its memory.

    Raises:
        ValueError: The image has another size than the plan, or a canvas is not whole: its source or a tile lies
            outside, or a part is neither content nor filled; or there is no such filter.

    Source: one resize and an exact cut as in thunlp/LLaVA-UHD, llava/slice_process.py ``slice_image_minicpm``.
    """
    image = load_image(image, settings=settings)
    image_hw = (image.height, image.width)
    if image_hw != tuple(plan.image_hw):
        raise ValueError(
            f"the plan is for an image of {plan.image_hw[0]}x{plan.image_hw[1]} px (height x width), this one has "
            f"{image_hw[0]}x{image_hw[1]} px: plan it by image_size_hw(image), which knows the EXIF orientation"
        )
    resize = _Resize(settings.resample or plan.resample, plan.antialias)
    views = []
    for canvas in plan.canvases:
        _check_canvas(canvas, image_hw)
        whole = _render_canvas(image, canvas, resize)
        name, antialias = canvas.view_filter or (plan.resample, plan.antialias)
        resize_view = _Resize(settings.resample or name, antialias)
        for top, left, bottom, right in canvas.tiles:
            tile = whole[top:bottom, left:right].copy()
            if tile.shape[:2] != tuple(canvas.view_hw):
                tile = np.array(resize_view(Image.fromarray(tile), canvas.view_hw))
            views.append(tile)
    return views


def patchify(view: Any, patch_size: int) -> Any:
    """Fold a view into patches.

    Patches are row-major; inside one the order is (channel, py, px), so that a patch Conv2d's weight (D, C, p, p),
    flattened to (D, C*p*p), is the matching linear layer. Rows and columns past the last whole patch are left out, as
    a convolution with stride = kernel never sees them (SigLIP 384 with patch 14: the last 6 px).

    Args:
        view: (h, w, C) array or tensor.
        patch_size: p, px.

    Returns:
        ((h // p) * (w // p), C * p * p), same type and dtype. :func:`unpatchify` is the inverse.

    Raises:
        ValueError: Not three axes, or a side is shorter than one patch.
    """
    if len(view.shape) != 3 or min(view.shape[:2]) < patch_size:
        raise ValueError(
            f"a view is (height, width, channels) with sides of at least one patch of {patch_size} px, "
            f"got {tuple(view.shape)}"
        )
    rows, cols = view.shape[0] // patch_size, view.shape[1] // patch_size
    seen = view[: rows * patch_size, : cols * patch_size]
    return rearrange(seen, "(h py) (w px) c -> (h w) (c py px)", py=patch_size, px=patch_size)


def unpatchify(patches: Any, grid_hw: tuple[int, int], patch_size: int) -> Any:
    """(rows * cols, C * p * p) patches back to the (rows * p, cols * p, C) view; the inverse of :func:`patchify`.

    Raises:
        ValueError: The number of patches is not rows * cols, or their width not a multiple of p * p.
    """
    rows, cols = grid_hw
    if len(patches.shape) != 2 or patches.shape[0] != rows * cols or patches.shape[1] % patch_size**2:
        raise ValueError(
            f"a {rows}x{cols} grid of {patch_size} px patches is ({rows * cols}, channels * {patch_size**2}), "
            f"got {tuple(patches.shape)}"
        )
    return rearrange(patches, "(h w) (c py px) -> (h py) (w px) c", h=rows, w=cols, py=patch_size, px=patch_size)


def _wh(size_hw: tuple[int, int]) -> tuple[int, int]:
    """Pillow's (width, height)."""
    return size_hw[1], size_hw[0]


def _three(name: str, values: Any) -> tuple[float, float, float]:
    try:
        result = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        result = ()
    if len(result) != 3 or not all(map(math.isfinite, result)):
        raise ValueError(f"{name} must be three finite numbers (RGB), got {values!r}")
    return result


def _short(source: Any) -> str:
    return repr(str(source)) if isinstance(source, (str, os.PathLike)) else f"this {type(source).__name__}"


def _preprocessor_configs(source: Any) -> Iterator[Mapping[str, Any]]:
    """Every dict of settings that ``source`` may mean, an image processor nested in a processor included."""
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        names = ("preprocessor_config.json", "processor_config.json")
        for file in [path / name for name in names] if path.is_dir() else [path]:
            if file.is_file():
                yield from _preprocessor_configs(json.loads(file.read_text(encoding="utf-8")))
        return
    config = source.to_dict() if hasattr(source, "to_dict") else source
    if isinstance(config, Mapping):
        yield config
        if isinstance(config.get("image_processor"), Mapping):
            yield config["image_processor"]


def _name(source: Any) -> str:
    """What to call this picture in an error."""
    if isinstance(source, Image.Image):
        filename = getattr(source, "filename", "")
        return repr(filename) if filename else "this Pillow image"
    if isinstance(source, (str, os.PathLike)):
        name = str(source)
        if name.startswith(("http://", "https://", "data:")):
            raise ValueError(f"{name[:60]!r} is not a path, and nothing is downloaded: fetch it and pass its bytes")
        return repr(name)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"these {len(source)} bytes"
    raise TypeError(
        f"an image is a Pillow image, a path, bytes, a NumPy array or a torch tensor, got {type(source).__name__}"
    )


@contextmanager
def _opened(source: Any, name: str) -> Iterator[Image.Image]:
    """``source`` as a Pillow image; what was opened here is closed again."""
    if isinstance(source, Image.Image):
        yield source
        return
    with open(source, "rb") if isinstance(source, (str, os.PathLike)) else io.BytesIO(source) as file:
        with _pillow_errors(name):
            image = Image.open(file)
        with image:
            yield image


@contextmanager
def _pillow_errors(name: str) -> Iterator[None]:
    """Pillow's many exceptions about a file as one ``ValueError`` that names it."""
    try:
        yield
    except MemoryError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"{name} has more pixels than Pillow's limit ({error}): if you trust it, raise PIL.Image.MAX_IMAGE_PIXELS "
            "and PixelSettings.max_pixels, or shrink the file"
        ) from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not an image that Pillow can read: check it, or convert it to PNG") from error
    except Exception as error:
        raise ValueError(
            f"{name} cannot be decoded, it is truncated or damaged ({type(error).__name__}: {error}): "
            "get it again, or save it anew with an image program"
        ) from error


def _check_pixels(image: Image.Image, settings: PixelSettings, name: str) -> None:
    if image.width * image.height > settings.max_pixels:
        raise ValueError(
            f"{name} is {image.height}x{image.width} px (height x width), {image.height * image.width} pixels, over "
            f"max_pixels={settings.max_pixels}: raise PixelSettings.max_pixels if you trust it, or shrink the file"
        )


def _check_frame(frame: int | None, frames: int, name: str) -> None:
    if frame is not None and (type(frame) is not int or not 0 <= frame < frames):
        raise ValueError(f"{name} has {frames} frame{'s' * (frames > 1)}, numbered from 0; got frame={frame!r}")


def _upright_frame(image: Image.Image, frame: int | None, name: str) -> Image.Image:
    """The asked frame, decoded, with its EXIF orientation applied. A caller's image is left at its own frame."""
    with _pillow_errors(name):
        stands = image.tell()
        frames = 1 if frame is None else getattr(image, "n_frames", 1)
    _check_frame(frame, frames, name)
    with _pillow_errors(name):
        if frame is None or frame == stands:
            image.load()
            picture = image
        else:
            try:
                image.seek(frame)
                picture = image.copy()
            finally:
                image.seek(stands)
        method = _UPRIGHT.get(picture.getexif().get(_ORIENTATION, 1))
        if method is None:
            return picture
        turned = picture.transpose(method)
    # the copied tag would turn it a second time
    turned.info = {key: value for key, value in turned.info.items() if key == "transparency"}
    return turned


def _header_exif(image: Image.Image) -> Image.Exif:
    """EXIF without decoding, unless a PNG has metadata behind its pixels (exiftool writes it there)."""
    if image.format != "PNG" or _png_late_metadata(image.fp):
        return image.getexif()
    return Image.Image.getexif(image)  # PNG's own getexif decodes the pixels first


def _png_late_metadata(file: BinaryIO) -> bool:
    """Whether text or EXIF chunks follow the pixel data. The position in the file is kept."""
    position = file.tell()
    file.seek(8)
    pixels_seen = late = False
    while not late and len(header := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        late = pixels_seen and kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt")
        pixels_seen = pixels_seen or kind == b"IDAT"
        file.seek(length + 4, io.SEEK_CUR)
    file.seek(position)
    return late


def _rgb(image: Image.Image, settings: PixelSettings) -> Image.Image:
    """Eight-bit RGB of an image of any mode; one that is that already is returned itself."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bit_gray(image)
    key = image.info.get("transparency")
    if isinstance(key, tuple) and max(key) > 255:
        raise ValueError("the transparent colour of a 16-bit RGB PNG is lost in 8 bits: save it with an alpha channel")
    if image.has_transparency_data:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*settings.background, 255)), image)
    image = image.convert("RGB")
    image.info = {}
    return image


def _eight_bit_gray(image: Image.Image) -> Image.Image:
    """L, or LA where one gray level means transparent, from the deep modes, which Pillow itself would clip at 255."""
    array = np.asarray(image)
    key = image.info.get("transparency")
    if image.mode == "I":
        if array.min() < 0 or array.max() > 65535:
            raise ValueError(
                f"a gray image of mode I is read as 0..65535, got {array.min()}..{array.max()}: scale it first"
            )
        array = array.astype(np.uint16)
    gray = Image.fromarray(_eight_bit(array))
    if isinstance(key, int):
        gray.putalpha(Image.fromarray(np.where(array == key, 0, 255).astype(np.uint8)))
    return gray


def _eight_bit(array: np.ndarray) -> np.ndarray:
    """uint8 from bool, uint8, uint16 (full range) or floats in 0..1, to the nearest level."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if array.dtype.kind == "f":
        if not (array.min() >= 0 and array.max() <= 1):  # also catches NaN
            raise ValueError(
                f"float pixels must lie in 0..1, got {array.min():.6g}..{array.max():.6g}: "
                "divide by 255, undo a normalisation, or pass uint8"
            )
        return np.rint(array.astype(np.promote_types(array.dtype, np.float32)) * 255).astype(np.uint8)
    raise ValueError(f"pixels must be uint8, uint16, bool or float in 0..1, got {array.dtype}: convert them first")


def _as_array(source: Any) -> np.ndarray | None:
    """A NumPy array or torch tensor as an array; ``None`` for anything else."""
    torch = sys.modules.get("torch")  # a tensor cannot exist before torch is imported
    if torch is not None and isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        return (source.float() if source.dtype == torch.bfloat16 else source).numpy()
    return source if isinstance(source, np.ndarray) else None


def _channels_last(array: np.ndarray) -> np.ndarray:
    """(h, w) or (h, w, 1 | 3 | 4) from either layout; see :func:`load_image` for the rule."""
    shape = array.shape
    if array.ndim not in (2, 3) or 0 in shape:
        raise ValueError(
            f"an image array is (h, w), (h, w, c) or (c, h, w) and not empty, got {shape}: pass the images of a batch "
            "one by one"
        )
    if array.ndim == 2:
        return array
    first, last = shape[0] in _CHANNELS, shape[2] in _CHANNELS
    if first and last:
        raise ValueError(
            f"an array of shape {shape} can be (h, w, c) or (c, h, w): pass a Pillow image, as from "
            "Image.fromarray(array) for uint8 (h, w, 3)"
        )
    if not first and not last:
        raise ValueError(f"an image array has 1, 3 or 4 channels first or last, got {shape}")
    return array if last else array.transpose(1, 2, 0)


def _image_from_array(array: np.ndarray) -> Image.Image:
    pixels = _eight_bit(_channels_last(array))
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(pixels))


def _check_filter(name: Any) -> None:
    if name not in RESAMPLE:
        raise ValueError(f"resample must be one of {', '.join(RESAMPLE)}, got {name!r}")


class _Resize:
    """``resize(image, size_hw)``: 8-bit RGB by one filter, which widens where it shrinks unless told not to."""

    def __init__(self, name: str, antialias: bool) -> None:
        _check_filter(name)
        self.name, self.antialias = name, antialias

    def __call__(
        self, image: Image.Image, size_hw: tuple[int, int], *, box: tuple[float, float, float, float] | None = None
    ) -> Image.Image:
        """``box``: (left, top, right, bottom) of the part that is resized, px; ``None`` is all of it."""
        left, top, right, bottom = box or (0, 0, image.width, image.height)
        if self.antialias:
            return image.resize(_wh(size_hw), RESAMPLE[self.name], box=box)
        rows = self._sampled(np.asarray(image), 0, (top, bottom), size_hw[0])
        found = self._sampled(rows, 1, (left, right), size_hw[1])
        return Image.fromarray(np.rint(found).clip(0, 255).astype(np.uint8))

    def _sampled(self, array: np.ndarray, axis: int, span: tuple[float, float], length: int) -> np.ndarray:
        """float32 with ``length`` samples of one axis, at the middles of as many equal parts of ``span``."""
        reach, weight = _TAPS[self.name]
        places = span[0] + (np.arange(length) + 0.5) * (span[1] - span[0]) / length - 0.5
        first = np.floor(places).astype(np.int64)
        taps = range(1 - reach, reach + 1)
        weights = np.stack([weight(np.abs(places - first - tap)) for tap in taps])
        weights /= weights.sum(axis=0)
        shape = [-1 if place == axis else 1 for place in range(3)]
        return sum(
            array.take(np.clip(first + tap, 0, array.shape[axis] - 1), axis) * part.astype(np.float32).reshape(shape)
            for tap, part in zip(taps, weights, strict=True)
        )


def _render_canvas(image: Image.Image, canvas: Canvas, resize: _Resize) -> np.ndarray:
    """(h, w, 3) uint8 of a whole canvas."""
    if canvas.source is not None:
        top, left, bottom, right = canvas.source
        image = image.crop((left, top, right, bottom))  # first, so that the filter sees nothing outside
    if canvas.first_hw is not None:
        image = resize(image, canvas.first_hw)
    if _is_crop(canvas) and math.prod(canvas.content_hw) > 16 * math.prod(canvas.size_hw):
        # an elongated image would be resized to gigabytes of which one view is kept: make only what is seen, which
        # may differ by a level or two, as Pillow then takes its two passes in another order
        return np.asarray(resize(image, canvas.size_hw, box=_seen(image, canvas)))
    whole = resize(image, canvas.content_hw)
    if canvas.offset != (0, 0) or canvas.size_hw != canvas.content_hw:
        content, whole = whole, Image.new("RGB", _wh(canvas.size_hw), canvas.fill or (0, 0, 0))
        whole.paste(content, _wh(canvas.offset))
    return np.asarray(whole)


def _is_crop(canvas: Canvas) -> bool:
    """Whether the content covers its canvas and reaches beyond it."""
    sides = list(zip(canvas.offset, canvas.content_hw, canvas.size_hw, strict=True))
    covers = all(start <= 0 and start + content >= side for start, content, side in sides)
    return covers and canvas.content_hw != canvas.size_hw


def _seen(image: Image.Image, canvas: Canvas) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the part of the image that a crop shows, px."""
    (top, left), (height, width) = canvas.offset, canvas.size_hw
    scale_h, scale_w = image.height / canvas.content_hw[0], image.width / canvas.content_hw[1]
    right, bottom = min((width - left) * scale_w, image.width), min((height - top) * scale_h, image.height)
    return -left * scale_w, -top * scale_h, right, bottom


def _check_canvas(canvas: Canvas, image_hw: tuple[int, int]) -> None:
    """Pillow would paint what is missing black: refuse it instead."""

    def inside(box: tuple[int, int, int, int], size_hw: tuple[int, int]) -> bool:
        top, left, bottom, right = box
        return 0 <= top < bottom <= size_hw[0] and 0 <= left < right <= size_hw[1]

    if min(*canvas.content_hw, *canvas.size_hw, *canvas.view_hw, *(canvas.first_hw or ())) < 1:
        raise ValueError(f"every side of a canvas must be at least 1 px, got {canvas}")
    if canvas.source is not None and not inside(canvas.source, image_hw):
        raise ValueError(f"the source {tuple(canvas.source)} of a canvas lies outside the image of {image_hw} px")
    for box in canvas.tiles:
        if not inside(box, canvas.size_hw):
            raise ValueError(f"the tile {tuple(box)} lies outside its canvas of {canvas.size_hw} px")
    covered = all(
        start <= 0 and start + content >= side
        for start, content, side in zip(canvas.offset, canvas.content_hw, canvas.size_hw, strict=True)
    )
    if not covered and canvas.fill is None:
        raise ValueError(
            f"content of {canvas.content_hw} px at {canvas.offset} does not cover its canvas of {canvas.size_hw} px: "
            "give the canvas a fill"
        )
