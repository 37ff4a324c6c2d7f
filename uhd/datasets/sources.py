"""Where images come from: folders, lists of files, tar archives, Parquet files and ``datasets`` on disk.

An image is a key and a place, which is what is read. Sources are listed in one order, and never held whole. What
cannot be listed, such as the rest of a torn archive, is an image that cannot be read, so that it is counted.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

_NAMES = """apng avif avifs bmp dib gif heic heif ico j2k jfif jp2 jpe jpeg jpf jpg jpx jxl pbm pcx pgm png pnm ppm
psd qoi tga tif tiff webp"""
SUFFIXES = frozenset(f".{name}" for name in _NAMES.split())
"""Every file with one of these is an image, damaged or not."""

_COMPRESSED = re.compile(r".*\.(tgz|tbz2?|txz|tzst|tar\.\w+|zip)", re.IGNORECASE)
_UNPACK = "this archive is compressed, so no image of it can be read alone: unpack it, or write it as a plain .tar"

UNIT = 64
"""Images of a unit."""


class Item(NamedTuple):
    """An image of a source.

    Attributes:
        key: What the source calls it.
        kind: ``"file"``, ``"tar"``, ``"rows"``, or ``"error"``: what could not be listed.
        place: Of the kind: (path,), (path, (name, offset, size) ...), (path, group, row, columns) or (sentence,).
    """

    key: str
    kind: str
    place: tuple


def listed(source: str | os.PathLike[str], *, columns: Sequence[str] = (), skip: Path | None = None) -> Iterator[Item]:
    """The images of a source, in order.

    Args:
        source: A folder, which is searched with all below it; a ``.tar`` or ``.parquet`` file; a folder that
            ``datasets`` saved; or a text file with a path in every line, relative to its own folder.
        columns: What to keep beside each image: columns of Parquet or of ``datasets``; in a tar the files of other
            suffixes with the image's name. Of several columns of images, name the one to read.
        skip: A folder that is none of it.

    Raises:
        ValueError: There is no such source, or it has no such columns, as plain files have none.
    """
    source = Path(source)
    for kept in (_rows, _arrow):  # of files that may have changed since
        kept.cache_clear()
    if source.is_dir():
        yield from _folder(source, "", tuple(columns), skip, ())
    elif not source.is_file():
        if source.exists():
            raise ValueError(f"{source} is a pipe or a device, a source is read more than once: write it to a file")
        raise ValueError(f"there is no {source}: give a folder, a list of files, a .tar or a .parquet file")
    elif _COMPRESSED.fullmatch(source.name):
        raise ValueError(f"{source}: {_UNPACK}")
    elif source.suffix.lower() in _ARCHIVES:
        yield from _archive(source, source.name, tuple(columns), True)
    else:
        yield from _lines(source, tuple(columns))


def read(item: Item) -> tuple[bytes, dict[str, Any]]:
    """An image's file, and what else of it is kept; a ``ValueError`` or ``OSError`` where it cannot be read."""
    if item.kind == "error":
        raise ValueError(item.place[0])
    if item.kind == "file":
        if not os.path.isfile(item.place[0]):  # a pipe would be waited for
            raise ValueError("it is no file" if os.path.lexists(item.place[0]) else "there is no such file")
        return Path(item.place[0]).read_bytes(), {}
    if item.kind == "tar":
        path, *parts = item.place
        with open(path, "rb") as file:
            found = {name: _window(file, offset, size) for name, offset, size in parts}
        return found.pop(""), {name: text.decode("utf-8", "backslashreplace") for name, text in found.items()}
    path, group, row, names = item.place
    with _LOADING:  # threads that come at once would each load a group
        columns = _rows(path, group, names)
    values = [column[row].as_py() for column in columns]
    content = values[0]
    if isinstance(content, dict):
        content, path = content.get("bytes"), content.get("path")
        content = Path(path).read_bytes() if content is None and path and os.path.isfile(path) else content
    if not content:
        raise ValueError("this row has no bytes of an image")
    return content, dict(zip(names[1:], values[1:], strict=True))


def _window(file: Any, offset: int, size: int) -> bytes:
    file.seek(offset)
    content = file.read(size)
    if len(content) < size:
        raise ValueError(f"the archive ends after {len(content)} of its {size} bytes")
    return content


def _folder(
    folder: Path, prefix: str, columns: tuple[str, ...], skip: Path | None, above: tuple[tuple[int, int], ...]
) -> Iterator[Item]:
    """In the order of names. Links are followed, but not into a folder that they are in."""
    here = folder.stat()
    here = (here.st_dev, here.st_ino)
    if here in above or (skip is not None and skip.is_dir() and folder.samefile(skip)):
        return
    if (saved := _saved(folder)) is not None:
        for name in saved:
            yield from _table(folder / name, prefix + name, columns, True)
        return
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries)
    except OSError as problem:
        yield Item(prefix.rstrip("/") or str(folder), "error", (f"cannot list this folder: {problem.strerror}",))
        return
    for name in names:
        path, key = os.path.join(folder, name), prefix + _text(name)
        suffix = os.path.splitext(name)[1].lower()
        if os.path.isdir(path):
            yield from _folder(Path(path), key + "/", columns, skip, (*above, here))
        elif suffix in SUFFIXES:
            yield _file(path, key, columns)
        elif suffix in _ARCHIVES or _COMPRESSED.fullmatch(name):
            yield from _archive(Path(path), key, columns, False)


def _archive(path: Path, key: str, columns: tuple[str, ...], asked: bool) -> Iterator[Item]:
    """The images in an archive; anything else is one itself."""
    if _COMPRESSED.fullmatch(path.name):
        yield Item(key, "error", (_UNPACK,))
    elif path.suffix.lower() in _ARCHIVES and path.is_file():
        yield from _ARCHIVES[path.suffix.lower()](path, key, columns, asked)
    else:
        yield _file(str(path), key, columns)


