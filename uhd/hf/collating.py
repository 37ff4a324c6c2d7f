"""Batches of packed rows: what a DataLoader, ``Trainer`` or TRL takes as its collator, and rows from a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import IterableDataset

from uhd.hf.labels import is_visual, labels_of
from uhd.hf.samples import prepare_sample
from uhd.hf.visual_inputs import VISUAL_KEYS, together
from uhd.loading import named
from uhd.merge import IGNORE
from uhd.settings import read_values


def pack_rows(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Spread samples over as few rows as first-fit finds, then as evenly as they go.

    Args:
        lengths: Tokens of each sample.
        max_length: What a row holds.

    Returns:
        The numbers of the samples in each row, in order.

    Raises:
        ValueError: A sample is longer than a row.

    >>> pack_rows([50, 30, 60, 20, 40], 100)
    [[0, 1, 3], [2, 4]]
    """
    for place, length in enumerate(lengths):
        _check_length(place, length, max_length)
    longest_first = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    rows: list[list[int]] = []
    filled: list[int] = []
    for place in longest_first:
        row = next((row for row, used in enumerate(filled) if used + lengths[place] <= max_length), len(rows))
        if row == len(rows):
            rows.append([])
            filled.append(0)
        rows[row].append(place)
        filled[row] += lengths[place]
    even: list[list[int]] = [[] for _ in rows]
    used = [0] * len(rows)
    for place in longest_first:
        row = used.index(min(used))
        even[row].append(place)
        used[row] += lengths[place]
    return sorted(sorted(row) for row in (even if max(used, default=0) <= max_length else rows))


def _check_length(number: int, length: int, max_length: int) -> None:
    if length > max_length:
        raise ValueError(
            f"sample {number} has {length} tokens, a row holds {max_length}: raise max_length, or give it fewer "
            "slices or a shorter text"
        )


class PackingCollator:
    """Samples of any mix of text, images and videos into packed rows, each at most ``max_length`` long.

    A sample is ``{"text" | "messages", "images", "videos"}``, see :func:`uhd.hf.samples.prepare_sample`, or what the
    processor returns for one prompt (tensors, or lists as ``datasets.map`` makes of them), or anything else that
    ``prepare`` turns into that. A list of prepared samples, as :class:`PackedStream` yields them, is one row.

    Labels are the sample's ``labels``; else its ids where ``assistant_masks`` or ``completion_mask`` says so, as of
    messages whose chat template marks what the assistant says; else all ids. Positions of images and videos, of
    padding, and the first of each sample are never targets.

    Args:
        processor: Of the model: its padding token fills rows, its image and video tokens are no targets.
        max_length: Tokens of a row, those of images and videos counted.
        prepare: From a raw sample to the processor's output for it, e.g.
            ``lambda sample: processor(text=sample["question"], images=sample["photo"])``.
        one_row: All samples behind each other in one row, as flash attention takes them; it may be longer than
            ``max_length``, which then is a bound for each sample.

    Returns, when called on a list of samples, a dictionary of ``input_ids``, ``position_ids`` and ``labels``
    (R, L) int64 and, as ``visual``, the images and videos of all samples, in order.

    Raises:
        ValueError: ``max_length`` is no number of tokens. When called: there is no sample; or one, by its number, is
            longer than a row, or has not what it needs.
    """

    def __init__(
        self,
        processor: Any,
        *,
        max_length: int,
        prepare: Callable[[Any], Mapping[str, Any]] | None = None,
        one_row: bool = False,
    ) -> None:
        (length,) = read_values({"max_length": max_length}, "a PackingCollator", max_length=int)
        if length < 1:
            raise ValueError(f"max_length is at least 1 token, got {length}")
        self.processor, self.max_length, self.prepare, self.one_row = processor, length, prepare, one_row

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        rows, single = [], []
        for number, sample in enumerate(samples):
            with named("sample", number):
                if isinstance(sample, list):
                    rows.append([self._tensors(part) for part in sample])
                else:
                    single.append(self.read(sample))
        if not rows and not single:
            raise ValueError("there is no sample to pack: give at least one")
        packed = pack_rows([len(sample["input_ids"]) for sample in single], self.max_length)
        rows += [[single[place] for place in row] for row in packed]
        if self.one_row:
            rows = [[sample for row in rows for sample in row]]
        ordered = [sample for row in rows for sample in row]
        pad = self.processor.tokenizer.pad_token_id
        fills = {"input_ids": 0 if pad is None else pad, "labels": IGNORE}
        batch = {}
        for name, fill in fills.items():
            parts = [torch.cat([sample[name] for sample in row]) for row in rows]
            batch[name] = pad_sequence(parts, batch_first=True, padding_value=fill)
        length = batch["input_ids"].shape[1]
        batch["position_ids"] = torch.stack([_positions(row, length) for row in rows])
        for name in VISUAL_KEYS:
            given = [sample[name] for sample in ordered if name in sample]
            if given:
                batch[name] = _joined(given)
        return together(batch)

    def read(self, sample: Any) -> dict[str, Tensor]:
        """One sample as tensors without padding: ``input_ids`` and ``labels`` (T,), and its images and videos."""
        if self.prepare is not None:
            sample = self.prepare(sample)
        elif not isinstance(sample, Mapping):
            raise TypeError(f"a sample is a dictionary, got {type(sample).__name__}")
        elif "input_ids" not in sample:
            sample = prepare_sample(sample, self.processor)
        return self._tensors(sample)

    def columns(self, sample: Any) -> dict[str, Tensor | None]:
        """As :meth:`read`, and ``None`` for what a sample lacks: ``datasets.map`` drops what its first lacks."""
        return {**dict.fromkeys(VISUAL_KEYS), **self.read(sample)}

    def _tensors(self, given: Mapping[str, Any]) -> dict[str, Tensor]:
        if "input_ids" not in given:
            raise ValueError(f"a prepared sample has input_ids, this one has {sorted(given)}")
        ids = torch.as_tensor(given["input_ids"]).long()
        if ids.dim() > 2 or (ids.dim() == 2 and len(ids) != 1):
            raise ValueError(f"a sample is one prompt, its input_ids are {tuple(ids.shape)}: give (T,) or (1, T)")
        ids = ids.flatten()
        kept = torch.ones_like(ids, dtype=torch.bool)
        if given.get("attention_mask") is not None:
            kept = torch.as_tensor(given["attention_mask"]).flatten().bool()
        masks = {} if given.get("labels") is not None else given
        labels = labels_of({**masks, "input_ids": ids}, self.processor)
        if masks is not given:
            labels = torch.where(labels == IGNORE, IGNORE, torch.as_tensor(given["labels"]).long().flatten())
        if not kept.any():
            raise ValueError("a sample has no tokens: leave it out")
        found = {"input_ids": ids[kept], "labels": labels[kept]}
        found["labels"][0] = IGNORE  # else the sample before would have to guess it
        visual = {name: _tensor(name, given[name]) for name in VISUAL_KEYS if given.get(name) is not None}
        if not visual and (count := int(is_visual(ids, self.processor).sum())):
            raise ValueError(
                f"a sample has {count} image or video positions and neither images nor videos, only {sorted(given)}; "
                "datasets.map drops the columns that its first sample lacks: map PackingCollator.columns"
            )
        return found | visual


