"""Train the nano model from nothing, on one or two CPU cores.

    python examples/nano/train.py runs/nano                # all stages, one after the other
    python examples/nano/train.py runs/nano vision & python examples/nano/train.py runs/nano text & wait
    python examples/nano/train.py runs/nano joint polish   # two cores: the first two stages side by side

A stage that was interrupted goes on from its newest checkpoint; one that is done is not run again. At the end the
folder holds the model in the transformers format (``model``), how well it reads fresh images (``evaluation.json``),
and the curves of the training (``curves.svg``).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from stages import Stage, Supervision, fit_attention, start_from, start_joint, train

from uhd import UHDForConditionalGeneration
from uhd.charts import curves, log_axis, percent_axis
from uhd.nano.build import NanoConfig, build_nano
from uhd.nano.evaluate import evaluate, summary, table
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


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("stages", nargs="*", help=f"of {', '.join(RECIPE)}; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="processes that make data; 0: this one")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of steps, for a quick look")
    parser.add_argument("--images", type=int, default=500, help="fresh images that the end is judged on")
    args = parser.parse_args(argv)
    if unknown := set(args.stages) - set(RECIPE):
        parser.error(f"no stage {', '.join(sorted(unknown))}: choose of {', '.join(RECIPE)}")
    torch.set_num_threads(1)  # small matrices: one thread a process, more processes
    args.folder.mkdir(parents=True, exist_ok=True)
    for name in args.stages or RECIPE:
        stage = replace(RECIPE[name], steps=max(round(RECIPE[name].steps * args.scale), 1))
        model, supervision = begin(args.folder, name, seed=args.seed)
        train(model, supervision, stage, args.folder, seed=args.seed, workers=args.workers)
    if not args.stages or "polish" in args.stages:
        finish(model, args.folder, images=args.images)


def begin(folder: Path, name: str, *, seed: int) -> tuple[UHDForConditionalGeneration, Supervision]:
    """The model as a stage finds it."""
    config = NanoConfig()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        supervision = Supervision(config.width, config.latents)
    model = build_nano(config, seed=seed)
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
        series[f"{name}: {key}"] = [(line["step"], line[key]) for line in lines if key in line]
    steps = [step for line in series.values() for step, _ in line]
    (folder / "curves.svg").write_text(curves(series, log_axis(steps, "step"), percent_axis("right")))


if __name__ == "__main__":
    main()
