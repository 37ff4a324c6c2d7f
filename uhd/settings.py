"""Frozen settings as plain JSON, and what is said where a name is not known: once for all parts."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, ClassVar, TypeVar

_Own = TypeVar("_Own", bound="Settings")


class Settings:
    """Base of frozen dataclasses: a changed copy of them, and to plain JSON types and back."""

    __slots__ = ()
    readers: ClassVar[Mapping[str, Callable[[Any], Any]]] = {}
    """What makes a field of its plain JSON types, where that is more than tuples of lists."""

    def replace(self: _Own, **changes: Any) -> _Own:
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; :meth:`from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls: type[_Own], data: Mapping[str, Any]) -> _Own:
        """The inverse of :meth:`to_dict`, also after JSON text; a ``ValueError`` names a wrong or missing key."""
        known = [field.name for field in dataclasses.fields(cls)]
        try:
            unknown = sorted(set(data) - set(known))
            if unknown:
                raise ValueError(f"{cls.__name__} has no {unknown}; its fields are {known}")
            return cls(**{key: cls._read(key, value) for key, value in data.items()})
        except TypeError as problem:
            raise ValueError(f"not the dictionary of a {cls.__name__}: {problem}") from None

    @classmethod
    def _read(cls, key: str, value: Any) -> Any:
        if not isinstance(value, (list, tuple, Mapping)):
            return value
        return cls.readers.get(key, as_tuples)(value)


def as_tuples(value: Any) -> Any:
    """Lists, which JSON makes of tuples, as tuples again, nested ones too.

    >>> as_tuples([[1, 2], "a"])
    ((1, 2), 'a')
    """
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


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
