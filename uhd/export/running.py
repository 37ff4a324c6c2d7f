"""An exported graph in onnxruntime, from images to tokens and their layouts: torch is not imported."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from uhd.export.host import Graph
from uhd.schema import TokenLayout
from uhd.schema.counted import checked_layout
from uhd.slicing import SlicePlan


class EncodedArray(NamedTuple):
    """As :class:`uhd.EncodedImage`, its tokens (plan.num_visual_tokens, D) an array."""

    tokens: np.ndarray
    plan: SlicePlan
    layout: TokenLayout


class Runner:
    """The graph of an ``.onnx`` file, with the ``.json`` beside it, called as a :class:`uhd.VisualEncoder` is.

    Attributes:
        schema, pixels, note: The encoder's; other ``pixels`` may be set.

    Raises:
        ImportError: onnxruntime is missing: ``pip install llava-uhd[onnx]``, or it alone.
        ValueError: One of both files is missing or damaged; when called, they are of two exports.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"there is no graph {path}: uhd export writes one")
        self.path, self.graph = path, Graph.read(path.with_suffix(".json"))
        self.run = session(path)
        self.schema, self.pixels, self.note = self.graph.own_schema, self.graph.own_pixels, self.graph.note

    def __call__(self, images: Sequence[Any]) -> list[EncodedArray]:
        """Plan, cut and encode images, one after the other; errors as of :func:`uhd.export.inputs`.

        Raises:
            ValueError: A plan has a packing, whose learned embeddings are not in the graph.
        """
        return [self._encoded(image) for image in images]

    def _encoded(self, image: Any) -> EncodedArray:
        plan, views = self.graph.cut(image, self.pixels)
        if plan.packing is not None:
            raise ValueError(
                f"{plan.strategy!r} packs the views' tokens with learned embeddings, which are not in the graph: "
                "encode with the encoder itself, or run the graph and pack on your own"
            )
        layout = checked_layout(plan, self.schema, where="the image", advice="the .json is another graph's")
        padded = self._run(self.graph.arrays(views, [view.patches_hw for view in plan.views]))
        parts = [tokens[: view.num_tokens] for tokens, view in zip(padded, plan.views, strict=False)]
        return EncodedArray(np.concatenate(parts), plan, layout)

    def _run(self, given: dict[str, np.ndarray]) -> np.ndarray:
        try:
            tokens = self.run(given)
            if (width := tokens.shape[-1]) != self.graph.width:
                raise ValueError(f"tokens are {width} wide, not {self.graph.width}")
        except Exception as problem:  # onnxruntime's own have no base of theirs
            name = self.path.with_suffix(".json").name
            raise ValueError(
                f"{self.path} does not run as {name} says, take both files of one export ({problem})"
            ) from problem
        return tokens


def session(file: str | os.PathLike[str]) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    """A graph in onnxruntime on the CPU: inputs -> tokens (V, Q, D); a ``ValueError`` where it is none."""
    try:
        import onnxruntime
    except ImportError as problem:
        raise ImportError(f"{file} is run by onnxruntime: pip install llava-uhd[onnx]") from problem
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors, which are raised too
    try:
        running = onnxruntime.InferenceSession(os.fspath(file), options, providers=["CPUExecutionProvider"])
    except Exception as problem:  # onnxruntime's own, which have no base of theirs
        raise ValueError(f"{file} does not fit or is damaged: {problem}") from problem
    return lambda given: running.run(["tokens"], given)[0]
