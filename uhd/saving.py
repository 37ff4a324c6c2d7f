"""An encoder on disk: its description, which is JSON, and its weights, in two files of one folder."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from uhd.files import damage_named, read_json
from uhd.parts import ROLES, describe_part, is_known, rebuild_part
from uhd.pixels import PixelSettings
from uhd.resampler import FeaturePacker
from uhd.schema import SpatialSchema
from uhd.schema.counted import slicing_from_dict
from uhd.settings import Settings, read_arguments, read_values
from uhd.slicing import Slicing, SlicingConfig, SlicingLike, find
from uhd.slicing.adaptive import RULES
from uhd.slicing.config import Recounted
from uhd.slicing.rules import with_settings
from uhd.vision.int8 import refuse_int8
from uhd.weights import check_numbers, check_weights
from uhd.writing import is_file, new_files

CONFIG_FILE = "uhd_encoder.json"
WEIGHTS_FILE = "model.safetensors"
FORMAT = 1
"""Version of what is written to ``uhd_encoder.json``; another one is refused, never guessed at."""

LEARNED = ("newline", "separator")
_Encoder = TypeVar("_Encoder", bound=nn.Module)


@dataclass(frozen=True)
class EncoderDescription(Settings):
    """All that makes a :class:`uhd.VisualEncoder` but its weights, in plain JSON types.

    Every file that describes an encoder is made of this: ``uhd_encoder.json``, and a model's ``config.json``.

    Attributes:
        vision, compressor: ``{"kind": ..., "config": ...}`` of a part; of a registered one its class and sizes too,
            for whoever reads the file; kind ``"custom"`` where only its maker can build it again.
        slicing: ``to_dict()`` of any slicing; of a function of the caller's own only its name.
        schema, pixels: ``to_dict()`` of a :class:`uhd.SpatialSchema` and of :class:`uhd.PixelSettings`.
        packer: ``to_dict()`` of the :class:`uhd.resampler.FeaturePacker`, where there is one.
        check_image_size, note: As in :class:`uhd.VisualEncoder`.
    """

    later = ("packer",)

    vision: dict[str, Any]
    compressor: dict[str, Any]
    slicing: dict[str, Any]
    schema: dict[str, Any]
    pixels: dict[str, Any]
    packer: dict[str, Any] | None = None
    check_image_size: bool = True
    note: str = ""

    @classmethod
    def of(cls, encoder: Any) -> EncoderDescription:
        """Describe an encoder as it is now."""
        parts = {role: describe_part(getattr(encoder, role), role) for role in ROLES}
        settings = {name: getattr(encoder, name).to_dict() for name in ("slicing", "schema", "pixels")}
        packer = encoder.packer and encoder.packer.to_dict()
        return cls(**parts, **settings, packer=packer, check_image_size=encoder.check_image_size, note=encoder.note)

    def to_dict(self) -> dict[str, Any]:
        """What ``uhd_encoder.json`` holds."""
        return {"format": FORMAT, **super().to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> EncoderDescription:
        """The inverse of :meth:`to_dict`; a ``ValueError`` where it is of another format, or no such dictionary."""
        if (found := data.get("format")) != FORMAT:
            raise ValueError(f"it has format {found!r}; this version reads format {FORMAT}")
        found = super().from_dict({name: value for name, value in data.items() if name != "format"})
        for role in ROLES:
            part = {"config": None, **getattr(found, role)}
            read_values(part, f"the description of the {role}", kind=str, config=dict[str, Any] | None)
        return found

    def resized(self, sizes: Mapping[str, int]) -> EncoderDescription:
        """The same with other settings of the compressor; a ``ValueError`` where it has no such setting."""
        settings = self.compressor.get("config") or {}
        unknown = [name for name in sizes if name not in settings]
        if unknown:
            raise ValueError(f"the compressor, {self.compressor['kind']!r}, has no {' or '.join(unknown)} to change")
        return replace(self, compressor={**self.compressor, "config": {**settings, **sizes}})

    def made_packer(self) -> FeaturePacker | None:
        """The packer, with new weights."""
        return None if self.packer is None else read_arguments(FeaturePacker, self.packer)

    def arguments(
        self,
        *,
        vision: nn.Module | None = None,
        compressor: nn.Module | None = None,
        slicing: SlicingLike | None = None,
        schema: SpatialSchema | str | None = None,
        pixels: PixelSettings | None = None,
        empty: Collection[str] = (),
    ) -> dict[str, Any]:
        """Arguments of :class:`uhd.VisualEncoder`, but for the packer; what is given replaces what is described.

        ``empty``: the parts that are built as in :func:`uhd.parts.rebuild_part`, to be filled.

        Raises:
            ValueError: A part or the slicing is the caller's own and was not given.
        """
        if schema is None and (slicing is None or find(slicing).uses_schema == (self.slicing.get("rule") in RULES)):
            schema = SpatialSchema.from_dict(self.schema)
        return {
            **{
                role: rebuild_part(getattr(self, role), role, empty=role in empty) if given is None else given
                for role, given in (("vision", vision), ("compressor", compressor))
            },
            "slicing": slicing_from_dict(self.slicing) if slicing is None else slicing,
            "schema": schema,
            "pixels": PixelSettings.from_dict(self.pixels) if pixels is None else pixels,
            "check_image_size": self.check_image_size,
            "note": self.note,
        }


def save(encoder: Any, folder: str | os.PathLike[str]) -> None:
    """Write an encoder's two files; errors as in :meth:`uhd.VisualEncoder.save_pretrained`."""
    refuse_int8(encoder)
    description = EncoderDescription.of(encoder)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    _check_dtypes(weights, description)  # here too: nothing is written that could not be read
    with new_files(folder) as new:
        try:
            save_file(weights, new / WEIGHTS_FILE, metadata={"format": "pt"})
        except RuntimeError as problem:
            raise ValueError(f"weights that share memory cannot be saved: untie them first. {problem}") from None
        (new / CONFIG_FILE).write_text(json.dumps(description.to_dict(), indent=2) + "\n")


