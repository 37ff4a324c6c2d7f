"""Frozen settings as plain JSON, and what is said where a name is not known: once for all parts."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import math
import numbers
import operator
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache
from typing import Any, ClassVar, TypeVar

_Own = TypeVar("_Own", bound="Settings")
_Made = TypeVar("_Made")
_Reader = Callable[[Any], Any]


class Settings:
    """Base of frozen dataclasses: a changed copy of them, and to plain JSON types and back."""

    __slots__ = ()
    later: ClassVar[tuple[str, ...]] = ()
    """Fields that files of earlier versions lack: their defaults stand for them."""

    def replace(self: _Own, **changes: Any) -> _Own:
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; :meth:`from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls: type[_Own], data: Mapping[str, Any]) -> _Own:
        """The inverse of :meth:`to_dict`, also after JSON text; errors as in :func:`read_arguments`."""
        return read_arguments(cls, data)


class Misread(ValueError):
    """A value that is not what its place asks for."""

    def __init__(self, what: str, place: str = "") -> None:
        super().__init__(f"{place}{what}".lstrip(".: "))
        self.what, self.place = what, place

    @classmethod
    def inside(cls, place: str, problem: ValueError) -> Misread:
        """The same, told from further out."""
        if isinstance(problem, Misread):
            return cls(problem.what, place + problem.place)
        return cls(f": {problem}", place)


def read_arguments(cls: type[_Made], data: Mapping[str, Any]) -> _Made:
    """Make an instance of a class from plain JSON types: every one of its arguments, as annotated, and no other.

    Floats must be finite. Lists become tuples, and dictionaries other settings, where the annotation says so; what is
    annotated as anything else is taken as it is. Arguments that the class names in ``later`` may be missing.

    Raises:
        ValueError: A key is unknown or missing, a value of another type or out of range; the message names it.

    >>> read_arguments(Misread, {"what": 3, "place": "here"})
    Traceback (most recent call last):
    ValueError: not the dictionary of a Misread: what must be a text, got 3
    """
    readers, later = _readers(cls), getattr(cls, "later", ())
    try:
        if not isinstance(data, Mapping):
            raise Misread(f"it is {data!r:.60}")
        if unknown := [name for name in data if name not in readers]:
            raise ValueError(f"{cls.__name__} has no {unknown!r:.200}; its fields are {list(readers)}")
        if missing := [name for name in readers if name not in data and name not in later]:
            raise Misread(f"missing {', '.join(missing)}")
        values = {name: _read_at("." + name, readers[name], value) for name, value in data.items()}
        return cls(**values)
    except (TypeError, Misread) as problem:
        raise ValueError(f"not the dictionary of a {cls.__name__}: {problem}") from None


def read_values(data: Any, what: str, **kinds: Any) -> list[Any]:
    """The values of these keys of a dictionary in plain JSON types, each as its annotation says; other keys may stand.

    >>> read_values({"epoch": 3, "before": [[1, 2]]}, "the state", epoch=int, before=tuple[tuple[int, int], ...])
    [3, ((1, 2),)]

    Raises:
        ValueError: A key is missing, or its value of another type; the message names it, and ``what`` is read.
    """
    try:
        values = _mapping(None)(data)
        if missing := [name for name in kinds if name not in values]:
            raise Misread(f"missing {', '.join(missing)}")
        return [_read_at("." + name, _reader(kind), values[name]) for name, kind in kinds.items()]
    except Misread as problem:
        raise ValueError(f"{what} is not one: {problem}") from None


def check_types(settings: Any) -> None:
    """Make the fields of a frozen dataclass what they are annotated as; a ``ValueError`` names one that is not."""
    readers = _readers(type(settings))
    for field in dataclasses.fields(settings):
        value = _read_at("." + field.name, readers[field.name], getattr(settings, field.name))
        object.__setattr__(settings, field.name, value)


def check_range(settings: Any, names: Iterable[str], least: float = 1, most: float = math.inf) -> None:
    """Raise a ``ValueError`` that names the first of these numbers out of range; ``None`` is in any."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not least <= value <= most:
            bound = f"least {least}" if value < least else f"most {most}"
            raise ValueError(f"{name} must be at {bound}; got {value}")


