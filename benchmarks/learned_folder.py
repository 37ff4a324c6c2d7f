"""A user's own images and questions, any saved model, any slicing strategies: accuracy and cost of each."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from learned_report import quantile
from learned_run import cost
from PIL import Image

from uhd import UHDForConditionalGeneration, VisualEncoder
from uhd.nano import load_nano
from uhd.nano.answer import batches
from uhd.nano.evaluate import edit_distance, wilson
from uhd.nano.images import as_learned, image_doubts
from uhd.pixels import load_image
from uhd.slicing import find

QUESTIONS_FILE = "questions.jsonl"
OWN = "own"
"""Instead of a strategy's name: the one that the model was saved with."""

NANO = "nano"
"""Instead of a model's folder: the shipped model, whose images are repainted as :func:`uhd.nano.ask` does."""

PROMPT = "{bos}{image}{question}"


@dataclass(frozen=True)
class Asked:
    """A line of the questions' file."""

    image: str
    question: str
    answer: str
    line: int


def read_questions(folder: Path) -> list[Asked]:
    """The lines of ``questions.jsonl``, their images beside it.

    Raises:
        ValueError: No folder or file, it is not UTF-8, a line that is not three strings, an image that is not there;
            with the line.
    """
    path = folder / QUESTIONS_FILE
    if not path.is_file():
        raise ValueError(
            f'there is no {path}: write a line {{"image": "a.png", "question": "...", "answer": "..."}} for each '
            "question"
        )
    found = []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as problem:
        raise ValueError(f"{path} is not UTF-8: {problem.reason} at byte {problem.start}") from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            values = [row[key] for key in ("image", "question", "answer")]
        except (ValueError, KeyError, TypeError) as problem:
            raise ValueError(f"{path}, line {number}: {problem!r}; needs image, question and answer") from None
        if not all(isinstance(value, str) and value.strip() for value in values):
            raise ValueError(f"{path}, line {number}: image, question and answer are strings, not empty, got {row}")
        if not (folder / values[0]).is_file():
            raise ValueError(f"{path}, line {number}: there is no image {folder / values[0]}")
        found.append(Asked(*values, line=number))
    if not found:
        raise ValueError(f"{path} has no questions")
    return found


def load_model(source: str) -> UHDForConditionalGeneration:
    """:data:`NANO` is the shipped one, anything else a folder.

    Raises:
        ValueError: Not a folder with a saved model.
    """
    if source == NANO:
        return load_nano()
    if not (Path(source) / "config.json").is_file():
        raise ValueError(f"{source} is no folder with a saved model (config.json); or give nano")
    return UHDForConditionalGeneration.from_pretrained(source).eval()


def encoder_with(model: UHDForConditionalGeneration, strategy: str) -> VisualEncoder:
    """The model's encoder, images cut by another rule that is fitted to its views and patches.

    Raises:
        ValueError: No such rule, or the model cannot take it: parts do not fit, or embeddings were never trained.
    """
    own = model.visual
    if strategy == OWN:
        return own
    rule, vision = find(strategy), own.vision
    side = getattr(own.slicing, "image_size", None) or getattr(vision, "image_size", None)
    if side is None:
        raise ValueError(f"{strategy!r} cannot be fitted: this model's vision encoder states no image_size")
    counted = getattr(own.compressor, "tokens_per_view", None) is not None
    try:
        found = VisualEncoder(
            vision,
            own.compressor,
            slicing=rule.for_vision(image_size=side, patch_size=vision.patch_size),
            schema=own.schema if counted else None,
            packer=own.packer,
            pixels=own.pixels,
            check_image_size=own.check_image_size,
        ).eval()
    except ValueError as problem:
        raise ValueError(f"this model cannot take {strategy!r}: {problem}") from None
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


def prompt_of(model: UHDForConditionalGeneration, question: str, template: str = PROMPT) -> str:
    """A question as text; ``{bos}`` is empty where the tokenizer writes that token by itself.

    Raises:
        ValueError: The template does not hold ``{image}`` and ``{question}``, once each, or holds other fields.
    """
    fields = sorted(set(re.findall(r"\{\w*\}", template)) - {"{bos}"})
    if fields != ["{image}", "{question}"] or template.count("{image}") != 1 or template.count("{question}") != 1:
        raise ValueError(
            "a prompt holds {image} and {question}, once each, maybe {bos}, and no other field, got "
            f"{template!r}"
        )
    processor = model.processor
    tokenizer = processor.tokenizer
    bos = tokenizer.bos_token or ""
    if bos and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        bos = ""
    return template.replace("{bos}", bos).replace("{image}", processor.image_token).replace("{question}", question)


def check_questions(model: UHDForConditionalGeneration, questions: Sequence[Asked], max_new_tokens: int) -> None:
    """That the model can be asked, and could answer.

    Raises:
        ValueError: A question holds a special token of the model; an answer has more tokens than it may write,
            or characters that its tokenizer does not have; with the line.
    """
    tokenizer = model.processor.tokenizer
    special = [*tokenizer.all_special_tokens, model.processor.image_token]
    for asked in questions:
        where, truth = f"{QUESTIONS_FILE}, line {asked.line}", asked.answer.strip()
        if held := [token for token in special if token in asked.question]:
            raise ValueError(f"{where}: the question holds {held[0]}, a token of the model's own: leave it out")
        ids = tokenizer(truth, add_special_tokens=False)["input_ids"]
        if len(ids) > max_new_tokens:
            raise ValueError(
                f"{where}: the answer has {len(ids)} tokens, the model may write {max_new_tokens}: give "
                "--max-new-tokens"
            )
        if (written := _written(tokenizer, truth)) != truth:
            raise ValueError(
                f"{where}: the model's tokenizer writes the answer {truth!r} as {written!r}: it could never be right"
            )
        if _letters(written := _written(tokenizer, asked.question)) != _letters(asked.question):
            raise ValueError(f"{where}: the model's tokenizer reads the question {asked.question!r} as {written!r}")


