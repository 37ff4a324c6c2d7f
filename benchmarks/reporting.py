"""How a benchmark measures and tells: on one thread, and not at all where a contender is wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def measured(run: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """What ``run`` gives on one thread; ``None``, and why on standard error, where it raises a ``RuntimeError``."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return run()
    except RuntimeError as problem:
        print(f"nothing is reported: {problem}", file=sys.stderr)
        return None
    finally:
        torch.set_num_threads(threads)


def written(
    result: Mapping[str, Any],
    file: Path,
    drawings: Mapping[str, str],
    circumstances: Sequence[str] = ("versions", "device"),
) -> None:
    """Write a result, and drawings by name beside it; print these parts of it, and what it is about."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, drawn in drawings.items():
        (file.parent / name).write_text(drawn + "\n", encoding="utf-8")
    for part in circumstances:
        print(", ".join(f"{key} {value}" for key, value in result[part].items()))
    print(result["about"])
