"""The ``uhd`` command. Typed sizes are WIDTHxHEIGHT, as people write them; in JSON, ``_hw`` says (height, width)."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uhd import commands

if TYPE_CHECKING:  # nothing heavy before `commands.run` is there to take an interrupt
    from uhd.encoder import VisualEncoder
    from uhd.pixels import PixelSettings
    from uhd.schema import SpatialSchema
    from uhd.slicing import SlicePlan, Slicing


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns the exit status, see :mod:`uhd.commands`; a wrong call exits with 2."""
    for stream in (sys.stdout, sys.stderr):  # a file's name may not be writable to the terminal
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    words = sys.argv[1:] if argv is None else argv
    name = " ".join(["uhd", *[word for word in words if word[:1].isalpha()][:1]])

    def command() -> int:
        args = _parser().parse_args(argv)
        return args.run(args)

    return commands.run(name, command)


def _parser() -> argparse.ArgumentParser:
    from uhd import __version__
    from uhd.compare import command_line as comparing
    from uhd.datasets import command_line as datasets
    from uhd.evaluation import command_line as evaluation
    from uhd.export import command_line as export
    from uhd.pixels import MAX_PIXELS
    from uhd.serving import command_line as serving

    parser = argparse.ArgumentParser(prog="uhd", description="Native-resolution eyes for any causal language model.")
    parser.add_argument("--version", action="version", version=f"uhd {__version__}")
    parser.add_argument("--max-pixels", type=int, metavar="N", help=f"refuse larger pictures (default {MAX_PIXELS})")
    known = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_planning(known)
    comparing.add(known)
    _add_encoding(known)
    datasets.add(known)
    serving.add(known)
    export.add(known)
    evaluation.add(known)
    return parser


def _add_planning(known: Any) -> None:
    """The commands that load no model."""
    command = known.add_parser("plan", help="where images are cut, and what that costs")
    command.add_argument("inputs", nargs="*", metavar="IMAGE|WxH", help="an image file, or WIDTHxHEIGHT in px")
    command.add_argument("--sizes", type=Path, metavar="FILE", help="a JSON list of [width, height]")
    command.add_argument("--candidates", action="store_true", help="every grid that was considered, with its score")
    command.add_argument("--json", action="store_true", help="one JSON object a line")
    commands.add_on_error(command)
    _slicing_arguments(command)
    command.set_defaults(run=_plan)

    command = known.add_parser("layout", help='where slices, overview, "," and "\\n" go')
    command.add_argument("input", metavar="IMAGE|WxH")
    command.add_argument("--json", action="store_true", help="the list of symbols, as JSON")
    _slicing_arguments(command)
    command.set_defaults(run=_layout)

    command = known.add_parser("show", help="a picture of the cut")
    command.add_argument("image")
    command.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the picture to write")
    command.add_argument("--attention", action="store_true", help="where an encoder's tokens look, drawn over it")
    command.add_argument("--model", metavar="MODEL", help="with --attention: a folder or nano-plus (default nano)")
    command.add_argument("--encoder", type=Path, metavar="DIR", help="with --attention: an encoder's folder instead")
    command.add_argument("--ask", metavar="QUESTION", help="with --attention: where the model looks as it answers")
    command.add_argument("--border-moves", type=int, metavar="K", help="borders avoid content by up to K patches")
    _slicing_arguments(command)
    command.set_defaults(run=_show)


def _add_encoding(known: Any) -> None:
    """The commands that load an encoder or a language model."""
    folder: Any = {"type": Path, "metavar": "DIR", "help": "a folder written by VisualEncoder.save_pretrained"}
    command = known.add_parser("encode", help="images to visual tokens, in a safetensors file")
    command.add_argument("images", nargs="+")
    command.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.safetensors")
    command.add_argument("--encoder", **folder)
    command.add_argument("--onnx", type=Path, metavar="FILE", help="a graph of uhd export, run without torch")
    command.add_argument("--strategy", metavar="NAME", help=_strategy_help())
    command.add_argument("--video", action="store_true", help="the images are the frames of one video, in order")
    commands.add_on_error(command)
    command.set_defaults(run=_encode)

    command = known.add_parser("demo", help="the whole way on one image, step by step, up to an answer")
    command.add_argument("image", nargs="?", help="default: one drawn on the spot, which the shipped model reads")
    command.add_argument(
        "--ask", action="append", default=[], metavar="QUESTION", help="ask the shipped model, e.g. 'all?'; repeatable"
    )
    command.add_argument(
        "--model", metavar="NAME", help="a shipped model: nano, which learned with slices, or nano-plus"
    )
    command.add_argument("--seed", type=int, metavar="N", help="of the image drawn on the spot; default: a new one")
    command.add_argument("-o", "--output", type=Path, default=Path("uhd_demo.png"), metavar="FILE")
    command.add_argument("--encoder", **folder)
    command.set_defaults(run=_demo)

    command = known.add_parser("doctor", help="what is installed and will run, or how eyes would fit a model")
    command.add_argument("lm", type=Path, nargs="?", metavar="LM_DIR", help="how eyes would fit the model in there")
    command.add_argument("--schema", metavar="NAME", default="llava-uhd", help="a token layout (default llava-uhd)")
    command.add_argument("--json", action="store_true", help="one JSON object")
    command.set_defaults(run=_doctor)


