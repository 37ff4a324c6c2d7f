"""Which rule, with which settings, for these images under this budget: every option is measured, and one is taken.

*Better* is :data:`MEANING`, and with ``learned`` :data:`LEARNED`. Numbers are compared rounded, so that a difference
that nobody would see decides nothing. An option that refuses an image is none.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from uhd.slicing import PRESETS, Slicing, SlicingConfig, SlicingLike, plan_many
from uhd.slicing.config import positive_int

from .inputs import Input, given_inputs
from .learned import Lost, differs, lost, shapes
from .measuring import Measured, chosen_rules, measure_sizes, measured_plans, measured_rows, weighted_quantile

SLICES = (*range(1, 13), 16, 20, 24, 32, 40)
LATENTS = (64, 100, 144, 256)
BASE_SIZES = (224, 336, 378, 448)
"""px; 378 is SigLIP's 384 in whole patches of 14."""

FAMILIES = ("llava-uhd-safe", "minicpm-v", "minicpm-v-4.6", "minicpm-v-4.6-4x")
"""Presets whose settings are varied where no rules are named; the others are options as they are then."""

MEANING = (
    "more resolution kept (to 0.1%), then shorter seams (to 0.01 image sides), less padding (to 0.1%), fewer tokens; "
    "means over the images"
)
LEARNED = (
    "fewer exact answers lost as the learned comparison measured it (to 0.1%; of resolution, and of the kind of "
    "cutting on images of these shapes), then shorter seams, less padding, fewer tokens; means over the images"
)
_SHOWN = 8  # alternatives
_WORST = 3  # images of each
_Settings = tuple[Sequence[int], Sequence[int], Sequence[int]]  # slices, latents, base sizes


@dataclass(frozen=True, eq=False)  # arrays have no single answer
class Option:
    """A rule with settings, and what it makes of the images: means, and of tokens the 95th percentile and the most.

    Attributes:
        name: The rule, and the settings that differ from its preset's.
        strategy: The rule alone.
        rule: It, with its settings.
        kept: (sizes,) resolution kept of each size.
        token_counts: (sizes,) tokens of each size.
        lost: Of exact answers, see :mod:`uhd.compare.learned`; ``None``: not measured, or not asked for.
    """

    name: str
    strategy: str
    rule: Slicing
    tokens: float
    tokens_p95: float
    tokens_max: float
    tflops: float
    tflops_max: float
    resolution_kept: float
    seam: float
    padding: float
    patches_per_token: float
    kept: np.ndarray
    token_counts: np.ndarray
    lost: Lost | None = None

    @property
    def worth(self) -> tuple[float, ...]:
        """What is compared, the best being the least; of equals the first is taken, which has fewer slices."""
        first = -round(self.resolution_kept, 3) if self.lost is None else round(self.lost.mean, 3)
        return first, round(self.seam, 2), round(self.padding, 3), round(self.tokens, 6)

    def same_as(self, other: Option) -> bool:
        """Whether both make the same of every image, as caps on slices do that none of them reaches."""
        pairs = ((self.kept, other.kept), (self.token_counts, other.token_counts))
        return self.strategy == other.strategy and self.worth == other.worth and all(np.array_equal(*p) for p in pairs)


@dataclass(frozen=True, eq=False)  # arrays have no single answer
class Choice:
    """The best option, the next best ones, and how many options there were.

    Attributes:
        images: Every image that was asked about.
        sizes_hw: (S, 2) their different sizes, px; ``counts`` (S,) images of each.
        budget: What was asked for, in words.
        best: The answer.
        runner_up: The best of all others that make something else of an image; ``None`` where there is none.
        alternatives: The best of every other rule, the best first, at most eight.
        meaning: What better meant.
        considered, over_budget, refusing, other: Numbers of options: all; above the budget; that refuse an image; that
            compress more than was allowed, or with ``learned`` cut as no measured arm does.
    """

    images: tuple[Input, ...]
    sizes_hw: np.ndarray
    counts: np.ndarray
    budget: str
    best: Option
    runner_up: Option | None
    alternatives: tuple[Option, ...]
    meaning: str
    considered: int
    over_budget: int
    refusing: int
    other: int

    def worse_at(self, other: Option, most: int = _WORST) -> list[tuple[Input, float, float]]:
        """Images of which another option keeps less than the best one, most so first: it, kept by each of the two."""
        less = np.round(self.best.kept - other.kept, 6)
        found = []
        for place in np.argsort(-less, kind="stable")[:most]:
            if less[place] > 0:
                size = tuple(self.sizes_hw[place].tolist())
                image = next(one for one in self.images if tuple(one.image_hw) == size)
                found.append((image, float(other.kept[place]), float(self.best.kept[place])))
        return found


