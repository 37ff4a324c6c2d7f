"""For your own tests: a checker of slicing rules, and hypothesis strategies for sizes and plans.

    from uhd.testing import check_strategy

    def test_my_rule():
        check_strategy(my_rule, max_tokens=2000)

Hypothesis is needed for :func:`image_sizes`, :func:`plans` and :func:`slicing_configs` only:

>>> from hypothesis import given, settings
>>> @settings(max_examples=10, derandomize=True, database=None, deadline=None)
... @given(plans(slicing_configs(), sizes_hw=image_sizes(min_side=100, max_aspect=6)))
... def test_every_view_has_patches(plan):
...     assert all(min(view.patches_hw) >= 1 for view in plan.views)
>>> test_every_view_has_patches()
"""

from __future__ import annotations

import json
import math
import operator
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from uhd.slicing import SlicingConfig, find, plan
from uhd.slicing.config import MAX_VIEWS, positive_int
from uhd.slicing.metrics import share_seen
from uhd.slicing.plan import MAX_SIDE, SlicePlan, bad_canvases, contradictions

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from uhd.slicing import SlicingLike

SIZES: tuple[tuple[int, int], ...] = (
    (336, 336),
    (337, 336),
    (1008, 672),
    (1080, 1920),
    (3000, 4000),
    (1568, 224),
    (224, 1568),
    (100, 60),
    (61, 997),
    (2500, 1000),
    (720, 1280),
    (1654, 1169),
)
"""Usual sizes (height, width), px: squares, one px more, photos, screens, pages, strips, thumbnails."""

EXTREMES: tuple[tuple[int, int], ...] = (
    (1, 1),
    (1, 4096),
    (4096, 1),
    (20, 4000),
    (4000, 20),
    (3, 50_000),
    (20_000, 20_000),
    (MAX_SIDE, MAX_SIDE),
)
"""Sizes that a rule plans, or refuses with a ``ValueError``."""

DRAWN = 2000
"""Sizes that are drawn by default: a fault in 0.4 % of them stays unseen once in 3,000 times."""

_ADVICE = {
    "returns": "a plan is expected for every usual size",
    "purity": "equal sizes must give equal, hashable, JSON-able plans: keep no state, draw no random numbers",
    "geometry": "the plan's parts contradict each other",
    "divisibility": "a view's sides must be whole multiples of patch_size, or its rim is never seen",
    "coverage": "part of the image is in no view: widen the boxes, or add an overview",
    "budget": "a bound is exceeded: cap slices, or shrink views",
    "transposition": "turning the image by 90 degrees changes its cost: compare log aspects, and break ties by area",
    "extremes": "an unusual size must be planned, or refused with a ValueError that names it",
}
CHECKS = tuple(_ADVICE)
"""What :func:`check_strategy` tests, by name."""

_Found = dict[tuple[int, int], SlicePlan | Exception]
_MOST_SHOWN = 3  # sizes named for each failure


@dataclass(frozen=True)
class Failure:
    """A law that a rule breaks.

    Attributes:
        check: One of :data:`CHECKS`.
        why: What is wrong, and what to do about it.
        examples: (height, width) of some images that show it, with what was seen.
        count: Number of images that show it.
    """

    check: str
    why: str
    examples: tuple[str, ...]
    count: int

    def __str__(self) -> str:
        seen = "".join(f"\n    {example}" for example in self.examples)
        more = f"\n    and {self.count - len(self.examples)} more" if self.count > len(self.examples) else ""
        return f"{self.check}: {self.why}{seen}{more}"


@dataclass(frozen=True)
class StrategyReport:
    """What :func:`inspect_strategy` found.

    Attributes:
        name: The rule.
        failures: Laws that are broken.
        planned, refused: Numbers of sizes.
        ties: How many of these sizes are near ties of two grids.
    """

    name: str
    failures: tuple[Failure, ...]
    planned: int
    refused: int
    ties: int = 0

    @property
    def ok(self) -> bool:
        return not self.failures

    def __str__(self) -> str:
        tried = f"{self.planned + self.refused:,} sizes tried, {self.ties} of them near ties"
        head = f"{self.name}: {tried}; {self.planned:,} planned, {self.refused:,} refused"
        if self.ok:
            return f"{head}, every law holds"
        return "\n  ".join([f"{head}, {len(self.failures)} laws broken", *map(str, self.failures)])


