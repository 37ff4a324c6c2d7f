"""How well the nano model reads: fresh scenes, free generation, by question and by aspect bucket."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from uhd.hf import UHDForConditionalGeneration
from uhd.nano.answer import answer_many, batches
from uhd.nano.task import BUCKETS, LEARNED, QUESTIONS, Question, TaskSettings, bucket, questions, scene

EVALUATION_SEED = 1_000_003
"""Seeds from here on are never trained on."""


@dataclass(frozen=True)
class Item:
    """One question: index of the scene, its aspect bucket, kind, truth, answer."""

    index: int
    bucket: int
    kind: str
    question: str
    truth: str
    answer: str
    confidence: float

    @property
    def exact(self) -> bool:
        return self.answer == self.truth


def evaluate(
    model: UHDForConditionalGeneration,
    *,
    images: int = 2000,
    seed: int = EVALUATION_SEED,
    settings: TaskSettings | None = None,
    kinds: Sequence[str] = LEARNED,
    batch_size: int = 64,
) -> list[Item]:
    """One question of every kind about every scene that has one, chosen by the seed.

    Raises:
        ValueError: No such kind, or one twice.
    """
    if len(set(kinds)) < len(kinds) or not set(kinds) <= set(QUESTIONS):
        raise ValueError(f"kinds must be different ones of {', '.join(QUESTIONS)}, got {', '.join(kinds)}")
    items: list[Item] = []
    for indices in batches(range(images), 8 * batch_size):
        scenes = [scene(seed, index, settings) for index in indices]
        asked = [choose(questions(item), kinds, (seed, index)) for item, index in zip(scenes, indices, strict=True)]
        texts = [[question.text for question in some] for some in asked]
        answers = answer_many(model, [item.image for item in scenes], texts, batch_size=batch_size)
        for index, drawn, some, found in zip(indices, scenes, asked, answers, strict=True):
            items += [
                Item(index, bucket(drawn.aspect), question.kind, question.text, question.answer, text, confidence)
                for question, (text, confidence) in zip(some, found, strict=True)
            ]
    return items


def choose(found: dict[str, tuple[Question, ...]], kinds: Sequence[str], seed: tuple[int, int]) -> list[Question]:
    """One question of each kind, where there is one."""
    rng = np.random.default_rng((*seed, 9))
    return [found[kind][int(rng.integers(len(found[kind])))] for kind in kinds if found[kind]]


def edit_distance(one: str, other: str) -> int:
    """Least number of characters to insert, delete or replace (Levenshtein)."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        row, above = [i], row
        for j, b in enumerate(other, 1):
            row.append(min(row[-1] + 1, above[j] + 1, above[j - 1] + (a != b)))
    return row[-1]


def wilson(right: int, asked: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    if not asked:
        return 0.0, 1.0
    z = 1.96
    share, spread = right / asked, z * z / asked
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / asked + spread / (4 * asked)) / (1 + spread)
    return middle - half, middle + half


def summary(items: Sequence[Item]) -> dict[str, dict[str, Any]]:
    """By kind: items, exact share and interval, characters right (1 - edit distance / length), exact by bucket."""
    found = {}
    for kind in dict.fromkeys(item.kind for item in items):
        some = [item for item in items if item.kind == kind]
        right = sum(item.exact for item in some)
        wrong = sum(edit_distance(item.answer, item.truth) for item in some)
        buckets = [[item.exact for item in some if item.bucket == number] for number in range(len(BUCKETS) + 1)]
        found[kind] = {
            "items": len(some),
            "exact": right / len(some),
            "interval": wilson(right, len(some)),
            "characters": 1 - wrong / sum(len(item.truth) for item in some),
            "buckets": [sum(part) / len(part) if part else None for part in buckets],
        }
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    """The summary as text."""
    borders = [f"<{BUCKETS[0]}", *(f"{a}-{b}" for a, b in itertools.pairwise(BUCKETS)), f">={BUCKETS[-1]}"]
    head = f"{'question':10}{'n':>6}{'exact':>8}  {'95 % interval':16}{'characters':>11}"
    lines = [f"{head}   exact at {', '.join(borders)}"]
    for kind, row in found.items():
        low, high = row["interval"]
        parts = "  ".join("  -  " if share is None else f"{share:.3f}" for share in row["buckets"])
        shares = f"{row['exact']:8.3f}  {low:.3f} to {high:.3f}  {row['characters']:11.3f}"
        lines.append(f"{kind:10}{row['items']:6}{shares}   {parts}")
    return "\n".join(lines)
