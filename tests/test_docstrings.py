"""Examples in docstrings run, and every public function over plain numbers or small tensors has one."""

import doctest
import importlib
import inspect
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = {path: path.read_text() for folder in ("uhd", "kernels") for path in sorted((ROOT / folder).rglob("*.py"))}
EXAMPLE = re.compile(r"^\s*>>> ", re.MULTILINE)
NEEDS_FILES = {"load_nano", "load_tokens", "save_tokens", "write_page"}
PACKAGES = [
    "uhd",
    "uhd_kernels",
    *(f"uhd.{each}" for each in ("compare", "pixels", "resampler", "schema", "slicing", "testing")),
]
PUBLIC = {"uhd.testing": ("check_strategy", "inspect_strategy", "image_sizes", "plans", "slicing_configs")}


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[parts[0] == "kernels" :]).removesuffix(".__init__")


WITH_EXAMPLES = [module_of(path) for path, text in SOURCES.items() if EXAMPLE.search(text)]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_give_what_they_say(name):
    module = importlib.import_module(name)
    results = doctest.testmod(module)  # prints what differs
    assert results.failed == 0
    assert results.attempted == len(EXAMPLE.findall(inspect.getsource(module)))  # none is out of doctest's sight


@pytest.mark.parametrize("name", PACKAGES)
def test_public_functions_have_an_example(name):
    module = importlib.import_module(name)
    public = [inspect.unwrap(getattr(module, each)) for each in getattr(module, "__all__", PUBLIC.get(name, ()))]
    functions = [each for each in public if inspect.isfunction(each)]
    assert functions
    # the docstring of a module may show a family of functions together
    docs = {each.__name__: f"{each.__doc__}{inspect.getmodule(each).__doc__}" for each in functions}
    assert {each for each, doc in docs.items() if not EXAMPLE.search(doc)} <= NEEDS_FILES
