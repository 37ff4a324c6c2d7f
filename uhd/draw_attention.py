"""Where an encoder's tokens looked, and where a model looked while it answered, drawn over the image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from uhd.draw import FAINT, INK, PAPER, SLICE, letters, paragraphs, view_names
from uhd.slicing import SlicePlan, view_box

Color = tuple[int, int, int]
_COLD, _HOT = np.array((255.0, 190.0, 40.0)), np.array((205.0, 20.0, 60.0))
_SHOWN = 12
"""Tokens of a view, or of all, that are drawn; a caption says of how many."""

_VIEWS = 8
_LEGEND = "All tokens: the mean of their maps. Pale is the least of a picture, red its most."
_SIDE, _GAP, _MARGIN, _LABEL = 112, 8, 24, 20  # px
_WIDTH = 1480


def heated(image: Image.Image, heat: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """An image (width, height) in grey, and over it a map (h, w) in colour: none where it is least, red where most."""
    resample = Image.Resampling.NEAREST if max(size) > 4 * max(image.size) else Image.Resampling.BICUBIC
    grey = np.asarray(image.convert("L").resize(size, resample), np.float32)[..., None]
    spread = Image.fromarray(np.asarray(heat, np.float32)).resize(size, Image.Resampling.BILINEAR)
    least, most = float(np.min(heat)), float(np.max(heat))
    share = ((np.asarray(spread) - least) / max(most - least, 1e-12)).clip(0, 1)[..., None]
    ground = 255 - (255 - grey) * 0.55
    color = _COLD + (_HOT - _COLD) * share
    # as ink on the picture: what is dark in it stays so
    inked = ground * (1 - share**0.7 * (1 - color / 255))
    return Image.fromarray(inked.clip(0, 255).astype(np.uint8))


def draw_attention(
    image: Image.Image,
    plan: SlicePlan,
    maps: Tensor | np.ndarray,
    *,
    answer: Sequence[tuple[str, np.ndarray]] = (),
    facts: Sequence[str] = (),
) -> Image.Image:
    """Draw where tokens looked, in one picture.

    Above: the image with the mean of all maps, cut lines over it. Then the maps of an answer's tokens, if any; then
    some tokens' own maps, view by view, each on the part of the image that its view shows.

    Args:
        image: The planned image.
        plan: Its plan.
        maps: (plan.num_visual_tokens, h, w), from :meth:`uhd.VisualEncoder.attention`.
        answer: Each generated token as text, and its map (h, w).
        facts: Lines at the top.

    Raises:
        ValueError: There is not one map a visual token.
    """
    maps = np.asarray(maps.detach().cpu() if isinstance(maps, Tensor) else maps, np.float32)
    if len(maps) != plan.num_visual_tokens:
        raise ValueError(f"the plan has {plan.num_visual_tokens} visual tokens, got {len(maps)} maps")
    width = _WIDTH - 2 * _MARGIN
    parts: list[Image.Image] = [paragraphs(list(facts), width, size=20, color=INK)] if facts else []
    names = view_names(plan)
    drawn = _with_cuts(heated(image, maps.mean(0), _fitted(image.size, 720, 560)), plan)
    if answer:  # beside the image
        shown = [(text, image, heat) for text, heat in answer]
        drawn = _beside(
            drawn, _row("the answer, token by token", shown, width - drawn.width - _MARGIN, _SIDE * 3 // 2)
        )
    parts.append(drawn)
    parts.append(paragraphs([_LEGEND], width, size=15, color=FAINT))
    for title, tokens in _tokens(plan, names):
        parts += _row(
            title, [(str(number), *_part(image, plan, maps[number], view)) for number, view in tokens], width
        )
    height = sum(part.height + _GAP for part in parts) + 2 * _MARGIN
    page = Image.new("RGB", (_WIDTH, height), PAPER)
    top = _MARGIN
    for part in parts:
        page.paste(part, (_MARGIN, top))
        top += part.height + _GAP
    return page


def _with_cuts(picture: Image.Image, plan: SlicePlan) -> Image.Image:
    """The picture of the whole image with its slices outlined."""
    pen, scale = ImageDraw.Draw(picture), picture.width / plan.image_hw[1]
    for view in plan.views:
        if view.kind == "slice":
            top, left, bottom, right = (float(edge) * scale for edge in view_box(plan, view.index))
            corner, end = (max(left, 0), max(top, 0)), (min(right, picture.width) - 1, min(bottom, picture.height) - 1)
            if end[0] > corner[0] and end[1] > corner[1]:
                pen.rectangle((*corner, *end), None, SLICE, 1)
    return picture


def _tokens(plan: SlicePlan, names: Sequence[str]) -> list[tuple[str, list[tuple[int, int | None]]]]:
    """Rows of tokens that are drawn: a title, and each token's number and view, ``None`` where it is of several."""
    if not plan.tokens_by_view:
        count = plan.num_visual_tokens
        return [(f"tokens, {_of(count)}", [(number, None) for number in _some(range(count))])]
    found, first = [], 0
    for view, name in zip(plan.views, names, strict=True):
        tokens = range(first, first + view.num_tokens)
        found.append((f"{name}: tokens, {_of(len(tokens))}", [(number, view.index) for number in _some(tokens)]))
        first = tokens.stop
    some = _some(found, _VIEWS)
    if len(some) < len(found):
        some[0] = (f"{len(some)} of {len(found)} views. {some[0][0]}", some[0][1])
    return some


def _of(count: int) -> str:
    return f"{min(count, _SHOWN)} of {count}" if count > _SHOWN else "all"


def _some(items: Sequence[Any], most: int = _SHOWN) -> list[Any]:
    return [items[number] for number in np.linspace(0, len(items) - 1, min(len(items), most)).round().astype(int)]


