"""A choice in words for a terminal, with settings to paste, and as JSON."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

from uhd.slicing import PRESETS, Slicing, SlicingConfig, find, strategies
from uhd.slicing.config import OwnRule

from .choosing import Choice, Option
from .learned import KINDS
from .summary import aligned, counted

STRONG = 16
"""Patches a token above which a choice says that it compresses a lot: most released systems stay at or below."""


def pasted(option: Option) -> str:
    """The option as Python, to be passed as ``slicing=`` to an encoder or as ``config`` to ``uhd.plan``."""
    rule = option.rule
    if isinstance(rule, SlicingConfig) and rule.name in PRESETS:
        settings = "".join(f", {setting}" for setting in _changed(rule, PRESETS[rule.name]))
        return f'uhd.SlicingConfig.preset("{rule.name}"{settings})'
    if isinstance(rule, SlicingConfig) and (option.strategy not in strategies() or find(option.strategy) != rule):
        return f"uhd.SlicingConfig({', '.join(_changed(rule, SlicingConfig()))})"
    if isinstance(rule, OwnRule) and rule.registered is None:
        return rule.name
    return f"uhd.strategy({json.dumps(option.strategy)})"


def _changed(rule: SlicingConfig, other: SlicingConfig) -> list[str]:
    """The settings of a rule that another one has otherwise, those that are varied first."""
    names = dict.fromkeys(("max_slices", "tokens_per_view", "image_size", "max_tokens"))
    names |= dict.fromkeys(field.name for field in fields(rule))
    changed = [name for name in names if getattr(rule, name) != getattr(other, name)]
    return [f"{name}={'uhd.slicing.' * (name == 'separators')}{getattr(rule, name)!r}" for name in changed]


def needed(rule: Slicing) -> str:
    """What else of an encoder the settings ask for; empty where they say nothing of it."""
    if not isinstance(rule, SlicingConfig):
        return ""
    tokens = "pixel merging" if rule.tokens_per_view is None else f"a compressor of {rule.tokens_per_view} latents"
    if rule.fits_latents:
        tokens = f"a PerceiverResampler trained with {rule.tokens_per_view} tokens a view on average, fitted to views"
    return f"a vision encoder of {rule.image_size} px and patches of {rule.patch_size} px, {tokens}"


def to_dict(choice: Choice) -> dict[str, Any]:
    """Plain JSON types: the chosen option, and under ``alternatives`` the others with what they lose."""
    return {
        **_of(choice.best),
        "images": len(choice.images),
        "budget": choice.budget,
        "better": choice.meaning,
        "options": {
            "considered": choice.considered,
            "over_budget": choice.over_budget,
            "refusing": choice.refusing,
            "other": choice.other,
        },
        "alternatives": [{**_of(option), **_loss(choice, option)} for option in _others(choice)],
    }


def _of(option: Option) -> dict[str, Any]:
    found = {
        "strategy": option.strategy,
        "name": option.name,
        "config": option.rule.to_dict(),
        "python": pasted(option),
        "tokens": option.tokens,
        "tokens_p95": option.tokens_p95,
        "tokens_max": option.tokens_max,
        "tflops": option.tflops,
        "tflops_max": option.tflops_max,
        "resolution_kept": option.resolution_kept,
        "seam": option.seam,
        "padding": option.padding,
        "patches_per_token": option.patches_per_token,
    }
    if isinstance(option.rule, SlicingConfig):
        rule = option.rule
        found |= {"slices": rule.max_slices, "latents": rule.tokens_per_view, "base_size": rule.image_size}
    if option.lost is not None:
        found["learned"] = option.lost._asdict()
    return found


def _loss(choice: Choice, option: Option) -> dict[str, Any]:
    best = choice.best
    return {
        "loses": {
            "resolution_kept": best.resolution_kept - option.resolution_kept,
            "seam": option.seam - best.seam,
            "padding": option.padding - best.padding,
            "tokens": option.tokens - best.tokens,
        },
        "on": [
            {"input": image.name, "image_hw": list(image.image_hw), "resolution_kept": own, "chosen": kept}
            for image, own, kept in choice.worse_at(option)
        ],
    }


def text(choice: Choice) -> str:
    """The recommendation, what it costs and keeps, what others would lose and where, and what to paste."""
    best = choice.best
    left = [
        f"{choice.over_budget} above the budget",
        *([f"{choice.refusing} refuse an image"] if choice.refusing else []),
        *([f"{choice.other} left out for another reason asked for"] if choice.other else []),
    ]
    said = [
        f"{counted(len(choice.images), 'image')} of {counted(len(choice.counts), 'size')}; budget: {choice.budget}",
        f"{choice.considered:,} options, {', '.join(left)}",
        f"better: {choice.meaning}",
        "",
        best.name,
        f"  {best.tokens:.0f} tokens an image (95 of 100 up to {best.tokens_p95:.0f}, at most {best.tokens_max:.0f}), "
        f"{best.tflops:.1f} TFLOPs",
        f"  {100 * best.resolution_kept:.1f}% of resolution kept, seams of {best.seam:.2f} image sides, "
        f"{100 * best.padding:.1f}% padding, {best.patches_per_token:.1f} patches a token",
    ]
    if best.lost is not None:
        said.append(f"  {best.lost} of exact answers lost ({KINDS[best.lost.kind]}; 95% interval)")
    if best.patches_per_token > STRONG:
        said.append(
            f"  note: most systems make a token of at most {STRONG} patches; what is lost beyond is not in the "
            f"resolution kept. --patches-per-token {STRONG} leaves such rules out"
        )
    others = _others(choice)
    said += [
        "",
        "What the others lose:",
        *_table(choice, others),
        "",
        "Of which image each keeps less, most so first:",
    ]
    said += [*_where(choice, others), "", "To paste:", f"  slicing = {pasted(best)}"]
    if needed(best.rule):
        said.append(f"  # with {needed(best.rule)}")
    return "\n".join(said)


def _others(choice: Choice) -> list[Option]:
    """The runner-up, where it is no alternative, and those."""
    first = choice.runner_up
    return [*([first] if first is not None and first not in choice.alternatives else []), *choice.alternatives]


def _table(choice: Choice, others: list[Option]) -> list[str]:
    rows = [("  option", "kept", "loses", "seam", "padding", "tokens", "at most", "TFLOPs", "patches/token")]
    learned = choice.best.lost is not None
    for option in (choice.best, *others):
        less = choice.best.resolution_kept - option.resolution_kept
        row = (
            ("* " if option is choice.best else "  ") + option.name,
            f"{100 * option.resolution_kept:.1f}%",
            "-" if option is choice.best else f"{100 * less:.1f}%",
            f"{option.seam:.2f}",
            f"{100 * option.padding:.1f}%",
            f"{option.tokens:.0f}",
            f"{option.tokens_max:.0f}",
            f"{option.tflops:.1f}",
            f"{option.patches_per_token:.1f}",
        )
        rows.append((*row, str(option.lost)) if learned else row)
    if learned:
        rows[0] = (*rows[0], "answers lost")
    return aligned(rows)


def _where(choice: Choice, others: list[Option]) -> list[str]:
    """For every other option the image that it loses most of; of the runner-up three."""
    lines = []
    for option in others:
        found = choice.worse_at(option, 3 if option is choice.runner_up else 1)
        lines += [
            f"  {option.name}: {100 * own:.1f}% of {image.name} ({image.image_hw[1]}x{image.image_hw[0]} px), "
            f"not {100 * kept:.1f}%"
            for image, own, kept in found
        ] or [f"  {option.name}: it keeps as much of every image"]
    return lines or ["  there is no other option"]