_CHANGES = ("max_slices", "max_tokens", "cut_by", "border_moves", "one_view_below", "latents")
_ADAPTIVE_ONLY = (*_CHANGES, "schema", "candidates")


def _strategy_help() -> str:
    from uhd.slicing import PRESETS

    return f"{', '.join(PRESETS)} (default llava-uhd-safe), or any name of docs/strategies.md"


def _slicing_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--strategy", metavar="NAME", help=_strategy_help())
    command.add_argument("--schema", metavar="NAME", help="a token layout; it brings its slicing and its counts")
    command.add_argument("--max-slices", type=int, metavar="N", help="cap on slices; 1 never cuts")
    command.add_argument("--max-tokens", type=int, metavar="N", help="fewer slices until a plan costs at most that")
    command.add_argument("--cut-by", metavar="WHAT", help="area, or shape: long images get more slices")
    command.add_argument("--one-view-below", type=float, metavar="R", help="up to R : 1 one larger view, not slices")
    command.add_argument("--latents", metavar="HOW", help="fixed, or fitted: a view's tokens by its patches")


def _config(args: argparse.Namespace) -> Slicing:
    """The slicing that was asked for; a schema brings its own, and its counts in any case."""
    from uhd.slicing import PRESETS, find

    rule = find(args.strategy or "llava-uhd-safe")
    if not rule.uses_schema:
        given = [f"--{key.replace('_', '-')}" for key in _ADAPTIVE_ONLY if getattr(args, key, None)]
        if given:
            raise ValueError(f"{', '.join(given)}: only for {', '.join(PRESETS)}, not {rule.name!r}")
        return rule
    changes = {key: getattr(args, key) for key in _CHANGES if getattr(args, key, None) is not None}
    if args.schema is None:
        return rule.replace(**changes)
    from uhd.schema import SpatialSchema

    return SpatialSchema.preset(args.schema).slicing_config(args.strategy and rule).replace(**changes)


def _schema(args: argparse.Namespace) -> SpatialSchema | None:
    """The schema that was asked for, or the one that goes with the slicing; ``None`` for rules without one."""
    from uhd.schema import SpatialSchema

    config = _config(args)
    return SpatialSchema.preset(args.schema or config.name) if config.uses_schema else None


def _plan(args: argparse.Namespace) -> int:
    from uhd.compare.inputs import read_sizes
    from uhd.slicing import candidates, plan

    config = _config(args)
    inputs = list(args.inputs) + ([] if args.sizes is None else read_sizes(args.sizes))
    if not inputs and args.sizes is None:
        raise ValueError("nothing to plan: give images, sizes such as 672x1008, or --sizes FILE")
    failed = 0
    for item in _progress(inputs, "sizes", quiet_below=5000):
        try:
            record: dict[str, Any] = {"image_hw": _size_hw(item, _pixels(args))}
        except (ValueError, OSError) as problem:
            if args.on_error == "stop":
                raise ValueError(f"{item}: {problem}") from problem
            failed += 1
            record = {"input": str(item), "error": str(problem)}
        else:
            try:
                found = plan(record["image_hw"], config)
                record |= {key: getattr(found, key) for key in ("grid", "slice_hw", "overview_hw")}
                record |= {"views": found.num_views, "num_patches": found.num_patches}
                record |= {"num_tokens": found.num_tokens, "strategy": found.strategy}
                if args.candidates:
                    record["candidates"] = [c._asdict() for c in candidates(record["image_hw"], config)]
            except ValueError as problem:  # this size is refused; the others go on
                record["error"] = str(problem)
        print(json.dumps(record) if args.json else _sentences(item, record, config))
    return commands.status(failed, len(inputs))


def _sentences(item: Any, record: dict[str, Any], config: Slicing) -> str:
    from uhd.slicing import plan

    name = "{1}x{0}".format(*item) if isinstance(item, tuple) else str(item)
    if "error" in record:
        return f"{name}: {record['error']}"
    lines = [f"{name}: {_summary(plan(record['image_hw'], config))}"]
    for candidate in record.get("candidates", ()):
        tie = "  tied but for rounding" if candidate["tied"] else ""
        lines.append("  {}x{} (rows x columns)  score {:.6f}{}".format(*candidate["grid"], candidate["score"], tie))
    return "\n".join(lines)