def _written(tokenizer: Any, text: str) -> str:
    return tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"], skip_special_tokens=True).strip()


def _letters(text: str) -> str:
    """What a tokenizer that changes case or spaces leaves."""
    return "".join(text.split()).casefold()


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


def judge(
    folder: Path,
    model: UHDForConditionalGeneration,
    strategies: Sequence[str],
    *,
    prompt: str = PROMPT,
    batch_size: int = 16,
    max_new_tokens: int = 48,
    repaint: bool = False,
) -> list[dict[str, Any]]:
    """Accuracy and cost of every strategy, as plain JSON types, with every answer.

    Args:
        repaint: Show images as :func:`uhd.nano.images.as_learned` makes them, for the shipped model.

    Raises:
        ValueError: The folder, a strategy, a question or an image is wrong; all are looked at before anything is run.
    """
    questions = read_questions(folder)
    check_questions(model, questions, max_new_tokens)
    encoders = {strategy: encoder_with(model, strategy) for strategy in strategies}
    names = list(dict.fromkeys(line.image for line in questions))
    pictures = [load_image(folder / name, settings=model.visual.pixels) for name in names]
    if repaint:
        pictures = [as_learned(picture) for picture in pictures]
    for strategy, encoder in encoders.items():
        for name, picture in zip(names, pictures, strict=True):
            try:
                encoder.plan((picture.height, picture.width))
            except ValueError as problem:
                raise ValueError(f"{strategy!r} cannot cut {name}: {problem}") from None
    asked = [(names.index(line.image), prompt_of(model, line.question, prompt)) for line in questions]
    rows, first = [], None
    for strategy, encoder in encoders.items():
        with swapped(model, encoder):
            start = time.perf_counter()
            found = answers(model, pictures, asked, batch_size=batch_size, max_new_tokens=max_new_tokens)
            seconds = time.perf_counter() - start
        said = [text for text, _ in found]
        exact = [text == line.answer.strip() for text, line in zip(said, questions, strict=True)]
        first = first or exact
        wrong = sum(edit_distance(text, line.answer.strip()) for text, line in zip(said, questions, strict=True))
        rows.append(
            {
                "strategy": strategy,
                "questions": len(questions),
                "exact": sum(exact) / len(exact),
                "interval": wilson(sum(exact), len(exact)),
                "to_first": paired(exact, first, [line.image for line in questions]),
                "characters": max(1 - wrong / sum(len(line.answer.strip()) for line in questions), 0.0),
                "seconds": round(seconds, 3),
                **cost(encoder, pictures, batch_size=batch_size),
                "unfinished": sum(not ended for _, ended in found),
                "images_in_doubt": sum(bool(image_doubts(picture)) for picture in pictures) if repaint else None,
                "answers": [
                    {"image": line.image, "question": line.question, "truth": line.answer, "answer": text}
                    for line, text in zip(questions, said, strict=True)
                ],
            }
        )
    return rows


def paired(exact: Sequence[bool], first: Sequence[bool], images: Sequence[str]) -> list[float | None]:
    """Difference of two strategies' shares of exact answers, and its 95 % interval over images, by Student's t.

    Questions about one image are not independent, so images are what is counted. There is no interval
    of one image, nor where all images agree on the difference: that is no measure of how certain it is.
    """
    sums: dict[str, list[int]] = {}
    for one, other, image in zip(exact, first, images, strict=True):
        found = sums.setdefault(image, [0, 0])
        found[0], found[1] = found[0] + one - other, found[1] + 1
    difference = sum(apart for apart, _ in sums.values()) / len(exact)
    spread = sum((apart - difference * asked) ** 2 for apart, asked in sums.values())
    if len(sums) < 2 or not spread:
        return [difference, None, None]
    half = quantile(len(sums) - 1) * math.sqrt(spread * len(sums) / (len(sums) - 1)) / len(exact)
    return [difference, max(difference - half, -1.0), min(difference + half, 1.0)]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text; costs are means of an image, seconds those of all questions.

    The interval of ``exact`` takes questions as independent, that of the difference to the first row images.
    """
    lines = [
        f"{'strategy':28}{'n':>5}{'exact':>8}  {'95 % interval':16}{'characters':>11}{'tokens':>8}{'visual':>8}"
        f"{'patches':>9}{'MFLOPs':>10}{'seconds':>9}  difference to {rows[0]['strategy']}"
    ]
    for row in rows:
        (low, high), (apart, least, most) = row["interval"], row["to_first"]
        told = "" if row is rows[0] else f"  {apart:+.3f}" + ("" if least is None else f" [{least:+.3f}, {most:+.3f}]")
        lines.append(
            f"{row['strategy']:28}{row['questions']:5}{row['exact']:8.3f}  {low:.3f} to {high:.3f}  "
            f"{row['characters']:11.3f}{row['tokens']:8.1f}{row['visual_tokens']:8.1f}{row['patches']:9.1f}"
            f"{row['encoder_flops'] / 1e6:10.1f}{row['seconds']:9.2f}{told}"
        )
    for row in rows:
        if row["unfinished"]:
            lines.append(f"{row['strategy']}: answers that had not ended: {row['unfinished']} (give --max-new-tokens)")
    if rows[0]["images_in_doubt"]:
        lines.append(f"images unlike what nano learned from: {rows[0]['images_in_doubt']} (`uhd demo IMAGE` says how)")
    return "\n".join(lines)