def check_strategy(rule: SlicingLike, **options: Any) -> StrategyReport:
    """Assert that a slicing rule keeps every law; a rule of your own, or any name.

    ============== ==============================================================================================
    returns        a :class:`SlicePlan` for that image, or a ``ValueError``; usual sizes are not refused
    purity         equal plans for equal sizes, in any order of calls; hashable; equal after a trip through JSON
    geometry       lengths are ints, tiles lie on their canvas, sources in the image, uncovered canvas has a fill,
                   filters exist, grids and counts agree; a plan whose canvases are wrong is not examined for
                   divisibility and coverage
    divisibility   view sides are whole multiples of the patch, so that the encoder sees every px
    coverage       every px of the image is in some view
    budget         ``max_tokens``, ``max_patches`` and 65,536 views are kept, also at extremes; tokens are positive
    transposition  the plan of w x h costs what that of h x w does
    extremes       1 px strips, an aspect of 200 and more, huge images: planned or refused, never another exception
    ============== ==============================================================================================

    All laws are tried on usual sizes, and all but purity on 2,000 sizes more that are drawn (always the same ones), so
    that a fault in 0.4 % of sizes is seen but for once in 3,000 times, and on near ties: squares, and sizes that lie
    as near as whole px allow between the aspects of two grids, where rounding decides.

    >>> print(check_strategy("llava-uhd-safe", skip=["transposition"], max_tokens=1000))
    llava-uhd-safe: 2,284 sizes tried, 264 of them near ties; 2,284 planned, 0 refused, every law holds

    Args:
        rule: A function from (height, width) to a :class:`SlicePlan`, a config, or a name.
        options: Keywords of :func:`inspect_strategy`.

    Raises:
        AssertionError: Some laws are broken; the message lists each with what to do and examples.
    """
    report = inspect_strategy(rule, **options)
    if not report.ok:
        raise AssertionError(str(report))
    return report


def inspect_strategy(
    rule: SlicingLike,
    *,
    sizes_hw: Iterable[Sequence[int]] = SIZES,
    extremes_hw: Iterable[Sequence[int]] = EXTREMES,
    drawn: int = DRAWN,
    max_tokens: int | None = None,
    max_patches: int | None = None,
    skip: Iterable[str] = (),
) -> StrategyReport:
    """Test a rule as :func:`check_strategy` does, and report instead of asserting.

    >>> report = inspect_strategy("clip")
    >>> report.ok, [failure.check for failure in report.failures]
    (False, ['coverage'])

    Args:
        rule: As in :func:`check_strategy`.
        sizes_hw: Usual sizes, px.
        extremes_hw: Sizes that may be refused.
        drawn: How many sizes are drawn beside these; 0 leaves out the near ties, too. A rule may refuse them.
        max_tokens, max_patches: Bounds of the "budget" check.
        skip: Checks to leave out, of :data:`CHECKS`; many released rules break "transposition", for instance.

    Raises:
        ValueError: ``skip`` names no check, ``drawn`` is no whole number from 0, a bound none from 1, a size not two
            whole numbers, or no strategy has that name.
        TypeError: ``skip`` is one name rather than a list.
    """
    if isinstance(skip, str):
        raise TypeError(f"skip is a list of checks, got the string {skip!r}: write [{skip!r}]")
    skip = set(skip)
    if unknown := sorted(skip - set(CHECKS)):
        raise ValueError(f"skip names no checks {unknown}; there are {', '.join(CHECKS)}")
    if type(drawn) is not int or drawn < 0:
        raise ValueError(f"drawn is a whole number of sizes, 0 for none; got {drawn!r}")
    for key, most in (("max_tokens", max_tokens), ("max_patches", max_patches)):
        if most is not None:
            positive_int(key, most)
    config = find(rule)
    name = rule if isinstance(rule, str) else config.name
    ties = near_ties() if drawn else ()

    def called(sizes: Iterable[Sequence[int]]) -> _Found:
        return {size: _call(config, size) for size in map(_whole, sizes)}

    usual, unusual, more = called(sizes_hw), called(extremes_hw), called((*drawn_sizes(drawn), *ties))
    failures = [
        Failure(check, _ADVICE[check], tuple(seen[:_MOST_SHOWN]), len(seen))
        for check, seen in _broken(config, usual, unusual, more, max_tokens, max_patches).items()
        if seen and check not in skip
    ]
    found = {**usual, **unusual, **more}
    planned = sum(isinstance(result, SlicePlan) for result in found.values())
    return StrategyReport(name, tuple(failures), planned, len(found) - planned, len(ties))


@lru_cache(maxsize=4)
def drawn_sizes(count: int) -> tuple[tuple[int, int], ...]:
    """So many different (height, width), px: sides of 27 and more, aspects up to 6 both ways, always the same.

    >>> len(set(drawn_sizes(2000)))
    2000
    """
    draw, sizes = random.Random(0), {}
    while len(sizes) < count:
        side, aspect = 2 ** draw.uniform(6, 12), 6 ** draw.uniform(-1, 1)
        size = round(side * math.sqrt(aspect)), round(side / math.sqrt(aspect))
        if size not in SIZES:
            sizes[size] = None
    return tuple(sizes)


