"""A file of questions: a line of JSON each, and what is wrong with some of them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPT = "{bos}{image}{question}"
"""Where a model has no chat template."""

Refuse = Callable[[int, str], None]
"""Takes a line's number and what is wrong with it."""


@dataclass(frozen=True)
class Asked:
    """A line: the image's path as it stands there and as it is found, the question, the true answers."""

    image: str
    path: Path
    question: str
    answers: tuple[str, ...]
    line: int


def read_questions(path: Path, refuse: Refuse | None = None) -> list[Asked]:
    """The lines of a file like ``{"image": "a.png", "question": "...", "answer": "..."}``; images lie beside it.

    ``answer`` is a string, or a list of strings of which each is true; other keys are passed over.

    Args:
        path: The file.
        refuse: Called for each line that is none of a question, which is left out; ``None``: the first raises.

    Raises:
        ValueError: No such file, or it is not UTF-8; no question is left; without ``refuse``, a line is wrong.
    """
    wanted = 'write a line {"image": "a.png", "question": "...", "answer": "..."} for each question'
    if not path.is_file():
        raise ValueError(f"there is no file {path}: {wanted}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as problem:
        raise ValueError(f"{path} is not UTF-8: {problem.reason} at byte {problem.start}") from None
    found, lines = [], 0
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        lines += 1
        try:
            found.append(_read_line(line, path.parent, number))
        except ValueError as problem:
            if refuse is None:
                raise ValueError(f"{path}, line {number}: {problem}") from None
            refuse(number, str(problem))
    if not lines:
        raise ValueError(f"{path} has no questions: {wanted}")
    return found


def _read_line(line: str, folder: Path, number: int) -> Asked:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"this is no JSON ({problem}); needs image, question and answer") from None
    if not isinstance(row, dict) or not row.keys() >= {"image", "question", "answer"}:
        raise ValueError(f"needs image, question and answer, got {row!s:.200}")
    image, question, answer = row["image"], row["question"], row["answer"]
    answers = answer if isinstance(answer, list) and answer else [answer]
    values = [image, question, *answers]
    if not all(isinstance(value, str) and value.strip() for value in values):
        raise ValueError(f"image, question and answer are strings, not empty, got {row!s:.200}")
    if not os.path.isfile(folder / image):  # unlike that of a Path it takes names that no file can have
        raise ValueError(f"there is no image {folder / image}")
    return Asked(image, folder / image, question, tuple(answers), number)


def answerable(model: Any, questions: Iterable[Asked], max_new_tokens: int, refuse: Refuse) -> list[Asked]:
    """The questions that a model can be asked and could answer; what is wrong with the others goes to ``refuse``."""
    found = []
    for asked in questions:
        if what := _unanswerable(model, asked, max_new_tokens):
            refuse(asked.line, what)
        else:
            found.append(asked)
    return found


def _unanswerable(model: Any, asked: Asked, max_new_tokens: int) -> str | None:
    """What is wrong with a question and its answers: of the latter one is enough that the model could give."""
    tokenizer = model.processor.tokenizer
    special = [*tokenizer.all_special_tokens, model.processor.image_token]
    if held := [token for token in special if token in asked.question]:
        return f"the question holds {held[0]}, a token of the model's own: leave it out"
    if _letters(written := _written(tokenizer, asked.question)) != _letters(asked.question):
        return f"the model's tokenizer reads the question {asked.question!r} as {written!r}"
    problems = []
    for truth in map(str.strip, asked.answers):
        ids = tokenizer(truth, add_special_tokens=False)["input_ids"]
        if len(ids) > max_new_tokens:
            problems.append(
                f"the answer has {len(ids)} tokens, the model may write {max_new_tokens}: give --max-new-tokens"
            )
        elif (written := _written(tokenizer, truth)) != truth:
            problems.append(
                f"the model's tokenizer writes the answer {truth!r} as {written!r}: it could never be right"
            )
    return problems[0] if len(problems) == len(asked.answers) else None


def _written(tokenizer: Any, text: str) -> str:
    return tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"], skip_special_tokens=True).strip()


def _letters(text: str) -> str:
    """What a tokenizer that changes case or spaces leaves."""
    return "".join(text.split()).casefold()


def prompt_of(model: Any, question: str, template: str | None = None) -> str:
    """A question as the model's prompt.

    Args:
        model: Whose processor.
        question: Text.
        template: ``{bos}`` in it is empty where the tokenizer writes that token by itself. ``None``: the model's chat
            template, or :data:`PROMPT` where it has none.

    Raises:
        ValueError: The template does not hold ``{image}`` and ``{question}``, once each, or holds other fields.
    """
    processor = model.processor
    if template is None and getattr(processor, "chat_template", None):
        said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        return processor.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    template = PROMPT if template is None else template
    fields = sorted(set(re.findall(r"\{\w*\}", template)) - {"{bos}"})
    if fields != ["{image}", "{question}"] or template.count("{image}") != 1 or template.count("{question}") != 1:
        raise ValueError(
            "a prompt holds {image} and {question}, once each, maybe {bos}, and no other field, got "
            f"{template!r}"
        )
    tokenizer = processor.tokenizer
    bos = tokenizer.bos_token or ""
    if bos and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        bos = ""
    return template.replace("{bos}", bos).replace("{image}", processor.image_token).replace("{question}", question)
