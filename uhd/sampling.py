"""Batches of a bounded cost: a sampler for ``DataLoader``, the same on every rank, that can be stopped and resumed."""

from __future__ import annotations

import heapq
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, distributed
from torch.utils.data import Sampler

from uhd.settings import check_choice, read_values, whole

UNEVEN = ("error", "repeat", "drop")

_SLACK = 200
"""While batches are too few, their number grows by at least this part of it."""

_DRAWS = 4
"""Of an epoch's order, each with half of the last one's jitter, the last without any."""

_MOST_RANKS = 1 << 20
Before = tuple[tuple[int, int], ...]
"""(number of ranks, batches that each of them took), one after the other, of one epoch."""


class TokenBudgetSampler(Sampler[list[int]]):
    """Batches of indices whose costs add up to nearly the same, and never to more than a budget.

    For ``DataLoader(..., batch_sampler=...)``. Every index comes exactly once an epoch. All epochs have one number of
    batches, and so have all ranks.

    Items are taken from the costliest to the cheapest, and each goes to the batch that costs least so far (longest
    processing time first: R. L. Graham, Bounds on multiprocessing timing anomalies, 1969); where it fits none, there
    are more batches. For this order alone every cost is first multiplied by a random factor in 1 - jitter ..
    1 + jitter, new in every epoch, so that an item meets others each time. The number of batches is settled once; an
    epoch for which it is too few is drawn again with half the jitter, at last without any.

    For R ranks the number of batches is raised to a multiple of R, so that the batches of one step cost nearly the
    same. All ranks compute the batches alike from the seed and the epoch, and do not communicate.

    >>> sampler = TokenBudgetSampler([5, 1, 4, 2, 3], budget=8, shuffle=False)
    >>> list(sampler)
    [[0, 1, 3], [2, 4]]

    Args:
        costs: One positive int an item, such as :func:`image_costs` gives.
        budget: The most that a batch may cost.
        max_items: The most items of a batch.
        shuffle: ``False``: the same batches in every epoch, in the order of their first items.
        seed: The same on all ranks.
        jitter: 0 up to below 1. More mixes better, less makes batches more even.
        rank, num_replicas: This process, and how many there are. By default as ``torch.distributed`` says, where that
            is initialised, else 0 and 1.
        uneven: What to do where there are too few items for a multiple of R batches. ``"error"``; ``"repeat"``: some
            batches, others in every epoch, come twice; ``"drop"``: some are left out. Nowhere else is anything
            repeated or left out.

    Raises:
        ValueError: An item costs more than the budget, costs are no positive ints, a setting is out of range, or the
            ranks cannot share the batches evenly.
    """

    def __init__(
        self,
        costs: Sequence[int] | np.ndarray | Tensor,
        budget: int,
        *,
        max_items: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        jitter: float = 0.25,
        rank: int | None = None,
        num_replicas: int | None = None,
        uneven: str = "error",
    ) -> None:
        self.budget = whole("budget", budget, least=1)
        self.costs = _check_costs(costs, self.budget)
        self.max_items = len(self.costs) if max_items is None else whole("max_items", max_items, least=1)
        self.rank, self.num_replicas = _check_ranks(rank, num_replicas)
        self.seed = whole("seed", seed, least=0)
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter must lie in 0 up to below 1, got {jitter!r}")
        check_choice("uneven", uneven, UNEVEN)
        self.shuffle, self.jitter, self.uneven = bool(shuffle), float(jitter), uneven
        self.epoch = self._start = self._first = self._taken = 0  # batches: to begin at, begun at, taken
        self._begun = False  # whether an iteration has given a batch since then
        self._before: Before = ()  # what other numbers of ranks took of the epoch that is to begin,
        self._first_before: Before = ()  # and of the one that has begun
        self._kept: tuple[Any, tuple[TokenBudgetSampler | None, np.ndarray]] | None = None  # what _rest found
        self._in_all = self._settle()
        self._num_batches = self._per_rank()

    def __len__(self) -> int:
        return self._count(self._before) - self._start

    def __iter__(self) -> Iterator[list[int]]:
        if self._begun:
            self._begin_at(0, ())
        self._first, self._taken, self._first_before = self._start, self._start, self._before
        return self._given(self._start, self._before)

    def _given(self, start: int, before: Before) -> Iterator[list[int]]:
        """Nothing is used up before the first batch: a ``DataLoader`` makes iterators that it never asks."""
        self._first, self._taken, self._first_before = start, start, before
        self._begun = True
        rest, items = self._rest(before)
        for batch in () if rest is None else rest._batches()[start:]:
            self._taken += 1
            yield items[batch].tolist()
        self._begin_at(0, ())

    def _begin_at(self, start: int, before: Before) -> None:
        self._start, self._before, self._begun = start, before, False

    def set_epoch(self, epoch: int) -> None:
        """Call it before every epoch: without, all epochs have the same batches in the same order.

        Raises:
            ValueError: A state of a later epoch was loaded, and no batch of it given yet: it would be lost.
        """
        epoch = whole("epoch", epoch, least=0)
        if epoch < self.epoch and not self._begun and (self._start or self._before):
            raise ValueError(
                f"the state that was loaded stands in epoch {self.epoch}, and set_epoch({epoch}) would lose it: count "
                f"epochs from there; a loader that counts them itself, as accelerate's, needs set_epoch({self.epoch})"
            )
        if epoch != self.epoch:
            self.epoch = epoch
            self._begin_at(0, ())
            self._first, self._taken, self._first_before = 0, 0, ()

    def state_dict(self, used: int | None = None) -> dict[str, Any]:
        """Where this epoch stands, the same for all ranks; plain JSON types.

        Args:
            used: How many batches the last iteration has given that were used. ``None``: all that it has given, which
                are too many where a ``DataLoader`` with workers has asked for some ahead.
        """
        taken = self._taken if used is None else self._first + whole("used", used, least=0)
        before = self._first_before
        taken = _check_taken(taken, self._count(before))
        state = {"epoch": self.epoch, "batches": taken, "num_replicas": self.num_replicas, **self._fingerprint()}
        return {**state, "before": [list(some) for some in before]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next iteration begins where the state stood; those after it begin at the beginning.

        With another number of ranks than the state's, the epoch goes on with the items that are left of it, in new
        batches under the same budget. The number of batches of that epoch is then its own.

        Raises:
            ValueError: The state is of other costs or settings, which have other batches; or the ranks cannot share
                what is left evenly.
        """
        epoch, batches, ranks = read_values(state, "a sampler's state", epoch=int, batches=int, num_replicas=int)
        old = {"before": state.get("before", ())}  # earlier versions wrote none
        (before,) = read_values(old, "a sampler's state", before=tuple[tuple[int, int], ...])
        mine = self._fingerprint()
        if other := [key for key, value in mine.items() if state.get(key) != value]:
            changes = ", ".join(f"{key}: saved {state.get(key)!r}, now {mine[key]!r}" for key in other)
            raise ValueError(f"the state is of a sampler with other batches ({changes})")
        for replicas, steps in (*before, (ranks, batches)):
            if not (1 <= replicas <= _MOST_RANKS and steps >= 0):
                raise ValueError(f"the state tells of {steps} batches of {replicas} ranks: it is damaged")
        now, self.epoch = self.epoch, whole("epoch", epoch, least=0)
        try:
            if ranks != self.num_replicas:
                before, batches = (*before, (ranks, batches)), 0
            _check_taken(batches, self._count(before))
        except ValueError:
            self.epoch = now
            raise
        self._begin_at(batches, before)
        self._first, self._taken, self._first_before = batches, batches, before

    def _fingerprint(self) -> dict[str, Any]:
        names = ("budget", "max_items", "shuffle", "seed", "jitter", "uneven")
        return {"costs": zlib.crc32(self.costs.tobytes()), **{name: getattr(self, name) for name in names}}

    def _count(self, before: Before) -> int:
        rest = self._rest(before)[0] if before else self
        return 0 if rest is None else rest._num_batches

    def _rest(self, before: Before) -> tuple[TokenBudgetSampler | None, np.ndarray]:
        """The sampler of what is left of the epoch, ``None`` where nothing is, and the items that it numbers."""
        if not before:
            return self, np.arange(len(self.costs))
        if self._kept is None or self._kept[0] != (self.epoch, before):
            items = self._left(before)
            rest = self._of(items, self.num_replicas, self.rank) if len(items) else None
            self._kept = (self.epoch, before), (rest, items)
        return self._kept[1]

    def _left(self, before: Before) -> np.ndarray:
        items = np.arange(len(self.costs))
        for ranks, steps in before:
            if len(items):
                over = self._of(items, ranks, 0)
                _check_taken(steps, over._num_batches)
                members, dealt = over._steps()
                taken = [members[batch] for batch in dealt[:steps].ravel()]
                items = np.delete(items, np.concatenate(taken)) if taken else items
        return items

    def _of(self, items: np.ndarray, ranks: int, rank: int) -> TokenBudgetSampler:
        """The same for some of the items, and other ranks, in this epoch."""
        names = ("budget", "shuffle", "seed", "jitter", "uneven")
        same = {name: getattr(self, name) for name in names}
        found = TokenBudgetSampler(self.costs[items], **same, max_items=self.max_items, rank=rank, num_replicas=ranks)
        found.epoch = self.epoch
        return found

    def _settle(self) -> int:
        """How many batches every epoch has, those of all ranks together."""
        least = max(math.ceil(int(self.costs.sum()) / self.budget), math.ceil(len(self.costs) / self.max_items))
        count = self._shared(least)
        orders = [self._order(0, draw) for draw in ((0, _DRAWS - 1) if self.shuffle else (_DRAWS - 1,))]
        while needed := next((more for order in orders if (more := self._fill(order, count)[1]) > count), 0):
            count = self._shared(min(max(needed, count + count // _SLACK), len(self.costs)))
        return count

    def _shared(self, count: int) -> int:
        rounded = math.ceil(count / self.num_replicas) * self.num_replicas
        return rounded if rounded <= len(self.costs) else count

    def _per_rank(self) -> int:
        whole, rest = divmod(self._in_all, self.num_replicas)
        if rest and self.uneven == "error":
            raise ValueError(
                f"{len(self.costs)} items make {self._in_all} batches, which {self.num_replicas} ranks cannot share "
                f"evenly: uneven='repeat' gives {self.num_replicas - rest} of them again, 'drop' leaves {rest} out"
            )
        if rest and self.uneven == "drop" and not whole:
            raise ValueError("uneven='drop' would leave out all of them: take 'repeat' or fewer ranks")
        return whole + bool(rest and self.uneven == "repeat")

    def _order(self, epoch: int, draw: int) -> list[int]:
        if not self.shuffle:
            return np.argsort(-self.costs, kind="stable").tolist()
        rng = np.random.default_rng((self.seed, epoch, draw))
        jitter = self.jitter / 2**draw if draw < _DRAWS - 1 else 0.0
        items = rng.permutation(len(self.costs))  # equal costs come in random order
        keys = self.costs[items] * (1 + jitter * (2 * rng.random(len(items)) - 1))
        return items[np.argsort(-keys, kind="stable")].tolist()

    def _fill(self, order: Sequence[int], count: int) -> tuple[np.ndarray, int]:
        """The batch of every item, and the number of batches: ``count``, or more where that is too few."""
        costs, budget, max_items = self.costs.tolist(), self.budget, self.max_items
        heap = [(0, 0, batch) for batch in range(count)]  # cost, items and number of each batch with room
        home = [0] * len(costs)
        for item in order:
            if not heap or heap[0][0] + costs[item] > budget:
                heapq.heappush(heap, (0, 0, count))
                count += 1
            cost, items, batch = heap[0]
            home[item] = batch
            if items + 1 == max_items:
                heapq.heappop(heap)
            else:
                heapq.heapreplace(heap, (cost + costs[item], items + 1, batch))
        return np.array(home), count

    def _batches(self) -> list[np.ndarray]:
        members, steps = self._steps()
        return [members[batch] for batch in steps[:, self.rank]]

    def _steps(self) -> tuple[list[np.ndarray], np.ndarray]:
        """The items of every batch of this epoch, and (steps, ranks) numbers of batches."""
        draws = range(_DRAWS) if self.shuffle else (_DRAWS - 1,)
        filled = (self._fill(self._order(self.epoch, draw), self._in_all) for draw in draws)
        home = next(home for home, count in filled if count == self._in_all)
        sizes = np.bincount(home)
        members = np.split(np.argsort(home, kind="stable"), np.cumsum(sizes)[:-1])
        return members, self._deal(np.bincount(home, weights=self.costs), np.array([some[0] for some in members]))

    def _deal(self, costs: np.ndarray, firsts: np.ndarray) -> np.ndarray:
        """(steps, ranks) numbers of batches, from what each costs and its first item."""
        rng = np.random.default_rng((self.seed, self.epoch, _DRAWS)) if self.shuffle else None
        chosen = np.argsort(firsts) if rng is None else rng.permutation(len(costs))
        chosen = np.resize(chosen, self._num_batches * self.num_replicas)  # cut, or begun again
        steps = chosen[np.argsort(-costs[chosen], kind="stable")].reshape(-1, self.num_replicas)
        if rng is not None:
            return rng.permuted(steps[rng.permutation(len(steps))], axis=1)
        steps = np.take_along_axis(steps, np.argsort(firsts[steps], axis=1), axis=1)
        return steps[np.argsort(firsts[steps[:, 0]], kind="stable")]


def _check_taken(batches: int, count: int) -> int:
    if batches > count:
        raise ValueError(f"an epoch has {count} batches, got batches={batches}")
    return batches


def _check_costs(costs: Any, budget: int) -> np.ndarray:
    found = np.asarray(costs)
    if found.ndim != 1 or not found.size or found.dtype.kind not in "iu":
        raise ValueError(f"costs are positive ints, one an item, got shape {found.shape} of {found.dtype}")
    if found.min() < 1:
        raise ValueError(f"costs are positive ints, item {int(found.argmin())} has {found.min()}")
    over = np.flatnonzero(found > budget)
    if len(over):
        worst = int(found.argmax())
        raise ValueError(
            f"{len(over)} of {len(found)} items cost more than budget={budget}, the most item {worst} with "
            f"{found[worst]}: raise the budget, lower max_slices, or leave such items out (torch.utils.data.Subset)"
        )
    return found.astype(np.int64)


def _check_ranks(rank: int | None, num_replicas: int | None) -> tuple[int, int]:
    if (rank is None) != (num_replicas is None):
        raise ValueError(f"rank and num_replicas go together, got rank={rank}, num_replicas={num_replicas}")
    if rank is None:
        shared = distributed.is_available() and distributed.is_initialized()
        return (distributed.get_rank(), distributed.get_world_size()) if shared else (0, 1)
    rank, num_replicas = whole("rank", rank, least=0), whole("num_replicas", num_replicas, least=1)
    if rank >= num_replicas:
        raise ValueError(f"ranks are numbered from 0, got rank={rank} of num_replicas={num_replicas}")
    return rank, num_replicas