@dataclass(frozen=True)
class _Waiting:
    """A sample in the buffer: its number in the stream, the stream's state before it, and what was made of it."""

    number: int
    mark: Any
    sample: dict[str, Tensor]


class PackedStream(IterableDataset):
    """Rows from a stream: each item is the list of samples, prepared, of one row that is nearly full.

    A row begins with the sample that has waited longest; of those in the buffer the longest that still fits is added
    until none does. At most ``buffer`` samples wait, with their patches, in each worker.

    It resumes as ``torchdata``'s ``StatefulDataLoader`` asks for it, with workers too: :meth:`state_dict` after some
    rows, and the same rows again follow after :meth:`load_state_dict`. No patches are in the state: samples that
    waited are read and prepared again. The stream must give the same samples in the same order; where it has
    ``state_dict`` and ``load_state_dict``, as those of ``datasets`` have, it is not read again from its beginning.

    Args:
        dataset: Any iterable of samples; with several workers it gives each its own share, as streams do.
        collator: Which prepares and measures them; give it to the ``DataLoader`` as well.
        buffer: How many samples to choose from.
    """

    def __init__(self, dataset: Iterable[Any], collator: PackingCollator, *, buffer: int = 64) -> None:
        if buffer < 1:
            raise ValueError(f"the buffer must hold 1 sample or more, got {buffer}")
        self.dataset, self.collator, self.buffer = dataset, collator, buffer
        self._waiting: list[_Waiting] = []
        self._read, self._mark = 0, None  # how many samples were read, and the stream's state after them
        self._loaded: Mapping[str, Any] | None = None
        self._fresh: Any = None  # the stream's state before one was loaded into it

    def __iter__(self) -> Iterator[list[dict[str, Tensor]]]:
        state, self._loaded = self._loaded, None
        self._waiting = waiting = []
        for number, mark, sample in self._samples(state):
            if state is None or number >= state["read"] or number in state["waiting"]:
                with named("sample", number):
                    waiting.append(_Waiting(number, mark, self.collator.read(sample)))
                _check_length(number, _length(waiting[-1]), self.collator.max_length)
            if len(waiting) > self.buffer:
                yield self._row(waiting)
        while waiting:
            yield self._row(waiting)

    def _samples(self, state: Mapping[str, Any] | None) -> Iterator[tuple[int, Any, Any]]:
        """Numbered samples, each with the stream's state before it, from the oldest that waited under a state."""
        first, mark = (0, None) if state is None else (state["first"], state["mark"])
        keeps = hasattr(self.dataset, "state_dict") and hasattr(self.dataset, "load_state_dict")
        if keeps and mark is not None:
            self._check_epoch(mark)
            self._fresh = self.dataset.state_dict() if self._fresh is None else self._fresh
            self.dataset.load_state_dict(mark)
        elif keeps and self._fresh is not None:  # those of datasets would begin every pass where the mark was
            self.dataset.load_state_dict(self._fresh)
        stream = islice(self.dataset, first if mark is None or not keeps else 0, None)
        self._read, self._mark = first, mark
        for number, sample in enumerate(stream, first):
            before, self._read = self._mark, number + 1
            self._mark = self.dataset.state_dict() if keeps else None
            yield number, before, sample

    def _check_epoch(self, mark: Any) -> None:
        """Those of datasets begin at the beginning, without a word, where a state is of another epoch."""
        saved = mark.get("epoch") if isinstance(mark, Mapping) else None
        now = getattr(self.dataset, "epoch", None)
        if None not in (saved, now) and saved != now:
            raise ValueError(f"the state stands in epoch {saved} of the stream, which is in {now}: set_epoch({saved})")

    def set_epoch(self, epoch: int) -> None:
        """Set the stream's epoch, where it has one: a shuffled stream comes in another order in each epoch."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where this pass over the stream stands behind the last row that was given, in plain types of JSON."""
        if self._loaded is not None:
            return dict(self._loaded)
        oldest = self._waiting[0] if self._waiting else None
        return {
            "read": self._read,
            "waiting": [waiting.number for waiting in self._waiting],
            "first": self._read if oldest is None else oldest.number,
            "mark": self._mark if oldest is None else oldest.mark,
            **self._settings(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next pass begins behind the row where the state stood; those after it begin at the beginning.

        Raises:
            ValueError: The state is of other settings, under which other rows were packed. A pass raises where the
                stream says that it is in another epoch.
        """
        kinds = {"read": int, "waiting": tuple[int, ...], "first": int}
        read, waiting, first = read_values(state, "a stream's state", **kinds)
        if min(read, first, *waiting) < 0 or "mark" not in state:
            raise ValueError(f"a stream's state is not one: {state!r:.200}")
        mine = self._settings()
        other = [
            f"{name}: saved {state.get(name)!r}, now {mine[name]!r}" for name in mine if state.get(name) != mine[name]
        ]
        if other:
            raise ValueError(f"the state is of a stream with other rows ({', '.join(other)})")
        self._loaded = dict(state)

    def _settings(self) -> dict[str, int]:
        return {"buffer": self.buffer, "max_length": self.collator.max_length}

    def _row(self, waiting: list[_Waiting]) -> list[dict[str, Tensor]]:
        """Take one row's samples out of those that wait."""
        row, space = [], self.collator.max_length
        fitting = [0]
        while fitting:
            place = max(fitting, key=lambda place: _length(waiting[place]))
            space -= _length(waiting[place])
            row.append(waiting.pop(place).sample)
            fitting = [place for place, one in enumerate(waiting) if _length(one) <= space]
        return row


def _length(waiting: _Waiting) -> int:
    return len(waiting.sample["input_ids"])


def _positions(row: list[dict[str, Tensor]], length: int) -> Tensor:
    lengths = [len(sample["input_ids"]) for sample in row]
    return torch.cat([torch.arange(count) for count in (*lengths, length - sum(lengths))])


def _tensor(name: str, value: Any) -> Tensor:
    """A field as the processor made it: ``datasets`` forgets that plans and raw patches are bytes."""
    found = torch.as_tensor(value)
    of_bytes = name.endswith("_plans") or (name.startswith("pixel_values") and not found.is_floating_point())
    return found.to(torch.uint8) if of_bytes else found


def _joined(parts: list[Tensor]) -> Tensor:
    """Behind each other; plans and padded patches, which are of unequal lengths, with zeros behind them."""
    if parts[0].dim() == 1:
        return torch.cat(parts)
    length = max(part.shape[1] for part in parts)
    inner = [0, 0] * (parts[0].dim() - 2)
    return torch.cat([functional.pad(part, (*inner, 0, length - part.shape[1])) for part in parts])
