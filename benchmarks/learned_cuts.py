"""What does a border through a glyph cost? The same text, moved by a few pixels, with and without a border through it.

A table of cut and uncut glyphs compares different images. Here every image is its own control: the text of a test
scene is moved twice inside its image, so that once a border between slices goes near the middle of one of the two
glyphs that the question "right K?" is about, and once through neither. Size, cut, words and question stay. Arms that
do not cut get the pairs of ``uhd``: what they lose is what the moving alone costs.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from learned_results import CUTS_FILE, read_cuts
from learned_run import INK_HW, TEST_SEED, chosen_factor, cut_by, read_runs, write_json
from PIL import Image

from uhd import UHDForConditionalGeneration, VisualEncoder
from uhd.nano import load_nano
from uhd.nano.answer import answer_many
from uhd.nano.evaluate import choose
from uhd.nano.task import Scene, TaskSettings, questions, scene

SHIPPED, CONTROL = "nano", "uhd"
"""The shipped model's name among the runs; the arm whose pairs judge arms that do not cut."""

FARTHEST = 8
"""Of a move along each axis, px."""

MIDDLE_HW = (3.0, 3.0)
"""Height and width around a glyph's middle, px, through which the border of a cut glyph goes."""

AROUND = 1.0
"""Room around the ink that a move keeps inside the image, px: edges are smoothed."""


@dataclass(frozen=True)
class Pair:
    """A question about one text at two places: no border goes through its two glyphs, or through a middle of them."""

    index: int
    question: str
    truth: str
    whole: Image.Image
    cut: Image.Image


def moved(drawn: Scene, shift_hw: tuple[int, int], rng: np.random.Generator) -> Scene:
    """The scene with its text ``shift_hw`` px further down and right; what comes free is ground with fresh noise."""
    pixels = np.asarray(drawn.image)
    ground = np.median(pixels) + rng.normal(0, TaskSettings().noise, pixels.shape)
    canvas = np.clip(np.rint(ground), 0, 255).astype(np.uint8)
    (down, along), (height, width) = shift_hw, pixels.shape
    source = pixels[max(-down, 0) : height - max(down, 0), max(-along, 0) : width - max(along, 0)]
    top, left = max(down, 0), max(along, 0)
    canvas[top : top + source.shape[0], left : left + source.shape[1]] = source
    return replace(drawn, image=Image.fromarray(canvas), glyphs=_moved_glyphs(drawn, shift_hw))


def moves(drawn: Scene) -> list[tuple[int, int]]:
    """All moves (down, along) in px that keep the ink inside the image, or cut off no more of it than already is."""
    axes = []
    for axis, extent in enumerate(drawn.image_hw):
        middles, half = [glyph.centre_hw[axis] for glyph in drawn.glyphs], INK_HW[axis] / 2 + AROUND
        first, last = max(min(middles) - half, 0.0), min(max(middles) + half, float(extent))
        least, most = max(-FARTHEST, -int(first)), min(FARTHEST, int(extent - last))
        axes.append(range(least, most + 1))
    return list(itertools.product(*axes))


def pair(index: int, encoder: VisualEncoder) -> Pair | None:
    """One random move that cuts and one that does not, of a test scene; ``None`` where one of them does not exist.

    The question is the one that the scene's evaluation asks. Nothing but the scene's number decides the moves.
    """
    drawn = scene(TEST_SEED, index)
    asked = choose(questions(drawn), ("right",), (TEST_SEED, index))
    if not asked:
        return None
    (one,), plan = asked, encoder.plan(drawn.image_hw)
    rng = np.random.default_rng((TEST_SEED, index, 17))
    tried = rng.permutation(moves(drawn)).tolist()
    places = [replace(drawn, glyphs=_moved_glyphs(drawn, shift_hw)) for shift_hw in tried]
    whole = (n for n, place in enumerate(places) if cut_by(place, one.text, plan) == "0")
    cut = (n for n, place in enumerate(places) if cut_by(place, one.text, plan, MIDDLE_HW) == "1")
    found = next(whole, None), next(cut, None)
    if None in found:
        return None
    images = [moved(drawn, tried[n], rng).image for n in found]
    return Pair(index, one.text, one.answer, *images)


