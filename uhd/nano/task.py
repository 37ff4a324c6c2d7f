"""The reading task of the nano model: glyphs drawn on small grey images of any aspect ratio, and questions about them.

A scene is drawn from (seed, index) alone, so that any process can make any part of the data and get the same pixels.
Glyphs come from Pillow's own font; the pixels a person would see are the pixels the model gets.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GLYPHS = "0123456789ACEFHKLPTX"
QUESTIONS = ("all", "line", "right", "where", "count")  # kinds of questions, see `questions`
LEARNED = ("all", "line", "right", "count")  # of shipped models; "where" stayed near chance in nano: unknown
BUCKETS = (1.5, 2.5, 4.0)  # borders of the aspect buckets, longer side / shorter side
PLACING_TRIES = 16  # random places that are tried for a word before it is left out
_ROOM, _RIM = 2, 3  # px around a glyph's cell that its ink may cover; and around the image, with a jitter of 1 px


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """From what scenes are drawn. Sizes in px."""

    area: tuple[int, int] = (614, 4096)  # range of the number of pixels, uniform
    max_aspect: float = 6.0  # aspect ratios are log-uniform in [1 / max_aspect, max_aspect]
    min_hw: tuple[int, int] = (14, 12)  # a side below is raised to it
    cell_hw: tuple[int, int] = (12, 8)  # pitch of text lines and of glyphs
    font_sizes: tuple[int, ...] = (11, 12)  # one is chosen for a scene
    max_words: int = 8  # in an image
    max_word: int = 3  # glyphs
    noise: float = 3.0  # standard deviation, grey levels of 255
    inverted: float = 0.0  # share of scenes with light text on a dark ground
    glyphs: str = GLYPHS  # what words are made of; the model and its training know GLYPHS alone

    def draw(self, rng: np.random.Generator) -> Scene:
        """A scene of these settings; one that draws otherwise is a subclass."""
        return _drawn(rng, self)


@dataclass(frozen=True)
class Glyph:
    """One drawn character: where its middle is (row, column; px, fractional), its line, and its word in that line."""

    text: str
    centre_hw: tuple[float, float]
    line: int
    word: int


@dataclass(frozen=True, eq=False)
class Scene:
    """A drawn image and what stands in it."""

    image: Image.Image  # mode "L"
    lines: tuple[tuple[str, ...], ...]  # the words of each
    glyphs: tuple[Glyph, ...]  # in reading order

    @property
    def image_hw(self) -> tuple[int, int]:
        return self.image.height, self.image.width

    @property
    def aspect(self) -> float:
        """Longer side / shorter side."""
        return max(self.image_hw) / min(self.image_hw)

    @property
    def text(self) -> str:
        """All words, lines separated by line breaks."""
        return "\n".join(" ".join(words) for words in self.lines)


@dataclass(frozen=True)
class Question:
    """What is asked, the true answer, and of what kind it is."""

    kind: str
    text: str
    answer: str


def scene(seed: int, index: int, settings: TaskSettings | None = None) -> Scene:
    """The scene number ``index`` of a seed: the same pixels and words in every process.

    A ``ValueError`` tells of settings under which not one glyph fits, and of a negative seed or index.
    """
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must be at least 0, got seed {seed} and index {index}")
    return (settings or TaskSettings()).draw(np.random.default_rng((seed, index)))


def _drawn(rng: np.random.Generator, settings: TaskSettings) -> Scene:
    """Words on a lattice of glyphs."""
    image_hw, cell_hw = _draw_size(rng, settings), settings.cell_hw
    lattice = image_hw[0] // cell_hw[0], image_hw[1] // cell_hw[1]
    if min(lattice) < 1:
        raise ValueError(f"no glyph of {cell_hw} fits an image of {image_hw} (height, width)")
    words = _place_words(rng, settings, *lattice)
    font_size = int(rng.choice(settings.font_sizes))
    ink = np.zeros([side + 2 * _RIM for side in image_hw], np.float32)
    origin = rng.integers(0, np.asarray(image_hw) % cell_hw + 1)
    lines: dict[int, list[str]] = {}  # the words of each row that has any, from top to bottom
    glyphs = []
    for row, start, text in words:
        line = lines.setdefault(row, [])
        for step, glyph in enumerate(text):
            corner = origin + np.multiply((row, start + step), cell_hw) + rng.integers(-1, 2, 2)
            top, left = corner + (_RIM - _ROOM)
            mask = _mask(glyph, font_size, cell_hw)
            under = ink[top : top + mask.shape[0], left : left + mask.shape[1]]
            np.maximum(under, mask, out=under)
            centre = corner + np.divide(cell_hw, 2)
            glyphs.append(Glyph(glyph, (float(centre[0]), float(centre[1])), len(lines) - 1, len(line)))
        line.append(text)
    ground, text_level = rng.uniform(190, 255), rng.uniform(0, 70)
    if rng.random() < settings.inverted:
        ground, text_level = 255 - ground, 255 - text_level
    grey = ground + (text_level - ground) * ink[_RIM:-_RIM, _RIM:-_RIM] + rng.normal(0, settings.noise, image_hw)
    image = Image.fromarray(np.clip(np.rint(grey), 0, 255).astype(np.uint8))
    return Scene(image, tuple(map(tuple, lines.values())), tuple(glyphs))


def questions(scene: Scene) -> dict[str, tuple[Question, ...]]:
    """Every question that can be asked about a scene, by kind; a kind may have none.

    * ``all?``: every word, in reading order;
    * ``line 2?``: the words of that text line, counted from 1 and without empty lines;
    * ``right K?``: the glyph after K on its line, over a gap between words too; K stands in the image once;
    * ``where K?``: line and word in the line, both from 1, as in ``2 1``; K stands in the image once;
    * ``count?``: the number of words.
    """
    found: dict[str, list[Question]] = {kind: [] for kind in QUESTIONS}

    def add(kind: str, what: object, answer: str) -> None:
        found[kind].append(Question(kind, f"{kind} {what}?" if what else f"{kind}?", answer))

    add("all", None, scene.text)
    for number, words in enumerate(scene.lines, 1):
        add("line", number, " ".join(words))
    text = "".join(glyph.text for glyph in scene.glyphs)
    for glyph, after in itertools.zip_longest(scene.glyphs, scene.glyphs[1:]):
        if text.count(glyph.text) > 1:
            continue
        add("where", glyph.text, f"{glyph.line + 1} {glyph.word + 1}")
        if after is not None and after.line == glyph.line:
            add("right", glyph.text, after.text)
    add("count", None, str(sum(map(len, scene.lines))))
    return {kind: tuple(some) for kind, some in found.items()}


def bucket(aspect: float) -> int:
    """0 to 3: which aspect bucket an image belongs to."""
    return sum(aspect >= border for border in BUCKETS)


def _draw_size(rng: np.random.Generator, settings: TaskSettings) -> tuple[int, int]:
    area = rng.uniform(*settings.area)
    aspect = math.exp(rng.uniform(-1, 1) * math.log(settings.max_aspect))  # height / width
    height, width = math.sqrt(area * aspect), math.sqrt(area / aspect)
    return max(round(height), settings.min_hw[0]), max(round(width), settings.min_hw[1])


def _place_words(
    rng: np.random.Generator, settings: TaskSettings, num_rows: int, num_cells: int
) -> list[tuple[int, int, str]]:
    """Put words on the lattice of glyphs: (row, cell, word) in reading order."""
    free = [[True] * (num_cells + 1) for _ in range(num_rows)]  # a column more: a word may end at the border
    words = []
    for _ in range(int(rng.integers(1, settings.max_words + 1))):
        length = int(rng.integers(1, min(settings.max_word, num_cells) + 1))
        text = "".join(settings.glyphs[number] for number in rng.integers(len(settings.glyphs), size=length))
        for down, along in rng.random((PLACING_TRIES, 2)).tolist():
            row, start = int(down * num_rows), int(along * (num_cells - length + 1))
            if all(free[row][start : start + length + 1]):
                free[row][max(start - 1, 0) : start + length + 1] = [False] * (length + 1 + (start > 0))
                words.append((row, start, text))
                break
    return sorted(words)


@lru_cache(maxsize=512)
def _mask(glyph: str, font_size: int, cell_hw: tuple[int, int]) -> np.ndarray:
    """Ink in [0, 1]: the glyph in the middle of its cell, with room on every side."""
    height, width = (side + 2 * _ROOM for side in cell_hw)
    canvas = Image.new("L", (width, height))
    ImageDraw.Draw(canvas).text((width / 2, height / 2), glyph, 255, ImageFont.load_default(font_size), anchor="mm")
    return np.asarray(canvas, np.float32) / 255