def _file(path: str, key: str, columns: tuple[str, ...]) -> Item:
    """One image; what is kept beside images is not beside this one."""
    if columns and os.path.splitext(path)[1].lower() not in _ARCHIVES:
        raise ValueError(
            f"{path} is a plain file, which has no column {', '.join(columns)}: there are columns in Parquet, in tar "
            "files, and in what datasets saved"
        )
    return Item(key, "file", (path,))


def _text(name: str) -> str:
    """A file's name as UTF-8 can hold it."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _lines(source: Path, columns: tuple[str, ...]) -> Iterator[Item]:
    with open(source, encoding="utf-8-sig") as file:
        try:
            for line in file:
                name = line.rstrip("\r\n")
                if "\0" in name:
                    raise ValueError("it holds bytes of 0")
                if name.strip():
                    yield from _archive(source.parent / name, name, columns, True)
        except ValueError as problem:
            raise ValueError(
                f"{source} is no source of images ({problem}): expected a folder, a .tar or .parquet file, or a list "
                "of paths, one a line in UTF-8"
            ) from None


def _tar(path: Path, key: str, columns: tuple[str, ...], _: bool) -> Iterator[Item]:
    """Members in their order; of those with one name up to its first dot, the images, with the others beside them."""
    try:
        with tarfile.open(path, "r:") as tar:
            for _, group in groupby(_members(tar), key=lambda member: _stem(member.name)):
                some = list(group)
                ends = {member.name[len(_stem(member.name)) + 1 :]: member for member in some}
                beside = [(name, ends[name].offset_data, ends[name].size) for name in columns if name in ends]
                for member in some:
                    if os.path.splitext(member.name)[1].lower() in SUFFIXES and not member.isdir():
                        own = _text(f"{key}/{member.name}")
                        if member.isreg() and not member.sparse:
                            yield Item(own, "tar", (str(path), ("", member.offset_data, member.size), *beside))
                        else:
                            yield Item(own, "error", ("it is a link or a device in its archive, not a file",))
    except (tarfile.TarError, OSError) as problem:
        yield Item(
            key, "error", (f"this tar archive is compressed, torn or damaged, its rest is not read: {problem}",)
        )


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        tar.members = []  # or it would keep them all
        yield member
    tar.fileobj.seek(0, os.SEEK_END)
    if tar.fileobj.tell() < tar.offset + tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it has no end")


def _stem(name: str) -> str:
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}".lstrip("/")


def _table(path: Path, key: str, columns: tuple[str, ...], asked: bool) -> Iterator[Item]:
    """Rows of Parquet, or of Arrow, in their order.

    In a folder, a table that has no images is none of its images; ``asked``: it is refused.
    """
    pyarrow = pyarrow_for(path)
    try:
        if path.suffix.lower() == ".parquet":
            with pyarrow.parquet.ParquetFile(path) as file:
                schema, groups = file.schema_arrow, range(file.num_row_groups)
                sizes = [(group, file.metadata.row_group(group).num_rows) for group in groups]
        else:
            schema, sizes = _arrow(str(path)).schema, [(None, len(_arrow(str(path))))]
        names = _columns(path, schema, columns, asked)
    except (pyarrow.ArrowException, OSError) as problem:
        yield Item(key, "error", (f"this {path.suffix} file is damaged: {problem}",))
        return
    places = ((group, row) for group, size in sizes for row in range(size)) if names else ()
    for number, place in enumerate(places):
        yield Item(f"{key}#{number}", "rows", (str(path), *place, names))


def pyarrow_for(path: Any) -> Any:
    """The module; a ``ValueError`` names the file that cannot be read without."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path} is read by pyarrow, which is missing here: install it") from None
    return pyarrow


_ARCHIVES = {".tar": _tar, ".parquet": _table}


def _saved(folder: Path) -> list[str] | None:
    """The Arrow files of a folder that ``datasets`` saved."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return [str(file["filename"]) for file in state["_data_files"]]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _columns(path: Path, schema: Any, columns: tuple[str, ...], asked: bool) -> tuple[str, ...]:
    """The column of images, and those that are kept beside it; () where there is none of images."""
    types = pyarrow_for(path).types

    def holds_images(kind: Any) -> bool:
        if types.is_struct(kind):
            return any(kind.field(place).name == "bytes" for place in range(kind.num_fields))
        return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)

    images = [field.name for field in schema if holds_images(field.type)]
    named = [name for name in images if name in columns] or images
    if not images and not asked:
        return ()
    if missing := [name for name in columns if name not in schema.names]:
        raise ValueError(f"{path} has no column {', '.join(missing)}; it has {', '.join(schema.names)}")
    if len(named) != 1:
        told = (
            f"several columns of image bytes ({', '.join(named)}): name one" if named else "no column of image bytes"
        )
        raise ValueError(f"{path} has {told}; its columns are {', '.join(schema.names)}")
    return (named[0], *(name for name in columns if name != named[0]))


_LOADING = Lock()


@lru_cache(maxsize=2)
def _rows(path: str, group: int | None, names: tuple[str, ...]) -> list[Any]:
    """Columns of an Arrow file, or of one group of Parquet's rows."""
    if group is None:
        table = _arrow(path)
    else:
        with pyarrow_for(path).parquet.ParquetFile(path) as file:
            table = file.read_row_group(group, columns=list(names))
    return [table[name] for name in names]


@lru_cache(maxsize=2)
def _arrow(path: str) -> Any:
    """A table whose rows are read where they are asked for."""
    pyarrow = pyarrow_for(path)
    return pyarrow.ipc.open_stream(pyarrow.memory_map(path)).read_all()
