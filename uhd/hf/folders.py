"""Saved folders: looked through before transformers reads them, and whatever is wrong with one names its file."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel

from uhd.checkpoint import SAFE, Checkpoint
from uhd.files import DAMAGE, damage_named, read_json
from uhd.weights import check_numbers

MODEL_FILES = ("config.json", "generation_config.json", *SAFE)
PROCESSOR_FILES = (
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json"),
    *("chat_template.jinja", "chat_template.json"),
)
_PROCESSOR_KEYS = ("slicing", "image_mean", "image_std", "background", "max_pixels")

_LAYERS = re.compile(r"(n_layers?|num\w*_layers)$")
_SIDES = re.compile(r"^((hidden|intermediate|vocab)_size|head_dim|num_attention_heads|n_embd|n_inner|d_model)$")
_SLACK = 8  # numbers of few bits are saved several in one
_USUAL = 1 << 14  # sides and layers up to that cost little, even where weights are missing


class UnfitFolder(ValueError, RuntimeError):
    """A folder's files do not fit each other; a ``RuntimeError`` too, which transformers raises for it."""


@contextmanager
def folder_named(source: Any, names: tuple[str, ...], subfolder: str | None = None) -> Iterator[None]:
    """Turn whatever is wrong with a local folder's content into one ``ValueError`` that names its files."""
    folder = _local(source, subfolder)
    try:
        yield
    except (torch.OutOfMemoryError, NotImplementedError):
        raise
    except Exception as problem:
        told = isinstance(problem, (ValueError, OSError)) and any(name in str(problem) for name in names)
        known = isinstance(problem, (*DAMAGE, OSError, StrictDataclassError)) or type(problem) is Exception
        if folder is None or told or not known:
            raise
        present = ", ".join(name for name in names if (folder / name).is_file())
        detail = str(problem) if isinstance(problem, (ValueError, OSError)) else repr(problem)
        raise UnfitFolder(f"{folder} cannot be loaded ({present}): {detail}") from problem


def check_model(source: Any, subfolder: str | None = None) -> None:
    """Look through a local folder with weights in safetensors: every file is whole, and none describes what cannot be.

    Raises:
        FileNotFoundError: A shard that the index names.
        ValueError: A damaged file, or a number of layers or a size that the weights cannot have.
    """
    folder = _local(source, subfolder)
    if folder is None or not any((folder / name).is_file() for name in SAFE):
        return
    checkpoint = Checkpoint(folder)
    checkpoint.check(checkpoint.files)
    shapes = checkpoint.shapes(checkpoint.files)
    if (folder / MODEL_FILES[1]).is_file():
        read_json(folder / MODEL_FILES[1])
    longest = max((side for shape in shapes.values() for side in shape), default=0)
    with damage_named(folder / MODEL_FILES[0]):
        for key, value in _numbers(checkpoint.config.get("text_config")):
            if _LAYERS.search(key) and value > max(len(shapes), 512):
                raise ValueError(f"{key} is {value}, and the weights are {len(shapes)} tensors in all")
            if _SIDES.search(key) and value > max(_SLACK * longest, _USUAL):
                raise ValueError(f"{key} is {value}, and no tensor of the weights is longer than {longest}")


def check_loaded(model: PreTrainedModel, missing: Collection[str], source: Any, subfolder: str | None = None) -> None:
    """Refuse a vision side whose weights are no numbers, or half in the folder; a ``ValueError`` names the file.

    ``missing``: weights that transformers says it did not find, which are not all of them; only where quantizing or
    adapters gave the loaded model other names than its file has are they all that can be known.
    """
    folder = _local(source, subfolder)
    weights = None if folder is None else next((folder / name for name in SAFE if (folder / name).is_file()), None)
    if weights is not None:
        saved, loaded = Checkpoint(folder).files, model.visual.state_dict(prefix="visual.")
        renamed = getattr(model, "is_quantized", False) or getattr(model, "_hf_peft_config_loaded", False)
        absent = sorted(missing if renamed else loaded.keys() - saved.keys())
        for part in ("visual.vision.", "visual.compressor."):  # a whole part may be new, half of one may not
            lacking = [name for name in absent if name.startswith(part)]
            if lacking and any(name.startswith(part) for name in saved):
                raise ValueError(f"{weights} does not fit or is damaged: there is no {', '.join(lacking)}")
        for name, tensor in loaded.items():
            with damage_named(saved.get(name, weights)):
                check_numbers({name: tensor})


def check_processor(source: Any, subfolder: str | None = None) -> None:
    """Look through a local folder's files of a processor; a ``ValueError`` names one that is damaged."""
    folder = _local(source, subfolder)
    for file in [folder / name for name in PROCESSOR_FILES] if folder is not None else []:
        if file.suffix == ".jinja" and file.is_file():
            with damage_named(file):
                file.read_text(encoding="utf-8")
        elif file.is_file():
            settings = read_json(file)
            if file.name == PROCESSOR_FILES[0]:
                _check_settings(file, settings)


@contextmanager
def processor_checked(source: Any, subfolder: str | None) -> Iterator[Callable[[Any], Any]]:
    """Where a processor is loaded: its files before, what was loaded by the function given, errors named."""

    def checked(found: Any) -> Any:
        processor = found[0] if isinstance(found, tuple) else found
        processor.image_processor.check_settings()
        processor.video_processor.check_settings()
        return found

    check_processor(source, subfolder)
    with folder_named(source, PROCESSOR_FILES, subfolder):
        yield checked


def _check_settings(file: Path, settings: Mapping[str, Any]) -> None:
    with damage_named(file):
        for name in ("image_processor", "video_processor"):
            missing = [key for key in _PROCESSOR_KEYS if key not in settings.get(name, dict.fromkeys(_PROCESSOR_KEYS))]
            if missing:
                raise ValueError(f"its {name} has no {', '.join(missing)}")


def _local(source: Any, subfolder: str | None) -> Path | None:
    """The folder, where it is one here."""
    folder = Path(source, subfolder or "") if isinstance(source, (str, os.PathLike)) else None
    return folder if folder is not None and folder.is_dir() else None


def _numbers(settings: Any) -> Iterator[tuple[str, int]]:
    """Every whole number in nested settings, with its key."""
    for key, value in settings.items() if isinstance(settings, Mapping) else ():
        if type(value) is int:
            yield str(key), value
        yield from _numbers(value)