def _summary(found: SlicePlan) -> str:
    """A plan in three lines, sizes as width x height."""

    def wide(size_hw: tuple[int, int]) -> str:
        return f"{size_hw[1]}x{size_hw[0]}"

    parts = ["not cut"]
    if found.grid and found.slice_hw:
        others = " (the first)" if len({view.size_hw for view in found.views if view.kind == "slice"}) > 1 else ""
        parts = ["{} x {} (rows x columns) slices of ".format(*found.grid) + f"{wide(found.slice_hw)} px{others}"]
    if found.overview_hw:
        parts.append(f"overview {wide(found.overview_hw)} px")
    return (
        f"{wide(found.image_hw)} px (width x height), {found.strategy}\n"
        f"  {', '.join(parts)}\n"
        f"  {found.num_views} view{'s' * (found.num_views > 1)}, {found.num_patches} patches, "
        f"{found.num_visual_tokens} visual tokens + {found.num_separators} separators = {found.num_tokens} tokens"
    )


def _layout(args: argparse.Namespace) -> int:
    from uhd.schema import layout
    from uhd.slicing import PRESETS, plan

    schema = _schema(args)
    if schema is None:
        raise ValueError(f"{args.strategy!r} has no schema of separators; layouts are for {', '.join(PRESETS)}")
    laid = layout(plan(_size_hw(args.input, _pixels(args)), _config(args)), schema)
    if args.json:
        print(json.dumps(laid.symbols))
    else:
        counts = f"{laid.num_visual_tokens} visual tokens + {laid.num_separators} separators"
        print(f"{laid.text()}\n{laid.num_tokens} positions: {counts}")
    return 0


def _show(args: argparse.Namespace) -> int:
    import numpy as np

    from uhd.compare.inputs import typed_size
    from uhd.draw import draw_plan, write_picture
    from uhd.pixels import load_image
    from uhd.planning import plan
    from uhd.slicing.borders import content_cut

    if typed_size(args.image) and not Path(args.image).exists():
        raise ValueError(f"{args.image} is a size, a picture is drawn of an image file: uhd compare takes sizes")
    _check_output(args.output, [args.image])
    names = ("model", "encoder", "ask") if not args.attention else _ADAPTIVE_ONLY[:-1]
    if given := [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]:
        raise ValueError(f"{given[0]} is {'not for' if args.attention else 'of'} --attention")
    if args.attention:
        from transformers.utils import logging

        from uhd.draw_attention import show

        logging.disable_progress_bar()
        told = {name: getattr(args, name) for name in ("model", "encoder", "strategy", "ask")}
        picture, found, words = show(_source(args.image, _pixels(args)), pixels=lambda own: _pixels(args, own), **told)
        write_picture(args.output, picture)
        print(f"{args.image}: {_summary(found)}", *words, f"wrote {args.output}", sep="\n")
        return 0
    image = load_image(_source(args.image, _pixels(args)), settings=_pixels(args))
    found = plan(image, _config(args))
    write_picture(args.output, draw_plan(image, found, schema=_schema(args)))
    print(f"{args.image}: {_summary(found)}")
    if found.grid:
        print(
            f"  {100 * content_cut(found, np.asarray(image)):.2f}% of the image's gradient lies on borders of slices"
        )
    print(f"wrote {args.output}")
    return 0


def _encode(args: argparse.Namespace) -> int:
    from uhd.token_files import check_output, token_file

    check_output(args.output)
    encoder: Any
    if args.onnx is None:
        import torch

        encoder, mode = _encoder(args.encoder, args.strategy), torch.inference_mode()
    else:
        from uhd.export.command_line import runner

        encoder, mode = runner(args), nullcontext()
    pixels = encoder.pixels = _pixels(args, encoder.pixels)
    done: list[str] = []
    failed, stop = 0, None
    with token_file(args.output, schema=encoder.schema, note=encoder.note) as file, mode:

        def one(image: str) -> None:
            (tokens,) = encoder([_source(image, pixels)])
            file.add(image, tokens)
            done.append(f"{image}: {_summary(tokens.plan)}\n  tokens {tuple(tokens.tokens.shape)}")

        if args.video:
            (video,) = encoder.encode_videos([[_source(image, pixels) for image in args.images]])
            file.add(name := f"{len(args.images)} frames", video)
            words = f"{_summary(video.plan.plans[0])} each\n  {video.plan.num_tokens} tokens in all"
            done.append(f"{name}: {words}\n  tokens {tuple(video.tokens.shape)}")
        else:
            images = _progress(args.images, "images", quiet_below=1)
            failed, stop = commands.each("uhd encode", images, one, stop=args.on_error == "stop")
        if stop and not file.size:
            raise stop
        commands.keep(stop, file.finish, f"{file.size} of {len(args.images)} images are in {args.output}")
    for words in done:
        print(words)
    print(f"wrote {args.output}")
    if encoder.note:
        print(f"note: {encoder.note}", file=sys.stderr)
    return commands.status(failed, len(args.images))


