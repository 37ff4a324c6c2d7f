"""An encoder as a graph for other runtimes: written with torch, run without it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from uhd.export.host import inputs, packed

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from uhd.encoder import VisualEncoder

__all__ = ["inputs", "onnx", "packed", "torch_program"]


def onnx(encoder: VisualEncoder, path: str | os.PathLike, *, dynamic: bool = True) -> float:
    """Write an encoder as an ONNX graph, with what its host must know in a ``.json`` of the same name beside it.

    Its one output is ``tokens`` (V, Q, D) of the views of a call; :func:`inputs` makes the inputs of images. It has
    the encoder's precision: float32, float16, or int8 weights in the ViT's blocks (``encoder.quantize()``). Learned
    newlines of a strategy's packing are left out: tokens are those of each view.

    Args:
        encoder: With :class:`uhd.vision.ViT` of any family, and a perceiver or spatial resampler, or an MLP, pixel
            shuffle or merge projector. It stays as it is.
        path: The graph, ``*.onnx``; both files are there at the end, or neither is new. Weights of 2 GB or more stand
            in a third one, ``*.onnx.data``.
        dynamic: Leave the number of views and their length free. ``False``: fixed to those of an image's largest plan,
            for runtimes that want fixed shapes.

    Returns:
        How far onnxruntime's tokens are from the encoder's, relative to the largest token, over images of several
        shapes.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing: ``pip install llava-uhd[onnx]``.
        TypeError, ValueError: The encoder has a part, dtype or slicing that no graph is made of, by name; or the graph
            is off by more than its precision allows (see :data:`uhd.export.graph.BOUNDS`), and nothing is written.
    """
    from uhd.export.graph import write

    return write(encoder, path, dynamic=dynamic)


def torch_program(encoder: VisualEncoder) -> ExportedProgram:
    """An encoder as a program of ``torch.export``, the number of views and of all patches free.

    It takes one dictionary, ``given``: what :func:`packed` makes of :func:`inputs`, as tensors; and gives tokens
    (V, Q, D). The resampler's attention is the operator ``uhd_kernels::varlen_cross_attention``, so that a saved
    program is loaded after ``import uhd_kernels``; ``program.run_decompositions(uhd_kernels.decompositions())`` leaves
    PyTorch's own operators, for whoever knows no others.

    >>> torch.export.save(uhd.export.torch_program(encoder), "encoder.pt2")  # doctest: +SKIP

    Raises:
        TypeError, ValueError: As :func:`onnx`; and the compressor is no perceiver of depth 1, or the ViT is int8.
    """
    from uhd.export.graph import packed_program

    return packed_program(encoder)
