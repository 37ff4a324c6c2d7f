"""Files and folders that are written whole or not at all, whatever ends the process that writes them.

A file is written in a hidden folder beside its place and moved there at once. The files of a folder are written in a
hidden folder inside it, which then gets the name :data:`READY`: from that moment the save has happened, and moving the
files to their places, which a kill may cut short, is finished by whoever reads or writes the folder next. Files that
others put there stay. What a killed writer left under its hidden name is taken over by the next one.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # not POSIX: no writer knows that another is gone, so each has names of its own
    fcntl = None  # type: ignore[assignment]

STAGE, READY, _DROPPED, _TEMPORARY = ".uhd-saving-", ".uhd-saved", ".uhd-dropped", ".uhd-tmp-"
_PROBE = 1 << 16  # bytes


@contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a path to write to; what is there at the end is moved to ``path`` at once, and after an error removed.

    It has no suffix: say in which format to write.

    A link stays, what it points to is replaced; permissions of a file that is replaced are kept.

    Raises:
        ValueError: There is no such folder, or something else than a file stands there.
        OSError: It cannot be written, e.g. on a full disk; what was there before is unchanged.
    """
    place = _checked(path)
    with _trouble_named(path), _claimed(_hidden(place)) as hidden:
        new = hidden / "new"  # no name that a search for such files would find
        yield new
        _settle(new, place, hidden)
        os.replace(new, place)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file of this text, in UTF-8, as :func:`new_file` does."""
    with new_file(path) as new:
        new.write_text(text, encoding="utf-8")


def check_place(path: str | os.PathLike[str]) -> None:
    """Before any work: raise what :func:`new_file` would where nothing could be written there. Nothing is changed."""
    place = _checked(path)
    with _trouble_named(path), _claimed(_hidden(place)) as hidden:
        (hidden / "probe").write_bytes(bytes(_PROBE))


@contextmanager
def new_files(folder: str | os.PathLike[str], *, one_of: str | None = None) -> Iterator[Path]:
    """Give a folder to write to; at the end all its files are in ``folder`` at once, and after an error none is.

    ``folder`` is made where it is missing. Its other files stay, but for those whose names match ``one_of``, a regular
    expression, where new ones do: a loader would take the old ones for the new. Inside another such block the folder
    that was given there is itself given.

    Raises:
        ValueError: A file stands where the folder, or a folder where one of its files should be.
        OSError: It cannot be written, e.g. on a full disk; what was there before is unchanged.
    """
    folder = Path(folder)
    if folder.parent.name.startswith(STAGE):
        yield folder
        return
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"cannot save to {folder}: it is a file, expected a folder")
    with _trouble_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        finish(folder)
        with _claimed(folder / STAGE) as hidden:
            stage = hidden / (folder.resolve().name or "root")  # by that name transformers calls a repository
            stage.mkdir()
            yield stage
            new = _files(stage)
            for file in new:
                _settle(file, _checked(folder / file.relative_to(stage), made=True), hidden)
            if new:
                if one_of:
                    _drop(stage, folder, re.compile(one_of))
                with _locked(folder):
                    _move(folder)  # of a save that came in between and was killed
                    os.rename(stage, folder / READY)
                    _move(folder)


def finish(folder: str | os.PathLike[str]) -> bool:
    """Move what a killed save left in ``folder`` to its places, and return whether there was anything.

    Raises:
        OSError: The files cannot be moved, e.g. in a folder that can only be read: neither the old nor the new whole
            is there.
    """
    folder = Path(folder)
    if not _is_ready(folder):
        return False
    with _locked(folder):
        _move(folder)
    return True


def is_file(path: Path) -> bool:
    """Whether there is such a file once its folder is whole; errors as of :func:`finish`."""
    finish(path.parent)
    return path.is_file()


def _is_ready(folder: Path) -> bool:
    return (folder / READY).is_dir() and not (folder / READY).is_symlink()


def _move(folder: Path) -> None:
    if not _is_ready(folder):  # another process was faster
        return
    ready = folder / READY
    try:
        places = {file: folder / file.relative_to(ready) for file in _files(ready)}
        for place in places.values():
            if not place.parent.resolve().is_relative_to(folder.resolve()):  # by a link that somebody put there
                raise ValueError(f"{place.parent} leads out of it")
        if (ready / _DROPPED).exists():
            for name in json.loads((ready / _DROPPED).read_text(encoding="utf-8")):
                (folder / Path(name).name).unlink(missing_ok=True)
            (ready / _DROPPED).unlink()
        for file, place in places.items():
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, place)
        for inner in sorted((path for path in ready.rglob("*") if path.is_dir()), reverse=True):
            inner.rmdir()
        ready.rmdir()
    except (OSError, ValueError, TypeError, RecursionError) as problem:
        raise OSError(
            f"{folder} is half old and half new: a save was killed as its files were moved there, and moving the rest "
            f"from {READY} fails ({_reason(problem)}): save it again, or load it once where it can be written"
        ) from problem


@contextmanager
def read_whole(folder: str | os.PathLike[str], description: str) -> Iterator[None]:
    """Read files of a folder that belong together, of which ``description`` is one.

    Raises:
        OSError: As :func:`finish`.
        ValueError: They were saved anew meanwhile.
    """
    finish(folder)
    before = _stamp(Path(folder, description))
    yield
    if Path(folder, READY).exists() or _stamp(Path(folder, description)) != before:
        raise ValueError(f"{folder} was saved anew while it was read: load it again")


def _hidden(place: Path) -> Path:
    """How names of folders begin from which a file is moved to this place."""
    return place.parent / f".{place.name[:200]}{_TEMPORARY}"


def _stamp(file: Path) -> tuple[int, int] | None:
    with suppress(OSError):
        found = file.stat()
        return found.st_ino, found.st_mtime_ns
    return None


def _checked(path: str | os.PathLike[str], *, made: bool = False) -> Path:
    """The file that ``path`` leads to, which can be written as far as one can see; ``made``: its folder will be."""
    place = Path(os.path.realpath(path))
    if not made and not place.parent.is_dir():
        raise ValueError(f"cannot write {path}: there is no folder {Path(path).parent}")
    if place.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder, expected a file")
    if place.exists() and not place.is_file():
        raise ValueError(f"cannot write {path}: it is a pipe or a device, expected a file")
    if place.exists() and not os.access(place, os.W_OK):
        raise PermissionError(f"cannot write {path}: it can only be read")
    return place


def _settle(file: Path, place: Path, hidden: Path) -> None:
    """Have the file on the disk before it is moved, with the permissions of the one that it replaces.

    A new one has those that the hidden folder got: safetensors and others let only the user read theirs.
    """
    with suppress(OSError):  # not every file system has any
        os.chmod(file, (place if place.exists() else hidden).stat().st_mode & 0o666)
    handle = os.open(file, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _drop(stage: Path, folder: Path, kind: re.Pattern[str]) -> None:
    """List in the stage which files of the folder the new ones replace under other names."""
    if any(kind.fullmatch(file.name) for file in stage.iterdir()):
        old = [file.name for file in folder.iterdir() if kind.fullmatch(file.name)]
        dropped = [name for name in old if not (stage / name).exists()]
        if dropped:
            (stage / _DROPPED).write_text(json.dumps(dropped), encoding="utf-8")
            _settle(stage / _DROPPED, stage / _DROPPED, stage)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time, where the file system has locks."""
    handle = None
    try:
        with suppress(OSError):
            if fcntl:
                handle = os.open(folder, os.O_RDONLY)
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _DROPPED)


