"""The front door: plan an image by any rule, and find rules by name.

A name stands for a preset of the adaptive planner or for a strategy of another system; your own rule needs no name:
pass the function.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

from uhd.slicing.adaptive import PRESETS, SlicingConfig, planner_of, resolve
from uhd.slicing.plan import SlicePlan, check_size
from uhd.slicing.strategies import ALIASES, STRATEGIES, StrategyConfig

Rule = Callable[[tuple[int, int]], SlicePlan]
"""A user's own strategy: (height, width) in px -> plan."""

_FUNCTIONS = {type(entry.config): entry.function for entry in STRATEGIES.values()}
_ADAPTIVE = {
    "llava-uhd": "adaptive grid of up to 7 slices near 336 px, overview last; the released LLaVA-UHD rule",
    "llava-uhd-safe": "the same, with every view kept within 576 patches also for degenerate images (the default)",
    "llava-uhd-paper": "the first release's rule: cap 6 that may be exceeded by one, small images are cut too",
    "minicpm-v": "adaptive grid of up to 9 slices near 448 px, sides rounded, overview first; MiniCPM-V 2.0 to 2.6",
    "minicpm-v-4.6": "the same in multiples of 56 px, patches / 16 tokens a view; MiniCPM-V 4.6",
    "minicpm-v-4.6-4x": "the same in multiples of 28 px, patches / 4 tokens a view; MiniCPM-V 4.6 in its 4x mode",
}


def plan(
    image_hw: tuple[int, int],
    config: SlicingConfig | StrategyConfig | Rule | str | None = None,
    *,
    max_tokens: int | None = None,
) -> SlicePlan:
    """Plan one image by the adaptive rule or by any other.

    Args:
        image_hw: (height, width) of the image, px.
        config: Settings of the adaptive planner or of any strategy, the name of either (see
            :func:`uhd.strategies`), or your own function from (height, width) to a :class:`SlicePlan`;
            ``None`` is ``"llava-uhd-safe"``.
        max_tokens: Bound on ``plan.num_tokens``: the number of slices is lowered until it holds. For the adaptive
            planner only: other rules have no such freedom.

    Returns:
        The plan. Equal arguments give the same (cached) object, unless the rule is your own function.

    Raises:
        ValueError: The size is not two ints in 1..1,000,000, the rule refuses it, no strategy has that name, or not
            even the overview fits ``max_tokens``.
        TypeError: ``config`` is none of these, or your function did not return a plan.
    """
    if config is not None and not isinstance(config, SlicingConfig):
        found = find(config)
        if not isinstance(found, SlicingConfig):
            return plan_by_rule(check_size(image_hw), found, max_tokens=max_tokens)
        config = found
    height, width = check_size(image_hw)
    return planner_of(resolve(config, max_tokens)).plan(height, width)


def strategies() -> dict[str, str]:
    """Every rule's name and one line about it; the shorter names come last."""
    named = {name: entry.summary for name, entry in STRATEGIES.items()}
    return {**_ADAPTIVE, **named, **{alias: f"{name}: {named[name]}" for alias, name in ALIASES.items()}}


def strategy(name: str) -> Rule:
    """The rule of this name (dashes and underscores are the same), to be called with (height, width) in px.

    Raises:
        ValueError: No such rule; the message lists the nearest names. The rule itself raises it for a size that it
            refuses.
    """
    return partial(plan, config=find(name))


def find(rule: Any) -> SlicingConfig | StrategyConfig | Rule:
    """What a name stands for, or what :func:`strategy` made of one; a config or another function as it is.

    Raises:
        ValueError: No rule has that name.
        TypeError: Neither a name, nor a config, nor a function.
    """
    if isinstance(rule, partial) and rule.func is plan and not rule.args and set(rule.keywords) == {"config"}:
        rule = rule.keywords["config"]  # what strategy() gave
    if isinstance(rule, str):
        key = rule.lower().replace("_", "-")
        if key in PRESETS:
            return PRESETS[key]
        key = ALIASES.get(key, key)
        if key in STRATEGIES:
            return STRATEGIES[key].config
        known = [*PRESETS, *ALIASES, *STRATEGIES]
        near = difflib.get_close_matches(key, known, n=4, cutoff=0.5)
        hint = (
            f"did you mean {', '.join(map(repr, near[:-1]))}{' or ' * (len(near) > 1)}{near[-1]!r}? " if near else ""
        )
        raise ValueError(f"no strategy named {rule!r}: {hint}uhd.strategies() lists all {len(known)} names")
    if isinstance(rule, SlicingConfig) or type(rule) in _FUNCTIONS or callable(rule):
        return rule
    raise TypeError(
        "a strategy is a name, a SlicingConfig, another strategy's config, or a function from (height, width) to a "
        f"SlicePlan; got {type(rule).__name__}"
    )


def rule_name(rule: SlicingConfig | StrategyConfig | Rule) -> str:
    """What to call a rule: its config's name, or that of the function."""
    function = getattr(rule, "func", rule)  # of a partial
    return getattr(rule, "name", None) or getattr(function, "__name__", type(rule).__name__)


def plan_by_rule(
    image_hw: tuple[int, int], rule: StrategyConfig | Rule, *, max_tokens: int | None = None
) -> SlicePlan:
    """The plan of a strategy's config or of a user's function; use :func:`uhd.plan`, which also checks the size.

    Raises:
        ValueError: ``max_tokens`` was given, or the function planned another image.
        TypeError: The function did not return a plan.
    """
    if max_tokens is not None:
        raise ValueError(
            f"max_tokens bounds the adaptive planner only, not {rule_name(rule)!r}: change the strategy's "
            "own settings, e.g. its number of tiles"
        )
    if isinstance(rule, StrategyConfig):
        return _cached(image_hw, rule)
    found = rule(image_hw)
    if not isinstance(found, SlicePlan):
        raise TypeError(f"{rule_name(rule)!r} must return a SlicePlan for (height, width), got {type(found).__name__}")
    if found.image_hw != image_hw:
        raise ValueError(f"asked to plan a {image_hw} image, {found.strategy!r} planned one of {found.image_hw}")
    return found


@lru_cache(maxsize=16384)
def _cached(image_hw: tuple[int, int], config: StrategyConfig) -> SlicePlan:
    return _FUNCTIONS[type(config)](image_hw, config)


def config_from_dict(data: Mapping[str, Any]) -> StrategyConfig:
    """The inverse of any strategy config's ``to_dict``, also after JSON text.

    Raises:
        ValueError: An unknown rule or setting.
    """
    rules = {kind.__name__: kind for kind in _FUNCTIONS}
    if data.get("rule") not in rules:
        raise ValueError(f"unknown rule {data.get('rule')!r}; known are {', '.join(rules)}")
    return rules[data["rule"]].from_dict(data)
