"""Any strategy's plan and layout as an encoder has them: with its compressor's tokens and its schema's separators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from uhd.schema.layout import Entry, SpatialSchema, TokenLayout, layout
from uhd.slicing import SlicePlan, SlicingConfig, VideoPlan, plan
from uhd.slicing.rules import Rule, config_from_dict, rule_name
from uhd.slicing.sample import Planner
from uhd.slicing.strategies import StrategyConfig

PLAIN = SpatialSchema(name="plain", column="", row="")
"""No symbols at all: the views in the plan's own order."""

IMAGE, NEWLINE = "image", "newline"
ADAPTIVE_RULES = ("released", "march2024")
"""What :class:`uhd.SlicingConfig` calls its rules; other strategies' dictionaries name a class there."""


def layout_of(plan: SlicePlan, schema: SpatialSchema, *, image_index: int = 0) -> TokenLayout:
    """As :func:`uhd.schema.layout`, for plans of every strategy.

    A plan with a packing is one entry ``"image"`` of ``plan.num_tokens`` positions: its newlines are among the tokens,
    and the schema has no part in it. Under :data:`PLAIN`, the overview is where the plan has it.
    """
    if plan.packing is not None:
        return TokenLayout((Entry(IMAGE, 0, 0, plan.num_tokens),), PLAIN)
    if schema == PLAIN:
        schema = PLAIN.replace(overview="first" if plan.views and plan.views[0].kind == "overview" else "last")
    return layout(plan, schema, image_index=image_index)


def video_layout(plan: VideoPlan, schema: SpatialSchema) -> TokenLayout:
    """The frames' layouts one after the other, and the newline; view indices go on from frame to frame."""
    entries: list[Entry] = []
    start = views = 0
    for number, frame in enumerate(plan.plans):
        laid = layout_of(frame, schema, image_index=number)
        entries += [
            Entry(e.symbol, None if e.view is None else e.view + views, e.start + start, e.stop + start)
            for e in laid.entries
        ]
        start += laid.num_tokens
        views += len(laid.view_order)
    if plan.newline:
        entries.append(Entry(NEWLINE, views, start, start + 1))
    return TokenLayout(tuple(entries), schema)


@dataclass(frozen=True)
class FittedRule:
    """A rule's cuts with an encoder's counts; call it with (height, width), or pass it where a strategy goes.

    Attributes:
        rule: A strategy's config, or your own function.
        tokens_per_view: What a compressor makes of any view; it takes the place of the rule's counts and packing.
            A ``nested`` rule's lower counts stay: such a view keeps the first latents. ``None`` keeps both.
        schema: Its separators are counted; not for plans that keep a packing. ``None``: the rule's own count.
    """

    rule: StrategyConfig | Rule
    tokens_per_view: int | None = None
    schema: SpatialSchema | None = None

    @property
    def name(self) -> str:
        return rule_name(self.rule)

    @property
    def patch_size(self) -> int | None:
        return getattr(self.rule, "patch_size", None)

    def __call__(self, image_hw: tuple[int, int]) -> SlicePlan:
        return self.fit(plan(image_hw, self.rule))

    def fit(self, found: SlicePlan) -> SlicePlan:
        """A plan of the rule, counted anew."""
        return _fit(found, self.tokens_per_view, self.schema, getattr(self.rule, "nested", False))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; :func:`slicing_from_dict` is the inverse, except for a function."""
        named = isinstance(self.rule, StrategyConfig)
        return {
            "rule": type(self).__name__,
            "base": self.rule.to_dict() if named else {"rule": "custom", "name": self.name},
            "tokens_per_view": self.tokens_per_view,
            "schema": self.schema and self.schema.to_dict(),
        }


AnySlicing = SlicingConfig | StrategyConfig | FittedRule | Rule
"""What an encoder holds as ``slicing``."""


@lru_cache(maxsize=4096)
def _fit(found: SlicePlan, tokens_per_view: int | None, schema: SpatialSchema | None, nested: bool) -> SlicePlan:
    if tokens_per_view is not None:
        counts = [min(c.tokens_per_view, tokens_per_view) if nested else tokens_per_view for c in found.canvases]
        canvases = tuple(replace(canvas, tokens_per_view=n) for canvas, n in zip(found.canvases, counts, strict=True))
        visual = sum(len(canvas.tiles) * canvas.tokens_per_view for canvas in canvases)
        found = replace(found, canvases=canvases, num_visual_tokens=visual, num_separators=0, packing=None)
    if schema is not None and found.packing is not None:
        raise ValueError(
            f"{found.strategy!r} has its own packing, so schema {schema.name!r} cannot lay its views out: leave the "
            "schema out, or take a compressor with a fixed number of tokens a view"
        )
    if schema is not None:
        found = replace(found, num_separators=layout_of(found, schema).num_separators)
    return found


def slicing_from_dict(data: Mapping[str, Any]) -> SlicingConfig | StrategyConfig | FittedRule:
    """The inverse of ``to_dict`` of any slicing that an encoder holds.

    Raises:
        ValueError: An unknown rule or setting, or a function of the caller's own.
    """
    kind = data.get("rule")
    if kind == "custom":
        raise ValueError(
            f"it was saved with a slicing function of the caller's own, {data.get('name')!r}: pass slicing=... to "
            "VisualEncoder.from_pretrained"
        )
    if kind == FittedRule.__name__:
        schema = data["schema"] and SpatialSchema.from_dict(data["schema"])
        base = slicing_from_dict(data["base"])
        if not isinstance(base, StrategyConfig):
            raise ValueError(f"a fitted rule holds a strategy's config, got {data['base']!r}")
        return FittedRule(base, data["tokens_per_view"], schema)
    if kind in ADAPTIVE_RULES:
        return SlicingConfig.from_dict(data)
    return config_from_dict(data)


def slicing_to_dict(slicing: AnySlicing) -> dict[str, Any]:
    """What :func:`slicing_from_dict` reads; of a function of the caller's own only the name."""
    if isinstance(slicing, (SlicingConfig, StrategyConfig, FittedRule)):
        return slicing.to_dict()
    return FittedRule(slicing).to_dict()["base"]


def own_function(slicing: AnySlicing | Mapping[str, Any]) -> str | None:
    """The name of the caller's own function in a slicing or its dictionary; ``None`` where it has none."""
    data = slicing if isinstance(slicing, Mapping) else slicing_to_dict(slicing)
    data = data["base"] if data.get("rule") == FittedRule.__name__ else data
    return data["name"] if data.get("rule") == "custom" else None


def planner_of(slicing: AnySlicing) -> Planner:
    """A slicing as :func:`uhd.slicing.sample.plan_sample` takes it."""
    if isinstance(slicing, FittedRule):
        return Planner(slicing.rule, slicing.fit)
    return Planner(slicing)


__all__ = [
    "PLAIN",
    "FittedRule",
    "layout_of",
    "own_function",
    "planner_of",
    "slicing_from_dict",
    "slicing_to_dict",
    "video_layout",
]
