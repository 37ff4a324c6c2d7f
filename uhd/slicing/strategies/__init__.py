"""Slicing rules of other systems by name: each is a function from (height, width) to a :class:`uhd.slicing.SlicePlan`.

A family of rules has a file: frozen settings, one pure function each, and a dict of named presets.
:mod:`uhd.slicing.rules` finds them by name.
"""

from __future__ import annotations

from uhd.moved import moved
from uhd.slicing.strategies import anyres, cells, closest, fixed, native, upscale
from uhd.slicing.strategies.base import Strategy, StrategyConfig

_FAMILIES = (fixed, anyres, closest, upscale, cells, native)

STRATEGIES: dict[str, Strategy] = {name: entry for family in _FAMILIES for name, entry in family.STRATEGIES.items()}
"""Every named rule of other systems: its config, function and one line about it. The adaptive presets are not here."""

ALIASES: dict[str, str] = {alias: name for family in _FAMILIES for alias, name in family.ALIASES.items()}
"""Shorter names, and what they stand for."""

__getattr__ = moved(
    __name__,
    {
        **dict.fromkeys(("find", "strategies", "strategy"), "uhd.slicing"),
        **dict.fromkeys(("Rule", "rule_name"), "uhd.slicing.rules"),
        "config_from_dict": "uhd.slicing.rules:slicing_from_dict",
    },
)

__all__ = ["ALIASES", "STRATEGIES", "Strategy", "StrategyConfig"]