def _part(image: Image.Image, plan: SlicePlan, heat: np.ndarray, view: int | None) -> tuple[Image.Image, np.ndarray]:
    """What a view shows of the image, and of a map; all of it where tokens are of several views."""
    if view is None:
        return image, heat
    height, width = plan.image_hw
    top, left, bottom, right = (float(edge) for edge in view_box(plan, view))
    top, left, bottom, right = max(top, 0), max(left, 0), min(bottom, height), min(right, width)
    box = [int(left), int(top), max(math.ceil(right), int(left) + 1), max(math.ceil(bottom), int(top) + 1)]
    down, along = heat.shape[0] / height, heat.shape[1] / width
    rows = slice(int(box[1] * down), max(math.ceil(box[3] * down), int(box[1] * down) + 1))
    columns = slice(int(box[0] * along), max(math.ceil(box[2] * along), int(box[0] * along) + 1))
    return image.crop(tuple(box)), heat[rows, columns]


def _beside(left: Image.Image, right: Sequence[Image.Image]) -> Image.Image:
    """Pictures below each other, to the right of one."""
    tall = sum(part.height + _GAP for part in right)
    both = Image.new("RGB", (left.width + _MARGIN + right[0].width, max(left.height, tall)), PAPER)
    both.paste(left)
    top = 0
    for part in right:
        both.paste(part, (left.width + _MARGIN, top))
        top += part.height + _GAP
    return both


def _row(
    title: str, items: Sequence[tuple[str, Image.Image, np.ndarray]], width: int, side: int = _SIDE
) -> list[Image.Image]:
    """A title, and pictures with their captions in as many lines as they need."""
    sizes = [_fitted(image.size, side, side) for _, image, _ in items]
    step = max([size[0] for size in sizes] + [36]) + _GAP
    per_line = max(width // step, 1)
    tall = max([size[1] for size in sizes], default=1) + _LABEL + _GAP
    panel = Image.new("RGB", (width, tall * math.ceil(len(items) / per_line)), PAPER)
    pen = ImageDraw.Draw(panel)
    for place, ((text, image, heat), size) in enumerate(zip(items, sizes, strict=True)):
        x, y = place % per_line * step, place // per_line * tall
        pen.text((x, y), text, fill=INK, font=letters(14))
        panel.paste(heated(image, heat, size), (x, y + _LABEL))
    return [paragraphs([title], width, size=15, color=FAINT), panel]


def _fitted(size: tuple[int, int], width: int, height: int) -> tuple[int, int]:
    scale = min(width / size[0], height / size[1])
    return max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)


def show(
    source: Any, *, model: str | None, encoder: Path | None, strategy: str | None, ask: str | None, pixels: Any
) -> tuple[Image.Image, SlicePlan, list[str]]:
    """What ``uhd show --attention`` draws: the picture, the plan, and what to say beside it.

    Args:
        source: The image, as :func:`uhd.pixels.load_image` takes it.
        model: A saved model's folder, or the name of a shipped one; ``None`` is ``nano``. Its encoder looks, unless
            ``encoder`` is the folder of one.
        strategy: Another rule than the encoder's own.
        ask: A question for the model, whose answer is drawn too.
        pixels: A function from the encoder's pixel settings to those that were asked for.

    Raises:
        ValueError: Both an encoder and a question; as where these are loaded and run.
    """
    from uhd.encoder import saved_encoder
    from uhd.evaluation.judging import OWN, encoder_with
    from uhd.nano.answer import SHIPPED, load_model
    from uhd.nano.images import as_learned
    from uhd.pixels import load_image

    if encoder is not None and (ask is not None or model is not None):
        raise ValueError("an encoder alone answers no question, and is no model: give --model or --encoder")
    model = model or "nano"
    asked = None if encoder is not None else load_model(model)
    if asked is None:
        eyes = saved_encoder(encoder, strategy)
    else:
        eyes = asked.visual = encoder_with(asked, strategy or OWN)
    eyes.pixels = pixels(eyes.pixels)
    image = load_image(source, settings=eyes.pixels)
    seen = as_learned(image) if asked is not None and model in SHIPPED else image
    batch = eyes.prepare([seen])
    (plan,), (maps,) = batch.plans, eyes.attention(batch)
    who = f"the shipped {model} model" if encoder is None and model in SHIPPED else str(encoder or model)
    facts, answer = [f"{plan}", f"eyes: {who}" + (f"; {eyes.note}" if eyes.note else "")], []
    if ask is not None:
        said, answer, share = _answered(asked, seen, ask)
        facts.append(f"asked {ask!r}, it says {said!r}; of its attention {share:.0%} went to the image")
    return draw_attention(image, plan, maps, answer=answer, facts=facts), plan, facts[1:]


def _answered(model: Any, image: Image.Image, question: str) -> tuple[str, list[tuple[str, np.ndarray]], float]:
    """The answer, each token of it with its map, and the mean share of attention that the image has."""
    from uhd.evaluation.questions import prompt_of

    model.language_model.set_attn_implementation("eager")
    inputs = model.processor(text=[prompt_of(model, question)], images=[[image]]).to(model.device)
    told = {"do_sample": False, "max_new_tokens": 48, "return_visual_attention": True}
    out = model.generate(**inputs, **told)
    tokenizer = model.processor.tokenizer
    new = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    (maps,) = out.visual_attention[0]
    pairs = [
        (tokenizer.decode([token]).replace("\n", "\\n").replace(" ", "(space)"), np.asarray(heat.cpu()))
        for token, heat in zip(new, maps, strict=True)
        if token not in tokenizer.all_special_ids
    ]
    share = float(out.visual_attention_share[0].mean())
    return tokenizer.decode(new, skip_special_tokens=True), pairs, share
