"""The benchmark scripts as modules."""

import importlib
import pathlib
import sys
from types import ModuleType

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