def choose(
    inputs: Any,
    *,
    max_tokens: float | None = None,
    max_tflops: float | None = None,
    per_image: bool = False,
    rules: Iterable[SlicingLike] | None = None,
    slices: Sequence[int] = SLICES,
    latents: Sequence[int] = LATENTS,
    base_sizes: Sequence[int] = BASE_SIZES,
    patches_per_token: float | None = None,
    learned: bool = False,
    **system: Any,
) -> Choice:
    """Recommend a rule and its settings for these images under this budget.

    Options: every rule by name, and the presets :data:`FAMILIES` with all ``slices``, ``latents`` and ``base_sizes``.

    Args:
        inputs: As in :func:`uhd.compare.table`: paths, (height, width) pairs, px, and Pillow images.
        max_tokens, max_tflops: The budget: one of them, or both. TFLOPs as :func:`uhd.slicing.metrics.measure` counts.
        per_image: Every image keeps the budget; otherwise their mean does.
        rules: Options instead of all rules by name; any preset among them is varied as those above.
        slices, latents, base_sizes: Settings of the adaptive planner that are tried: caps on slices, tokens a view,
            and sides of the square that the vision encoder was trained on, px.
        patches_per_token: Leave out what makes a token of more ViT patches than that, on average. What a resampler
            loses by that is not in the resolution kept.
        learned: Weigh by what the learned comparison measured (:data:`LEARNED`); kinds of cutting that it did not
            measure are no options.
        system: ``vit``, ``resampler`` and ``lm`` of :func:`uhd.slicing.metrics.measure`.

    Raises:
        ValueError: No budget or image, a wrong size, setting or rule, or nothing fits: it says what the nearest costs.

    >>> found = choose([(1754, 1240), (1240, 1754)], max_tokens=600, rules=["llava-uhd-safe", "llava-1.5"])
    >>> found.best.name, found.best.tokens, round(found.best.resolution_kept, 3)
    ('llava-uhd-safe, 8 slices, 448 px', 584.0, 0.712)
    """
    check_budget(max_tokens=max_tokens, max_tflops=max_tflops, patches_per_token=patches_per_token)
    images = tuple(given_inputs(inputs))
    options, measured, refusals = _options(images, rules, (slices, latents, base_sizes), max_tokens, per_image, system)
    budget = _budget(max_tokens, max_tflops, per_image)
    within = _within(options, budget, refusals, max_tokens or math.inf, max_tflops or math.inf, per_image)
    allowed = _allowed(within, budget, patches_per_token, measured if learned else None)
    best, *others = sorted(allowed, key=lambda option: option.worth)
    others = [option for option in others if not option.same_as(best)]
    return Choice(
        images,
        measured.sizes_hw,
        measured.counts,
        budget,
        best,
        others[0] if others else None,
        _first_of_each([option for option in others if option.strategy != best.strategy]),
        LEARNED if learned else MEANING,
        considered=len(options) + len(refusals),
        over_budget=len(options) - len(within),
        refusing=len(refusals),
        other=len(within) - len(allowed),
    )


def check_budget(**bounds: float | None) -> None:
    """Raise a ``ValueError`` where there is no budget, or a bound is no number above 0."""
    if bounds["max_tokens"] is None and bounds["max_tflops"] is None:
        raise ValueError("a choice needs a budget: max_tokens, max_tflops, or both")
    for name, most in bounds.items():
        known = isinstance(most, numbers.Real) and not isinstance(most, bool)
        if most is not None and not (known and 0 < most < math.inf):
            raise ValueError(f"{name} is a number above 0, got {most!r}")


