"""The second task of the learned comparison: small pages, lines of text or ruled tables, in several styles and sizes.

Only what Pillow brings along is drawn, so that every machine has the same pages: its outline font at five sizes,
regular, bold, slanted or narrow, and its bitmap font. Words, questions and glyphs are those of :mod:`uhd.nano.task`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from uhd.nano.task import Glyph, Scene, TaskSettings, _draw_size

STYLES = ("regular", "bold", "slanted", "narrow", "bitmap")
SIZES = (10, 11, 12, 13, 14)
"""Of the outline font, px; the bitmap font has one."""

TABLES = 0.5
"""Share of the pages that are tables."""

FILLED = 0.75
"""Share of a table's cells, and of a page's lines, with words in them."""

Word = tuple[str, int, float, int]  # text, top (px), left (px), number of its line


@dataclass(frozen=True, kw_only=True)
class PageSettings(TaskSettings):
    """Of pages: areas, aspects, noise and words as of the first task; ``cell_hw`` and ``font_sizes`` do nothing."""

    def draw(self, rng: np.random.Generator) -> Scene:
        height, width = _draw_size(rng, self)
        style = STYLES[int(rng.integers(len(STYLES)))]
        font = Font(style, int(rng.choice([size for size in SIZES if size + 1 <= height])))
        ink = np.zeros((height, width), np.float32)
        table = rng.random() < TABLES
        words = _table(rng, self, font, ink) if table else _lines(rng, self, font, (height, width))
        glyphs, lines = [], {}
        for text, top, left, line in words:
            row = lines.setdefault(line, [])
            for glyph in text:
                mask = font.mask(glyph)
                _put(ink, mask, top, round(left))
                centre = (top + font.pitch / 2, round(left) + font.advance(glyph) / 2)
                glyphs.append(Glyph(glyph, centre, len(lines) - 1, len(row)))
                left += font.advance(glyph)
            row.append(text)
        ground, text_level = rng.uniform(190, 255), rng.uniform(0, 70)
        grey = ground + (text_level - ground) * ink + rng.normal(0, self.noise, ink.shape)
        image = Image.fromarray(np.clip(np.rint(grey), 0, 255).astype(np.uint8))
        return Scene(image, tuple(map(tuple, lines.values())), tuple(glyphs))


@dataclass(frozen=True)
class Font:
    """Glyphs of one style and size."""

    style: str
    size: int

    @property
    def pitch(self) -> int:
        """Height of a line, px."""
        return 11 if self.style == "bitmap" else self.size

    def mask(self, glyph: str) -> np.ndarray:
        """Ink in [0, 1], (pitch, columns): the glyph at the left of its box."""
        return _mask(self, glyph)

    def advance(self, glyph: str) -> float:
        """From this glyph to the next, px."""
        return _advance(self, glyph)

    def width(self, text: str) -> float:
        return sum(map(self.advance, text))


@lru_cache(maxsize=64)
def _face(font: Font) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default_imagefont() if font.style == "bitmap" else ImageFont.load_default(font.size)


@lru_cache(maxsize=4096)
def _advance(font: Font, glyph: str) -> float:
    if font.style == "bitmap":
        return float(_face(font).getbbox(glyph)[2])
    return _face(font).getlength(glyph) * (0.75 if font.style == "narrow" else 1.0) + (font.style == "bold")


@lru_cache(maxsize=4096)
def _mask(font: Font, glyph: str) -> np.ndarray:
    face, box = _face(font), (font.size + 6, font.pitch)
    canvas = Image.new("L", box)
    if font.style == "bitmap":
        ImageDraw.Draw(canvas).text((0, 0), glyph, 255, face)
        return np.asarray(canvas, np.float32) / 255
    draw, middle = ImageDraw.Draw(canvas), font.pitch / 2
    draw.text((0, middle), glyph, 255, face, anchor="lm")
    if font.style == "bold":  # once more, a pixel to the right
        draw.text((1, middle), glyph, 255, face, anchor="lm")
    slope, share = (0.2, 1.0) if font.style == "slanted" else (0.0, 0.75 if font.style == "narrow" else 1.0)
    if slope or share < 1:
        into = (1 / share, slope, -slope * middle, 0, 1, 0)
        canvas = canvas.transform(canvas.size, Image.Transform.AFFINE, into, Image.Resampling.BILINEAR)
    return np.asarray(canvas, np.float32) / 255


def _put(ink: np.ndarray, mask: np.ndarray, top: int, left: int) -> None:
    """The darker of both, where the mask is inside."""
    under = ink[top : top + mask.shape[0], left : left + mask.shape[1]]
    np.maximum(under, mask[: under.shape[0], : under.shape[1]], out=under)


def _word(rng: np.random.Generator, settings: TaskSettings, font: Font, room: float) -> str:
    """1 to ``max_word`` glyphs, as many as there is room for; "" where not one fits."""
    text = ""
    for number in rng.integers(len(settings.glyphs), size=int(rng.integers(1, settings.max_word + 1))):
        if font.width(text + settings.glyphs[number]) > room:
            break
        text += settings.glyphs[number]
    return text


def _lines(rng: np.random.Generator, settings: TaskSettings, font: Font, image_hw: tuple[int, int]) -> list[Word]:
    """Words after each other in lines below each other, some lines empty, each with an indent."""
    (height, width), words = image_hw, []
    pitch = font.pitch + int(rng.integers(1, 4))
    count = max((height - font.pitch - 1) // pitch + 1, 1)
    most = int(rng.integers(1, settings.max_words + 1))
    first = int(rng.integers(count))  # never empty
    rows = [row for row in range(count) if row == first or rng.random() < FILLED]
    for row in rows:
        left = 1 + rng.uniform(0, 0.3) * max(width - 4 * font.size, 0)
        while len(words) < most:
            text = _word(rng, settings, font, width - left - 1)
            if not text:
                break
            words.append((text, row * pitch, left, row))
            left += font.width(text) + font.size * rng.uniform(0.4, 1.2)
    return words or _one(rng, settings, font)


def _table(rng: np.random.Generator, settings: TaskSettings, font: Font, ink: np.ndarray) -> list[Word]:
    """A word in most cells of a ruled table; its rules are drawn."""
    height, width = ink.shape
    cell = font.pitch + 3, font.size * settings.max_word + 4
    rows, columns = max(height // cell[0], 1), max(width // cell[1], 1)
    tall, wide = height / rows, width / columns
    level = rng.uniform(0.3, 0.9)
    for row in range(1, rows):
        ink[round(row * tall) - 1] = level
    for column in range(1, columns):
        ink[:, round(column * wide) - 1] = level
    order = rng.permutation(rows * columns)[: int(rng.integers(1, settings.max_words + 1))]
    words = []
    for place in sorted(order.tolist()):
        row, column = divmod(place, columns)
        if words and rng.random() > FILLED:
            continue
        text = _word(rng, settings, font, wide - 3)
        free = wide - 3 - font.width(text)
        left = column * wide + 1 + free * (0, 0.5, 1)[int(rng.integers(3))]
        top = round(row * tall + max(tall - 1 - font.pitch, 0) / 2)
        words += [(text, top, left, row)] if text else []
    return words or _one(rng, settings, font)


def _one(rng: np.random.Generator, settings: TaskSettings, font: Font) -> list[Word]:
    """A glyph in the corner, where a page has room for nothing else."""
    return [(settings.glyphs[int(rng.integers(len(settings.glyphs)))], 0, 1.0, 0)]
