"""Any saved model, any slicing rules, questions about images: accuracy and cost of each rule."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from uhd.encoder import VisualEncoder
from uhd.evaluation.questions import Asked, Refuse, answerable, prompt_of
from uhd.evaluation.scores import anls, characters_wrong, exact, paired
from uhd.flop_counter import count_flops
from uhd.hf import UHDForConditionalGeneration
from uhd.nano.answer import batches
from uhd.nano.evaluate import wilson
from uhd.nano.images import as_learned, image_doubts
from uhd.pixels import load_image
from uhd.planning import plan
from uhd.saving import check_given, fitted_rule
from uhd.slicing import SlicePlan

OWN = "own"
"""Instead of a strategy's name: the one that the model was saved with."""

COSTS = ("visual_tokens", "tokens", "views", "patches")


def encoder_with(model: UHDForConditionalGeneration, strategy: str) -> VisualEncoder:
    """The model's encoder, images cut by another rule: :func:`uhd.saving.fitted_rule`.

    Raises:
        ValueError: No such rule, or the model cannot take it: parts do not fit, or embeddings were never trained.
    """
    own = model.visual
    if strategy == OWN:
        return own
    rule = fitted_rule(own, strategy)
    counted = getattr(own.compressor, "tokens_per_view", None) is not None
    try:
        found = VisualEncoder(
            own.vision,
            own.compressor,
            slicing=rule,
            schema=own.schema if counted else None,
            packer=own.packer,
            pixels=own.pixels,
            check_image_size=own.check_image_size,
        ).eval()
    except ValueError as problem:
        raise ValueError(f"this model cannot take {strategy!r}: {problem}") from None
    check_given(found, strategy)
    if found.packer is not None and found.packer is not own.packer:
        raise ValueError(f"this model cannot take {strategy!r}: it needs newlines that the model never learned")
    return found


@contextmanager
def swapped(model: UHDForConditionalGeneration, encoder: VisualEncoder) -> Iterator[None]:
    """The model with another encoder around the same weights."""
    own, model.visual = model.visual, encoder
    try:
        yield
    finally:
        model.visual = own


@torch.inference_mode()
def answers(
    model: UHDForConditionalGeneration,
    pictures: Sequence[Image.Image],
    asked: Sequence[tuple[int, str]],
    *,
    batch_size: int,
    max_new_tokens: int,
) -> list[tuple[str, bool]]:
    """Greedy answers to (image number, prompt) pairs, and whether each came to its end; images are encoded once."""
    encoded = [item for part in batches(pictures, batch_size) for item in model.visual(list(part))]
    ends = model.generation_config.eos_token_id
    ends = torch.tensor(ends if isinstance(ends, list) else [-1 if ends is None else ends], device=model.device)
    found = []
    for part in batches(asked, batch_size):
        inputs = model.processor(text=[prompt for _, prompt in part], images=[[encoded[number]] for number, _ in part])
        out = model.generate(**inputs.to(model.device), do_sample=False, max_new_tokens=max_new_tokens)
        new = out[:, inputs["input_ids"].shape[1] :]
        texts = model.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        found += zip((text.strip() for text in texts), torch.isin(new, ends).any(1).tolist(), strict=True)
    return found


def cost(encoder: VisualEncoder, images: Sequence[Any], *, batch_size: int = 64) -> dict[str, Any]:
    """Means over images: visual tokens, positions in the language model, views, patches, and FLOPs of the encoder.

    FLOPs are counted while it runs: matrix products of ViT and compressor, two for each multiply-add; ``None`` where a
    part multiplies in ways that the counter does not know.
    """
    plans: list[SlicePlan] = []

    def encode() -> None:
        for part in batches(images, batch_size):
            plans.extend(item.plan for item in encoder(list(part)))

    try:
        flops = count_flops(encode)
    except NotImplementedError:
        flops = None
        plans = [plan(image, encoder.slicing) for image in images]
    told = {name: [getattr(plan, f"num_{name}") for plan in plans] for name in COSTS}
    means = {name: round(float(np.mean(values)), 2) for name, values in told.items()}
    most = {"most_visual_tokens": max(told["visual_tokens"])}
    return {**means, **most, "encoder_flops": None if flops is None else round(flops / len(images))}


