"""The benchmark scripts as modules, and tests in a process where Triton interprets."""

import contextlib
import importlib
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

FOLDER = pathlib.Path(__file__).parent.parent / "benchmarks"


def load_script(name: str) -> ModuleType:
    """Import a benchmark, which finds its neighbours by bare name as when it is run."""
    with among_scripts():
        return importlib.import_module(name)


@contextlib.contextmanager
def among_scripts() -> Iterator[None]:
    """Have benchmarks found by bare name, and those names forgotten again; what had one before has it after.

    They must not stay: ``kernels`` and ``datasets`` would be taken for Hugging Face's packages of these names. Nor may
    the paths that scripts add.
    """
    own = {path.stem for path in FOLDER.glob("*.py")}
    aside = {name: sys.modules.pop(name) for name in own & set(sys.modules)}
    paths = list(sys.path)
    sys.path.insert(0, str(FOLDER))
    try:
        yield
    finally:
        sys.path[:] = paths
        for name in own & set(sys.modules):
            del sys.modules[name]
        sys.modules.update(aside)


def interpreted(path, *selection: str) -> int:
    """Run tests of a file in a process that has Triton interpret, as is chosen on import; the number that passed."""
    pytest.importorskip("triton")
    paths = os.pathsep.join([str(FOLDER.parent / "kernels"), os.environ.get("PYTHONPATH", "")])
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(path), *selection],
        env={**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=FOLDER.parent,
        capture_output=True,
        text=True,
    )
    if found.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:
        pytest.skip(re.search(r"SKIPPED .*?: (Triton .*)", found.stdout)[1])
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]
    assert "skipped" not in found.stdout
    return int(re.search(r"(\d+) passed", found.stdout)[1])
