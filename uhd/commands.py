"""How a command ends: its exit status and the one line that it says, interrupted or on any error."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from uhd.lazily import LibraryMissing

DONE, REFUSED, SOME_FAILED, INTERRUPTED, TERMINATED = 0, 1, 3, 130, 143
"""Exit statuses; 2, a wrong call, is argparse's own."""


def add_on_error(command: argparse.ArgumentParser, what: str = "an image that cannot be read") -> None:
    """Give a command ``--on-error``: whether the first of many items that fails ends it."""
    told = f"report {what} and go on, exiting with {SOME_FAILED} (default), or stop there"
    command.add_argument("--on-error", choices=("report", "stop"), default="report", help=told)


def status(failed: int, total: int) -> int:
    """The exit status after so many of all items failed."""
    return DONE if not failed else REFUSED if failed == total else SOME_FAILED


class Stopped(KeyboardInterrupt):
    """A signal came; with a message, finished work was kept. Python exits by SIGINT itself after some of the plain."""

    word, status = "interrupted", INTERRUPTED


class Terminated(Stopped):
    """SIGTERM came: whoever keeps finished work on Ctrl-C keeps it then, too."""

    word, status = "terminated", TERMINATED


def run(name: str, command: Callable[[], int]) -> int:
    """Run a command and return its exit status; what goes wrong is one line on stderr, after ``name``.

    Ctrl-C raises :class:`Stopped` in it, SIGTERM :class:`Terminated`.
    ``UHD_DEBUG=1`` in the environment shows tracebacks, too.
    """
    try:
        with _signals_raised():
            status = command()
            if sys.stdout is not None:
                sys.stdout.flush()
            return status
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stdout = None
        return DONE
    except KeyboardInterrupt as stop:
        kind = stop if isinstance(stop, Stopped) else Stopped
        _say(name, ", ".join([kind.word, *map(str, stop.args)]))
        return kind.status
    except (ValueError, OSError) as problem:
        _say(name, str(problem) or repr(problem))
    except ImportError as problem:
        missing = isinstance(problem, ModuleNotFoundError)
        _say(name, str(LibraryMissing.of("this command", problem) if missing else problem))
    except Exception as problem:
        _say(name, f"{type(problem).__name__}: {problem} (UHD_DEBUG=1 shows where)")
    return REFUSED


def each(
    name: str, items: Iterable[str], one: Callable[[str], str | None], *, stop: bool = False
) -> tuple[int, KeyboardInterrupt | None]:
    """Do one thing with every item and print what it says; return how many failed, and what interrupted it.

    An item that fails is reported and the others go on; with ``stop`` a ``ValueError`` ends the run.
    """
    failed = 0
    try:
        for item in items:
            try:
                said = one(item)
            except (ValueError, OSError) as problem:
                if stop:
                    raise ValueError(f"{item}: {problem}") from problem
                _say(name, f"{item}: {problem}")
                failed += 1
            else:
                print(said) if said else None
    except KeyboardInterrupt as interrupt:
        return failed, interrupt
    return failed, None


def keep(stop: KeyboardInterrupt | None, write: Callable[[], None], words: str) -> None:
    """Write what is finished, again where a signal came meanwhile; then raise what stopped the run, with ``words``."""
    try:
        write()
    except KeyboardInterrupt as late:
        stop = stop or late
        write()
    if stop:
        raise type(stop)(words)


def _say(name: str, words: str) -> None:
    if os.environ.get("UHD_DEBUG") == "1":
        traceback.print_exc()
    print(f"{name}: {' '.join(line.strip() for line in words.splitlines())}", file=sys.stderr)


@contextmanager
def _signals_raised() -> Iterator[None]:
    """Handlers of others stay."""
    ours = {signal.SIGINT: (signal.default_int_handler, Stopped), signal.SIGTERM: (signal.SIG_DFL, Terminated)}
    if threading.current_thread() is not threading.main_thread():  # only that one may set a handler
        ours = {}
    ours = {number: pair for number, pair in ours.items() if signal.getsignal(number) == pair[0]}

    def stop(number: int, _: Any) -> None:
        raise ours[number][1]

    for number in ours:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, (before, _) in ours.items():
            signal.signal(number, before)
