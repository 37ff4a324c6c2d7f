"""Write an encoder back into the files of a release."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from uhd.checkpoint import PICKLED, SAFE, Checkpoint
from uhd.encoder import VisualEncoder
from uhd.pretrained.recipe import Recipe
from uhd.vision import CompressedViT, ViT, ViTConfig, to_source_state_dict
from uhd.vision.weights import vision_names
from uhd.writing import new_files


def write(encoder: VisualEncoder, folder: str | os.PathLike[str], recipe: Recipe, *, visual_only: bool) -> None:
    """See :func:`uhd.pretrained.save`."""
    folder, like = Path(folder), recipe.checkpoint
    if folder.resolve() == like.folder.resolve():
        raise ValueError(f"{folder} is the folder to be like: write to another one")
    _check_settings(encoder, recipe)
    tensors = released_tensors(encoder, recipe)
    wanted = recipe.names.all if visual_only else list(like.files)
    like.check(wanted)
    shapes = like.shapes(tensors)
    wrong = {name: (tuple(x.shape), shapes[name]) for name, x in tensors.items() if tuple(x.shape) != shapes[name]}
    if wrong:
        raise ValueError(f"weights of other shapes than those of {like.folder}, as name: (got, expected): {wrong}")
    by_file: dict[str, list[str]] = {}
    for name in wanted:
        file = like.files[name].with_suffix(".safetensors").name.replace("pytorch_model", "model")
        by_file.setdefault(file, []).append(name)
    _check_empty(folder, set(by_file))
    with new_files(folder) as new:
        for file in sorted(like.folder.iterdir()):
            ours = file.suffix in (".safetensors", ".bin") or file.name in (SAFE[1], PICKLED[1])
            if file.is_file() and not ours:
                shutil.copy2(file, new / file.name)
        _write_weights(new, by_file, tensors, like)


def _write_weights(
    folder: Path, by_file: Mapping[str, list[str]], tensors: Mapping[str, Tensor], like: Checkpoint
) -> None:
    sizes = 0
    for file, inside in by_file.items():
        content = dict(like.read([name for name in inside if name not in tensors]))
        content |= {name: tensors[name] for name in inside if name in tensors}
        sizes += sum(tensor.nbytes for tensor in content.values())
        save_file({name: x.cpu().contiguous() for name, x in content.items()}, folder / file, {"format": "pt"})
    if list(by_file) != [SAFE[0]]:
        weight_map = {name: file for file, inside in by_file.items() for name in inside}
        index = {"metadata": {"total_size": sizes}, "weight_map": weight_map}
        (folder / SAFE[1]).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _check_empty(folder: Path, written: set[str]) -> None:
    """Refuse a folder with weights that would stay beside the new ones, or be read in their place."""
    kept = written if written == {SAFE[0]} else written | {SAFE[1]}
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]
    others = sorted(file.name for file in weights if file.name not in kept)
    if others:
        raise ValueError(f"{folder} holds other weights, {', '.join(others)}: write to a new folder")


def _check_settings(encoder: VisualEncoder, recipe: Recipe) -> None:
    """Refuse an encoder whose settings differ from those in the files that are copied."""
    if not isinstance(encoder.vision, ViT) or not encoder.vision.own_stem:
        raise ValueError(f"the vision encoder is a {type(encoder.vision).__name__}, the format holds a ViT")
    after = getattr(encoder.vision.config, "compress_after", ())
    got, expected = (_plain(encoder.vision).config, after), (recipe.vit, recipe.compress_after)
    if got != expected:
        raise ValueError(f"the vision encoder has other settings: got {got}, expected {expected} as the format says")
    meant = recipe.encoder(encoder.vision, encoder.compressor, encoder.packer)
    for setting in ("slicing", "schema", "pixels"):
        got, expected = getattr(encoder, setting), getattr(meant, setting)
        if got != expected:
            raise ValueError(
                f"the encoder's {setting} is not what the format's settings say, so it would be lost: got {got}, "
                f"expected {expected}. VisualEncoder.save_pretrained keeps it"
            )


def released_tensors(encoder: VisualEncoder, recipe: Recipe) -> dict[str, Tensor]:
    """Return the encoder's tensors under the checkpoint's names, or raise where it has none for one."""
    vit, names = encoder.vision, recipe.names
    parts = {
        "vision": to_source_state_dict(_plain(vit), recipe.vit_names),
        "compressor": encoder.compressor.state_dict(),
        "window": {},
    }
    if isinstance(vit, CompressedViT):
        parts["window"] = next(iter(vit.compressors.values())).to_source_state_dict()
    if recipe.tower is not None:
        _check_tower(parts.pop("vision"), recipe.tower)
    released, unknown = {}, []
    for part, tensors in parts.items():
        known = getattr(names, part)
        unknown += [f"{part} {name}" for name in tensors if name not in known]
        released.update({known[name]: tensor.detach() for name, tensor in tensors.items() if name in known})
    if names.newline is not None:
        released[names.newline] = encoder.packer.newline.detach()
    if unknown:
        raise ValueError(f"the checkpoint to be like has no tensors for {', '.join(unknown)}")
    return released


def _plain(vit: ViT) -> ViT:
    """Return the same weights in a ViT without compressors."""
    if not isinstance(vit, CompressedViT):
        return vit
    fields = {field.name: getattr(vit.config, field.name) for field in dataclasses.fields(ViTConfig)}
    with torch.device("meta"):
        plain = ViT(ViTConfig(**fields))
    state = {name: x for name, x in vit.state_dict().items() if not name.startswith("compressors.")}
    plain.load_state_dict(state, assign=True)
    return plain


def _check_tower(tensors: Mapping[str, Tensor], tower: Checkpoint) -> None:
    """Refuse a trained vision encoder where the format keeps it in a folder of its own, which stays as it is."""
    full = vision_names(tower.files)
    inner = {full[name]: name for name in tensors}
    for name, theirs in tower.read(inner):
        ours = tensors[inner[name]]
        if not torch.equal(ours.cpu().to(theirs.dtype), theirs):
            raise ValueError(
                f"the vision encoder is not that of {tower.folder} any more ({name}), and the checkpoint to be like "
                "holds none: give one that does, or use VisualEncoder.save_pretrained"
            )