@contextmanager
def _claimed(base: Path) -> Iterator[Path]:
    """Give an empty folder that is this writer's alone, and remove it at the end."""
    path, handle = _claim(base)
    try:
        for old in path.iterdir():
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def _claim(base: Path) -> tuple[Path, int | None]:
    """Take the first name that no living writer has: each holds a lock, which ends with its process."""
    for number in range(1000) if fcntl else ():
        path = base.with_name(f"{base.name}{number}")
        try:
            path.mkdir(exist_ok=True)
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except (FileExistsError, FileNotFoundError):  # another writer removed it just then
            continue
        except OSError:
            if os.path.lexists(path):  # another user's
                continue
            raise
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # it was not removed before it was locked, and no other user's killed writer left it
            if os.path.samestat(os.fstat(handle), os.lstat(path)) and os.access(path, os.W_OK | os.X_OK):
                return path, handle
            os.close(handle)
        except (BlockingIOError, FileNotFoundError):
            os.close(handle)
        except OSError:  # there are no locks here
            os.close(handle)
            with suppress(OSError):  # another writer that found none removed it
                path.rmdir()
            break
    path = base.with_name(f"{base.name}{os.getpid()}-{secrets.token_hex(4)}")
    path.mkdir()
    return path, None


@contextmanager
def _trouble_named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Say of what the system refuses where it was, and that nothing happened."""
    try:
        yield
    except Exception as problem:
        # safetensors has an error of its own, tokenizers none; an OSError without a number was said already
        if not getattr(problem, "errno", None) and "os error" not in str(problem):
            raise
        builtin = isinstance(problem, OSError) and type(problem).__module__ == "builtins"
        kind = type(problem) if builtin else OSError
        raise kind(f"cannot write {path}: {_reason(problem)}; nothing there was changed") from problem


def _reason(problem: Exception) -> str:
    if not isinstance(problem, OSError) or not problem.strerror:
        return str(problem)
    ours = any(part in str(problem.filename) for part in ("None", STAGE, _TEMPORARY))
    return problem.strerror if ours else f"{problem.strerror} ({problem.filename})"
