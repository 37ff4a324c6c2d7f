"""Any slicing's plans and layouts as an encoder has them: with its compressor's tokens and its schema's separators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from uhd.schema.layout import Entry, SpatialSchema, TokenLayout, layout
from uhd.slicing import SlicePlan, Slicing, SlicingLike, VideoPlan, find
from uhd.slicing.config import OWN, REGISTERED, Recounted
from uhd.slicing.rules import slicing_from_dict as uncounted_from_dict

PLAIN = SpatialSchema(name="plain", column="", row="")
"""No symbols at all: the views in the plan's own order."""

IMAGE, NEWLINE = "image", "newline"
COUNTED = "FittedRule"
"""What the dictionary of a :class:`Counted` has in place of a rule's name."""


def layout_of(plan: SlicePlan, schema: SpatialSchema, *, image_index: int = 0) -> TokenLayout:
    """As :func:`uhd.schema.layout`, for plans of every strategy.

    A plan with a packing is one entry ``"image"`` of ``plan.num_tokens`` positions: its newlines are among the tokens,
    and the schema has no part in it. Under :data:`PLAIN`, the overview is where the plan has it.

    >>> from uhd.slicing import plan
    >>> layout_of(plan((336, 672), "llava-next"), PLAIN).symbols
    ('image',)
    """
    if plan.packing is not None:
        return TokenLayout((Entry(IMAGE, 0, 0, plan.num_tokens),), PLAIN)
    if schema == PLAIN:
        schema = PLAIN.replace(overview="first" if plan.views and plan.views[0].kind == "overview" else "last")
    return layout(plan, schema, image_index=image_index)


def checked_layout(plan: SlicePlan, schema: SpatialSchema, *, where: str, advice: str) -> TokenLayout:
    """As :func:`layout_of`, or a ``ValueError`` where the plan counts other separators than the schema has."""
    laid = layout_of(plan, schema)
    if plan.packing is None and plan.num_separators != laid.num_separators:
        raise ValueError(
            f"{where} is planned by {plan.strategy!r} with {plan.num_separators} separators, schema {schema.name!r} "
            f"has {laid.num_separators}: {advice}"
        )
    return laid


def video_layout(plan: VideoPlan, schema: SpatialSchema) -> TokenLayout:
    """The frames' layouts one after the other, and the newline; view indices go on from frame to frame.

    >>> from uhd.slicing import plan_video
    >>> laid = video_layout(plan_video((336, 336), 2, "llava-onevision"), PLAIN)
    >>> laid.symbols, laid.num_tokens
    (('image', 'image', 'newline'), 393)
    """
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


def planned_layout(plan: SlicePlan | VideoPlan, schema: SpatialSchema, index: int = 0) -> TokenLayout:
    """The layout of an image, the ``index``-th of its sample, or of a video."""
    return video_layout(plan, schema) if isinstance(plan, VideoPlan) else layout_of(plan, schema, image_index=index)


@dataclass(frozen=True)
class Counted(Recounted):
    """A rule's cuts with an encoder's counts.

    Attributes:
        rule: A strategy, or your own function.
        tokens_per_view: What a compressor makes of any view; it takes the place of the rule's counts and packing.
            A ``nested`` rule's lower counts stay: such a view keeps the first latents; those of a canvas with
            ``latents_hw`` stay too. ``None`` keeps both.
        schema: Its separators are counted; not for plans that keep a packing. ``None``: the rule's own count.
    """

    rule: Slicing
    tokens_per_view: int | None = None
    schema: SpatialSchema | None = None

    def fit(self, plan: SlicePlan) -> SlicePlan:
        return _fit(plan, self.tokens_per_view, self.schema, self.nested)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; :func:`slicing_from_dict` is the inverse, except for a function."""
        return {
            "rule": COUNTED,
            "base": self.rule.to_dict(),
            "tokens_per_view": self.tokens_per_view,
            "schema": self.schema and self.schema.to_dict(),
        }


def counted(slicing: Slicing, tokens_per_view: int | None, schema: SpatialSchema) -> Slicing:
    """A slicing that counts what a compressor gives and a schema adds; the rule itself where both leave its counts.

    >>> rule = find("internvl")
    >>> rule.plan((448, 448)).num_tokens, counted(rule, 64, PLAIN).plan((448, 448)).num_tokens
    (256, 64)

    ``tokens_per_view``: ``None`` where it depends on the view. :data:`PLAIN` leaves the separators of other rules than
    the adaptive planner's as they count them. ``latents="fitted"`` leaves the adaptive planner's tokens.
    """
    if slicing.uses_schema:
        found = schema.slicing_config(slicing)
        return found if found.latents == "fitted" else found.replace(tokens_per_view=tokens_per_view)
    rule = slicing.rule if isinstance(slicing, Counted) else slicing
    separators = None if schema == PLAIN else schema
    return rule if tokens_per_view is None and separators is None else Counted(rule, tokens_per_view, separators)


@lru_cache(maxsize=4096)
def _fit(found: SlicePlan, tokens_per_view: int | None, schema: SpatialSchema | None, nested: bool) -> SlicePlan:
    if tokens_per_view is not None:
        canvases = tuple(
            replace(c, tokens_per_view=min(c.tokens_per_view, tokens_per_view) if nested else tokens_per_view)
            if c.latents_hw is None
            else c
            for c in found.canvases
        )
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


def slicing_from_dict(data: Mapping[str, Any]) -> Slicing:
    """The inverse of ``to_dict`` of any slicing that an encoder holds.

    >>> rule = counted(find("internvl"), 64, PLAIN)
    >>> slicing_from_dict(rule.to_dict()) == rule
    True

    Raises:
        ValueError: An unknown rule or setting, or a function of the caller's own.
    """
    if data.get("rule") != COUNTED:
        return uncounted_from_dict(data)
    base, schema = uncounted_from_dict(data["base"]), data["schema"]
    return Counted(base, data["tokens_per_view"], schema and SpatialSchema.from_dict(schema))


def own_function(slicing: SlicingLike | Mapping[str, Any]) -> str | None:
    """The name of the caller's own function in a slicing or its dictionary; ``None`` where it has none.

    >>> own_function("llava-uhd") is None
    True
    """
    data = slicing if isinstance(slicing, Mapping) else find(slicing).to_dict()
    data = data.get("base", data)
    return data["name"] if data.get("rule") == OWN else None


def named_function(data: Mapping[str, Any]) -> str | None:
    """The name of a function in a slicing's dictionary, registered or not: what the dictionary alone does not bring
    back.

    >>> named_function({"rule": "registered", "name": "halves"})
    'halves'
    """
    data = data.get("base", data)
    return data["name"] if data.get("rule") in (OWN, REGISTERED) else None


__all__ = [
    "PLAIN",
    "Counted",
    "checked_layout",
    "counted",
    "layout_of",
    "named_function",
    "own_function",
    "planned_layout",
    "slicing_from_dict",
    "video_layout",
]
