"""The benchmark scripts as modules, and tests in a process where Triton interprets."""

import importlib
import os
import pathlib
import re
import subprocess
import sys
from types import ModuleType

import pytest

FOLDER = pathlib.Path(__file__).parent.parent / "benchmarks"


def load_script(name: str) -> ModuleType:
    """Import a benchmark, which finds its neighbours by bare name as when it is run, and forget those names again.

    They must not stay: ``kernels`` would be taken for Hugging Face's package of that name.
    """
    before = set(sys.modules)
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))
        for each in set(sys.modules) - before:
            if str(getattr(sys.modules[each], "__file__", None)).startswith(str(FOLDER)):
                del sys.modules[each]


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