MOST_LAYERS = 512
"""Most layers of any part: to build one of a mistaken number would take for ever."""


def check_fields(settings: Any, names: Iterable[str]) -> None:
    """Raise a ``ValueError`` that names the first of these attributes that is not what its class annotates it as."""
    readers = _readers(type(settings))
    for name in names:
        _read_at("." + name, readers[name], getattr(settings, name))


@cache
def _readers(cls: type) -> dict[str, _Reader]:
    """What reads each argument of a class."""
    names, hints = inspect.signature(cls).parameters, {}
    for one in reversed(cls.__mro__) if dataclasses.is_dataclass(cls) else (cls.__init__,):
        own = {name: kind for name, kind in inspect.get_annotations(one).items() if name in names}
        with contextlib.suppress(NameError):  # names that type checkers alone know: nothing is checked by them
            hints |= typing.get_type_hints(
                types.SimpleNamespace(__annotations__=own), vars(sys.modules[one.__module__])
            )
    return {name: _reader(hints.get(name, Any)) for name in names}


def _read_at(place: str, read: _Reader, value: Any) -> Any:
    try:
        return read(value)
    except ValueError as problem:
        raise Misread.inside(place, problem) from None


def _reader(kind: Any) -> _Reader:
    """What reads a value that is annotated so."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind in _PLAIN:
        return _PLAIN[kind]
    if origin in (typing.Union, types.UnionType):
        return _one_of([_reader(part) for part in parts if part is not type(None)], type(None) in parts)
    if origin is tuple and parts:
        return _many(_reader(parts[0])) if parts[-1] is ... else _row([_reader(part) for part in parts], tuple)
    if origin in (dict, Mapping):
        return _mapping(None if parts[1] is Any else _reader(parts[1]))
    if origin is list:
        return _many(_reader(parts[0]))
    if isinstance(kind, type) and issubclass(kind, Settings):
        return kind.from_dict
    if isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_make"):
        return _row([_reader(part) for part in typing.get_type_hints(kind).values()], kind._make)
    return as_tuples


def _wrong(wanted: str, value: Any) -> Misread:
    return Misread(f" must be {wanted}, got {value!r:.60}")


def _whole(value: Any) -> int:
    if type(value) is int:
        return value
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise _wrong("a whole number", value)
    return operator.index(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not abs(value) <= sys.float_info.max:
        raise _wrong("a finite number", value)
    return value


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong("True or False", value)
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong("a text", value)
    return value


_PLAIN: dict[Any, _Reader] = {int: _whole, float: _number, bool: _truth, str: _text}


def _one_of(readers: list[_Reader], optional: bool) -> _Reader:
    def read(value: Any) -> Any:
        if value is None and optional:
            return None
        for reader in readers[:-1]:
            try:
                return reader(value)
            except ValueError:
                continue
        return readers[-1](value)

    return read


def _mapping(reader: _Reader | None) -> _Reader:
    def read(values: Any) -> Any:
        if not isinstance(values, Mapping):
            raise _wrong("an object of settings", values)
        return (
            values
            if reader is None
            else {key: _read_at(f"[{key!r:.40}]", reader, value) for key, value in values.items()}
        )

    return read


def _many(reader: _Reader) -> _Reader:
    def read(values: Any) -> tuple:
        if not isinstance(values, (list, tuple)):
            raise _wrong("a list", values)
        return tuple([_read_at(f"[{place}]", reader, value) for place, value in enumerate(values)])

    return read


def _row(readers: list[_Reader], make: Callable[[Iterable[Any]], Any]) -> _Reader:
    def read(values: Any) -> Any:
        if not isinstance(values, (list, tuple)) or len(values) != len(readers):
            raise _wrong(f"a list of {len(readers)}", values)
        found = zip(readers, values, strict=True)
        return make([_read_at(f"[{place}]", reader, value) for place, (reader, value) in enumerate(found)])

    return read


def as_tuples(value: Any) -> Any:
    """Lists, which JSON makes of tuples, as tuples again, nested ones too.

    >>> as_tuples([[1, 2], "a"])
    ((1, 2), 'a')
    """
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


def whole(name: str, value: Any, *, least: int) -> int:
    """The value as an int; a ``ValueError`` that names the setting where it is none, or less than ``least``."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return number


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raise a ``ValueError`` where a setting is none of its choices.

    >>> check_choice("side", "right", ["top", "left"])
    Traceback (most recent call last):
    ValueError: side must be 'top' or 'left', got 'right'
    """
    *others, last = map(repr, choices)
    if repr(value) not in (*others, last):
        raise ValueError(f"{name} must be {', '.join(others)} or {last}, got {value!r}")


def plain_name(name: Any) -> str:
    """A name as tables have it: in small letters, with dashes.

    >>> plain_name("LLaVA_UHD")
    'llava-uhd'
    """
    return str(name).lower().replace("_", "-")


def unknown_name(kind: str, name: Any, known: Iterable[str], listed: str | None = None) -> ValueError:
    """The error for a name that is not known: the nearest names, and where all of them are ``listed``.

    >>> print(unknown_name("filter", "bicubik", ["bicubic", "lanczos"]))
    no filter named 'bicubik': did you mean 'bicubic'? There are: bicubic, lanczos
    """
    known = list(known)
    near = [repr(one) for one in difflib.get_close_matches(plain_name(name), known, n=3, cutoff=0.5)]
    nearest = f"did you mean {', '.join(near[:-1])}{' or ' * (len(near) > 1)}{near[-1]}? " if near else ""
    return ValueError(f"no {kind} named {name!r}: {nearest}{listed or 'There are: ' + ', '.join(known)}")


def check_free(kind: str, name: Any, taken: Mapping[str, Any], new: Any) -> None:
    """Refuse a name under which something else is known, and something that has another name already.

    The same definition run again, as a notebook's cell is or a module that is reloaded, replaces the old one.

    Raises:
        TypeError: The name is no text.
        ValueError: It is taken, or empty.

    >>> check_free("strategy", "Square", {"square": len}, max)
    Traceback (most recent call last):
    ValueError: the strategy name 'Square' is taken by builtins.len: choose another for builtins.max
    """
    if not isinstance(name, str):
        raise TypeError(f"a {kind} is registered under a name, a str, got {type(name).__name__}")
    if not name.strip():
        raise ValueError(f"a {kind} is registered under a name that is not empty, got {name!r}")
    for known, old in taken.items():
        same_name = plain_name(known) == plain_name(name)
        if same_name and not _same_definition(old, new):
            raise ValueError(
                f"the {kind} name {name!r} is taken by {place_of(old)}: choose another for {place_of(new)}"
            )
        if old is new and not same_name:
            raise ValueError(f"{place_of(new)} is registered as the {kind} {known!r} already: it has one name")


def kept_arguments(one: Any, names: Collection[str]) -> dict[str, Any]:
    """The attributes of something that are its constructor's arguments.

    Raises:
        ValueError: It does not keep them all; the message says what to do.
    """
    missing = [name for name in names if not hasattr(one, name)]
    if missing:
        raise ValueError(
            f"{place_of(type(one))} cannot be saved: it does not keep {', '.join(missing)} of its constructor's "
            "arguments as attributes; let it, or give it a to_dict()"
        )
    return {name: getattr(one, name) for name in names}


def place_of(one: Any) -> str:
    """Module and name of a class or function; anything else as it shows itself.

    >>> place_of(Settings)
    'uhd.settings.Settings'
    """
    return f"{one.__module__}.{one.__qualname__}" if hasattr(one, "__qualname__") else repr(one)


def _same_definition(old: Any, new: Any) -> bool:
    if hasattr(old, "__qualname__") and hasattr(new, "__qualname__"):
        return old is new or ("<" not in place_of(new) and place_of(old) == place_of(new))
    return bool(old == new)