@lru_cache(maxsize=1)
def near_ties() -> tuple[tuple[int, int], ...]:
    """(height, width), px, where two grids fit nearly alike, and squares, which fit both ways.

    The grids of n - 1, n and n + 1 slices, and those of up to n, each with the next one by aspect; n is up to 12.

    >>> len(near_ties())
    264
    """
    sizes = dict.fromkeys((side, side + more) for side in (97, 333, 479, 600, 911, 1201) for more in (-1, 0, 1))
    ties: dict[float, None] = {}
    for most in range(2, 13):
        for least in (1, most - 2):
            counts = range(max(least, 1), most + 1)
            aspects = sorted({cols * cols / n for n in counts for cols in range(1, n + 1) if n % cols == 0})
            ties |= dict.fromkeys(round(math.sqrt(below * above), 9) for below, above in pairwise(aspects))
    for tie in ties:
        for side in (311, 1511):
            height = round(side / math.sqrt(tie))
            sizes |= dict.fromkeys((height, round(height * tie) + more) for more in (-1, 0, 1))  # to either side
    return tuple(sizes)


def _broken(
    config: Any, usual: _Found, unusual: _Found, more: _Found, max_tokens: int | None, max_patches: int | None
) -> dict[str, list[str]]:
    """For each of :data:`CHECKS` every size that fails, with what was seen."""
    few = [found for found in usual.values() if isinstance(found, SlicePlan)]
    kept = few + [found for found in more.values() if isinstance(found, SlicePlan)]
    plans = kept + [found for found in unusual.values() if isinstance(found, SlicePlan)]
    sound = [found for found in kept if not any(bad_canvases(found))]
    shuffled = random.Random(0).sample(few, len(few))
    return {
        "returns": _raised(usual) + _raised(more, allowed=ValueError),
        "purity": _each(shuffled, lambda found: _impure(config, found)),
        "geometry": _each(plans, contradictions),
        "divisibility": _each(sound, _bad_sides),
        "coverage": _each(sound, _uncovered),
        "budget": _each(plans, lambda found: _over_budget(found, max_tokens, max_patches)),
        "transposition": _each(kept, lambda found: _asymmetric(config, found)),
        "extremes": _raised(unusual, allowed=ValueError),
    }


def _whole(image_hw: Sequence[int]) -> tuple[int, int]:
    try:
        height, width = map(operator.index, image_hw)
    except (TypeError, ValueError):
        raise ValueError(f"sizes are lists of (height, width) in whole px, got {image_hw!r} in one") from None
    return height, width


def _call(config: Any, image_hw: tuple[int, int]) -> SlicePlan | Exception:
    try:
        return plan(image_hw, config)
    except Exception as problem:  # whatever a user's rule raises is what is reported
        return problem


def _named(image_hw: tuple[int, int], what: object) -> str:
    return f"{image_hw[0]}x{image_hw[1]} px (height x width): {what}"


def _raised(found: _Found, allowed: type[Exception] | tuple[()] = ()) -> list[str]:
    problems = {size: result for size, result in found.items() if isinstance(result, Exception)}
    return [_named(size, f"{type(p).__name__}: {p}") for size, p in problems.items() if not isinstance(p, allowed)]


def _each(plans: Iterable[SlicePlan], complaints: Callable[[SlicePlan], Iterator[str]]) -> list[str]:
    return [_named(found.image_hw, what) for found in plans for what in complaints(found)]


def _impure(config: Any, found: SlicePlan) -> Iterator[str]:
    again = _call(config, found.image_hw)
    if again != found:
        yield f"{found}, and then {again}"
        return
    try:
        hash(found)
        restored = SlicePlan.from_dict(json.loads(json.dumps(found.to_dict())))
    except (TypeError, ValueError) as problem:
        yield f"{problem}: use tuples, Box and ints, no lists or floats"
        return
    if restored != found:
        yield "changed by to_dict and from_dict: use plain tuples, Box and ints"


def _bad_sides(found: SlicePlan) -> Iterator[str]:
    for size in sorted({c.view_hw for c in found.canvases if any(side % found.patch_size for side in c.view_hw)}):
        yield f"a view of {size[0]}x{size[1]} px with patches of {found.patch_size} px"


def _uncovered(found: SlicePlan) -> Iterator[str]:
    share = share_seen(found)
    if share < 1 - 1e-9:
        yield f"{100 * share:.1f}% of the image is in a view"


