"""What images the nano model knows: dark text on a plain light ground; others are turned into that, or doubted."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

from uhd.nano.task import TaskSettings

GROUND, TEXT = 222.0, 35.0  # grey levels of 255 in the middle of what it learned from
LEAST_CONTRAST = 40.0  # between text and ground, grey levels: less may be noise
MOST_COLOUR = 16.0  # distance of text from the line between both colours, root mean square, grey levels
INK = (0.003, 0.4)  # share of an image's pixels that text can cover
MOST_THICK = 0.05  # of the dark pixels inside dark areas; at most 0.012 in 1,500 scenes of the task
LOOKED_AT = 256  # larger images are looked at in so many px a side, and never repainted


def as_learned(image: Image.Image) -> Image.Image:
    """Repaint text of one colour on a plain ground of another as dark on light, in the grey levels of the task.

    Not learned: each pixel's place on the line from the ground's colour (the median) to the text's becomes its grey
    level. So light text on dark, colours and pale text can be read by a model that never saw them.

    Returns:
        A new image of mode "L"; ``image`` itself where it needs no repainting, where there are not two colours,
        without pixels, or beyond 256 px a side.
    """
    if not 0 < min(image.size) <= max(image.size) <= LOOKED_AT or not level_doubts(image):
        return image
    apart = np.asarray(image.convert("RGB"), np.float32)
    apart = apart - np.median(apart, axis=(0, 1))
    far = _levels(apart) > LEAST_CONTRAST
    if not INK[0] <= far.mean() <= INK[1]:
        return image
    towards = apart[far].mean(0)
    towards /= np.linalg.norm(towards) + 1e-6
    along = apart @ towards
    beside = apart[far] - along[far, None] * towards
    if np.sqrt((_levels(beside) ** 2).mean()) > MOST_COLOUR:
        return image
    grey = GROUND + (TEXT - GROUND) * along / np.percentile(along[far], 90)
    painted = Image.fromarray(np.rint(grey.clip(0, 255)).astype(np.uint8))
    return image if level_doubts(painted) else painted


def _levels(apart: np.ndarray) -> np.ndarray:
    """Length of RGB differences (..., 3); a difference of greys has its own number of levels."""
    return np.linalg.norm(apart, axis=-1) / np.sqrt(3)


def image_doubts(image: Image.Image) -> tuple[str, ...]:
    """How an image differs from those the model learned from: size, aspect, colour, ground, amount of ink, strokes.

    Cheap and on purpose coarse: a strip, a photo, an empty page, a screenshot.
    """
    (least, most), max_aspect = TaskSettings().area, TaskSettings().max_aspect
    width, height = image.size
    aspect = max(width, height) / min(width, height)
    doubts = []
    if not 0.7 * least <= width * height <= 1.25 * most:
        doubts.append(f"{width}x{height} px are {width * height} in all, it learned from {least} to {most}")
    if aspect > max_aspect * 1.2:
        doubts.append(f"an aspect ratio of {aspect:.1f}, it learned up to {max_aspect:.0f}")
    return (*doubts, *level_doubts(image))


def level_doubts(image: Image.Image) -> tuple[str, ...]:
    """The part of :func:`image_doubts` about colours and grey levels."""
    if max(image.size) > LOOKED_AT:
        width, height = (min(side, LOOKED_AT) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BOX)
    pixels = np.asarray(image.convert("RGB"), np.int16)
    doubts = []
    if np.ptp(pixels, axis=2).mean() > 8:
        doubts.append("colours, it learned from grey")
    grey = pixels.mean(2)
    ground = float(np.median(grey))
    if ground < 170:
        doubts.append(f"a ground of {ground:.0f} of 255, it learned from dark text on 190 to 255")
    if (np.abs(grey - ground) < 16).mean() < 0.5:
        doubts.append("an uneven ground, it learned from plain ones")
    dark = grey < ground - 70
    ink = float(dark.mean())
    if not INK[0] <= ink <= INK[1]:
        return (*doubts, f"{ink:.1%} of dark px: no text that it could read")
    inner = Image.fromarray(dark.astype(np.uint8)).filter(ImageFilter.MinFilter(3))
    thick = float(np.asarray(inner).sum() / dark.sum())
    if thick > MOST_THICK:
        doubts.append(f"{thick:.0%} of the dark px inside areas thicker than its strokes")
    return tuple(doubts)
