"""Training batches for a nano model: seeded, made by any number of worker processes, the same for any number."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from uhd import SliceBatch, SlicePlan, UHDForConditionalGeneration, plan
from uhd.nano.build import BEGIN, END, IMAGE, PAD
from uhd.nano.task import GLYPHS, Question, Scene, TaskSettings, questions, scene
from uhd.pixels import move_borders
from uhd.slicing.coordinates import view_box

IGNORE = -100
GROUP = 8
"""Steps whose scenes are sorted by length together, so that little is padded."""

PARTS_HW = (2, 3)
"""Parts of a latent's cell that a glyph's middle can lie in: a cell can hold more than one glyph."""

KINDS = len(GLYPHS) + 1
"""Each glyph, and one that an overview shows too coarsely to be read."""

NUM_CODES = PARTS_HW[0] * PARTS_HW[1] * KINDS
"""What a latent can tell of its cell: a kind in a part."""

TASK = TaskSettings()
DENSE = replace(TASK, max_words=40)
"""Images full of words, for the vision stage: several times the glyphs a second."""


@dataclass(eq=False)
class NanoBatch:
    """One step's data.

    Attributes:
        images: Cut and packed.
        input_ids, labels, position_ids: (B, T): an image, then questions with their answers, each at the positions
            that it would have alone after the image.
        seen: (B, 1, T, T) bool: a question sees the image and itself, not the other questions.
        latent_codes: (M, NUM_CODES) bool, M latents of all views: what has its middle in a latent's cell.
        patch_codes: (N, KINDS) bool: what has its middle in a patch.
    """

    images: SliceBatch
    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    seen: Tensor
    latent_codes: Tensor
    patch_codes: Tensor


class NanoData(IterableDataset):
    """The batches of steps ``start`` to ``stop - 1``; worker w of n makes every n-th, from the w-th on.

    Args:
        model: Whose slicing, pixels and tokenizer are used; only those travel to the workers.
        seed: Of the scenes. Evaluation has seeds of its own, see :data:`uhd.nano.evaluate.EVALUATION_SEED`.
        batch_size: Images.
        start, stop: Steps.
        settings: Of the scenes of a step.
        ask: Whether to make questions; the vision stage needs none.
        every: Whether to ask every kind of question, or four; see :func:`choose_questions`.
    """

    def __init__(
        self,
        model: UHDForConditionalGeneration,
        *,
        seed: int,
        batch_size: int,
        start: int,
        stop: int,
        settings: Callable[[int], TaskSettings],
        ask: bool = True,
        every: bool = False,
    ) -> None:
        self.slicing, self.pixels = model.visual.slicing, model.visual.pixels
        self.ids = model.processor.tokenizer.get_vocab()
        self.seed, self.batch_size, self.start, self.stop = seed, batch_size, start, stop
        self.settings, self.ask, self.every = settings, ask, every

    def __iter__(self) -> Iterator[NanoBatch]:
        info = get_worker_info()
        number, count = (0, 1) if info is None else (info.id, info.num_workers)
        made, samples = None, []
        for step in range(self.start + number, self.stop, count):
            group, place = divmod(step, GROUP)
            if group != made:
                made, samples = group, self._samples(group)
            yield self._collate(samples[place])

    def _samples(self, group: int) -> list[list[_Sample]]:
        """The samples of `GROUP` steps, those of near lengths in one step, the steps in random order."""
        settings, size = self.settings(group * GROUP), self.batch_size
        drawn = [self._sample(index, settings) for index in range(group * GROUP * size, (group + 1) * GROUP * size)]
        drawn.sort(key=lambda sample: len(sample.ids))
        order = np.random.default_rng((self.seed, group, 2)).permutation(GROUP)
        return [drawn[place * size : (place + 1) * size] for place in order]

    def _sample(self, index: int, settings: TaskSettings) -> _Sample:
        drawn = scene(self.seed, index, settings)
        cut = move_borders(drawn.image, plan(drawn.image_hw, self.slicing), self.slicing, settings=self.pixels)
        rng = np.random.default_rng((self.seed, index, 1))
        asked = choose_questions(drawn, rng, every=self.every) if self.ask else []
        return _Sample.write(drawn, cut, asked, self.ids)

    def _collate(self, samples: list[_Sample]) -> NanoBatch:
        plans = [sample.plan for sample in samples]
        images = SliceBatch.from_images(
            [sample.scene.image for sample in samples],
            plans,
            settings=self.pixels,
            patch_size=plans[0].patch_size,
        )
        told = [codes(sample.scene, sample.plan) for sample in samples]
        return NanoBatch(images, *_pad(samples, self.ids[PAD]), *map(torch.cat, zip(*told, strict=True)))


def loader(data: NanoData, *, workers: int) -> DataLoader:
    """The batches in order, whatever the number of workers; with 0 they are made in this process."""
    return DataLoader(
        data,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=GROUP if workers else None,
        worker_init_fn=_one_thread,
    )


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def choose_questions(drawn: Scene, rng: np.random.Generator, *, every: bool) -> list[Question]:
    """Everything, a line, a neighbour, and one more of the short kinds or ``every`` kind; as far as there are any."""
    found, chosen = questions(drawn), []
    rest = ("where", "count") if every else (("where", "count", "right")[int(rng.integers(3))],)
    for kind in ("all", "line", "right", *rest):
        left = [question for question in found[kind] if question not in chosen]
        if left:
            chosen.append(left[int(rng.integers(len(left)))])
    return chosen


def codes(drawn: Scene, cut: SlicePlan) -> tuple[Tensor, Tensor]:
    """Where the glyphs' middles are: (M, NUM_CODES) bool for all views' latents, (N, KINDS) bool for their patches."""
    boxes, grids, latent_grids, coarse = _views(cut)
    numbers = np.array([GLYPHS.index(glyph.text) for glyph in drawn.glyphs])
    centres = np.array([glyph.centre_hw for glyph in drawn.glyphs])
    share = (centres - boxes[:, None, :2]) / (boxes[:, None, 2:] - boxes[:, None, :2])  # (V, n, 2) of the view
    view, glyph = np.nonzero(((share >= 0) & (share < 1)).all(-1))
    share, kind = share[view, glyph], np.where(coarse[view], len(GLYPHS), numbers[glyph])
    cell, rest = np.divmod(share * latent_grids[view], 1)
    cell, part = cell.astype(int), (rest * PARTS_HW).astype(int)
    firsts = np.concatenate([[0], np.cumsum(latent_grids.prod(1))])
    latents = torch.zeros(int(firsts[-1]), NUM_CODES, dtype=torch.bool)
    row = firsts[view] + cell[:, 0] * latent_grids[view, 1] + cell[:, 1]
    latents[row, (part[:, 0] * PARTS_HW[1] + part[:, 1]) * KINDS + kind] = True
    place = (share * grids[view]).astype(int)
    starts = np.concatenate([[0], np.cumsum(grids.prod(1))])
    patches = torch.zeros(int(starts[-1]), KINDS, dtype=torch.bool)
    patches[starts[view] + place[:, 0] * grids[view, 1] + place[:, 1], kind] = True
    return latents, patches


@lru_cache(maxsize=20_000)
def _views(cut: SlicePlan) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Each view's box in the image, its grids of patches and of latents, and whether it is too coarse."""
    boxes = np.array([tuple(map(float, view_box(cut, view.index))) for view in cut.views])
    grids = np.array([view.patches_hw for view in cut.views])
    coarse = np.array([view.kind == "overview" and cut.num_views > 1 for view in cut.views])
    latents = np.array([view.latents_hw or [round(view.num_tokens**0.5)] * 2 for view in cut.views])
    return boxes, grids, latents, coarse