def check_settings(**settings: Sequence[int]) -> None:
    """Raise a ``ValueError`` where slices, latents or base sizes that are tried are no counts."""
    for name, values in settings.items():
        if isinstance(values, (str, numbers.Number)) or not len(values):
            raise ValueError(f"{name} are a list of whole numbers from 1, got {values!r}")
        for value in values:
            positive_int(f"each of {name}", value)


def _within(
    options: Sequence[Option], budget: str, refusals: list[str], max_tokens: float, max_tflops: float, per_image: bool
) -> list[Option]:
    """Options that keep the budget; a ``ValueError`` that names the nearest where there is none."""
    within, nearest = [], None
    for option in options:
        tokens, tflops = (option.tokens_max, option.tflops_max) if per_image else (option.tokens, option.tflops)
        over = max(tokens / max_tokens, tflops / max_tflops)
        if over <= 1:
            within.append(option)
        elif nearest is None or over < nearest[0]:
            nearest = over, option
    if within:
        return within
    if nearest is None:
        raise ValueError(
            f"every one of {len(refusals)} options refuses one of these images: leave such images out. The first of "
            f"them says: {refusals[0]}"
        )
    option = nearest[1]
    raise ValueError(
        f"nothing keeps the budget of {budget}: the nearest is {option.name} with {option.tokens:.0f} tokens (at most "
        f"{option.tokens_max:.0f}) and {option.tflops:.1f} TFLOPs an image"
    )


def _allowed(
    options: Sequence[Option], budget: str, patches_per_token: float | None, learned_for: Measured | None
) -> list[Option]:
    """Options that are all else that was asked for, weighed by the learned comparison where that was."""
    allowed = [o for o in options if patches_per_token is None or o.patches_per_token <= patches_per_token]
    advice = "allow more patches a token" if not allowed else "leave learned out"
    if learned_for is not None:
        images = learned_for.sizes_hw, learned_for.counts
        for place, option in enumerate(allowed):
            shares = shapes(*images, among=differs(option.rule, learned_for.sizes_hw))
            allowed[place] = replace(option, lost=lost(option.rule, option.resolution_kept, shares))
        allowed = [option for option in allowed if option.lost is not None]
    if not allowed:
        raise ValueError(
            f"{len(options)} of the options keep the budget of {budget}, and none of them what else was asked for: "
            f"{advice}"
        )
    return allowed


def _first_of_each(options: Iterable[Option]) -> tuple[Option, ...]:
    """The first option of every rule, at most eight."""
    firsts: dict[str, Option] = {}
    for option in options:
        firsts.setdefault(option.strategy, option)
    return tuple(firsts.values())[:_SHOWN]


def _budget(max_tokens: float | None, max_tflops: float | None, per_image: bool) -> str:
    parts = [f"{most:g} {name}" for most, name in ((max_tokens, "tokens"), (max_tflops, "TFLOPs")) if most is not None]
    return " and ".join(parts) + (" for every image" if per_image else " an image on average")


def _options(
    images: Sequence[Input],
    rules: Iterable[SlicingLike] | None,
    settings: _Settings,
    max_tokens: float | None,
    per_image: bool,
    system: dict[str, Any],
) -> tuple[list[Option], Measured, list[str]]:
    """Every option that plans all images, the rules by name measured, and why each other option refuses an image."""
    check_settings(**dict(zip(("slices", "latents", "base_sizes"), settings, strict=True)))
    named = chosen_rules(rules)
    presets = [PRESETS[family] for family in (FAMILIES if rules is None else PRESETS)]
    families = [rule for _, rule in named if rule in presets]
    for base in settings[2]:
        if families and all(base % preset.unit for preset in families):
            units = sorted({preset.unit for preset in families})
            raise ValueError(
                f"base size {base} px fits no preset among the rules: give multiples of {' or '.join(map(str, units))}"
            )
    measured = measure_sizes([one.image_hw for one in images], [rule for _, rule in named], **system)
    options, refusals, own = [], [], {rule for _, rule in named}
    for place, (name, rule) in enumerate(named):
        if rule in PRESETS.values() and not _among(rule, settings):
            own.discard(rule)
        elif measured.complete[place]:
            columns = {key: rows[place] for key, rows in measured.values.items()}
            options.append(_option(name, name, rule, columns, measured.counts))
        else:
            refusals.append(f"{name}: {next(why for (rule, _), why in measured.refusals.items() if rule == place)}")
    bound = int(max_tokens) if per_image and max_tokens is not None and max_tokens >= 1 else None
    for name, rule in named:
        if rule in families:
            for option in _varied(name, rule, measured, settings, bound, system):
                if isinstance(option, str):
                    refusals.append(option)
                elif option.rule not in own:
                    options.append(option)
    return options, measured, refusals


