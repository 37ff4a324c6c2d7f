"""One page to try slicing rules on a size of one's own choice: sliders or a dropped photo, cuts drawn as they move.

The adaptive planner runs in the page, by ``uhd/slicing/planner.js``, so its rules are exact for every size. Each
other rule is planned here for a lattice of sizes, and the page says for which of them it draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from uhd.slicing import PRESETS, Slicing, SlicingConfig, SlicingLike, find
from uhd.slicing.flops import LMS, VITS, lm_flops, mlp_flops, plan_flops, vit_flops

from .inputs import SETS
from .measuring import chosen_rules, planned_by
from .scripted import cut_code, scripted_page

LATTICE: tuple[int, ...] = tuple(round(64 * 2 ** (step / 6)) for step in range(43))
"""Sides, px, for which rules without a planner in the page are planned: 64 to 8,192, six in a doubling."""

MOST_BYTES = 1_000_000
"""Most bytes that a page may take."""

SHOWN = ("llava-uhd-safe", "minicpm-v-4.6", "llava-next", "internvl")
"""The rules side by side when the page opens, unless others are named."""

_FLOPS = 10**10  # a hundredth of a TFLOP, which the page shows
_VIT, _LM = "clip-l", "llama-13b"
_HERE = Path(__file__).parent


def explore_page(strategies: Iterable[SlicingLike] | None = None) -> str:
    """Make one self-contained HTML page with sliders for width and height, and up to four rules side by side.

    A photo that is dropped on it stays in the browser: the page's own policy forbids every request.

    Args:
        strategies: Rules to choose from, the first four of which are shown first: names, settings, or functions from
            (height, width) to a plan. The presets of the adaptive planner are always there. ``None``: the usual ones.

    Raises:
        ValueError: No strategies, an unknown name, or so many that the page would take more than 1 MB.
        TypeError: ``strategies`` is one name rather than a list.

    >>> explore_page(["llava-uhd", "internvl"]).splitlines()[0]
    '<!doctype html>'
    """
    if isinstance(strategies, str):
        raise TypeError(f"strategies are a list, got the string {strategies!r}: write [{strategies!r}]")
    named = list((*SHOWN, *SETS["common"]) if strategies is None else strategies)
    if not named:
        raise ValueError("no rules to explore: name at least one, or leave them out for the usual ones")
    rules: dict[Slicing, SlicingLike] = {}
    for rule in (*named, *PRESETS):
        rules.setdefault(find(rule), rule)
    known = [_rule(name, rule) for name, rule in chosen_rules(rules.values())]
    shown = min(len({find(rule) for rule in named}), len(SHOWN))
    data = {"rules": known, "shown": shown, "lattice": LATTICE, "flops": _system(rules)}
    styles = (_HERE / "overview.css", _HERE / "explore.css")
    scripts = (_HERE.parent / "slicing" / "planner.js", _HERE / "parts.js", _HERE / "explore.js")
    page = scripted_page("explore.html", styles, scripts, data, lattice=LATTICE)
    if len(page.encode()) > MOST_BYTES:
        raise ValueError(
            f"a page of these {len(known)} rules takes {len(page.encode()):,} bytes, at most {MOST_BYTES:,} are "
            "written: name fewer strategies"
        )
    return page


def _rule(name: str, rule: Slicing) -> dict[str, Any]:
    """A rule as its settings, for the planner in the page, or as what it makes of every size of the lattice."""
    if isinstance(rule, SlicingConfig):
        return {"name": name, "config": rule.to_dict()}
    outcomes: dict[str | tuple[Any, ...], int] = {}
    places = []
    for height in LATTICE:
        for width in LATTICE:
            outcome = _outcome(rule, (height, width))
            places.append(outcomes.setdefault(outcome, len(outcomes)))
    return {"name": name, "outcomes": list(outcomes), "places": places}


def _outcome(rule: Slicing, image_hw: tuple[int, int]) -> str | tuple[Any, ...]:
    """What the page shows of a plan, in the order in which its script takes it apart; or why there is none."""
    try:
        plan = planned_by(rule, image_hw)
    except ValueError as problem:
        return str(problem)
    flops = round(plan_flops(plan, vit=_VIT, lm=_LM).total / _FLOPS)
    counts = (plan.num_views, plan.num_patches, plan.num_visual_tokens, plan.num_separators, flops)
    return (plan.grid, plan.slice_hw, plan.overview_hw, *counts, tuple(cut_code(plan)))


def _system(rules: Iterable[Slicing]) -> dict[str, Any]:
    """FLOPs of the reference system as polynomials: of a view's patches, by patch size, and of an image's tokens."""
    sides = {rule.patch_size for rule in rules if isinstance(rule, SlicingConfig)}
    return {
        "unit": _FLOPS,
        "vit": {side: _quadratic(lambda n, side=side: vit_flops(n, _VIT, patch_size=side)) for side in sorted(sides)},
        "projector": _quadratic(lambda n: mlp_flops(n, VITS[_VIT].width, width=LMS[_LM].width)),
        "lm": _quadratic(lambda n: lm_flops(n, _LM)),
    }


def _quadratic(formula: Callable[[int], int]) -> tuple[int, int, int]:
    """(c0, c1, c2) of c0 + c1 n + c2 n^2, from three of its values."""
    zero, one, two = map(formula, range(3))
    square = (two - 2 * one + zero) // 2
    return zero, one - zero - square, square
