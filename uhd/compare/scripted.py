"""Pages that hold their own script and nothing from outside, and what one of them draws of a plan."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from uhd.slicing import SlicePlan, view_box

_HERE = Path(__file__).parent
_MOST_BOXES = 40  # drawn of a plan


def filled(template: str, **fields: Any) -> str:
    """A template of this folder with these fields; one that it asks for and does not get is an error."""
    import jinja2

    options = {"autoescape": True, "undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    return jinja2.Template((_HERE / template).read_text(encoding="utf-8"), **options).render(**fields)


def scripted_page(template: str, styles: Iterable[Path], scripts: Iterable[Path], data: Any, **fields: Any) -> str:
    """Fill a template of this folder with one style and one script, each made of several files, and its data as JSON.

    The template gets ``style``, ``script``, its ``script_hash`` for the page's policy and ``data`` besides ``fields``.
    """
    script = "".join(path.read_text(encoding="utf-8") for path in scripts)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return filled(
        template,
        style="".join(path.read_text(encoding="utf-8") for path in styles),
        script=script,
        script_hash=f"sha256-{digest}",
        # no "<" ends the element that holds it
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        **fields,
    )


def cut_code(plan: SlicePlan) -> list[int]:
    """[rows, columns] of equal parts, or the boxes (top, left, bottom, right) of views in thousandths of the image."""
    kind = "overview" if plan.slice_hw is None else "slice"
    shown = [canvas for canvas in plan.canvases if canvas.kind == kind]
    whole = shown[0]
    if len(shown) == 1 and whole.source is None and whole.offset == (0, 0):
        h, w = whole.tiles[0].size_hw
        if whole.content_hw == whole.size_hw == (h * whole.grid[0], w * whole.grid[1]):
            return list(whole.grid)
    boxes: list[int] = []
    for view in plan.views:
        if view.kind == kind and len(boxes) < 4 * _MOST_BOXES:
            edges = view_box(plan, view.index)
            share = [min(max(float(edge) / plan.image_hw[side % 2], 0), 1) for side, edge in enumerate(edges)]
            if share[2] > share[0] and share[3] > share[1]:
                boxes += [round(1000 * edge) for edge in share]
    return boxes
