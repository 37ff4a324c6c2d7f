"""Put a trained nano model into the package: float16 weights, judged as they will be loaded, numbers in the card.

python examples/nano/ship.py runs/nano --images 2000

It is judged first, and the package stays as it was where it does not read well enough (:data:`LEAST`).
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from train import DEFAULT_RULE, RULES

from uhd import UHDForConditionalGeneration
from uhd.hf.bare import MODULE
from uhd.nano.answer import SHIPPED
from uhd.nano.build import build_nano
from uhd.nano.evaluate import EVALUATION_SEED, evaluate, summary, table

ASSETS = Path(__file__).parents[2] / "uhd" / "assets"
BEGIN, END = "<!-- numbers -->", "<!-- end of numbers -->"
MOST_BYTES = 4_000_000
LEAST = {"right": 0.93, "line": 0.85, "all": 0.75}
"""Exact answers of a model that is worth shipping."""


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what train.py wrote")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--into", type=Path, help="default: the package's folder for models of this rule")
    parser.add_argument("--anyway", action="store_true", help="however it reads")
    args = parser.parse_args(argv)
    if args.images < 1:
        parser.error(f"--images must be at least 1, got {args.images}")
    if not (args.folder / "model" / "config.json").is_file():
        parser.error(f"{args.folder} has no trained model (model/config.json): run train.py to its end")
    into = args.into or ASSETS / next(name for name, learned in SHIPPED.items() if learned == rule_of(args.folder))
    path = into / "README.md"
    card = path.read_text() if path.is_file() else ""
    if card.count(BEGIN) != 1 or card.count(END) != 1:
        parser.error(f"{path} needs the lines {BEGIN} and {END}, once each, for the numbers")
    made = halved(args.folder)
    items = evaluate(UHDForConditionalGeneration.from_pretrained(made, dtype=torch.float32), images=args.images)
    found = summary(items)
    print(table(found))
    (args.folder / "shipped.json").write_text(json.dumps(found, indent=1) + "\n")
    low = [kind for kind, least in LEAST.items() if kind not in found or found[kind]["exact"] < least]
    if low and not args.anyway:
        raise SystemExit(f"not shipped: {', '.join(low)} below {LEAST}; --anyway ships it nevertheless")
    for new in made.iterdir():
        (into / new.name).write_bytes(new.read_bytes())
    numbers = f"{BEGIN}\n\n```\n{table(found)}\n```\n\n{args.images} images of seed {EVALUATION_SEED}.\n\n{END}"
    path.write_text(card.partition(BEGIN)[0] + numbers + card.partition(END)[2])


def rule_of(folder: Path) -> str:
    """The slicing rule that a folder's model learned with."""
    run = folder / "run.json"
    told = json.loads(run.read_text()) if run.exists() else {}
    return told.get("rule", DEFAULT_RULE)


def halved(folder: Path) -> Path:
    """The folder's model in float16, in a folder beside it."""
    trained = UHDForConditionalGeneration.from_pretrained(folder / "model")
    model = build_nano(**RULES[rule_of(folder)]())
    model.load_state_dict(trained.state_dict())
    model.eval().to(torch.float16)
    made = folder / "shipped"
    shutil.rmtree(made, ignore_errors=True)
    model.save_pretrained(made)
    (made / f"{MODULE}.py").unlink()  # the package has the classes themselves
    for path in made.glob("*.json"):
        told = json.loads(
            path.read_text(), object_hook=lambda part: {k: v for k, v in part.items() if k != "auto_map"}
        )
        path.write_text(json.dumps(told, indent=2) + "\n")
    size = (made / "model.safetensors").stat().st_size
    if size > MOST_BYTES:
        raise SystemExit(f"{made} holds {size} bytes of weights, the package takes {MOST_BYTES}")
    return made


if __name__ == "__main__":
    main()