def refuse_shared(encoder: nn.Module) -> None:
    """Raise a ``ValueError`` where one weight has two names: no file of ours, or of transformers, would hold both."""
    names: dict[int, str] = {}
    for name, parameter in encoder.named_parameters(remove_duplicate=False):
        if names.setdefault(id(parameter), name) != name:
            both = f"{names[id(parameter)]} and {name}"
            raise ValueError(f"weights that share memory cannot be saved: {both} are one, untie them first")


def described(kind: type[_Encoder], folder: Path) -> _Encoder:
    """An encoder of this class without weights, in eval mode; a ``ValueError`` names what is missing or damaged."""
    if not is_file(folder / CONFIG_FILE):
        raise ValueError(f"{folder} holds no {CONFIG_FILE}: give a folder that save_pretrained wrote")
    with damage_named(folder / CONFIG_FILE):
        description = EncoderDescription.from_dict(read_json(folder / CONFIG_FILE))
        encoder = kind(**description.arguments(empty=ROLES))
        _take_packer(encoder, description)
    encoder.only_described = True
    return encoder.eval()


def fitted_rule(encoder: Any, strategy: str) -> Slicing:
    """The rule of this name for an encoder's views and patches.

    Where the encoder's own rule fits latents to views, so do other rules of the adaptive planner, with as many a view
    on average. Of rules of other kinds every view has all of the resampler's latents.

    Raises:
        ValueError: No such rule, or the encoder does not tell for which size it was made.
    """
    rule, vision, own = find(strategy), encoder.vision, encoder.slicing
    side = getattr(own, "image_size", None) or getattr(vision, "image_size", None)
    if side is None:
        raise ValueError(f"{strategy!r} cannot be fitted: this model's vision encoder states no image_size")
    rule = rule.for_vision(image_size=side, patch_size=vision.patch_size)
    both = [found for found in (rule, own) if isinstance(found, SlicingConfig) and found.tokens_per_view]
    if len(both) == 2 and "fitted" in (both[0].latents, both[1].latents):
        rule = rule.replace(latents="fitted", tokens_per_view=own.tokens_per_view)
    return rule


def check_given(encoder: Any, strategy: str) -> None:
    """Raise a ``ValueError`` where settings in a rule's name are not those that the encoder cuts and counts by."""
    if "+" not in strategy:
        return
    rule, given = with_settings(strategy)
    used = encoder.slicing.rule if isinstance(encoder.slicing, Recounted) else encoder.slicing
    for name in given:
        if getattr(used, name) != getattr(rule, name):
            what = f"{name} is {getattr(used, name)!r} of this encoder, {strategy!r} gives {getattr(rule, name)!r}"
            raise ValueError(f"{what}: leave it out")


def lacks_weights(encoder: nn.Module) -> bool:
    """Whether a described encoder was given none since; accelerate's hooks fetch those that it keeps elsewhere."""
    fetched = any(hasattr(part, "_hf_hook") for part in encoder.modules())
    return not fetched and any(weight.is_meta for weight in encoder.parameters())


