"""``uhd export``, and what ``uhd encode --onnx`` runs, without torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add(known: Any) -> None:
    """Add ``export`` to the parser's commands."""
    command = known.add_parser("export", help="an encoder as an ONNX graph, for runtimes without torch")
    command.add_argument("encoder", type=Path, metavar="DIR", help="a folder written by VisualEncoder.save_pretrained")
    command.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.onnx")
    command.add_argument("--dtype", choices=("float32", "float16", "int8"), help="of the weights (default: as saved)")
    command.add_argument("--strategy", metavar="NAME", help="another slicing, a name of docs/strategies.md")
    command.add_argument("--fixed", action="store_true", help="fix views and length to those of the largest plan")
    command.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> int:
    from uhd import export
    from uhd.encoder import saved_encoder
    from uhd.export.graph import BOUNDS

    encoder = saved_encoder(args.encoder, args.strategy)
    if args.dtype == "float16":
        encoder.half()
    elif args.dtype is not None:
        encoder.float()
    if args.dtype == "int8":
        encoder.quantize()
    error = export.onnx(encoder, args.output, dynamic=not args.fixed)
    name = args.dtype or str(next(encoder.parameters()).dtype).removeprefix("torch.")
    print(
        f"wrote {args.output} and {args.output.with_suffix('.json').name}: {name}, within {error:.1e} of the encoder "
        f"in onnxruntime, relative to the largest token ({BOUNDS[name]:.0e} is allowed)"
    )
    return 0


def runner(args: argparse.Namespace) -> Any:
    """The graph that ``uhd encode --onnx`` was given, a :class:`uhd.export.running.Runner`."""
    from uhd.export.running import Runner

    if given := [f"--{name}" for name in ("encoder", "strategy", "video") if getattr(args, name)]:
        raise ValueError(f"{', '.join(given)}: not with --onnx, whose graph has its own encoder and slicing")
    return Runner(args.onnx)