def evaluate(
    model: UHDForConditionalGeneration,
    questions: Sequence[Asked],
    strategies: Sequence[str] = (OWN,),
    *,
    prompt: str | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 48,
    repaint: bool = False,
    refuse: Refuse | None = None,
    keep: Callable[[list[dict[str, Any]]], None] | None = None,
) -> list[dict[str, Any]]:
    """Accuracy and cost of every strategy, as plain JSON types, with every answer.

    Every strategy is asked the same questions: what one of them cannot cut, none is asked about. Images are read,
    encoded and asked about in parts, so that a data set may be larger than memory.

    Args:
        model: Whose language model answers.
        questions: From :func:`read_questions`.
        strategies: Names, or ``"own"``. All are compared with the first.
        prompt: As in :func:`uhd.evaluation.questions.prompt_of`.
        batch_size: Questions that are answered together.
        max_new_tokens: Most that an answer may have.
        repaint: Show images as :func:`uhd.nano.images.as_learned` makes them, for a shipped model.
        refuse: Called with a line and what is wrong with it, which is then left out; ``None``: the first raises.
        keep: Called with what there is so far where an interrupt ends the run, which it does afterwards.

    Returns:
        For each strategy ``exact``, ``anls`` and ``characters`` (1 - edit distance / length), each in 0..1, with
        ``interval`` of ``exact`` and differences to the first strategy ``to_first``, ``anls_to_first``; means over
        images of ``tokens``, ``visual_tokens``, ``views``, ``patches``, ``encoder_flops``; ``seconds``; ``answers``.

    Raises:
        ValueError: A strategy does not fit the model; without ``refuse``, a question or an image is wrong; with it, no
            question is left.
    """
    encoders = {strategy: encoder_with(model, strategy) for strategy in dict.fromkeys(strategies)}
    prompt_of(model, "?", prompt)  # raises where the template is wrong
    told = _told if refuse is None else refuse
    by_image: dict[Path, list[Asked]] = {}
    for asked in answerable(model, questions, max_new_tokens, told):
        by_image.setdefault(asked.path, []).append(asked)
    judged = [_Judged(strategy, repaint) for strategy in encoders]
    try:
        for paths in batches(list(by_image), batch_size):
            group = {path: by_image[path] for path in paths}
            texts, pictures = _askable(model, group, encoders, repaint, prompt, max_new_tokens, told)
            how = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
            parts = [_asked(model, encoder, texts, pictures, **how) for encoder in encoders.values() if texts]
            for one, part in zip(judged, parts, strict=False):  # all rules have answered, or none
                one.add(list(texts), list(pictures.values()), *part)
    except KeyboardInterrupt:
        if keep is not None and judged[0].asked:
            keep([one.row(judged[0]) for one in judged])
        raise
    if not judged[0].asked:
        raise ValueError("no question is left that could be asked")
    return [one.row(judged[0]) for one in judged]


def _asked(
    model: UHDForConditionalGeneration,
    encoder: VisualEncoder,
    texts: dict[Asked, str],
    pictures: dict[Path, Image.Image],
    *,
    batch_size: int,
    max_new_tokens: int,
) -> tuple[list[tuple[str, bool]], float, dict[str, Any]]:
    """What one rule makes of some questions: answers, seconds, and the cost of the images."""
    numbers, shown = {path: number for number, path in enumerate(pictures)}, list(pictures.values())
    pairs = [(numbers[asked.path], text) for asked, text in texts.items()]
    with swapped(model, encoder):
        start = time.perf_counter()
        found = answers(model, shown, pairs, batch_size=batch_size, max_new_tokens=max_new_tokens)
        seconds = time.perf_counter() - start
    return found, seconds, cost(encoder, shown, batch_size=batch_size)


def _told(line: int, what: str) -> None:
    raise ValueError(f"line {line}: {what}")


def _pictures(
    model: UHDForConditionalGeneration,
    questions: dict[Path, list[Asked]],
    encoders: dict[str, VisualEncoder],
    repaint: bool,
    refuse: Refuse,
) -> dict[Path, Image.Image]:
    """The images that can be read, and that all rules can cut."""
    found = {}
    for path, some in questions.items():
        try:
            picture = load_image(path, settings=model.visual.pixels)
            picture = as_learned(picture) if repaint else picture
            for strategy, encoder in encoders.items():
                try:
                    encoder.plan((picture.height, picture.width))
                except ValueError as problem:
                    raise ValueError(f"{strategy!r} cannot cut {some[0].image}: {problem}") from None
        except (ValueError, OSError) as problem:
            for asked in some:
                refuse(asked.line, str(problem))
        else:
            found[path] = picture
    return found


def _askable(
    model: UHDForConditionalGeneration,
    questions: dict[Path, list[Asked]],
    encoders: dict[str, VisualEncoder],
    repaint: bool,
    prompt: str | None,
    max_new_tokens: int,
    refuse: Refuse,
) -> tuple[dict[Asked, str], dict[Path, Image.Image]]:
    """The questions that can be asked of all rules, with their prompts, and their images."""
    pictures, texts = _pictures(model, questions, encoders, repaint, refuse), {}
    for path, picture in pictures.items():
        for asked in questions[path]:
            text = prompt_of(model, asked.question, prompt)
            if _has_room(model, asked, text, picture, encoders, max_new_tokens, refuse):
                texts[asked] = text
    return texts, {asked.path: pictures[asked.path] for asked in texts}


def _has_room(
    model: UHDForConditionalGeneration,
    asked: Asked,
    prompt: str,
    picture: Image.Image,
    encoders: dict[str, VisualEncoder],
    max_new_tokens: int,
    refuse: Refuse,
) -> bool:
    """Whether question, image and answer have room in the language model with every rule; else it is refused."""
    limit, text = model.config.max_positions, len(model.processor.tokenizer(prompt)["input_ids"]) - 1
    for strategy, encoder in encoders.items():
        seen = encoder.plan((picture.height, picture.width)).num_tokens
        if limit is not None and text + seen + max_new_tokens > limit:
            refuse(
                asked.line,
                f"{strategy!r} makes {seen} positions of {asked.image}, the text has {text} and the answer up to "
                f"{max_new_tokens}: the language model has {limit} in all",
            )
            return False
    return True