def _moved_glyphs(drawn: Scene, shift_hw: Sequence[int]) -> tuple:
    return tuple(
        replace(glyph, centre_hw=tuple(at + by for at, by in zip(glyph.centre_hw, shift_hw, strict=True)))
        for glyph in drawn.glyphs
    )


def judge(model: UHDForConditionalGeneration, some: Sequence[Pair]) -> dict[str, str]:
    """A character a pair, "1" where the answer is exact: texts that are whole, and texts that are cut."""
    told = {}
    for name in ("whole", "cut"):
        answers = answer_many(model, [getattr(one, name) for one in some], [[one.question] for one in some])
        told[name] = "".join(str(int(said[0][0] == one.truth)) for said, one in zip(answers, some, strict=True))
    return told


def fingerprint(*parts: bytes) -> str:
    """Tells other weights, or other pairs, from those that were judged."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def work(out: Path, checkpoints: Path, *, images: int = 1000, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Judge the shipped model, and every finished run of ``out/long`` whose model is in ``checkpoints/long``.

    What the file in ``out`` holds of the same weights is not done again. Runs at a learning rate that was not chosen
    are left out; those without a model are named.

    Raises:
        ValueError: The file was made with another number of images, or with other pairs.
    """
    path = out / CUTS_FILE
    told = read_cuts(path) if path.exists() else {"seed": TEST_SEED, "images": images, "pairs": {}, "runs": {}}
    if told["images"] != images:
        raise ValueError(f"{path} was made with {told['images']} images, not {images}: move it away to begin anew")
    runs, pairs, kept, absent = told["runs"], {}, [], []
    for name, (arm, folder) in {SHIPPED: (CONTROL, None), **_models(out / "long", checkpoints / "long")}.items():
        if folder is not None and not (folder / "config.json").exists():
            absent.append(name)
            continue
        model = (load_nano() if folder is None else UHDForConditionalGeneration.from_pretrained(folder)).eval()
        by = arm if _cuts(model.visual) else CONTROL
        if by not in pairs:
            pairs[by] = _pairs(model.visual if by == arm else load_nano().visual, images)
            found = _told(pairs[by])
            if told["pairs"].setdefault(by, found) != found:
                raise ValueError(
                    f"{path} has other pairs of {by} than this code makes, or is of an earlier version: move it away "
                    "to begin anew"
                )
        weights = fingerprint(*(tensor.numpy().tobytes() for tensor in model.state_dict().values()))
        if runs.get(name, {}).get("weights") == weights:
            kept.append(name)
            continue
        runs[name] = {"by": by, "weights": weights, **judge(model, pairs[by])}
        write_json(path, told)
        whole, cut = (runs[name][key].count("1") / len(pairs[by]) for key in ("whole", "cut"))
        say(f"{name}: {len(pairs[by])} pairs, exact {whole:.3f} whole, {cut:.3f} cut")
    if kept:
        say(f"judged before: {', '.join(kept)}")
    if absent:
        say(f"without a model in {checkpoints / 'long'}: {', '.join(absent)}")
    return told


def _pairs(encoder: VisualEncoder, images: int) -> list[Pair]:
    return [one for index in range(images) if (one := pair(index, encoder))]


def _told(some: Sequence[Pair]) -> dict[str, Any]:
    """Of which scenes pairs are, and what tells others from them."""
    parts = [
        part
        for one in some
        for part in (one.question.encode(), one.truth.encode(), one.whole.tobytes(), one.cut.tobytes())
    ]
    return {"scenes": [one.index for one in some], "fingerprint": fingerprint(*parts)}


def _models(results: Path, checkpoints: Path) -> dict[str, tuple[str, Path]]:
    """By run: its arm and its model's folder; those of a learning rate that was not chosen are left out."""
    found = read_runs(results)
    factors = next(iter(found.values()))["settings"]["factors"] if found else ()
    kept = [task for task in found if chosen_factor(task.arm, found, factors) in (None, task.factor)]
    return {task.name: (task.arm, checkpoints / task.name / "model") for task in kept}


def _cuts(encoder: VisualEncoder) -> bool:
    """Whether the encoder cuts a long image at all."""
    return sum(view.kind == "slice" for view in encoder.plan((26, 157)).views) > 1
