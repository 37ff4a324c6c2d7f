"""Writes an encoder as an ONNX graph, and refuses to where that does not give the encoder's tokens."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from uhd.encoder import VisualEncoder
from uhd.export.host import Graph, Keys, Positions, Windows, packed
from uhd.export.padded import COMPRESSORS, PackedEncoder, PaddedEncoder
from uhd.export.running import session
from uhd.loading import Preparation
from uhd.positions import bucket_position_ids
from uhd.resampler import MergeProjector, PerceiverResampler, PixelShuffleProjector, SpatialResampler
from uhd.saving import lacks_weights
from uhd.schema.counted import own_function
from uhd.settings import place_of
from uhd.shortcuts import is_plain
from uhd.slicing.adaptive import SlicingConfig
from uhd.vision import CompressedViT, ViT
from uhd.vision.int8 import Int8Linear
from uhd.vision.stem import WindowStem
from uhd.writing import new_files

BOUNDS = {"float32": 1e-4, "float16": 2e-2, "int8": 5e-2}
"""How far a graph's tokens may be from the encoder's of the same precision, relative to the largest token. Half types
are rounded at other places by every runtime, and int8 inputs that lie between two steps fall to either side."""

OPSET = 18

_MOST = 2048  # patches along a side for which a rule of buckets is written down
_EXTRA = ("onnx", "onnxscript", "onnxruntime")


def write(encoder: VisualEncoder, path: str | os.PathLike[str], *, dynamic: bool = True) -> float:
    """As :func:`uhd.export.onnx`."""
    if missing := [name for name in _EXTRA if importlib.util.find_spec(name) is None]:
        raise ImportError(f"an export to ONNX needs {', '.join(missing)}: pip install llava-uhd[onnx]")
    path = Path(path)
    if path.suffix != ".onnx":
        raise ValueError(f"a graph is written to an .onnx file, got {os.fspath(path)!r}")
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: there is no folder {path.parent}")
    graph = described(encoder, dynamic=dynamic)
    with new_files(path.parent, one_of=re.escape(path.name) + r"(\.data)?") as folder:
        new = folder / path.name
        _export(encoder, graph, new)
        graph = graph.replace(error=_difference(encoder, graph, new))
        if not graph.error <= graph.bound:
            raise ValueError(
                f"onnxruntime's tokens are off by {graph.error:.1e} of the largest, at most {graph.bound:.0e} is "
                f"allowed in {'int8' if graph.int8 else graph.dtype}: nothing was written"
            )
        new.with_suffix(".json").write_text(json.dumps(graph.to_dict(), separators=(",", ":")) + "\n")
    return graph.error


def described(encoder: VisualEncoder, *, dynamic: bool = True) -> Graph:
    """What the host must know of an encoder's graph; errors as of :func:`uhd.export.onnx`."""
    if not isinstance(encoder, VisualEncoder):
        raise TypeError(
            f"a graph is made of a uhd.VisualEncoder, got {type(encoder).__name__}: take a model's model.visual, or "
            "what VisualEncoder.from_pretrained makes of a folder"
        )
    vision, compressor = encoder.vision, encoder.compressor
    dtype = _checked(encoder)
    if (own := own_function(encoder.slicing)) is not None:
        raise ValueError(f"the slicing is the function {own!r} of your own, which no file holds: export without it")
    if encoder.slicing.fits_latents:
        raise ValueError(
            f"slicing {encoder.slicing.name!r} fits latents to views, a graph has one number of them for every view: "
            "set one_view_below=None and latents='fixed' in the slicing, if the model has learned with such views"
        )
    int8 = any(isinstance(part, Int8Linear) for part in vision.modules())
    views = length = None
    if not dynamic:
        if not isinstance(encoder.slicing, SlicingConfig):
            raise ValueError(f"the largest plan of {encoder.slicing.name!r} is not known: export with dynamic=True")
        views, length, *_ = encoder.slicing.worst_case()
    return Graph(
        slicing=encoder.slicing.to_dict(),
        schema=encoder.schema.to_dict(),
        pixels=encoder.pixels.to_dict(),
        patch_size=vision.patch_size,
        width=compressor.out_dim,
        tokens_per_view=compressor.tokens_per_view,
        dtype=dtype,
        int8=int8,
        positions=_positions(vision),
        keys=_keys(compressor),
        windows=_windows(compressor),
        neighbours=isinstance(vision.stem, WindowStem),
        merges=(vision.stride // vision.patch_size).bit_length() - 1,
        blocks=_blocks(compressor),
        views=views,
        length=length,
        error=0.0,
        bound=BOUNDS["int8" if int8 else dtype],
        note=encoder.note,
    )


def _checked(encoder: VisualEncoder) -> str:
    """The dtype of an encoder that a graph can be made of."""
    vision, compressor = encoder.vision, encoder.compressor
    packed = type(vision) in (ViT, CompressedViT)
    if not packed or not vision.own_stem:
        what = "a ViT with a stem of your own" if packed else place_of(type(vision))
        raise TypeError(f"the vision encoder is {what}; a graph is made of uhd.vision.ViT with its own stem")
    if type(compressor) not in COMPRESSORS:
        known = ", ".join(one.__name__ for one in COMPRESSORS)
        raise TypeError(f"the compressor is {place_of(type(compressor))}; a graph is made of {known}")
    if lacks_weights(encoder):
        raise ValueError("this encoder has no weights: VisualEncoder.from_pretrained loads them")
    for name, part in nn.ModuleDict({"vision": vision, "compressor": compressor}).named_modules():
        ours = type(part).__module__.startswith(("torch.nn.modules.", "uhd."))
        if not ours or not is_plain(part, type(part)):
            told = "it has hooks or a forward of its own" if ours else f"it is {place_of(type(part))}"
            raise TypeError(f"{name} cannot be exported, {told}: merge or take off what was put there")
    tensors = [*vision.named_parameters(), *compressor.named_parameters()]
    if odd := [name for name, tensor in tensors if type(tensor.data) is not torch.Tensor]:
        raise TypeError(f"{odd[0]} is no plain tensor: export before it is quantised or spread over devices")
    dtypes = {str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors}
    if len(dtypes) != 1 or not dtypes <= BOUNDS.keys():
        raise ValueError(
            f"the weights are {' and '.join(sorted(dtypes))}; a graph has float32 or float16: encoder.float() or "
            "encoder.half() first"
        )
    return dtypes.pop()


def _positions(vit: ViT) -> Positions | None:
    config = vit.config
    if config.position_grid_hw is None:
        return None
    shifted: dict[str, tuple[int, ...]] = {}
    if config.bucket_rule != "integer":
        side = config.position_grid_hw[0]
        for length in range(1, _MOST + 1):
            off = bucket_position_ids((length, 1), side, config.bucket_rule).numpy() // side
            off = off - np.arange(length) * side // length
            if (abs(off) > 1).any():
                raise ValueError(f"bucket_rule {config.bucket_rule!r} is off by more than one place at {length}")
            if off.any():
                shifted[str(length)] = (*np.flatnonzero(off > 0).tolist(), *(-1 - np.flatnonzero(off < 0)).tolist())
    most = None if config.bucket_rule == "integer" else _MOST
    return Positions(config.position_grid_hw, config.interpolation, config.antialias, shifted, most)


def _keys(compressor: nn.Module) -> Keys | None:
    if isinstance(compressor, SpatialResampler):
        return Keys("interpolated", compressor.config.side)
    if not isinstance(compressor, PerceiverResampler) or compressor.config.key_position == "none":
        return None
    if compressor.config.key_position == "direct":
        return Keys("sines", compressor.out_dim // 2)
    return Keys("interpolated", compressor.config.side)


def _windows(compressor: nn.Module) -> Windows | None:
    if not isinstance(compressor, SpatialResampler):
        return None
    return Windows(compressor.config.side, compressor.config.aligned)


def _blocks(compressor: nn.Module) -> tuple[int, ...]:
    if isinstance(compressor, PixelShuffleProjector):
        return (compressor.factor,)
    return (2,) * compressor.rounds if isinstance(compressor, MergeProjector) else ()


def _export(encoder: VisualEncoder, graph: Graph, file: Path) -> None:
    module = PaddedEncoder(encoder.vision, encoder.compressor)
    if any(tensor.device.type != "cpu" for tensor in (*module.parameters(), *module.buffers())):
        module = copy.deepcopy(module).cpu()
    given = example(graph)
    axes = {} if graph.views else {name: free_axes(name, graph.merges) for name in given}
    save_graph(_evaluated(module), given, file, axes)


def save_graph(
    module: nn.Module, given: Mapping[str, np.ndarray], file: Path, axes: Mapping[str, dict[int, Any]]
) -> None:
    """Write the ONNX graph of a module that takes one dictionary, traced by these inputs; ``axes`` are free."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's own
        program = torch.onnx.export(
            module,
            kwargs={"given": {name: torch.from_numpy(array) for name, array in given.items()}},
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=list(given),
            output_names=["tokens"],
            dynamic_shapes={"given": dict(axes)} if axes else None,
        )
        program.save(file)


def _evaluated(module: PaddedEncoder) -> PaddedEncoder:
    """In eval mode, the encoder's own parts staying as they are."""
    if not any(part.training for part in module.children()):
        return module.eval()
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, tensors).eval()


def packed_program(encoder: VisualEncoder) -> torch.export.ExportedProgram:
    """As :func:`uhd.export.torch_program`."""
    graph = described(encoder)
    odd = {"an int8 ViT": graph.int8, "compressors inside the ViT": graph.merges > 0}
    shallow = type(encoder.compressor) is PerceiverResampler and encoder.compressor.config.depth == 1
    odd[f"{type(encoder.compressor).__name__} of this depth"] = not shallow
    if what := next((what for what, there in odd.items() if there), None):
        raise TypeError(f"a packed program is made of a ViT and a perceiver of depth 1, this has {what}: export.onnx")
    given = {name: torch.from_numpy(array) for name, array in packed(example(graph)).items()}
    views, patches, side = (torch.export.Dim(name) for name in ("views", "patches", "side"))
    own = {"ends": {0: views}, "key_sines": {0: side}}
    axes = {"given": {name: own.get(name, {0: patches}) for name in given}}
    module = _evaluated(PackedEncoder(encoder.vision, encoder.compressor))
    with torch.no_grad():
        return torch.export.export(module, (), {"given": given}, dynamic_shapes=axes, strict=False)


def example(graph: Graph) -> dict[str, np.ndarray]:
    """Inputs by which a graph is traced: three views of different shapes, or all that a fixed one has."""
    u = graph.unit
    grids = [(2 * u, 3 * u), (4 * u, 2 * u), (u, 5 * u)]
    if graph.length is not None:
        grids = [(u, u)]
    views = [np.ones((h * w, 3 * graph.patch_size**2), np.float32) for h, w in grids]
    return graph.arrays(views, grids)


def free_axes(name: str, merges: int = 0) -> dict[int, Any]:
    """The free axes of an input; of patches that are joined so often there are four times as many each time."""
    views, length = torch.export.Dim("views"), torch.export.Dim("length")
    patches = 4**merges * length if merges else length
    others = {
        "windows": {0: views, 2: length},
        "window_mask": {0: views},
        "blocks": {0: views, 1: torch.export.Dim("num_tokens")},
        "key_sines": {0: torch.export.Dim("side")},
    }
    joined = name in ("key_rows", "key_columns", "key_row_numbers", "key_column_numbers")
    return others.get(name, {0: views, 1: length if joined else patches})


def _difference(encoder: VisualEncoder, graph: Graph, file: Path) -> float:
    """The largest, relative to the largest token, over two images at once: one that is cut and a small one."""
    side = encoder.vision.image_size or graph.rule.view_side or 16 * graph.patch_size
    drawn = np.random.default_rng(0)
    sizes = [(side * 13 // 10, side * 17 // 10), (side * 2 // 5 + 1, side * 3 // 5 + 1)]
    images = [Image.fromarray(drawn.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    prepare = Preparation(encoder.slicing, graph.own_pixels, graph.patch_size)
    run = session(file)
    worst, largest = 0.0, 0.0
    groups = [images] if graph.views is None else [[image] for image in images]
    for group in groups:
        batch = prepare(group)
        with torch.inference_mode():
            packed, lengths = encoder.encode_packed(batch.patches, batch.grids)
        plans = [graph.cut(image) for image in group]
        given = graph.arrays([view for _, views in plans for view in views], batch.grids)
        padded = run(given)
        found = np.concatenate([view[:count] for view, count in zip(padded, lengths, strict=False)])
        wanted = packed.float().cpu().numpy()
        worst = max(worst, float(np.abs(found.astype(np.float32) - wanted).max()))
        largest = max(largest, float(np.abs(wanted).max()))
        if not np.isfinite(wanted).all():
            raise ValueError("the encoder's own tokens are no finite numbers: nothing was written")
    return worst / largest if largest else worst