@dataclass(eq=False)
class _Sample:
    """A scene, its plan, and its row of tokens with the number of the question each belongs to (0: the image)."""

    scene: Scene
    plan: SlicePlan
    ids: list[int]
    labels: list[int]
    positions: list[int]
    owners: list[int]

    @classmethod
    def write(cls, drawn: Scene, cut: SlicePlan, asked: list[Question], ids: dict[str, int]) -> _Sample:
        start = 1 + cut.num_tokens
        row = cls(
            drawn, cut, [ids[BEGIN]] + [ids[IMAGE]] * cut.num_tokens, [IGNORE] * start, [*range(start)], [0] * start
        )
        for owner, question in enumerate(asked, 1):
            answer = [*(ids[character] for character in question.answer), ids[END]]
            row.ids += [*(ids[character] for character in question.text), *answer]
            row.labels += [*[IGNORE] * len(question.text), *answer]
            row.positions += range(start, start + len(question.text) + len(answer))
            row.owners += [owner] * (len(question.text) + len(answer))
        return row


def _pad(samples: list[_Sample], pad: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids, labels and positions (B, T) padded on the right, and what sees what (B, 1, T, T)."""
    longest = max(len(sample.ids) for sample in samples)

    def padded(name: str, fill: int) -> Tensor:
        return torch.tensor([(row := getattr(item, name)) + [fill] * (longest - len(row)) for item in samples])

    owners = padded("owners", -1)
    same = (owners[:, None, :] == owners[:, :, None]) | (owners == 0)[:, None, :]
    seen = same & torch.ones(longest, longest, dtype=torch.bool).tril()
    return padded("ids", pad), padded("labels", IGNORE), padded("positions", 0), seen[:, None]
