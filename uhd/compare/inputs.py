"""What is compared: the images that words on a command line name, with their sizes, and the rules."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from uhd.datasets.sources import SUFFIXES, Item, listed, read
from uhd.settings import plain_name, unknown_name
from uhd.slicing import PRESETS, Slicing, SlicingLike, find, strategies
from uhd.slicing.plan import check_size

from .measuring import all_rules

_SIZE = re.compile(r"([0-9]+)[xX×]([0-9]+)")  # noqa: RUF001

SETS: dict[str, tuple[str, ...]] = {
    "common": (
        *("llava-uhd-safe", "minicpm-v", "minicpm-v-4.6", "llava-1.5", "llava-next", "llava-onevision", "internvl"),
        *("qwen2.5-vl", "qwen3-vl", "pixtral", "idefics3", "gemma3", "llama4", "deepseek-vl2", "molmo2"),
    ),
    "adaptive": tuple(PRESETS),
    "all": tuple(all_rules()),
}
"""Rules that ``--set`` names together."""


def typed_size(word: str) -> tuple[int, int] | None:
    """(height, width) of ``WIDTHxHEIGHT``, as people write sizes; ``None`` for anything else.

    >>> typed_size("672x1008"), typed_size("photo.jpg")
    ((1008, 672), None)
    """
    found = _SIZE.fullmatch(word)
    return (int(found[2]), int(found[1])) if found else None


class Input(NamedTuple):
    """One image: what it is called, its size, and where its picture is; ``None``: only the size is known."""

    name: str
    image_hw: tuple[int, int]
    picture: Any = None


def given_inputs(images: Any) -> Iterator[Input]:
    """Every image of one or several paths, (height, width) pairs, Pillow images and :class:`Input`s.

    Raises:
        ValueError: One that cannot be read, named, or a size that is none.
        TypeError: Something else.
    """
    if isinstance(images, (str, os.PathLike)) or hasattr(images, "getexif"):
        images = [images]
    if isinstance(images, bytes) or not hasattr(images, "__iter__"):
        raise TypeError(f"images are a list of (height, width), paths or pictures, got {images!r:.60}")
    for number, one in enumerate(images):
        if isinstance(one, Input):
            yield one
        elif isinstance(one, (str, os.PathLike)):
            from uhd.pixels import DEFAULT

            for name, what in named_inputs([os.fspath(one)]):
                try:
                    yield Input(name, size_of(what, DEFAULT), what)
                except (ValueError, OSError) as problem:
                    raise ValueError(f"{name}: {problem}") from problem
        elif hasattr(one, "getexif"):
            from uhd.pixels import image_size_hw

            yield Input(f"image {number}", image_size_hw(one), one)
        elif one is None or isinstance(one, (int, float)):
            raise TypeError(f"images are a list of (height, width), paths or pictures, got {one!r} in it")
        else:
            size_hw = check_size(one)
            yield Input("{1}x{0}".format(*size_hw), size_hw)


def named_inputs(paths: Iterable[str], sizes: Path | None = None) -> Iterator[tuple[str, Any]]:
    """(name, what it stands for) of every image that paths name: sizes, pictures, folders, lists, tars, Parquet.

    What it stands for is a (height, width), a path, or an :class:`uhd.datasets.sources.Item`; nothing is opened that
    is a picture.

    Raises:
        ValueError: There is no such path, or it is no such file.
    """
    for path in paths:
        if not path.strip():  # a shell's variable that is not set; as a path it would be the working folder
            raise ValueError(f"{path!r} names no image: leave it out, or give . for the working folder")
        if (size_hw := typed_size(path)) is not None:
            yield path, size_hw
        elif holds_many(path):
            yield from ((item.key, item) for item in listed(path))
        else:
            yield path, path
    for height, width in [] if sizes is None else read_sizes(sizes):
        yield f"{width}x{height}", (height, width)


def holds_many(path: str) -> bool:
    """Whether a path is a folder, an archive, a table or a list, rather than one picture."""
    place = Path(path)
    if os.path.isdir(path) or place.suffix.lower() in (".tar", ".parquet"):
        return True
    if place.suffix.lower() in SUFFIXES or not os.path.isfile(
        path
    ):  # which take names that no file can have, unlike a Path's
        return False
    try:
        with open(place, "rb") as file:
            start = file.read(4096)
    except OSError:  # whoever reads it says so
        return False
    try:
        text = start.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        if problem.start < len(start) - 4:
            return False
        text = start[: problem.start].decode("utf-8-sig")
    # SVG, HTML and JSON are text, too, and no list of paths; an empty file is a list that names none
    return "\0" not in text and not text.lstrip().startswith(("<", "{", "["))


def size_of(what: Any, settings: Any) -> tuple[int, int]:
    """(height, width) of what :func:`named_inputs` gives; a ``ValueError`` or ``OSError`` where it cannot be read."""
    if isinstance(what, tuple) and not isinstance(what, Item):
        return check_size(what)
    from uhd.pixels import image_size_hw

    if not isinstance(what, Item) and (not os.path.exists(what) or os.path.isdir(what)):
        raise ValueError(f"{what!r} is neither an image file nor a size such as 672x1008 (WIDTHxHEIGHT)")
    return image_size_hw(source_of(what, settings), settings=settings)


def source_of(what: Any, settings: Any) -> Any:
    """What :func:`uhd.pixels.load_image` reads it from."""
    from uhd.pixels.source import command_source

    if isinstance(what, Item):
        return what.place[0] if what.kind == "file" and os.path.isfile(what.place[0]) else read(what)[0]
    return command_source(what, settings)


def read_sizes(path: Path) -> list[tuple[Any, Any]]:
    """(height, width) of a JSON list of [width, height], whatever these are; a ``ValueError`` where it is none."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        sizes = json.loads(text, parse_constant=str, parse_float=_number)
        if not isinstance(sizes, list) or not all(isinstance(size, list) for size in sizes):
            raise ValueError("it holds something else")
        return [(height, width) for width, height in sizes]
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"{path} must hold a JSON list of [width, height]: {problem}") from None