def _among(rule: SlicingConfig, settings: _Settings) -> bool:
    """Whether a preset as it is has settings that are tried."""
    slices, latents, base_sizes = settings
    counted = rule.tokens_per_view is None or rule.tokens_per_view in latents
    return rule.max_slices in slices and rule.image_size in base_sizes and counted


def _varied(
    name: str,
    preset: SlicingConfig,
    measured: Measured,
    settings: _Settings,
    bound: int | None,
    system: dict[str, Any],
) -> Iterator[Option | str]:
    """The preset with every setting, also bounded in every image's tokens; or why one refuses an image."""
    slices, latents, base_sizes = settings
    sizes, counts = measured.sizes_hw, measured.counts

    def option(rule: SlicingConfig) -> Option | str:
        columns, refused = measured_rows(sizes, rule, **system)
        worded = _worded(name, preset, rule)
        return f"{worded}: {next(iter(refused.values()))}" if refused else _option(worded, name, rule, columns, counts)

    for base in base_sizes:
        if base % preset.unit:
            continue
        for most in slices:
            cut = preset.replace(image_size=base, max_slices=most)
            planned = None if cut.fits_latents else plan_many(sizes, cut)
            own = [preset.tokens_per_view] if preset.tokens_per_view is None else latents
            for tokens in own:
                rule = cut.replace(tokens_per_view=tokens)
                if planned is None:
                    found = option(rule)
                else:
                    columns = measured_plans(sizes, _recounted(planned, rule), rule, **system)
                    found = _option(_worded(name, preset, rule), name, rule, columns, counts)
                yield found
                over = bound is not None and isinstance(found, Option) and found.tokens_max > bound
                if over and most == max(slices):
                    yield option(rule.replace(max_tokens=bound))


def _recounted(planned: dict[str, np.ndarray], rule: SlicingConfig) -> dict[str, np.ndarray]:
    """The same cuts with the rule's own tokens a view."""
    if rule.tokens_per_view is None:
        return planned
    views, grid = planned["num_views"], planned["grid"]
    separators = rule.separators.per_image + (grid[:, 0] > 0) * rule.separators.of_cut(*grid.T)
    return {**planned, "num_tokens": views * rule.tokens_per_view + separators}


def _worded(name: str, preset: SlicingConfig, rule: SlicingConfig) -> str:
    words = [name, f"{rule.max_slices} slice{'s' * (rule.max_slices > 1)}"]
    if rule.tokens_per_view != preset.tokens_per_view:
        words.append(f"{rule.tokens_per_view} latents")
    if rule.image_size != preset.image_size:
        words.append(f"{rule.image_size} px")
    if rule.max_tokens is not None:
        words.append(f"at most {rule.max_tokens} tokens")
    return ", ".join(words)


def _option(name: str, strategy: str, rule: Slicing, columns: dict[str, np.ndarray], counts: np.ndarray) -> Option:
    def mean(column: str) -> float:
        return float((columns[column] * counts).sum() / counts.sum())

    tokens = mean("tokens")
    return Option(
        name,
        strategy,
        rule,
        tokens,
        weighted_quantile(columns["tokens"], counts, 0.95),
        float(columns["tokens"].max()),
        mean("tflops"),
        float(columns["tflops"].max()),
        mean("resolution_kept"),
        mean("seam"),
        mean("padding"),
        mean("patches") / max(tokens, 1),
        columns["resolution_kept"],
        columns["tokens"],
    )
