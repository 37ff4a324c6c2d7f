"""A folder with a model as transformers saves it: its settings, and its tensors one by one."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from uhd.files import damage_named, read_json
from uhd.pixels.settings import image_processors
from uhd.writing import is_file

SAFE = ("model.safetensors", "model.safetensors.index.json")
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_ADAPTER = (("adapter_model.safetensors",), ("adapter_model.bin",))


def refuse_pickled(folder: Path, how: str) -> None:
    """Raise a ``ValueError`` where weights are there in pickled form only; ``how`` says how to ask for those."""
    for safe, pickled in ((SAFE, PICKLED), _ADAPTER):
        found = [name for name in pickled if (folder / name).is_file()]
        if found and not any((folder / name).is_file() for name in safe):
            raise ValueError(
                f"{folder} has pickled weights only ({found[0]}): save the model as safetensors, or pass {how}"
            )


def transformers_config(folder: Path) -> Any:
    """Read ``config.json`` as one of transformers' own classes. Code that the folder brings is never run.

    Raises:
        ValueError: It is none; the message names the file.
    """
    from transformers import AutoConfig

    file = folder / "config.json"
    with damage_named(file), own_code_named(file, "load it with transformers, if you trust it, and pass the module"):
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


@contextmanager
def own_code_named(what: Any, how: str) -> Iterator[None]:
    """One sentence where transformers refuses code that a folder brings; ``how`` says how to ask for it."""
    try:
        yield
    except ValueError as problem:
        if "trust_remote_code" not in str(problem):
            raise
        raise ValueError(f"{what} asks for code that the folder brings, which is not run: {how}") from problem


def check_described(folder: Path) -> None:
    """Raise a ``FileNotFoundError`` where a folder lacks the file that says what it holds."""
    if not is_file(folder / "config.json"):
        raise FileNotFoundError(f"{folder} has no config.json: copy the whole release, its *.json files included")


class Checkpoint:
    """What a folder of ``save_pretrained``, or of a release on the hub, holds. At first only names are read.

    Args:
        folder: With ``config.json`` and ``model.safetensors`` (or its shards and their index).
        pickled: Also take ``pytorch_model.bin``, whose loading is limited to tensors (``weights_only``).

    Attributes:
        folder: The folder.
        config: Content of ``config.json``.
        files: Every tensor's name -> the file that holds it.

    Raises:
        FileNotFoundError: The folder, its config or its weights are not there; the message names the files.
        ValueError: Only pickled weights, or a file that is not what its name says.
    """

    def __init__(self, folder: str | os.PathLike[str], *, pickled: bool = False) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder; give a local one, nothing is downloaded")
        check_described(self.folder)
        self.config = read_json(self.folder / "config.json")
        self.pickled = False
        self.files = self._find_files(pickled)

    @cached_property
    def preprocessor(self) -> Mapping[str, Any] | None:
        """Settings of the image processor; ``None`` where the folder has no file of it."""
        return next(image_processors(self.folder), None)

    def _find_files(self, pickled: bool) -> dict[str, Path]:
        for single, index in (SAFE, PICKLED) if pickled else (SAFE,):
            self.pickled = single == PICKLED[0]
            if (self.folder / single).is_file():
                with self._opened(self.folder / single) as opened:
                    return dict.fromkeys(opened.keys(), self.folder / single)
            if (self.folder / index).is_file():
                return self._indexed(self.folder / index)
        how = "pickled=True to uhd.pretrained, which reads their tensors with torch.load(weights_only=True)"
        refuse_pickled(self.folder, how)
        raise FileNotFoundError(f"{self.folder} has no weights: neither {SAFE[0]} nor {SAFE[1]}")

    def _indexed(self, index: Path) -> dict[str, Path]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index} has no weight_map from tensors to files")
        odd = [file for file in weight_map.values() if not isinstance(file, str) or Path(file).name != file]
        if odd:
            raise ValueError(f"{index} must name files beside it, got {odd[0]!r}")
        return {name: self.folder / file for name, file in weight_map.items()}

    @contextmanager
    def _opened(self, file: Path) -> Iterator[Any]:
        """A mapping of tensors, or an open safetensors file; both have ``keys``."""
        with damage_named(file):
            opened = nullcontext(_unpickled(file)) if self.pickled else safe_open(file, framework="pt")
            with opened as tensors:
                yield tensors

    def check(self, names: Iterable[str]) -> None:
        """Raise a ``FileNotFoundError`` that lists the missing files among those that hold these tensors."""
        files = dict.fromkeys(self.files[name] for name in names)
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            what = f"tensors are in missing {', '.join(missing)}"
            raise FileNotFoundError(f"{self.folder} is incomplete: {what}, says {SAFE[1]}")

    def shapes(self, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of these tensors without reading them."""
        shapes = {}
        for file, wanted in self._by_file(names).items():
            with self._opened(file) as opened:
                if lacking := set(wanted).difference(opened.keys()):
                    raise ValueError(f"{file} does not hold {min(lacking)}, as {SAFE[1]} says that it does")
                for name in wanted:
                    shapes[name] = tuple(opened[name].shape if self.pickled else opened.get_slice(name).get_shape())
        return shapes

    def _by_file(self, names: Iterable[str]) -> dict[Path, list[str]]:
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.files[name], []).append(name)
        return by_file

    def read(self, names: Iterable[str], device: str | torch.device = "cpu") -> Iterator[tuple[str, Tensor]]:
        """Yield these tensors by name, each with memory of its own; of every file only their bytes are read.

        Raises a ``ValueError`` where a file is damaged, or does not hold what the index says.
        """
        for file, wanted in self._by_file(names).items():
            for name, tensor in self._read_file(file, wanted):
                yield name, tensor.to(device, copy=True)  # what goes wrong on a device is no damage of the file

    def _read_file(self, file: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        with self._opened(file) as opened:
            yield from ((name, opened[name] if self.pickled else opened.get_tensor(name)) for name in names)


def _unpickled(file: Path) -> Mapping[str, Tensor]:
    try:  # mapped where its format allows, so that unused tensors are not read
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError):
        raise ValueError(f"{file} is damaged or holds more than tensors, so none of it was loaded") from None
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        raise ValueError(f"{file} holds a {type(tensors).__name__}, expected a dictionary of tensors by name")
    other = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
    if other:
        raise ValueError(f"{file} holds more than tensors by name ({', '.join(other)}): save a state_dict() alone")
    return tensors
