"""Damaged artefacts against their readers: ``python -m tests.fuzz.artefacts --kind model --seed 0 --cases 1000``.

Case N of a seed is always the same damage, so a run that was stopped goes on with ``--first N``, and one case alone is
``--first N --cases 1``. What is printed, as JSON lines, are the cases that raised anything but a ``ValueError`` or
``OSError`` with the damaged file's name, or took more than two seconds; the last line sums up.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

import uhd
from tests import tiny
from tests.fuzz.damage import damaged_file, damaged_json
from tests.hf import tiny as hf_tiny
from tests.memory import peak_mib
from uhd.hf import UHDForConditionalGeneration, UHDProcessor
from uhd.slicing import SlicePlan, VideoPlan, plan_video
from uhd.token_files import load_tokens, save_tokens

SECONDS = 2


def _tokens(folder: Path) -> None:
    encoder = tiny.tiny_encoder()
    images = encoder([tiny.picture(70, 40), tiny.picture(20, 30)])
    save_tokens(folder / "tokens.safetensors", images, schema=encoder.schema, names=["a", "b"], note="for a test")


def _encoder(folder: Path) -> None:
    tiny.tiny_encoder().save_pretrained(folder)


def _model(folder: Path) -> None:
    model = hf_tiny.attach(hf_tiny.encoder())
    model.save_pretrained(folder, max_shard_size="20KB")
    model.processor.save_pretrained(folder)


def _read_model(folder: Path) -> None:
    UHDForConditionalGeneration.from_pretrained(folder)
    UHDProcessor.from_pretrained(folder)


KINDS: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any]]] = {
    "tokens": (_tokens, lambda folder: load_tokens(folder / "tokens.safetensors")),
    "encoder": (_encoder, uhd.VisualEncoder.from_pretrained),
    "model": (_model, _read_model),
}
SUFFIXES = (".json", ".safetensors", ".jinja")


class TooLong(Exception):
    pass


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Stop what computes longer than it may, however busy the machine is."""

    def stop(*_: Any) -> None:
        raise TooLong(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def complaint(read: Callable[[], Any], name: str) -> str | None:
    """What is wrong with how damage was met; ``None`` where nothing is."""
    try:
        with bounded():
            read()
    except (ValueError, OSError) as problem:
        return None if name in str(problem) else f"does not name {name}: {problem!r:.300}"
    except BaseException as problem:
        if isinstance(problem, KeyboardInterrupt):
            raise
        return f"{problem!r:.300}"
    return None


def run(kind: str, seed: int, cases: range, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield what every case came to that was met badly."""
    write, read = KINDS[kind]
    whole, torn = folder / "whole", folder / "torn"
    whole.mkdir()
    torch.manual_seed(0)
    write(whole)
    read(whole)  # imports, and proof that it can be read
    files = sorted(path.name for path in whole.iterdir() if path.suffix in SUFFIXES)
    for case in cases:
        rng = random.Random(f"{kind} {seed} {case}")
        shutil.rmtree(torn, ignore_errors=True)
        shutil.copytree(whole, torn)
        name = rng.choice(files)
        if rng.random() < 0.05 and kind != "tokens":
            (torn / name).unlink()
        else:
            damaged_file(torn / name, rng)
        if what := complaint(partial(read, torn), "torn" if not (torn / name).exists() else name):
            yield {"kind": kind, "seed": seed, "case": case, "file": name, "what": what}


def _used(kind: type[SlicePlan | VideoPlan], data: Any) -> None:
    """Read a plan and ask it all that others ask it."""
    found = kind.from_dict(data)
    for one in found.plans if isinstance(found, VideoPlan) else (found,):
        str((one.views, one.num_tokens, one.num_patches, str(one)))


def run_plans(seed: int, cases: range) -> Iterator[dict[str, Any]]:
    """The same for plans, which are JSON and no file."""
    whole = [uhd.plan((70, 4000), "llava-uhd").to_dict(), uhd.plan((900, 400), "llava-next").to_dict()]
    whole.append(plan_video((300, 400), 2, "llava-onevision").to_dict())
    for case in cases:
        rng = random.Random(f"plans {seed} {case}")
        data = damaged_json(rng.choice(whole), rng)
        kind = VideoPlan if isinstance(data, dict) and "plans" in data else SlicePlan
        what = complaint(partial(_used, kind, data), "")
        if what:
            yield {"kind": "plans", "seed": seed, "case": case, "what": what}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kind", choices=[*KINDS, "plans"], required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--cases", type=int, default=1000)
    args = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    cases, start, bad = range(args.first, args.first + args.cases), time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        found = run_plans(args.seed, cases) if args.kind == "plans" else run(args.kind, args.seed, cases, Path(folder))
        for one in found:
            bad += 1
            print(json.dumps(one), flush=True)
    seconds = round(time.monotonic() - start, 1)
    print(json.dumps({"cases": len(cases), "bad": bad, "seconds": seconds, "peak_mib": round(peak_mib())}))
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
