"""NumPy arrays and torch tensors as 8-bit pixels, without importing torch."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from .settings import PixelSettings
from .source import PictureError, check_size, picture_errors

_CHANNELS = (1, 3, 4)

_ROUNDING = 1e-4
"""How far floats may lie outside of 0..1: what resizing or a colour transform in float32 leaves there."""

_BAND = 1 << 20
"""Values that are converted at a time, so that wide types do not stand in memory for all pixels."""


def _is_tensor(source: Any) -> bool:
    torch = sys.modules.get("torch")  # a tensor cannot exist before torch is imported
    return torch is not None and isinstance(source, torch.Tensor)


def array_name(source: Any) -> str | None:
    """Say what to call an array or tensor in an error; ``None`` for anything else."""
    if isinstance(source, np.ndarray):
        return f"this array of shape {source.shape}"
    if not _is_tensor(source):
        return None
    try:
        return f"this tensor of shape {tuple(source.shape)}"
    except Exception:  # nested ones have none
        return "this tensor"


def array_errors(name: str) -> AbstractContextManager[None]:
    """As :func:`uhd.pixels.source.picture_errors`, about what is no file."""
    return picture_errors(name, "cannot be read as pixels", "pass a uint8 NumPy array, or a Pillow image")


def checked_layout(source: Any, settings: PixelSettings, name: str) -> tuple[tuple[int, int], bool]:
    """Return (height, width) and whether channels come first, before any value is moved or converted.

    Raises :class:`PictureError`: it holds no plain values, its shape is none of an image or ambiguous (the rule is
    that of :func:`uhd.pixels.load_image`), or it is too large.
    """
    if _is_tensor(source):
        _check_tensor(source)
    elif np.ma.is_masked(source):
        raise PictureError("it hides some values behind a mask: give them one with .filled(value)")
    shape = tuple(source.shape)
    if len(shape) not in (2, 3) or 0 in shape:
        raise PictureError(
            f"an image array is (h, w), (h, w, c) or (c, h, w) and not empty, got {shape}: pass the images of a batch "
            "one by one"
        )
    first, last = shape[0] in _CHANNELS, shape[-1] in _CHANNELS
    if len(shape) == 2:
        first, last = False, True
        shape = (*shape, 1)
    if first and last:
        raise PictureError(
            f"an array of shape {shape} can be (h, w, c) or (c, h, w): pass a Pillow image, as from "
            "Image.fromarray(array) for uint8 (h, w, 3)"
        )
    if not first and not last:
        raise PictureError(f"an image array has 1, 3 or 4 channels first or last, got {shape}")
    size_hw = shape[1:] if first else shape[:2]
    check_size(size_hw, settings, name)
    return size_hw, first


def _check_tensor(tensor: Any) -> None:
    torch = sys.modules["torch"]
    odd = {
        "nested: pass its images one by one": tensor.is_nested,
        "on the device meta, and so has no values: make it on another": tensor.device.type == "meta",
        "quantized: pass tensor.dequantize()": tensor.is_quantized,
        "sparse: pass tensor.to_dense()": tensor.layout is not torch.strided,
    }
    for what, is_so in odd.items():
        if is_so:
            raise PictureError(f"it is {what}")


def as_pixels(source: Any, settings: PixelSettings, name: str) -> np.ndarray:
    """Convert to (h, w) or (h, w, 3 | 4) uint8; what is that already is not copied.

    Errors are those of :func:`checked_layout`, and a :class:`PictureError` for other types or ranges.
    """
    _, first = checked_layout(source, settings, name)
    if _is_tensor(source):
        torch = sys.modules["torch"]
        source = source.detach().cpu().resolve_conj().resolve_neg()
        if source.is_floating_point() and source.dtype not in (torch.float16, torch.float32, torch.float64):
            source = source.float()  # NumPy has no bfloat16
        source = source.numpy()
    array = np.asarray(source)
    array = eight_bit(array.transpose(1, 2, 0) if first else array)
    return array[:, :, 0] if array.shape[2:] == (1,) else array


def eight_bit(array: np.ndarray) -> np.ndarray:
    """Convert bool, uint16 (full range) or floats in 0..1 to the nearest level of uint8, (h, w, ...)."""
    kind, size = array.dtype.kind, array.dtype.itemsize
    if array.dtype == np.uint8:
        return array
    if not (kind in "bf" or (kind == "u" and size == 2)):  # in either byte order
        raise PictureError(
            f"pixels must be uint8, uint16, bool or float in 0..1, got {array.dtype}: convert them first"
        )
    if kind == "f":
        _check_range(array)
    found = np.empty(array.shape, np.uint8)
    rows = max(_BAND // max(array[0].size, 1), 1)
    for top in range(0, len(array), rows):
        part = array[top : top + rows]
        if kind == "f":
            part = np.rint(part.astype(np.promote_types(part.dtype, np.float32)).clip(0, 1) * 255)
        else:
            part = part * np.uint8(255) if kind == "b" else (part.astype(np.uint32) + 128) // 257
        found[top : top + rows] = part
    return found


def _check_range(array: np.ndarray) -> None:
    least, most = array.min(), array.max()
    slack = max(_ROUNDING, float(np.finfo(array.dtype).eps))  # half precision is coarser
    if not (least >= -slack and most <= 1 + slack):  # also catches NaN
        raise PictureError(
            f"float pixels must lie in 0..1, got {least:.9g}..{most:.9g}: divide by 255, undo a normalisation, clip "
            "them, or pass uint8"
        )
