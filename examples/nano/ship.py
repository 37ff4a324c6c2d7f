"""Put a trained nano model into the package: float16 weights, judged as they will be loaded, numbers in the card.

python examples/nano/ship.py runs/nano --images 2000
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch

from uhd import UHDForConditionalGeneration, load_nano
from uhd.nano.build import build_nano
from uhd.nano.evaluate import EVALUATION_SEED, evaluate, summary, table

ASSETS = Path(__file__).parents[2] / "uhd" / "assets" / "nano"
BEGIN, END = "<!-- numbers -->", "<!-- end of numbers -->"
MOST_BYTES = 4_000_000


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what train.py wrote")
    parser.add_argument("--images", type=int, default=2000)
    args = parser.parse_args(argv)
    trained = UHDForConditionalGeneration.from_pretrained(args.folder / "model")
    model = build_nano()
    model.load_state_dict(trained.state_dict())
    model.eval().to(torch.float16)
    card = (ASSETS / "README.md").read_text()
    made = args.folder / "shipped"
    shutil.rmtree(made, ignore_errors=True)
    model.save_pretrained(made)
    size = (made / "model.safetensors").stat().st_size
    if size > MOST_BYTES:
        raise SystemExit(f"{made} holds {size} bytes of weights, the package takes {MOST_BYTES}")
    for new in made.iterdir():
        (ASSETS / new.name).write_bytes(new.read_bytes())
    items = evaluate(load_nano(), images=args.images)
    found = summary(items)
    print(table(found))
    numbers = f"{BEGIN}\n\n```\n{table(found)}\n```\n\n{args.images} images of seed {EVALUATION_SEED}.\n\n{END}"
    before, _, rest = card.partition(BEGIN)
    (ASSETS / "README.md").write_text(before + numbers + rest.partition(END)[2])
    (args.folder / "shipped.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
