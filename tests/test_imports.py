"""What loads what: the planner is free of tensor libraries, and imports point down only."""

import graphlib
import importlib
import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "timm", "PIL")

_spec = importlib.util.spec_from_file_location("architecture", ROOT / "docs" / "architecture.py")
architecture = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(architecture)


def run(code, cwd):
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "use",
    [
        "uhd.plan((1008, 672)); uhd.candidates((1008, 672)); uhd.plan_many([[10, 20]])",
        "uhd.layout(uhd.plan((1008, 672)))",
        "import uhd.slicing.strategies, uhd.schema.separators; uhd.strategy('minicpm-v')((10, 20))",
    ],
)
def test_planning_and_layout_load_no_tensor_library(use):
    code = f"import sys, uhd, uhd.slicing, uhd.schema; {use}; print([m for m in {HEAVY} if m in sys.modules])"
    found = run(code, ROOT)
    assert found.stdout.strip() == "[]", found.stderr


def test_transformers_imports_from_the_repository_root():
    """A package called kernels there would shadow Hugging Face's, which transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "import sys; sys.path.insert(1, 'kernels'); import transformers.models.llama.modeling_llama, uhd_kernels"
    found = run(code, ROOT)
    assert found.returncode == 0, found.stderr


def test_files_import_in_no_circle():
    """Lazy imports and those for type checkers count, and so do those through a package's own names."""
    graph = architecture.graph()
    assert sum(map(len, graph.values())) > 300
    list(graphlib.TopologicalSorter(graph).static_order())  # raises, naming the circle


def test_torch_without_ranks_imports():
    """Built so, torch has ``torch.distributed`` and nothing in it: what lies inside is imported where ranks exist."""
    for folder in ("uhd", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            at_once = re.findall(r"^(?:from|import) (torch\.distributed\.\S+)", path.read_text(), re.M)
            assert at_once == [], path


def test_a_circle_would_be_seen(tmp_path):
    (tmp_path / "one.py").write_text("def f():\n    from uhd.two import g\n")
    (tmp_path / "two.py").write_text("from . import one\n")
    known = {"uhd.one": tmp_path / "one.py", "uhd.two": tmp_path / "two.py"}
    graph = {module: set(architecture.imports(module, known)) for module in known}
    assert graph == {"uhd.one": {"uhd.two"}, "uhd.two": {"uhd.one"}}


def test_rooms_stand_on_floors_as_the_page_draws_them():
    """A new import that lifts a room shows here: run docs/architecture.py, and look whether it should."""
    text = architecture.PAGE.read_text()
    assert architecture.page(text) == text
    assert architecture.floors()[-2:] == [["uhd.cli"], ["uhd.__main__"]]


def test_the_page_names_files_and_what_is_in_them():
    named = re.findall(r"`(uhd/[\w/]+(?:\.py)?)(?:: (\w+))?`", architecture.PAGE.read_text())
    assert len(named) > 30
    for path, name in named:
        assert (ROOT / path).exists(), path
        if name:
            assert re.search(rf"^ *(?:def|class) {name}\b", (ROOT / path).read_text(), re.MULTILINE), (path, name)


def test_moved_names_load_from_their_old_path_and_say_so():
    import uhd.slicing
    from uhd.moved import moved

    old = moved("uhd.old", {"find": "uhd.slicing.rules", "cut": "uhd.slicing:plan"})
    with pytest.warns(DeprecationWarning, match=r"uhd\.old\.find has moved: use uhd\.slicing\.rules\.find"):
        assert old("find") is uhd.slicing.find
    with pytest.warns(DeprecationWarning, match=r"uhd\.old\.cut has moved: use uhd\.slicing\.plan"):
        assert old("cut") is uhd.slicing.plan
    with pytest.raises(AttributeError, match=r"module 'uhd\.old' has no attribute 'glue'"):
        old("glue")


@pytest.mark.parametrize(
    "path",
    [
        "uhd.slicing.config.PRESETS",
        "uhd.slicing.media.plan_sample",
        "uhd.slicing.plan.plan",
        "uhd.slicing.strategies.find",
    ],
)
def test_old_import_paths_work_with_a_warning(path):
    module, _, name = path.rpartition(".")
    with pytest.warns(DeprecationWarning, match=f"{name} has moved: use uhd"):
        assert getattr(sys.modules.get(module) or importlib.import_module(module), name) is not None


def test_only_one_module_imports_the_kernels():
    users = {
        module for module, names in architecture.graph().items() if any(n.startswith("uhd_kernels") for n in names)
    }
    assert {user for user in users if user.startswith("uhd.")} == {"uhd.resampler.attention"}


def test_a_vision_encoder_loads_no_compressor():
    code = "import sys, uhd.vision; print([m for m in ('uhd.resampler', 'uhd_kernels') if m in sys.modules])"
    found = run(code, ROOT)
    assert found.stdout.strip() == "[]", found.stderr


def test_every_public_name_loads():
    import uhd

    for name in uhd.__all__:
        assert getattr(uhd, name) is not None
    assert set(uhd.__all__) <= set(dir(uhd))
    with pytest.raises(AttributeError, match="no attribute 'Slicer'"):
        uhd.Slicer  # noqa: B018