def _number(digits: str) -> float | str:
    """No infinite size: JSON could not say it again."""
    return float(digits) if math.isfinite(float(digits)) else digits


def named_rules(words: Iterable[str], sets: Iterable[str] = ()) -> list[SlicingLike] | None:
    """Rules that a command line names; ``None``, which is every rule, where it names none, or the set of all.

    Args:
        words: A name, also with settings (``name+setting=value``), a pattern of names with ``*``, ``?`` or ``[...]``,
            or ``module:function``, which is imported from the working folder or where Python finds it.
        sets: Names of :data:`SETS`.

    Raises:
        ValueError: A name, pattern, set or function that is none.

    >>> named_rules(["minicpm-v-4*", "llava-uhd"])
    ['minicpm-v-4.6', 'minicpm-v-4.6-4x', 'llava-uhd']
    """
    found: dict[Any, SlicingLike] = {}
    words, sets = list(words), list(sets)
    for name in sets:
        if name not in SETS:
            raise unknown_name("set of strategies", name, SETS, f"There are {', '.join(SETS)}")
        for rule in SETS[name]:
            found.setdefault(find(rule), rule)
    for word in words:
        for rule in _named(word):
            found.setdefault(find(rule), rule)
    return list(found.values()) if words or set(sets) - {"all"} else None


def _named(word: str) -> Sequence[SlicingLike]:
    if "+" in word:
        find(word)
        return [word]
    if ":" in word:
        return [imported(word)]
    if not any(mark in word for mark in "*?["):
        find(word)
        return [word]
    pattern = plain_name(word)
    full = [name for name in all_rules() if fnmatchcase(name, pattern)]
    if not full:  # an alias stands for a rule only where no full name matches
        full = [name for name in strategies() if fnmatchcase(name, pattern)]
    if not full:
        raise ValueError(f"no strategy is named like {word!r}: uhd.strategies() lists all names")
    return full


def imported(word: str) -> Slicing:
    """The rule that ``module:function`` names; a ``ValueError`` where there is none."""
    module, _, name = word.partition(":")
    folder = os.getcwd()
    sys.path.insert(0, folder)  # as with python -m; a command's own folder stands there otherwise
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as problem:
        raise ValueError(f"{word!r} names no rule as module:function: {problem}") from problem
    except Exception as problem:  # whatever the module does
        raise ValueError(f"{word!r} cannot be imported: {type(problem).__name__}: {problem}") from problem
    finally:
        sys.path.remove(folder)
    try:
        return find(found)
    except TypeError as problem:
        raise ValueError(f"{word!r} is no rule: {problem}") from None