def refuse_described(encoder: nn.Module) -> None:
    """Raise a ``ValueError`` where an encoder was only described, and so can encode nothing."""
    if getattr(encoder, "only_described", False) and lacks_weights(encoder):
        raise ValueError("this encoder has no weights: VisualEncoder.from_pretrained loads them")


def load(kind: type[_Encoder], folder: Path, *, sizes: Mapping[str, int] | None = None, **given: Any) -> _Encoder:
    """Read what :func:`save` wrote as an encoder of this class, in eval mode.

    ``given`` is as in :meth:`EncoderDescription.arguments`; ``sizes`` are settings of the compressor to change: its
    weights of other shapes than the saved ones are new, and ``note`` says so. A ``ValueError`` names a damaged file.
    """
    with damage_named(folder / CONFIG_FILE):
        description = EncoderDescription.from_dict(read_json(folder / CONFIG_FILE))
    settings = description.compressor.get("config") or {}
    sizes = {name: size for name, size in (sizes or {}).items() if size != settings.get(name)}
    resized = description.resized(sizes)
    with damage_named(folder / CONFIG_FILE):
        encoder = kind(**resized.arguments(**given, empty=ROLES[:1] if sizes else ROLES))
        new = _take_packer(encoder, description)
    with damage_named(folder / WEIGHTS_FILE):
        # assigned, not copied: every tensor keeps the dtype it was saved in
        weights = load_file(folder / WEIGHTS_FILE)
        other = _leave_out(weights, encoder) if sizes else []
        wanted = {name: tensor for name, tensor in encoder.state_dict().items() if name not in (*new, *other)}
        check_weights(weights, wanted, f"what {CONFIG_FILE} describes")
        encoder.load_state_dict(weights, strict=False, assign=True)
        check_numbers(weights)
        _check_dtypes(weights, description)
    if new:
        add_note(encoder, f"{', '.join(new)}: new, UNTRAINED weights, since the saved encoder had another slicing")
    if sizes:
        changed = ", ".join(f"{name}={size} (trained with {settings[name]})" for name, size in sizes.items())
        learned = [name for name in other if name in dict(encoder.named_parameters())]
        untrained = f"; {', '.join(learned)}: new, UNTRAINED weights" if learned else ""
        add_note(encoder, f"the compressor has {changed} and must be trained again{untrained}")
    return encoder.eval()


def _check_dtypes(weights: Mapping[str, Tensor], description: EncoderDescription) -> None:
    """Refuse parts of several dtypes; the caller's own parts may have several."""
    own = [role for role in ROLES if not is_known(getattr(description, role))]
    first: dict[str, str] = {}
    for name, tensor in weights.items():
        other = first.setdefault(name.partition(".")[0], name)
        if tensor.dtype != weights[other].dtype and name.partition(".")[0] not in own:
            told = f"{other} is {weights[other].dtype}, {name} is {tensor.dtype}"
            raise ValueError(f"{told}: a part has one dtype, convert the encoder and save it again")


def add_note(encoder: Any, note: str) -> None:
    """Say one thing more that a user of the encoder must know."""
    if note not in encoder.note:
        encoder.note = "; ".join(filter(None, (encoder.note, note)))


def _leave_out(weights: dict[str, Tensor], encoder: nn.Module) -> list[str]:
    """Take the compressor's weights that have another shape now out of the saved ones; return their names."""
    own = {name: tensor.shape for name, tensor in encoder.state_dict().items() if name.startswith("compressor.")}
    other = [name for name, shape in own.items() if name in weights and weights[name].shape != shape]
    for name in other:
        dtype = weights.pop(name).dtype
        tensor = encoder.get_parameter(name) if name in dict(encoder.named_parameters()) else encoder.get_buffer(name)
        tensor.data = tensor.data.to(dtype)
    return other


def _take_packer(encoder: Any, description: EncoderDescription) -> list[str]:
    """Make room for a saved packer's embeddings; return the names of those that are needed and were not saved."""
    made = description.made_packer()
    saved = {kind: getattr(made, kind, None) is not None for kind in LEARNED}
    own = {kind: getattr(encoder.packer, kind, None) is not None for kind in LEARNED}
    if any(saved[kind] and not own[kind] for kind in LEARNED):
        encoder.packer = FeaturePacker(made.width, **{kind: saved[kind] or own[kind] for kind in LEARNED})
    return [f"packer.{kind}" for kind in LEARNED if own[kind] and not saved[kind]]