class _Judged:
    """What came of one strategy so far."""

    def __init__(self, strategy: str, repaint: bool) -> None:
        self.strategy, self.repaint = strategy, repaint
        self.asked: list[Asked] = []
        self.said: list[str] = []
        self.costs: list[tuple[int, dict[str, Any]]] = []
        self.unfinished, self.doubted, self.seconds = 0, 0, 0.0

    def add(
        self,
        asked: Sequence[Asked],
        shown: Sequence[Image.Image],
        found: Sequence[tuple[str, bool]],
        seconds: float,
        costs: dict[str, Any],
    ) -> None:
        self.asked += asked
        self.said += [text for text, _ in found]
        self.unfinished += sum(not ended for _, ended in found)
        self.doubted += sum(bool(image_doubts(picture)) for picture in shown) if self.repaint else 0
        self.seconds += seconds
        self.costs.append((len(shown), costs))

    def scores(self, score: Callable[[str, Sequence[str]], Any]) -> list[Any]:
        return [score(text, asked.answers) for text, asked in zip(self.said, self.asked, strict=True)]

    def row(self, first: _Judged) -> dict[str, Any]:
        right, near, wrong = map(self.scores, (exact, anls, characters_wrong))
        images, count = [asked.image for asked in self.asked], sum(shown for shown, _ in self.costs)
        means = {}
        for name in (*COSTS, "encoder_flops"):
            values = [(shown, costs[name]) for shown, costs in self.costs]
            known = all(value is not None for _, value in values)
            means[name] = round(sum(shown * value for shown, value in values) / count, 2) if known else None
        return {
            "strategy": self.strategy,
            "questions": len(self.asked),
            "images": count,
            "exact": sum(right) / len(right),
            "interval": wilson(int(sum(right)), len(right)),
            "to_first": paired(right, first.scores(exact), images),
            "anls": sum(near) / len(near),
            "anls_to_first": paired(near, first.scores(anls), images),
            "characters": max(1 - sum(bad for bad, _ in wrong) / max(sum(size for _, size in wrong), 1), 0.0),
            "seconds": round(self.seconds, 3),
            **means,
            "most_visual_tokens": max(costs["most_visual_tokens"] for _, costs in self.costs),
            "unfinished": self.unfinished,
            "images_in_doubt": self.doubted if self.repaint else None,
            "answers": [
                {
                    "image": asked.image,
                    "question": asked.question,
                    "truth": asked.answers[0] if len(asked.answers) == 1 else list(asked.answers),
                    "answer": text,
                }
                for asked, text in zip(self.asked, self.said, strict=True)
            ],
        }


def table(rows: Sequence[dict[str, Any]], *, model: str = "nano") -> str:
    """The rows as text; costs are means of an image, seconds those of all questions. ``model``: whose they are.

    The interval of ``exact`` takes questions as independent, those of the differences to the first row images.
    """
    wide = max(28, *(len(row["strategy"]) + 1 for row in rows))
    lines = [
        f"{'strategy':{wide}}{'n':>5}{'exact':>8}  {'95 % interval':16}{'ANLS':>7}{'characters':>11}{'tokens':>8}"
        f"{'visual':>8}{'patches':>9}{'TFLOPs':>10}{'seconds':>9}  exact and ANLS minus {rows[0]['strategy']}'s"
    ]
    for row in rows:
        low, high = row["interval"]
        apart = "".join(_difference(row[key]) for key in ("to_first", "anls_to_first") if row is not rows[0])
        flops = "-" if row["encoder_flops"] is None else f"{row['encoder_flops'] / 1e12:.3g}"
        lines.append(
            f"{row['strategy']:{wide}}{row['questions']:5}{row['exact']:8.3f}  {low:.3f} to {high:.3f}  "
            f"{row['anls']:7.3f}{row['characters']:11.3f}{row['tokens']:8.1f}{row['visual_tokens']:8.1f}"
            f"{row['patches']:9.1f}{flops:>10}{row['seconds']:9.2f}{apart}"
        )
    for row in rows:
        if row["unfinished"]:
            lines.append(f"{row['strategy']}: answers that had not ended: {row['unfinished']} (give --max-new-tokens)")
    if rows[0]["images_in_doubt"]:
        how = 'uhd demo IMAGE --ask "all?"' + (f" --model {model}" if model != "nano" else "")
        lines.append(f"images unlike what {model} learned from: {rows[0]['images_in_doubt']} (`{how}` says how)")
    return "\n".join(lines)


def _difference(values: Sequence[float | None]) -> str:
    apart, least, most = values
    return f"  {apart:+.3f}" + ("" if least is None else f" [{least:+.3f}, {most:+.3f}]")