def _over_budget(found: SlicePlan, max_tokens: int | None, max_patches: int | None) -> Iterator[str]:
    if found.num_tokens < 1 or min((c.tokens_per_view for c in found.canvases), default=1) < 0:
        yield f"{found.num_tokens} tokens"
    if found.num_views > MAX_VIEWS:
        yield f"{found.num_views} views, at most {MAX_VIEWS}"
    if max_tokens is not None and found.num_tokens > max_tokens:
        yield f"{found.num_tokens} tokens, max_tokens={max_tokens}"
    if max_patches is not None and found.num_patches > max_patches:
        yield f"{found.num_patches} patches, max_patches={max_patches}"


def _asymmetric(config: Any, found: SlicePlan) -> Iterator[str]:
    turned = _call(config, found.image_hw[::-1])
    if not isinstance(turned, SlicePlan):
        yield f"planned, but turned: {type(turned).__name__}: {turned}"
    elif turned.num_tokens != found.num_tokens:
        yield f"{found.num_tokens} tokens, and {turned.num_tokens} when turned"


# --- hypothesis


def image_sizes(
    *, min_side: int = 1, max_side: int = 4096, max_aspect: float | None = None
) -> SearchStrategy[tuple[int, int]]:
    """(height, width) pairs, px: everyday ones, thin strips, squares and their neighbours one px off.

    Args:
        min_side, max_side: Bounds of both sides.
        max_aspect: Bound on longer / shorter side.
    """
    from hypothesis import strategies as st

    if not 1 <= min_side <= max_side <= MAX_SIDE:
        raise ValueError(f"expected 1 <= min_side <= max_side <= {MAX_SIDE}, got {min_side} and {max_side}")
    if max_aspect is not None and not max_aspect >= 1:
        raise ValueError(f"max_aspect is longer / shorter side, so at least 1, got {max_aspect!r}")
    side = st.integers(min_side, max_side)
    short = st.integers(min_side, min(min_side + 40, max_side))
    near = st.builds(lambda a, d: (a, min(max(a + d, min_side), max_side)), side, st.integers(-1, 1))
    sizes = st.one_of(st.tuples(side, side), near, st.tuples(short, side), st.tuples(side, short))
    if max_aspect is None:
        return sizes

    def bounded(size: tuple[int, int]) -> tuple[int, int]:
        longest = max(int(min(size) * max_aspect), min(size))
        return min(size[0], longest), min(size[1], longest)

    return sizes.map(bounded)


def slicing_configs() -> SearchStrategy[SlicingConfig]:
    """Valid configs of the adaptive planner: any view side, patch, cap, rounding, token rule and option."""
    from hypothesis import strategies as st

    def build(patch: int, units: int, merge: int, **fields: Any) -> SlicingConfig:
        if fields["tokens_per_view"] is None:
            fields["latents"] = "fixed"
            fields["border_moves"] = 0
        return SlicingConfig(patch_size=patch, merge=merge, image_size=patch * merge * units, **fields)

    return st.builds(
        build,
        patch=st.sampled_from((8, 14, 16, 32)),
        units=st.integers(1, 40),
        merge=st.sampled_from((1, 2, 4)),
        max_slices=st.integers(1, 40),
        rounding=st.sampled_from(("floor", "round")),
        clamp=st.booleans(),
        overview_first=st.booleans(),
        tokens_per_view=st.one_of(st.none(), st.integers(1, 256)),
        one_view_below=st.sampled_from((None, None, 1.0, 2.5)),
        latents=st.sampled_from(("fixed", "fixed", "fitted")),
        cut_by=st.sampled_from(("area", "shape")),
        border_moves=st.integers(0, 4),
    )


def plans(
    rule: SlicingLike | SearchStrategy = "llava-uhd-safe", *, sizes_hw: SearchStrategy[tuple[int, int]] | None = None
) -> SearchStrategy[SlicePlan]:
    """Plans by a rule, or by rules drawn from a strategy such as :func:`slicing_configs`; refused sizes are left out.

    Args:
        rule: A name, a config, your function, or a hypothesis strategy of these.
        sizes_hw: Of (height, width); default :func:`image_sizes`.
    """
    from hypothesis import strategies as st

    rules = rule if isinstance(rule, st.SearchStrategy) else st.just(rule)
    sizes = image_sizes() if sizes_hw is None else sizes_hw

    def planned(config: Any, image_hw: tuple[int, int]) -> SlicePlan | None:
        try:
            return plan(image_hw, config)
        except ValueError:
            return None

    return st.builds(planned, rules, sizes).filter(lambda found: found is not None)
