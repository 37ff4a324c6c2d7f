"""What ``uhd demo`` shows: the nano model reading an image that it has never seen, or a page and untrained eyes."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from torch import nn

    from uhd.encoder import VisualEncoder
    from uhd.hf import UHDForConditionalGeneration
    from uhd.nano.task import Scene
    from uhd.slicing import Slicing

UNTRAINED = "UNTRAINED weights (seeded random numbers): shapes and counts are real, the tokens mean nothing"

_Result = TypeVar("_Result")

_INK, _ACCENT = (34, 36, 42), (38, 110, 104)
_TEXT = (
    "A page is taller than it is wide. A square encoder has",
    "to squeeze it or to pad it, and small print is lost.",
    "Cut at its own aspect ratio, every line stays readable.",
)
_COLUMNS = ("Region", "Q1", "Q2", "Q3")
_SALES = {"North": (412, 436, 471), "South": (298, 305, 331), "East": (187, 192, 204), "West": (256, 243, 270)}


def page_image(width: int = 672, height: int = 1008) -> Image.Image:
    """A page with a headline, text, a table and, where there is room, a chart; ``width`` and ``height`` are px."""
    if min(width, height) < 200:
        raise ValueError(f"a page needs sides of at least 200 px, got width {width}, height {height}")
    page = Image.new("RGB", (width, height), (250, 249, 245))
    pen = ImageDraw.Draw(page)
    unit = min(width, height * 2 // 3)
    margin, step, body = unit // 14, unit // 26, ImageFont.load_default(unit // 38)
    y = margin
    pen.text((margin, y), "Quarterly report", fill=_INK, font=ImageFont.load_default(unit // 15))
    y += unit // 9
    pen.line((margin, y, width - margin, y), fill=_ACCENT, width=max(unit // 168, 1))
    y += unit // 28
    for line in _TEXT:
        pen.text((margin, y), line, fill=_INK, font=body)
        y += step
    y += step
    columns = [margin + i * (width - 2 * margin) // 4 for i in range(4)]
    for number, row in enumerate([_COLUMNS, *((region, *sales) for region, sales in _SALES.items())]):
        if number % 2 == 0:
            pen.rectangle((margin, y - 4, width - margin, y + step - 4), fill=(236, 233, 224))
        for left, cell in zip(columns, row, strict=True):
            pen.text((left + 8, y), str(cell), fill=_INK if number else _ACCENT, font=body)
        y += step + 6
    bottom = height - 2 * margin
    if bottom - y > 4 * step:
        _draw_chart(pen, (margin, y + step, width - margin, bottom), body)
    return page


def _draw_chart(pen: ImageDraw.ImageDraw, box: tuple[int, int, int, int], font: ImageFont.ImageFont) -> None:
    left, top, right, bottom = box
    values = [value for sales in _SALES.values() for value in sales]
    bar = (right - left) // len(values)
    for number, value in enumerate(values):
        start = left + number * bar
        pen.rectangle((start + 4, bottom - value * (bottom - top) // 480, start + bar - 4, bottom), fill=_ACCENT)
    pen.line((left, bottom, right, bottom), fill=_INK, width=3)
    pen.text((left, bottom + 12), "Sales by region and quarter, thousands", fill=_INK, font=font)


def untrained_encoder(
    *, seed: int = 0, out_dim: int = 256, strategy: str | Slicing | None = None, depth: int = 4, width: int = 192
) -> VisualEncoder:
    """A small :class:`uhd.VisualEncoder` (4 ViT layers of width 192) with seeded random weights.

    It shows shapes, counts and speed; its tokens mean nothing. The caller's random state is left as it was.

    Args:
        seed: Of the weights.
        out_dim: Width of the tokens.
        strategy: Any slicing strategy; its view and patch sizes become the ViT's, and the compressor gives as many
            tokens as it counts. ``None`` is ``"llava-uhd-safe"`` with 64 latents.
        depth, width: Of the ViT.
    """
    import torch

    from uhd.encoder import VisualEncoder
    from uhd.pixels import PixelSettings
    from uhd.schema import SpatialSchema
    from uhd.slicing import find
    from uhd.vision import ViT, ViTConfig

    config = find(strategy or "llava-uhd-safe")
    side, patch = config.view_side, config.patch_size
    positions = (side // patch,) * 2 if side else (24, 24)
    vit = {"image_size": side, "patch_size": patch, "position_grid_hw": positions}
    vit |= {"width": width, "depth": depth, "heads": max(width // 64, 1), "mlp_width": 4 * width}
    schema = SpatialSchema.preset(config.name) if config.uses_schema else None
    pixels = PixelSettings(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = ViT(ViTConfig(**vit)), _compressor_for(config, width, out_dim)
        return VisualEncoder(*parts, slicing=config, schema=schema, pixels=pixels, note=UNTRAINED).eval()


def _compressor_for(config: Slicing, in_dim: int, out_dim: int) -> nn.Module:
    """One that gives every view the features that the strategy counts: a projector if that is possible."""
    from uhd.resampler import MLPProjector, PerceiverConfig, PerceiverResampler, PixelShuffleProjector, PoolProjector
    from uhd.resampler.stitch import feature_lengths
    from uhd.slicing import plan

    plans = [plan(image_hw, config) for image_hw in ((1008, 672), (224, 448))]
    grids = [view.patches_hw for found in plans for view in found.views]
    lengths = [count for found in plans for count in feature_lengths(found)]
    fixed = getattr(config, "tokens_per_view", None)
    for factor in range(1, 9) if fixed is None else ():
        if lengths == [math.ceil(rows / factor) * math.ceil(columns / factor) for rows, columns in grids]:
            if factor == 1:
                return MLPProjector(in_dim, out_dim)
            exact = not any(side % factor for grid in grids for side in grid)
            return (PixelShuffleProjector if exact else PoolProjector)(in_dim, out_dim, factor=factor)
    latents = math.ceil(fixed**0.5) ** 2 if config.fits_latents else max(lengths)
    square = math.isqrt(latents) ** 2 == latents
    positions = {} if square else {"query_position": False, "key_position": "direct"}
    sizes = {"num_heads": 2, "num_latents": latents, **positions}
    return PerceiverResampler(PerceiverConfig.for_new(out_dim, in_dim, fits_latents=config.fits_latents, **sizes))


def run(image: Any, *, encoder: VisualEncoder, say: Callable[[str], None]) -> None:
    """Take one image through the four parts and ``say`` what comes out of each, with shapes and times."""
    import torch

    from uhd.pixels import load_image
    from uhd.schema.counted import layout_of

    image = load_image(image, settings=encoder.pixels)
    image_hw = (image.height, image.width)
    plan, seconds = _timed(lambda: encoder.plan(image_hw))
    cut = "not cut" if plan.grid is None else "{} x {} (rows x columns)".format(*plan.grid)
    views = f"{plan.num_views} view{'s' * (plan.num_views > 1)}"
    say(f"1 slice     {seconds}   (height, width) {image_hw} -> {cut}, {views}")
    for candidate in encoder.slicing.candidates(image_hw)[:3]:
        say(f"{'':24}considered {candidate.grid[0]} x {candidate.grid[1]}, score {candidate.score:.3f}")
    batch, seconds = _timed(lambda: encoder.prepare([image]))
    say(f"  cut       {seconds}   {image_hw} -> patches {tuple(batch.patches.shape)} {batch.patches.dtype}")
    with torch.inference_mode():
        patches = batch.ordered("chw").normalized(encoder.pixels).patches
        features, seconds = _timed(lambda: encoder.vision(patches, batch.grids))
        say(f"2 encode    {seconds}   {tuple(patches.shape)} -> features {tuple(features.shape)}")
        latents = encoder.asked([view.latents_hw for view in plan.views])
        tokens, seconds = _timed(lambda: encoder.compressor(features, batch.grids, *filter(None, [latents])))
        meaning = " (views, latents, width)" if tokens.dim() == 3 else ""
        say(f"3 compress  {seconds}   {tuple(features.shape)} -> tokens {tuple(tokens.shape)}{meaning}")
        if plan.packing is not None:
            packed, seconds = _timed(lambda: encoder.pack(tokens.flatten(0, -2), plan))
            say(f"  pack      {seconds}   {tuple(tokens.shape)} -> tokens {tuple(packed.shape)}, newlines included")
    laid, seconds = _timed(lambda: layout_of(plan, encoder.schema))
    say(f"4 lay out   {seconds}   {laid.num_tokens} positions for the language model:")
    say(f"{'':24}{laid.text()!r}")


def _timed(call: Callable[[], _Result]) -> tuple[_Result, str]:
    start = time.perf_counter()
    return call(), f"{(time.perf_counter() - start) * 1e3:8.1f} ms"


class Reader:
    """The nano model with questions: the caller's, or three about an image drawn on the spot, with their answers.

    Args:
        questions: As :func:`uhd.nano.task.questions` words them; none: three about the drawn image, or for all that
            stands on the caller's.
        seed: Of the drawn image; ``None`` takes a new one each time, and says which.
        model: Name of a shipped one.

    Raises:
        ValueError: A negative seed (those are not kept from training), no such model, or what :func:`uhd.nano.ask`
            refuses.
    """

    def __init__(self, questions: Sequence[str] = (), *, seed: int | None = None, model: str = "nano") -> None:
        from uhd.nano.answer import check_questions

        check_questions(tuple(questions))
        if seed is not None and seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        self.questions, self.model_name = tuple(questions), model
        self.seed = secrets.randbelow(10**6) if seed is None else seed

    @property
    def name(self) -> str:
        return f"drawn on the spot, never seen in training (again with --seed {self.seed})"

    @cached_property
    def model(self) -> UHDForConditionalGeneration:
        """:func:`uhd.load_nano`, loaded once."""
        from transformers.utils import logging

        from uhd.nano import load_nano

        logging.disable_progress_bar()
        return load_nano(self.model_name)

    @cached_property
    def scene(self) -> Scene:
        """The first scene of the seed that LLaVA-UHD cuts and that has two lines and a neighbour to ask for."""
        from uhd.nano.build import NanoConfig
        from uhd.nano.evaluate import EVALUATION_SEED
        from uhd.nano.task import questions, scene

        for index in count():
            drawn = scene(EVALUATION_SEED + 1 + self.seed, index)
            if NanoConfig().slicing.plan(drawn.image_hw).grid and len(drawn.lines) > 1 and questions(drawn)["right"]:
                return drawn

    def read(self, image: Image.Image, *, own: bool, say: Callable[[str], None]) -> None:
        """Ask, and ``say`` answers beside the truth where that is known, and doubts where there are any."""
        from uhd.nano import ask
        from uhd.nano.answer import EXAMPLES
        from uhd.nano.images import as_learned
        from uhd.nano.task import questions

        drawn = {} if own else questions(self.scene)
        known = {item.text: item.answer for some in drawn.values() for item in some}
        three = (("all", 0), ("line", 1), ("right", 0))  # everything, the second line, a neighbour
        asked = self.questions or ([EXAMPLES["all"]] if own else [drawn[kind][place].text for kind, place in three])
        answers, elapsed = _timed(lambda: ask(self.model, image, asked))
        say(f"5 read      {elapsed}   {len(asked)} answer{'s' * (len(asked) > 1)}, one character at a time:")
        if as_learned(image) is not image:
            say(f"{'':24}its two colours are repainted as dark text on light ground, which the model learned from")
        shared = [doubt for doubt in answers[0].doubts if all(doubt in answer.doubts for answer in answers)]
        for question, answer in zip(asked, answers, strict=True):
            truth = ""
            if question in known:
                truth = "   right" if answer.text == known[question] else f"   WRONG, it is {known[question]!r}"
            say(f"{'':24}{question:10} {answer.text!r} ({answer.confidence:.0%} sure a character){truth}")
            for doubt in answer.doubts:
                if doubt not in shared:
                    say(f"{'':35}doubtful: {doubt}")
        for doubt in shared:
            say(f"{'':24}far from what it knows: {doubt}")
