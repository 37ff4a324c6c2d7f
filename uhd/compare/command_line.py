"""The words of ``uhd compare``, ``uhd choose`` and ``uhd explore``, and what they do."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from uhd import commands

ONE_BY_ONE = 4
"""Images named one by one that are compared each for itself; of more, and of folders and lists, there is a summary."""


def add(known: Any) -> None:
    """Add the three commands to the subparsers of ``uhd``."""
    command = known.add_parser("compare", help="what slicing rules do to an image, or to a data set, side by side")
    _inputs(command)
    command.add_argument("--html", type=Path, metavar="FILE.html", help="one page, with nothing outside it")
    command.add_argument("--csv", type=Path, metavar="FILE", help="a line for each image and rule")
    command.add_argument("--latex", type=Path, metavar="FILE", help="the summary as a LaTeX table")
    command.add_argument("--json", action="store_true", help="one JSON object of the data set, or one an image")
    shown = command.add_mutually_exclusive_group()
    shown.add_argument("--each", action="store_true", help="every image for itself, also of folders and lists")
    shown.add_argument("--summary", action="store_true", help="a summary, also of few images")
    command.add_argument(
        "--budget", type=int, metavar="N", help="of each image: tokens it should cost, adds tokens / N"
    )
    command.set_defaults(run=_compare)

    command = known.add_parser("choose", help="which rule with which settings, for these images under a budget")
    _inputs(command)
    command.add_argument("--max-tokens", type=float, metavar="N", help="tokens an image costs at most, on average")
    command.add_argument("--max-tflops", type=float, metavar="X", help="TFLOPs of the reference system, the same")
    command.add_argument("--per-image", action="store_true", help="every image keeps the budget, not only their mean")
    command.add_argument("--learned", action="store_true", help="weigh by what docs/learned.md measured")
    for name, what in (
        ("slices", "caps on slices that are tried"),
        ("latents", "tokens a view that are tried"),
        ("base-sizes", "sides of the vision encoder's square that are tried, px"),
    ):
        command.add_argument(f"--{name}", type=_numbers, metavar="N,...", help=what)
    command.add_argument("--patches-per-token", type=float, metavar="X", help="leave out what compresses more")
    command.add_argument("--json", action="store_true", help="one JSON object")
    command.set_defaults(run=_choose, wrong=command.error)

    command = known.add_parser("explore", help="a page with sliders: where up to four rules cut an image of any size")
    command.add_argument("-o", "--output", type=Path, default=Path("uhd_explore.html"), metavar="FILE.html")
    _rule_arguments(command, "the first four are shown first (default: the usual ones)")
    command.set_defaults(run=_explore)


def _inputs(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "inputs", nargs="*", metavar="PATH|WxH", help="image, folder, list of paths, .tar, .parquet, or WIDTHxHEIGHT"
    )
    command.add_argument("--sizes", type=Path, metavar="FILE", help="a JSON list of [width, height]")
    _rule_arguments(command, "default: all")
    commands.add_on_error(command)
    for part, default in (("vit", "clip-l"), ("resampler", "none, an MLP"), ("lm", "llama-13b")):
        command.add_argument(f"--{part}", metavar="NAME", help=f"what FLOPs are counted for (default {default})")


def _rule_arguments(command: argparse.ArgumentParser, default: str) -> None:
    command.add_argument(
        "--strategies",
        action="append",
        metavar="A,B,...",
        help=f"names of docs/strategies.md, patterns such as 'internvl*', or module:function; {default}",
    )
    command.add_argument("--set", action="append", default=[], metavar="NAME", help="common, adaptive or all")


def _numbers(words: str) -> list[int]:
    return [int(word) for word in words.split(",")]


def _rules(args: argparse.Namespace) -> Any:
    from uhd.slicing.rules import split_names

    from .inputs import named_rules

    words = [word for text in args.strategies or () for word in split_names(text)]
    if args.strategies is not None and not words:
        return []  # which is refused, unlike none at all
    return named_rules(words, args.set)


def _pixels(args: argparse.Namespace) -> Any:
    from uhd.pixels import DEFAULT

    return DEFAULT if args.max_pixels is None else DEFAULT.replace(max_pixels=args.max_pixels)


def _system(args: argparse.Namespace) -> dict[str, Any]:
    from .report import system_of

    return system_of(args.vit, args.resampler, args.lm)


def _compare(args: argparse.Namespace) -> int:
    from uhd.datasets.sources import SUFFIXES
    from uhd.writing import check_place

    from .inputs import holds_many

    rules = _rules(args)
    outputs = [path for path in (args.html, args.csv, args.latex) if path is not None]
    if len({path.resolve() for path in outputs}) < len(outputs):
        raise ValueError("--html, --csv and --latex write a file each: name different ones")
    if args.html is not None:
        _check_page(args.html)
    for path in outputs:
        check_place(path)
        given = [*args.inputs, *filter(None, [args.sizes])]
        if path.exists() and any(os.path.exists(item) and path.samefile(item) for item in given):
            raise ValueError(f"{path} is the image itself: choose another output")
        if path.suffix.lower() in (*SUFFIXES, ".tar", ".parquet"):
            raise ValueError(f"cannot write {path}: images end so, and it may be one of them")
    many = args.sizes or args.csv or args.latex or len(args.inputs) > ONE_BY_ONE or any(map(holds_many, args.inputs))
    if args.each and (args.csv or args.latex):
        raise ValueError("--csv and --latex are of all images together: leave --each out")
    if args.summary or (many and not args.each):
        return _compare_all(args, rules)
    return _compare_each(args, rules)


def _check_page(path: Path) -> None:
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"cannot write {path}: a page ends in .html")


def _compare_each(args: argparse.Namespace, rules: Any) -> int:
    from .inputs import size_of, source_of
    from .measuring import chosen_rules
    from .report import compare, picture_of, table

    system, pixels = _system(args), _pixels(args)
    found: list[Any] = []
    looks = args.html is not None or any(rule.border_moves for _, rule in chosen_rules(rules))
    inputs = _images(args)
    if not inputs:
        raise ValueError("nothing to compare: give at least one image or size")

    def one(name: str) -> str:
        what, image = inputs[name], None
        if looks and not _is_size(what):
            image, size_hw = picture_of(source_of(what, pixels), pixels)
        else:
            size_hw = size_of(what, pixels)
        compared = compare(size_hw, rules, name=Path(name).name, image=image, budget=args.budget, **system)
        if args.html is not None:
            found.append(compared)
        return json.dumps(compared.to_dict()) if args.json else table(compared) + "\n"

    failed, stop = commands.each("uhd compare", inputs, one, stop=args.on_error == "stop")
    if found:
        from .page import write_page

        words = f"{len(found)} of {len(inputs)} images are in {args.html}"
        commands.keep(stop, lambda: write_page(args.html, found), words)
        print(f"wrote {args.html}: open it in a browser", file=sys.stderr if args.json else sys.stdout)
    elif stop:
        raise stop
    return commands.status(failed, len(inputs))


def _is_size(what: Any) -> bool:
    from uhd.datasets.sources import Item

    return isinstance(what, tuple) and not isinstance(what, Item)


def _images(args: argparse.Namespace) -> dict[str, Any]:
    """What the words of a command stand for, by names that are all different."""
    from .inputs import named_inputs
    from .measuring import distinct

    found = list(named_inputs(args.inputs, args.sizes))
    return dict(zip(distinct(name for name, _ in found), (what for _, what in found), strict=True))


def _read(args: argparse.Namespace, name: str) -> tuple[list[Any], int]:
    """Every image with its size, and how many could not be read."""
    from .inputs import Input, size_of

    pixels = _pixels(args)
    inputs = _images(args)
    if not inputs:
        raise ValueError("there are no images: give images, folders, lists, sizes such as 672x1008, or --sizes FILE")
    found: list[Input] = []

    def one(each: str) -> None:
        what = inputs[each]
        found.append(Input(each, size_of(what, pixels), None if _is_size(what) else what))

    failed, stop = commands.each(name, inputs, one, stop=args.on_error == "stop")
    if stop:
        raise stop
    return found, failed


def _compare_all(args: argparse.Namespace, rules: Any) -> int:
    from uhd.writing import new_file, write_text

    from . import summary

    if args.budget is not None:
        raise ValueError("--budget is of each image: add --each, or ask uhd choose for what keeps a budget")
    system = _system(args)
    found, failed = _read(args, "uhd compare")
    if not found:
        return commands.REFUSED
    answer = summary.summarize(found, rules, **system)
    print(json.dumps({**summary.to_dict(answer), "failed": failed}) if args.json else summary.text(answer))
    said = sys.stderr if args.json else sys.stdout
    if args.csv is not None:
        with new_file(args.csv) as new, open(new, "w", newline="", encoding="utf-8") as file:
            summary.write_csv(file, answer)
        print(f"wrote {args.csv}: a line for each image and rule", file=said)
    if args.latex is not None:
        write_text(args.latex, summary.latex(answer) + "\n")
        print(f"wrote {args.latex}", file=said)
    if args.html is not None:
        from .overview import overview_page

        write_text(args.html, overview_page(answer, settings=_pixels(args)))
        print(f"wrote {args.html}: open it in a browser", file=said)
    return commands.status(failed, failed + len(found))


def _choose(args: argparse.Namespace) -> int:
    from . import advice
    from .choosing import check_budget, check_settings, choose

    rules = _rules(args)
    named = {name: getattr(args, name) for name in ("slices", "latents", "base_sizes")}
    settings = {name: values for name, values in named.items() if values is not None}
    if args.max_tokens is None and args.max_tflops is None:
        args.wrong("a choice needs a budget: --max-tokens N, --max-tflops X, or both")
    bounds = {name: getattr(args, name) for name in ("max_tokens", "max_tflops", "patches_per_token")}
    check_budget(**bounds)  # before any image is read
    check_settings(**settings)
    system = _system(args)
    found, failed = _read(args, "uhd choose")
    if not found:
        return commands.REFUSED
    choice = choose(found, **bounds, per_image=args.per_image, rules=rules, learned=args.learned, **settings, **system)
    print(json.dumps({**advice.to_dict(choice), "failed": failed}) if args.json else advice.text(choice))
    return commands.status(failed, failed + len(found))


def _explore(args: argparse.Namespace) -> int:
    from uhd.writing import check_place, write_text

    from .explore import explore_page

    _check_page(args.output)
    check_place(args.output)
    write_text(args.output, explore_page(_rules(args)))
    print(f"wrote {args.output}: open it in a browser")
    return 0
