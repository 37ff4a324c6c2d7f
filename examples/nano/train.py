"""Train the nano model from nothing, on one or two CPU cores.

    python examples/nano/train.py runs/nano                # all stages, one after the other
    python examples/nano/train.py runs/nano vision & python examples/nano/train.py runs/nano text & wait
    python examples/nano/train.py runs/nano joint polish   # two cores: the first two stages side by side

A stage that was interrupted goes on from its newest checkpoint; one that is done is not run again. A folder is for one
seed, rule and number of steps, which ``run.json`` tells; others are refused. All take about 80 CPU minutes. At the end
the folder holds the model in the transformers format (``model``), how well it reads fresh images
(``evaluation.json``), and the curves of the training (``curves.svg``).
"""

from __future__ import annotations

import argparse
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from stages import Stage, Supervision, fit_attention, start_from, start_joint, train

from uhd import UHDForConditionalGeneration
from uhd.charts import curves, log_axis, percent_axis
from uhd.nano.build import NanoConfig, build_nano, plus_parts
from uhd.nano.evaluate import EVALUATION_SEED, evaluate, summary, table
from uhd.nano.task import QUESTIONS

JOINT = Stage(
    name="joint",
    steps=4500,
    matrix_lr=0.006,
    other_lr=0.002,
    latent_weight=0.1,
    patch_weight=0.1,
    match_weight=0.0,
)
RECIPE = {
    "vision": Stage(name="vision", steps=2400),
    "text": Stage(name="text", steps=2400, matrix_lr=0.006, other_lr=0.002),
    "joint": JOINT,
    "polish": replace(JOINT, name="polish", steps=1400, matrix_lr=0.003, other_lr=0.001, every=True),
}
RULES = {"llava-uhd": lambda: {"config": NanoConfig()}, "uhd-plus": plus_parts}
"""What :func:`uhd.nano.build_nano` takes for each slicing rule."""

DEFAULT_RULE = "llava-uhd"
"""Of folders that tell none, too."""

NEEDS = {"vision": (), "text": (), "joint": ("vision", "text"), "polish": ("joint",)}
"""Stages that a stage starts from."""

SEEDS = EVALUATION_SEED // 10
"""Seeds of training are below this: scenes have ten times the seed, and the number of the stage."""


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("stages", nargs="*", help=f"of {', '.join(RECIPE)}; default: all")
    parser.add_argument("--seed", type=int, default=0, help=f"0 to {SEEDS - 1}")
    parser.add_argument("--rule", choices=sorted(RULES), default=DEFAULT_RULE, help="that cuts images")
    parser.add_argument("--workers", type=int, default=0, help="processes that make data; 0: this one")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of steps, for a quick look")
    parser.add_argument("--images", type=int, default=500, help="fresh images that the end is judged on")
    args = parser.parse_args(argv)
    if unknown := set(args.stages) - set(RECIPE):
        parser.error(f"no stage {', '.join(sorted(unknown))}: choose of {', '.join(RECIPE)}")
    if not 0 <= args.seed < SEEDS:
        parser.error(f"--seed must be 0 to {SEEDS - 1} (scenes of larger ones are for evaluation), got {args.seed}")
    if not (math.isfinite(args.scale) and args.scale > 0):
        parser.error(f"--scale must be above 0, got {args.scale}")
    if args.workers < 0 or args.images < 1:
        parser.error(f"needs --workers of at least 0 and --images of at least 1, got {args.workers}, {args.images}")
    torch.set_num_threads(1)  # small matrices: one thread a process, more processes
    stages = {name: replace(kept, steps=max(round(kept.steps * args.scale), 1)) for name, kept in RECIPE.items()}
    try:
        steps = {name: stage.steps for name, stage in stages.items()}
        settle(args.folder, {"seed": args.seed, "rule": args.rule, "steps": steps})
        for name in (name for name in RECIPE if name in (args.stages or RECIPE)):
            check_done(args.folder, [stages[before] for before in NEEDS[name]])
            model, supervision = begin(args.folder, name, seed=args.seed, rule=args.rule)
            train(model, supervision, stages[name], args.folder, seed=args.seed, workers=args.workers)
    except (FileExistsError, NotADirectoryError, RunError) as problem:
        parser.error(str(problem))
    if not args.stages or "polish" in args.stages:
        finish(model, args.folder, images=args.images)


class RunError(ValueError):
    """A folder does not fit what is asked for."""


def settle(folder: Path, wanted: dict[str, Any]) -> None:
    """Make the folder one of this run, or see that it is.

    Raises:
        RunError: It is one of another run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.json"
    if path.exists():
        found = json.loads(path.read_text())
        has, asked = _leaves({"rule": DEFAULT_RULE, **found} if "rule" in wanted else found), _leaves(wanted)
        if differ := [key for key in {**asked, **has} if has.get(key) != asked.get(key)]:
            told = ", ".join(f"{key} {has.get(key)}, asked is {asked.get(key)}" for key in differ)
            raise RunError(f"{folder} belongs to another run ({told}): give another folder, or move it away")
        return
    if begun := sorted(folder.glob("*.pt")):
        raise RunError(
            f"{folder} has {begun[0].name} of an unknown run (no run.json): give another folder, or move it away"
        )
    new = folder / f"run.{os.getpid()}.new"  # stages may start side by side
    new.write_text(json.dumps(wanted) + "\n")
    new.replace(path)


def _leaves(told: dict[str, Any], path: str = "") -> dict[str, Any]:
    """{"steps.joint": 3} of {"steps": {"joint": 3}}."""
    found = {}
    for key, value in told.items():
        found |= _leaves(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return found


def check_done(folder: Path, needed: list[Stage]) -> None:
    """That stages have run to their end.

    Raises:
        RunError: One has not.
    """
    for stage in needed:
        path = folder / f"{stage.name}.pt"
        steps = torch.load(path, weights_only=True)["step"] if path.exists() else 0
        if steps < stage.steps:
            raise RunError(f"stage {stage.name} is needed first: it has {steps} of {stage.steps} steps in {folder}")


def begin(
    folder: Path, name: str, *, seed: int, rule: str = DEFAULT_RULE
) -> tuple[UHDForConditionalGeneration, Supervision]:
    """The model as a stage finds it."""
    parts = RULES[rule]()
    config = parts["config"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        supervision = Supervision(config.width, config.latents)
    model = build_nano(**parts, seed=seed)
    if name == "joint":
        start_joint(folder, model, supervision)
    elif name == "polish":
        start_from(folder / "joint.pt", model, supervision)
    elif name == "vision":
        print(f"attention starts {fit_attention(model):.3f} nats from local")
    return model, supervision


def finish(model: UHDForConditionalGeneration, folder: Path, *, images: int) -> None:
    """Save in the transformers format, judge on fresh images, draw the curves."""
    model.eval().save_pretrained(folder / "model")
    items = evaluate(model, images=images, kinds=QUESTIONS)
    found = summary(items)
    (folder / "evaluation.json").write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))
    draw_curves(folder)


def draw_curves(folder: Path) -> None:
    """What each stage's log says, over its steps."""
    shown = {"vision": "patch found", "text": "characters", "joint": "characters", "polish": "characters"}
    series = {}
    for name, key in shown.items():
        path = folder / f"{name}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        found = {line["step"]: line[key] for line in lines if key in line}  # what was interrupted wrote some twice
        series[f"{name}: {key}"] = sorted(found.items())
    steps = [step for line in series.values() for step, _ in line]
    (folder / "curves.svg").write_text(curves(series, log_axis(steps, "step"), percent_axis("right")))


if __name__ == "__main__":
    main()