def _demo(args: argparse.Namespace) -> int:
    from uhd import demo
    from uhd.draw import draw_plan, write_picture
    from uhd.pixels import load_image
    from uhd.planning import plan

    _check_output(args.output, filter(None, [args.image]))
    if args.seed is not None and args.image is not None:
        raise ValueError(f"--seed is of the image drawn on the spot, and {args.image} was given")
    asking = args.ask or args.model is not None or (args.image is None and not args.encoder)
    name = "nano" if args.model is None else args.model
    reader = demo.Reader(args.ask, seed=args.seed, model=name) if asking else None
    if reader and args.encoder:
        raise ValueError(
            "a shipped model answers --ask, and has its own eyes: leave --encoder out, or --ask and --model"
        )
    encoder = reader.model.visual if reader else _encoder(args.encoder)
    name, eyes = "a page drawn for this demo", "a small ViT and perceiver resampler"
    if reader:
        name, eyes = reader.name, f"the shipped {reader.model_name} model"
    encoder.pixels = _pixels(args, encoder.pixels)
    own = None if args.image is None else _source(args.image, encoder.pixels)
    source = own if own is not None else reader.scene.image if reader else demo.page_image()
    image = load_image(source, settings=encoder.pixels)
    found = plan(image, encoder.slicing)
    schema = encoder.schema if found.packing is None else None
    drawn = draw_plan(image, found, schema=schema, settings=encoder.pixels)
    write_picture(args.output, drawn, note=encoder.note)
    print(f"image: {args.image or name}: {_summary(found)}\nencoder: {args.encoder or eyes}")
    if encoder.note:
        print(f"note: {encoder.note}")
    print()
    demo.run(image, encoder=encoder, say=print)
    if reader:
        reader.read(image, own=args.image is not None, say=print)
    print(f"\nwrote {args.output}: the cut, every view, and the token string")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    if args.lm is None:
        from uhd import environment

        here = environment.look()
        print(json.dumps(here.to_dict()) if args.json else environment.table(here))
        return 0

    from transformers.utils import logging

    from uhd.hf.doctor import diagnose, table

    logging.disable_progress_bar()
    found = diagnose(args.lm, schema=args.schema)
    print(json.dumps(found.to_dict()) if args.json else table(found))
    return 1 if found.problems else 0


def _check_output(output: Path, inputs: Iterable[str]) -> None:
    """Before any work: a picture can be written there, and is none of the inputs."""
    from PIL import Image

    from uhd.draw import picture_file
    from uhd.writing import check_place

    check_place(output)
    picture_file(output, Image.new("RGB", (1, 1)))
    if output.exists() and any(Path(item).exists() and output.samefile(item) for item in inputs):
        raise ValueError(f"{output} is the image itself: choose another output")


def _encoder(folder: Path | None, strategy: str | None = None) -> VisualEncoder:
    """The saved encoder, cutting by ``strategy`` if one is named, or an untrained one that is made for it."""
    if folder is None:
        from uhd import demo

        return demo.untrained_encoder(strategy=strategy)
    from uhd.encoder import saved_encoder

    return saved_encoder(folder, strategy)


def _pixels(args: argparse.Namespace, settings: PixelSettings | None = None) -> PixelSettings:
    """The settings, or the default ones, with the limit that was asked for."""
    from uhd.pixels import DEFAULT

    settings = settings or DEFAULT
    return settings if args.max_pixels is None else settings.replace(max_pixels=args.max_pixels)


def _source(item: str, pixels: PixelSettings) -> str | bytes:
    """An image's path, or all of a FIFO such as ``<(...)``, whatever the command does with it then."""
    from uhd.pixels.source import command_source

    return command_source(item, pixels)


def _size_hw(item: Any, pixels: PixelSettings) -> tuple[Any, Any]:
    """(height, width) of ``WIDTHxHEIGHT`` or of an image file; an entry of a sizes file is one already."""
    if isinstance(item, tuple):
        return item
    from uhd.compare.inputs import size_of, typed_size

    return typed_size(item) or size_of(item, pixels)


def _progress(items: Sequence[Any], unit: str, *, quiet_below: int) -> Iterator[Any]:
    """A bar on stderr, where there is enough to wait for and no line of ours breaks it."""
    if len(items) <= quiet_below or not sys.stderr.isatty() or (unit == "sizes" and sys.stdout.isatty()):
        return iter(items)
    from tqdm import tqdm

    return iter(tqdm(items, unit=unit))


if __name__ == "__main__":
    sys.exit(main())
