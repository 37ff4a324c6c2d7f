"""Ask the nano model, and say where an image or a question is far from what it knows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from uhd.hf import UHDForConditionalGeneration
from uhd.nano.build import BEGIN, END, IMAGE, PAD
from uhd.nano.images import as_learned, image_doubts
from uhd.nano.task import GLYPHS
from uhd.pixels import load_image
from uhd.writing import is_file

SHIPPED = {"nano": "llava-uhd", "nano-plus": "uhd-plus"}
"""The models that this package brings, each with the slicing rule that it learned with; the first is the default."""

MAX_ANSWER = 48  # characters: 8 words of 3 glyphs and what separates them, and some room

LEAST_CONFIDENCE, LEAST_READING = 0.8, 0.9
"""Answers below the first are marked, and all about an image where its "all?" is below the second; the model's card
says how many that are, on scenes of the task and on others."""

EXAMPLES = {"all": "all?", "line": "line 2?", "right": "right K?", "count": "count?"}
_FORMS = rf"(all|line [1-9]|right [{GLYPHS}]|count)\?"


@dataclass(frozen=True)
class Answer:
    """What the model says.

    Doubts are reasons not to trust it: image or question unlike those it learned from, a low confidence, or question
    and answer do not fit what it reads when asked for everything.
    """

    text: str  # greedy; cut off after MAX_ANSWER characters, which is then a doubt
    confidence: float  # geometric mean of the probabilities of its characters
    doubts: tuple[str, ...]


def load_nano(name: str = "nano", **kwargs: Any) -> UHDForConditionalGeneration:
    """A small model that this package brings: it reads up to 8 short words on small grey images, on one CPU core.

    Its card, with what it can and cannot do, is ``uhd/assets/nano/README.md``.

    Args:
        name: ``"nano"`` learned with LLaVA-UHD's slices, ``"nano-plus"`` with one view at an image's own aspect, the
            rule ``uhd-plus``, and reads better: ``uhd/assets/nano-plus/README.md``.
        kwargs: As for ``from_pretrained``; the weights are stored in float16 and loaded in float32 unless ``dtype``
            says otherwise.

    Returns:
        The model in eval mode; :attr:`~uhd.UHDForConditionalGeneration.processor` is its processor. See :func:`ask`.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in SHIPPED:
        raise ValueError(f"no model {name!r} comes with this package: there are {', '.join(SHIPPED)}")
    kwargs.setdefault("dtype", torch.float32)
    with resources.as_file(resources.files("uhd") / "assets" / name) as folder:
        model = UHDForConditionalGeneration.from_pretrained(folder, **kwargs)
        model.processor  # noqa: B018  read while the folder is there
    return model.eval()


def load_model(source: str) -> UHDForConditionalGeneration:
    """One of :data:`SHIPPED` by name, or the model in a folder that ``save_pretrained`` wrote, in eval mode.

    A folder that has a shipped model's name is ``./nano-plus``.

    Raises:
        ValueError: Not a folder with a saved model.
    """
    check_source(source)
    return load_nano(source) if source in SHIPPED else UHDForConditionalGeneration.from_pretrained(source).eval()


def check_source(source: str) -> None:
    """Raises what :func:`load_model` raises, before anything is loaded."""
    if source not in SHIPPED and not is_file(Path(source) / "config.json"):
        raise ValueError(f"{source} is no folder with a saved model (config.json); or give {' or '.join(SHIPPED)}")


def ask(model: UHDForConditionalGeneration, image: Any, questions: Sequence[str]) -> list[Answer]:
    """Questions about one image, which is encoded once and also read whole, to know what to doubt.

    Text of another colour than dark on light is repainted for the model (:func:`uhd.nano.images.as_learned`).

    Args:
        model: From :func:`load_nano`.
        image: What :func:`uhd.pixels.load_image` takes, with its errors.
        questions: See :func:`uhd.nano.task.questions`; it knows those of :data:`uhd.nano.task.LEARNED`.

    Raises:
        ValueError: A question is empty, or holds one of the model's special tokens.
        TypeError: ``questions`` is no list of strings.
    """
    check_questions(questions)
    shown = as_learned(load_image(image, settings=model.visual.pixels))
    asked = list(dict.fromkeys((*questions, EXAMPLES["all"])))
    found = dict(zip(asked, answer_many(model, [shown], [asked])[0], strict=True))
    reading, sure = found[EXAMPLES["all"]]
    doubts = image_doubts(shown)
    if sure < LEAST_READING:
        doubts += (f"asked for everything it is unsure: {sure:.0%} a character",)
    return [Answer(*found[each], (*doubts, *_doubts(each, *found[each], reading))) for each in questions]


