"""The ``uhd`` command. Typed sizes are WIDTHxHEIGHT, as people write them; in JSON, ``_hw`` says (height, width)."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from uhd.slicing import PRESETS, SlicePlan, SlicingConfig, candidates, plan

_SIZE = re.compile(r"(\d+)[xX×](\d+)")  # noqa: RUF001


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns the exit status: 0, or 1 where an input could not be read."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stdout = None
        return 0
    except (ValueError, OSError) as problem:
        print(f"uhd {args.command}: {problem}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="uhd", description="Native-resolution eyes for any causal language model.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser("plan", help="where images are cut, and what that costs")
    command.add_argument("inputs", nargs="*", metavar="IMAGE|WxH", help="an image file, or WIDTHxHEIGHT in px")
    command.add_argument("--sizes", type=Path, metavar="FILE", help="a JSON list of [width, height]")
    command.add_argument("--candidates", action="store_true", help="every grid that was considered, with its score")
    command.add_argument("--json", action="store_true", help="one JSON object a line")
    _slicing_arguments(command)
    command.set_defaults(run=_plan)

    command = commands.add_parser("layout", help='where slices, overview, "," and "\\n" go')
    command.add_argument("input", metavar="IMAGE|WxH")
    command.add_argument(
        "--schema", metavar="NAME", help="token layout; brings its slicing preset (default llava-uhd)"
    )
    command.add_argument("--json", action="store_true", help="the list of symbols, as JSON")
    _slicing_arguments(command)
    command.set_defaults(run=_layout)

    command = commands.add_parser("show", help="a picture of the cut")
    command.add_argument("image")
    command.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the picture to write")
    command.add_argument("--schema", metavar="NAME", help="token layout; brings its slicing preset")
    _slicing_arguments(command)
    command.set_defaults(run=_show)

    command = commands.add_parser("encode", help="images to visual tokens, in a safetensors file")
    command.add_argument("images", nargs="+")
    command.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    command.add_argument(
        "--encoder", type=Path, metavar="DIR", help="a folder written by VisualEncoder.save_pretrained"
    )
    command.set_defaults(run=_encode)

    command = commands.add_parser("demo", help="the whole way on one image, step by step")
    command.add_argument("image", nargs="?", help="default: a page drawn for the demo")
    command.add_argument("-o", "--output", type=Path, default=Path("uhd_demo.png"), metavar="FILE")
    command.add_argument("--encoder", type=Path, metavar="DIR")
    command.set_defaults(run=_demo)
    return parser


def _slicing_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--strategy", metavar="NAME", help=f"one of {', '.join(PRESETS)} (default llava-uhd-safe)")
    command.add_argument("--max-slices", type=int, metavar="N")
    command.add_argument(
        "--max-tokens", type=int, metavar="N", help="fewer slices until a plan costs at most N tokens"
    )


def _config(args: argparse.Namespace) -> SlicingConfig:
    changes = {key: getattr(args, key) for key in ("max_slices", "max_tokens") if getattr(args, key) is not None}
    if getattr(args, "schema", None) is None:
        return SlicingConfig.preset(args.strategy or "llava-uhd-safe", **changes)
    from uhd.schema import SpatialSchema

    return SpatialSchema.preset(args.schema).slicing_config(args.strategy).replace(**changes)


def _plan(args: argparse.Namespace) -> int:
    config = _config(args)
    inputs = list(args.inputs)
    if args.sizes is not None:
        inputs += _read_sizes(args.sizes)
    if not inputs:
        raise ValueError("nothing to plan: give images, sizes such as 672x1008, or --sizes FILE")
    status = 0
    for item in _progress(inputs, "sizes", 5000):
        record: dict[str, Any] = {}
        try:
            record["image_hw"] = _size_hw(item)
        except (ValueError, OSError) as problem:
            record = {"input": str(item), "error": str(problem)}
            status = 1
        else:
            try:
                found = plan(record["image_hw"], config)
                record.update(_record(found))
                if args.candidates:
                    record["candidates"] = [c._asdict() for c in candidates(record["image_hw"], config)]
            except ValueError as problem:
                record["error"] = str(problem)
        print(json.dumps(record) if args.json else _sentence(item, record, config))
    return status


def _record(found: SlicePlan) -> dict[str, Any]:
    return {
        "grid": found.grid,
        "slice_hw": found.slice_hw,
        "overview_hw": found.overview_hw,
        "views": found.num_views,
        "num_patches": found.num_patches,
        "num_tokens": found.num_tokens,
        "strategy": found.strategy,
    }


def _sentence(item: Any, record: dict[str, Any], config: SlicingConfig) -> str:
    name = "{1}x{0}".format(*item) if isinstance(item, (list, tuple)) else str(item)
    if "error" in record:
        return f"{name}: {record['error']}"
    found = plan(record["image_hw"], config)

    def wide(size_hw: tuple[int, int]) -> str:
        return f"{size_hw[1]}x{size_hw[0]}"

    cut = "not cut"
    if found.grid and found.slice_hw:
        cut = f"{found.grid[0]} rows x {found.grid[1]} columns of {wide(found.slice_hw)} px slices"
    lines = [
        f"{name}: {wide(found.image_hw)} px (width x height), {found.strategy}",
        f"  {cut}, overview {wide(found.overview_hw)} px",
        f"  {found.num_views} views, {found.num_patches} patches, {found.num_visual_tokens} visual tokens "
        f"+ {found.num_separators} separators = {found.num_tokens} tokens",
    ]
    for candidate in record.get("candidates", ()):
        tie = "  tied" if candidate["tied"] else ""
        lines.append("  {}x{} (rows x columns)  score {:.6f}{}".format(*candidate["grid"], candidate["score"], tie))
    return "\n".join(lines)


def _layout(args: argparse.Namespace) -> int:
    from uhd.schema import SpatialSchema, layout

    args.schema = args.schema or "llava-uhd"
    laid = layout(plan(_size_hw(args.input), _config(args)), SpatialSchema.preset(args.schema))
    if args.json:
        print(json.dumps(laid.symbols))
    else:
        print(laid.text())
        print(
            f"{laid.num_tokens} positions: {laid.num_visual_tokens} visual tokens + {laid.num_separators} separators"
        )
    return 0


def _show(args: argparse.Namespace) -> int:
    from uhd.draw import draw_plan
    from uhd.pixels import image_size_hw
    from uhd.schema import SpatialSchema

    found = plan(image_size_hw(args.image), _config(args))
    picture = draw_plan(args.image, found, schema=SpatialSchema.preset(args.schema or args.strategy or "llava-uhd"))
    picture.save(args.output)
    print(found)
    print(f"wrote {args.output}")
    return 0


def _encode(args: argparse.Namespace) -> int:
    import torch

    from uhd.encoder import save_tokens

    encoder, note = _encoder(args.encoder)
    encoded = []
    with torch.inference_mode():
        for image in _progress(args.images, "images", 1):
            encoded += encoder([image])
    names = [Path(image).name for image in args.images]
    save_tokens(args.output, encoded, schema=encoder.schema, names=names, note=note)
    for name, item in zip(names, encoded, strict=True):
        print(f"{name}: {item.plan}, tokens {tuple(item.tokens.shape)}")
    print(f"wrote {args.output}")
    if note:
        print(f"{note}. Use --encoder DIR.", file=sys.stderr)
    return 0


def _demo(args: argparse.Namespace) -> int:
    from uhd import demo
    from uhd.draw import draw_plan

    encoder, note = _encoder(args.encoder)
    image = demo.page_image() if args.image is None else args.image
    print(f"image: {args.image or 'a page drawn for this demo'}")
    print(f"encoder: {args.encoder or 'a small ViT and perceiver resampler'}{': ' + note if note else ''}\n")
    demo.run(image, encoder=encoder, say=print)
    from uhd.pixels import load_image

    image = load_image(image, settings=encoder.pixels)
    found = encoder.plan((image.height, image.width))
    draw_plan(image, found, schema=encoder.schema, settings=encoder.pixels).save(args.output)
    print(f"\nwrote {args.output}: the cut, every view, and the token string")
    return 0


def _encoder(folder: Path | None) -> tuple[Any, str]:
    """The encoder, and what to say about its weights."""
    if folder is None:
        from uhd import demo

        return demo.untrained_encoder(), demo.UNTRAINED
    from uhd.encoder import VisualEncoder

    return VisualEncoder.from_pretrained(folder), ""


def _size_hw(item: Any) -> tuple[int, int]:
    """(height, width) of ``WIDTHxHEIGHT``, of ``[width, height]`` or of a file."""
    if isinstance(item, tuple):
        return item
    found = _SIZE.fullmatch(item)
    if found:
        return int(found[2]), int(found[1])
    if not Path(item).exists():
        raise ValueError(f"{item!r} is neither a file nor a size such as 672x1008 (WIDTHxHEIGHT)")
    from uhd.pixels import image_size_hw

    return image_size_hw(item)


def _read_sizes(path: Path) -> list[tuple[Any, Any]]:
    sizes = json.loads(path.read_text())
    if not isinstance(sizes, list) or not all(isinstance(size, list) and len(size) == 2 for size in sizes):
        raise ValueError(f"{path} must hold a JSON list of [width, height]")
    return [(height, width) for width, height in sizes]


def _progress(items: Iterable[Any], unit: str, quiet_below: int) -> Iterator[Any]:
    """A bar on the terminal's stderr where there is enough to wait for, and stdout goes elsewhere."""
    items = list(items)
    if len(items) <= quiet_below or not sys.stderr.isatty():
        yield from items
        return
    from tqdm import tqdm

    yield from tqdm(items, unit=unit, disable=sys.stdout.isatty() and unit == "sizes")


if __name__ == "__main__":
    sys.exit(main())
