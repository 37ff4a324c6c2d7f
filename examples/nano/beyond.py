"""What the shipped model makes of images that it did not learn from, and how often it says that it should be doubted.

python examples/nano/beyond.py --images 200    # about four minutes on one core
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from PIL import Image
from transformers.utils import logging

from uhd import UHDForConditionalGeneration
from uhd.nano import ask
from uhd.nano.answer import load_model
from uhd.nano.evaluate import choose
from uhd.nano.task import LEARNED, TaskSettings, questions, scene

SEED = 4_300_000
TASK = TaskSettings()
SCENES = {
    "the task itself": TASK,
    "font of 10 px": replace(TASK, font_sizes=(10,)),
    "font of 13 px": replace(TASK, font_sizes=(13,)),
    "font of 9 px": replace(TASK, font_sizes=(9,)),
    "font of 14 px": replace(TASK, font_sizes=(14,)),
    "noise of 10": replace(TASK, noise=10.0),
    "noise of 20": replace(TASK, noise=20.0),
    "up to 14 words": replace(TASK, max_words=14),
    "up to 5 glyphs a word": replace(TASK, max_word=5),
    "4096 to 8000 px, 12 words": replace(TASK, area=(4096, 8000), max_words=12),
    "aspect up to 12": replace(TASK, max_aspect=12.0),
    "light on dark": replace(TASK, inverted=1.0),
    "other capitals": replace(TASK, glyphs="BDGIJMNOQRSUVWYZ"),
    "small letters": replace(TASK, glyphs="abdefghijmnqrty"),
}
LEAST_CONTRAST = 60.0  # of two colours, levels of 255, root mean square over the channels


def pale(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A third of the contrast."""
    pixels = np.asarray(image, np.float32)
    return _image(np.median(pixels) + (pixels - np.median(pixels)) / 3)


def two_colours(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Ground and text of random colours."""
    ground, text = rng.uniform(0, 255, (2, 3))
    while np.linalg.norm(ground - text) < LEAST_CONTRAST * 3**0.5:
        ground, text = rng.uniform(0, 255, (2, 3))
    pixels = np.asarray(image, np.float32)
    ink = (np.median(pixels) - pixels) / max(np.median(pixels) - pixels.min(), 1)
    return _image(ground + (text - ground) * ink[..., None])


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(pixels.clip(0, 255)).astype(np.uint8))


CHANGED = {
    "a third of the contrast": pale,
    "two random colours": two_colours,
    "turned by 90 degrees": lambda image, rng: image.transpose(Image.Transpose.ROTATE_90),
    "turned by 180 degrees": lambda image, rng: image.transpose(Image.Transpose.ROTATE_180),
}


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200, help="of each row")
    parser.add_argument("--model", default="nano", help="a folder, or the name of a shipped one (default nano)")
    args = parser.parse_args(argv)
    if args.images < 1:
        parser.error(f"--images must be at least 1, got {args.images}")
    logging.disable_progress_bar()
    model = load_model(args.model)
    print(f"{'':28}{'all? right':>12}{'all? marked':>13}{'wrong, unmarked':>17}{'marked, any':>13}")
    for name, settings in SCENES.items():
        print(row(name, model, settings, lambda image, rng: image, images=args.images), flush=True)
    for name, change in CHANGED.items():
        print(row(name, model, TASK, change, images=args.images), flush=True)


def row(
    name: str,
    model: UHDForConditionalGeneration,
    settings: TaskSettings,
    change: Callable[[Image.Image, np.random.Generator], Image.Image],
    *,
    images: int,
) -> str:
    """Of "all?": shares right, marked, and wrong without a mark; of one question of every kind: share marked."""
    right = marked = missed = answers = any_marked = 0
    for index in range(images):
        drawn = scene(SEED, index, settings)
        asked = choose(questions(drawn), LEARNED, (SEED, index))
        shown = change(drawn.image, np.random.default_rng((SEED, index)))
        found = ask(model, shown, [question.text for question in asked])
        good, doubted = found[0].text == drawn.text, bool(found[0].doubts)
        right, marked, missed = right + good, marked + doubted, missed + (not good and not doubted)
        answers, any_marked = answers + len(found), any_marked + sum(bool(answer.doubts) for answer in found)
    shares = (right / images, marked / images, missed / images, any_marked / answers)
    return f"{name:28}" + "".join(f"{share:{size}.2f}" for share, size in zip(shares, (12, 13, 17, 13), strict=True))


if __name__ == "__main__":
    main()