def check_questions(questions: Sequence[str]) -> None:
    """Raises what :func:`ask` raises about its questions."""
    if not isinstance(questions, (list, tuple)) or not all(isinstance(question, str) for question in questions):
        raise TypeError(f"questions is a list of strings, got {questions!r}")
    for question in questions:
        if not question.strip():
            raise ValueError(f"a question is empty; ask for instance {', '.join(EXAMPLES.values())}")
        if special := [token for token in (PAD, BEGIN, END, IMAGE) if token in question]:
            raise ValueError(f"the question {question!r} holds {special[0]}, a token of the model's own: leave it out")


@torch.inference_mode()
def answer_many(
    model: UHDForConditionalGeneration,
    images: Sequence[Any],
    questions: Sequence[Sequence[str]],
    *,
    batch_size: int = 64,
) -> list[list[tuple[str, float]]]:
    """(answer, confidence) of every question of every image, by free greedy generation; images are encoded once."""
    encoded = [item for part in batches(images, batch_size) for item in model.visual(part)]
    flat = [(item, question) for item, asked in zip(encoded, questions, strict=True) for question in asked]
    order = sorted(range(len(flat)), key=lambda n: (flat[n][1], flat[n][0].layout.num_tokens))
    answers = {}
    for part in batches(order, batch_size):
        answers.update(zip(part, _generate(model, [flat[n] for n in part]), strict=True))
    places = iter(range(len(flat)))
    return [[answers[next(places)] for _ in asked] for asked in questions]


def _generate(model: UHDForConditionalGeneration, pairs: Sequence[tuple[Any, str]]) -> list[tuple[str, float]]:
    processor = model.processor
    texts, images = [f"{BEGIN}{IMAGE}{question}" for _, question in pairs], [[item] for item, _ in pairs]
    inputs = processor(text=texts, images=images).to(model.device)
    told = {"output_logits": True, "return_dict_in_generate": True}
    out = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_ANSWER, **told)
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    logits = torch.stack(out.logits, dim=1).float().log_softmax(-1)  # (B, T, vocabulary)
    chosen = logits.gather(-1, new[..., None])[..., 0]
    ended = (new == processor.tokenizer.eos_token_id).long()
    said = ended.cumsum(1) == ended  # up to the first end, which counts
    confidence = ((chosen * said).sum(1) / said.sum(1)).exp()
    texts = processor.tokenizer.batch_decode(new, skip_special_tokens=True)
    return list(zip(texts, confidence.tolist(), strict=True))


def question_doubts(question: str) -> tuple[str, ...]:
    """Whether the model knows this form of question."""
    if re.fullmatch(_FORMS, question):
        return ()
    forms = ", ".join(EXAMPLES.values())
    return (f"the question {question!r} has none of the forms it learned ({forms}; glyphs {GLYPHS})",)


def reading_doubts(question: str, answer: str, reading: str) -> tuple[str, ...]:
    """Whether question and answer fit ``reading``, the model's answer to "all?"; one is wrong if not."""
    if question_doubts(question):
        return ()
    kind, _, what = question.rstrip("?").partition(" ")
    lines, expected = reading.split("\n") if reading else [], answer
    if kind == "line":
        if int(what) > len(lines):
            return (f"{question!r}: it reads {len(lines) or 'no'} line{'s' * (len(lines) != 1)} in all",)
        expected = lines[int(what) - 1]
    elif kind == "right":
        joined = [line.replace(" ", "") for line in lines]
        times = sum(line.count(what) for line in joined)
        if times != 1:
            return (f"{question!r}: it reads {times or 'no'} {what} in all, and learned to find one",)
        expected = next(line for line in joined if what in line).partition(what)[2][:1]
        if not expected:
            return (f"{question!r}: it reads nothing to the right of {what}",)
    elif kind == "count":
        expected = str(len(reading.split()))
    return () if answer == expected else (f"{question!r}: asked for everything it reads {expected!r} there",)


def _doubts(question: str, text: str, confidence: float, reading: str) -> tuple[str, ...]:
    unsure = confidence < LEAST_CONFIDENCE and question != EXAMPLES["all"]  # of which the image's doubts tell
    low = (f"unsure: {confidence:.0%} a character",) if unsure else ()
    cut = (f"cut off after {MAX_ANSWER} characters",) if len(text) >= MAX_ANSWER else ()
    return (*question_doubts(question), *reading_doubts(question, text, reading), *low, *cut)


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Runs of ``size`` items, the last one shorter."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
