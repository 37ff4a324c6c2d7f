"""Data sets of images that outgrow a process and a machine: their visual tokens on disk, and these read again.

A source is listed in a fixed order and divided into units of :data:`uhd.datasets.sources.UNIT` images. A unit is read,
prepared, encoded and written as one file, which appears at once: whoever maps over units, a loop here or Ray
elsewhere, killed or not, ends with the same bytes. What a folder of units holds is said in its ``README.md``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from uhd.lazily import lazily

if TYPE_CHECKING:
    from uhd.datasets.estimating import estimate
    from uhd.datasets.inspecting import inspect
    from uhd.datasets.running import encode
    from uhd.datasets.tokens import Tokens

_MODULES = {"Tokens": "tokens", "encode": "running", "estimate": "estimating", "inspect": "inspecting"}
_HOMES = {name: f"uhd.datasets.{module}" for name, module in _MODULES.items()}
__all__ = ["Tokens", "encode", "estimate", "inspect"]

__getattr__ = lazily(__name__, _HOMES)  # the command line asks for its words only
