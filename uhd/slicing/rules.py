"""The front door: plan an image by any rule, and find rules by name.

A name stands for a preset of the adaptive planner or for a strategy of another system; settings may follow it, as in
``"llava-uhd-safe+max_slices=12"``. Your own rule needs no name: pass the function.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from uhd.settings import as_tuples, check_free, place_of, plain_name, unknown_name
from uhd.slicing.adaptive import DEFAULT, PRESETS, RULES, SlicingConfig
from uhd.slicing.config import OWN, REGISTERED, OwnRule, Rule, Slicing
from uhd.slicing.grids import Candidate
from uhd.slicing.plan import SlicePlan
from uhd.slicing.strategies import ALIASES, STRATEGIES

SlicingLike = Slicing | Rule | str
"""What stands for a slicing wherever one is asked for: itself, your own function, or a name."""

_REGISTERED: dict[str, Slicing] = {}

_ADAPTIVE = {
    "llava-uhd": "adaptive grid of up to 7 slices near 336 px, overview last; the released LLaVA-UHD rule",
    "llava-uhd-safe": "the same, with every view kept within 576 patches also for degenerate images (the default)",
    "llava-uhd-paper": "the first release's rule: cap 6 that may be exceeded by one, small images are cut too",
    "minicpm-v": "adaptive grid of up to 9 slices near 448 px, sides rounded, overview first; MiniCPM-V 2.0 to 2.6",
    "minicpm-v-4.6": "the same in multiples of 56 px, patches / 16 tokens a view; MiniCPM-V 4.6",
    "minicpm-v-4.6-4x": "the same in multiples of 28 px, patches / 4 tokens a view; MiniCPM-V 4.6 in its 4x mode",
    "uhd-plus": "one native view up to 8:1, of as many patches as slices and overview; to be trained",
}


def plan(image_hw: tuple[int, int], config: SlicingLike | None = None, *, max_tokens: int | None = None) -> SlicePlan:
    """Plan one image by the adaptive rule or by any other.

    Args:
        image_hw: (height, width) of the image, px.
        config: Settings of any rule, its name (see :func:`uhd.strategies`), or your own function from (height, width)
            to a :class:`SlicePlan`; ``None`` is ``"llava-uhd-safe"``.
        max_tokens: Bound on ``plan.num_tokens``, met by fewer slices; for the adaptive planner only.

    Returns:
        The plan. Equal arguments give the same (cached) object, unless the rule is your own function.

    Raises:
        ValueError: The size is not two ints in 1..1,000,000, the rule refuses it, no strategy has that name, or not
            even the overview fits ``max_tokens``.
        TypeError: ``config`` is none of these, or your function did not return a plan.

    >>> found = plan((1008, 672))
    >>> found.grid, found.slice_hw, found.overview_hw, found.num_tokens
    ((3, 2), (336, 336), (406, 266), 454)
    >>> print(plan((1008, 672), "pixtral"))
    pixtral-1024-p16: 1008x672 px (height x width) -> overview 1008x672 px, 1 view, 2646 patches, 2646 tokens
    """
    slicing = find(config)
    if max_tokens is not None:
        slicing = slicing.within(max_tokens)
    return slicing.plan(image_hw)


def candidates(
    image_hw: tuple[int, int], config: SlicingLike | None = None, *, max_tokens: int | None = None
) -> tuple[Candidate, ...]:
    """Every grid that was considered for this image, best first.

    ``()`` where the image is not cut, or the rule scores no grids. Equal scores stay in the order in which the rule
    tries them, so the first entry is the plan's grid. Arguments and errors as in :func:`plan`.

    >>> for grid, score, tied in candidates((1008, 672))[:3]:
    ...     print(grid, round(score, 3), tied)
    (3, 2) 0.0 False
    (2, 3) -0.811 False
    (5, 1) -1.204 False
    """
    slicing = find(config)
    if max_tokens is not None:
        slicing = slicing.within(max_tokens)
    return slicing.candidates(image_hw)


def strategies() -> dict[str, str]:
    """Every rule's name and one line about it; the shorter names come last.

    >>> strategies()["gemma3"]
    'gemma3-896: stretched to 896 px, 256 tokens; Gemma 3 by default'
    """
    named = {name: entry.summary for name, entry in STRATEGIES.items()}
    short = {alias: f"{name}: {named[name]}" for alias, name in ALIASES.items()}
    return {**_ADAPTIVE, **named, **short, **{name: _line_about(rule) for name, rule in _REGISTERED.items()}}


def _line_about(rule: Slicing) -> str:
    if not isinstance(rule, OwnRule):
        return repr(rule)
    function = getattr(rule.function, "func", rule.function)  # of a partial
    return (function.__doc__ or "").strip().partition("\n")[0] or "a function of your own"


def register_strategy(name: str, rule: Slicing | Rule | None = None) -> Any:
    """Give a rule of your own a name, which then stands for it wherever a strategy's name does, and is what is saved.

    What was saved with it loads in a process that has registered it too; any other says what to register. Settings of
    a class of your own, a :class:`uhd.slicing.strategies.StrategyConfig`, are saved as they are once one of them has
    a name.

    Args:
        name: A dash and an underscore are the same, and so are capital and small letters.
        rule: A function from (height, width) to a :class:`SlicePlan`, or settings. Without it, a decorator.

    Returns:
        The rule.

    Raises:
        TypeError: Neither a function nor settings.
        ValueError: The name stands for another rule, or the rule has another name. The same function defined again, as
            in a notebook, takes the place of the old one.

    >>> @register_strategy("stretched-small")
    ... def stretched_small(image_hw):
    ...     return plan(image_hw, "blip2")
    >>> strategy("stretched-small") == find(stretched_small)
    True
    """
    if rule is None:
        check_free("strategy", name, {}, None)  # a decorator without a name is told where it stands
        return lambda given: register_strategy(name, given)
    if not callable(rule) or isinstance(rule, type):
        raise TypeError(f"a strategy is a function from (height, width) to a SlicePlan, or settings; got {rule!r}")
    given = rule.function if isinstance(rule, OwnRule) else rule
    if isinstance(given, Slicing):
        _check_settings(given)
    if "+" in str(name):
        raise ValueError(f"a strategy's name has no '+', after which settings follow: got {name!r}")
    taken = {known: find(known) for known in (*ALIASES, *PRESETS, *STRATEGIES, *_REGISTERED)}
    taken = {known: one.function if isinstance(one, OwnRule) else one for known, one in taken.items()}
    check_free("strategy", name, taken, given)
    name = plain_name(name)
    _REGISTERED[name] = given if isinstance(given, Slicing) else OwnRule(given, registered=name)
    return rule


def _check_settings(rule: Slicing) -> None:
    """Refuse settings that their dictionary would not bring back."""
    kind, word, known = type(rule), rule.to_dict().get("rule"), _settings_classes()
    if word not in known and word != kind.__name__:
        raise TypeError(f"{kind.__name__}.to_dict() has not its class's name as 'rule': make it a StrategyConfig")
    if place_of(known.get(word, kind)) != place_of(kind):
        raise ValueError(f"settings named {word!r} are {place_of(known[word])} already: rename {place_of(kind)}")


def _settings_classes() -> dict[str, type[Slicing]]:
    """Every class of settings by the ``rule`` of its dictionary."""
    configs = [*_REGISTERED.values(), *(entry.config for entry in STRATEGIES.values())]
    classes = {type(config).__name__: type(config) for config in configs if not isinstance(config, OwnRule)}
    return {**classes, **dict.fromkeys(RULES, SlicingConfig)}


def strategy(name: str) -> Slicing:
    """The rule of this name (dashes and underscores are the same), to be called with (height, width) in px.

    Settings may follow the name, each after a ``+``; values are written as in JSON, texts also without quotes.

    Raises:
        ValueError: No such rule, or no such setting of it; the message lists the nearest names, or all settings.

    >>> strategy("llava-next")((1008, 672)).grid
    (2, 2)
    >>> strategy("llava-uhd-safe+cut_by=shape+max_slices=9")((100, 2000)).grid
    (1, 7)
    """
    return find(name)


def find(rule: SlicingLike | None) -> Slicing:
    """The rule that a name stands for, or your own function as a rule; a rule as it is; the default for ``None``.

    Raises:
        ValueError: No rule has that name, or it has no such setting.
        TypeError: Neither a name, nor a rule, nor a function.

    >>> find("internvl").max_tiles
    12
    """
    if isinstance(rule, Slicing):
        return rule
    if rule is None:
        return DEFAULT
    if isinstance(rule, str):
        key = ALIASES.get(plain_name(rule), plain_name(rule))
        if key in PRESETS:
            return PRESETS[key]
        if key in STRATEGIES:
            return STRATEGIES[key].config
        if key in _REGISTERED:
            return _REGISTERED[key]
        if "+" in rule:
            return with_settings(rule)[0]
        known = [*PRESETS, *ALIASES, *STRATEGIES, *_REGISTERED]
        raise unknown_name("strategy", rule, known, f"uhd.strategies() lists all {len(known)} names")
    if callable(rule):
        # by ==: a bound method is another object every time it is taken
        named = (one for one in _REGISTERED.values() if isinstance(one, OwnRule) and one.function == rule)
        return next(named, OwnRule(rule))
    raise TypeError(
        "a strategy is a name, a SlicingConfig, another strategy's config, or a function from (height, width) to a "
        f"SlicePlan; got {type(rule).__name__}"
    )


def with_settings(text: str) -> tuple[Slicing, dict[str, Any]]:
    """The rule of ``name+setting=value+...`` and the settings that it gives; errors as of :func:`find`.

    >>> with_settings("internvl+max_tiles=6")[1]
    {'max_tiles': 6}
    """
    name, *words = text.split("+")
    rule, given = find(name.strip()), {}
    known = [] if isinstance(rule, OwnRule) else [f.name for f in fields(rule) if f.name not in _NO_SETTINGS]
    for word in words:
        setting, equals, value = word.partition("=")
        setting = setting.strip().replace("-", "_").lower()
        if not equals or setting not in known:
            told = f"its settings are {', '.join(known)}" if known else "it is a function, which has no settings"
            raise ValueError(
                f"{text!r:.80} is no rule: {word!r:.40} is not a setting of {name!r} and its value; {told}"
            )
        if setting in given:
            raise ValueError(f"{text!r:.80} is no rule: it gives {setting} twice")
        given[setting] = _value(value.strip())
    return rule.replace(**given), given


_NO_SETTINGS = ("name", "separators")  # of those that follow a name
_WORDS = {"true": True, "false": False, "none": None}


def _value(text: str) -> Any:
    """As JSON or Python writes it; any other text is itself."""
    try:
        return _WORDS[text.lower()] if text.lower() in _WORDS else as_tuples(json.loads(text))
    except (ValueError, RecursionError):
        return text


def split_names(text: str) -> list[str]:
    """Names between commas; those inside brackets belong to a setting.

    >>> split_names("clip, llava-next+grids=[[1,2],[2,1]]")
    ['clip', 'llava-next+grids=[[1,2],[2,1]]']
    """
    names, depth = [""], 0
    for mark in text:
        depth += (mark in "[{") - (mark in "]}")
        if mark == "," and depth <= 0:
            names.append("")
        else:
            names[-1] += mark
    return [name.strip() for name in names if name.strip()]


def rule_name(rule: SlicingLike) -> str:
    """The name in a rule's settings, or that of the function."""
    return find(rule).name


def slicing_from_dict(data: Mapping[str, Any]) -> Slicing:
    """The inverse of any slicing's ``to_dict``, also after JSON text; see also :mod:`uhd.schema.counted`.

    Raises:
        ValueError: An unknown rule or setting, a function of your own, or a name that is not registered.

    >>> slicing_from_dict({**find("pixtral").to_dict(), "longest": 512}).longest
    512
    """
    kind = data.get("rule")
    if kind == OWN:
        raise ValueError(
            f"it was saved with a slicing function of the caller's own, {data.get('name')!r}: pass slicing=... to "
            "VisualEncoder.from_pretrained"
        )
    if kind == REGISTERED:
        if data.get("name") not in _REGISTERED:
            raise ValueError(
                f"it was saved with the strategy {data.get('name')!r}, which is not registered here: call "
                f"uhd.register_strategy({data.get('name')!r}, your function) before loading, or pass slicing=..."
            )
        return _REGISTERED[data["name"]]
    known = _settings_classes()
    if kind not in known:
        raise ValueError(
            f"unknown rule {kind!r}; known are {', '.join(known)}. Settings of a class of your own need "
            "uhd.register_strategy first"
        )
    return known[kind].from_dict(data)
