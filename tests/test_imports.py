"""What loads what: the planner is free of tensor libraries, and imports point down only."""

import ast
import graphlib
import importlib
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "timm", "PIL")

EVERYWHERE = {"uhd.moved", "uhd.settings"}
"""The ground floor: they import nothing of this project, and every part may import them."""

# what each part may import of this project
ALLOWED = {
    **{part: set() for part in EVERYWHERE},
    "uhd_kernels": {"uhd_kernels"},
    "uhd.slicing": {"uhd.slicing"},
    "uhd.schema": {"uhd.schema", "uhd.slicing"},
    "uhd.files": set(),
    "uhd.pixels": {"uhd.pixels", "uhd.slicing", "uhd.files"},
    "uhd.checkpoint": {"uhd.files", "uhd.pixels"},
    "uhd.batch": {"uhd.slicing", "uhd.pixels"},
    "uhd.loading": {"uhd.slicing", "uhd.schema", "uhd.pixels", "uhd.batch"},
    "uhd.grids": set(),
    "uhd.shortcuts": set(),
    "uhd.positions": {"uhd.grids"},
    "uhd.vision": {"uhd.vision", "uhd.grids", "uhd.positions", "uhd.shortcuts", "uhd.pixels", "uhd.checkpoint"},
    "uhd.resampler": {"uhd.resampler", "uhd.grids", "uhd.positions", "uhd.shortcuts", "uhd_kernels"},
    "uhd.environment": {"uhd.pixels", "uhd.resampler"},
    "uhd.merge": {"uhd.schema"},
    "uhd.draw": {"uhd.slicing", "uhd.schema", "uhd.pixels"},
    "uhd.charts": set(),
    "uhd.compare": {"uhd.compare", "uhd", "uhd.slicing", "uhd.pixels", "uhd.charts"},
    "uhd.testing": {"uhd.slicing"},
    "uhd.parts": {"uhd.pixels", "uhd.vision", "uhd.resampler"},
    "uhd.token_files": {"uhd.slicing", "uhd.schema", "uhd.encoder", "uhd.files"},
    "uhd.encoder": {
        "uhd.files",
        "uhd.shortcuts",
        "uhd.parts",
        "uhd.slicing",
        "uhd.schema",
        "uhd.pixels",
        "uhd.batch",
        "uhd.loading",
        "uhd.grids",
        "uhd.vision",
        "uhd.resampler",
    },
    "uhd.pretrained": {
        "uhd.checkpoint",
        "uhd.pretrained",
        "uhd.slicing",
        "uhd.schema",
        "uhd.pixels",
        "uhd.vision",
        "uhd.resampler",
        "uhd.encoder",
    },
    "uhd.hf": {
        "uhd.hf",
        "uhd.environment",
        "uhd.slicing",
        "uhd.schema",
        "uhd.pixels",
        "uhd.batch",
        "uhd.loading",
        "uhd.vision",
        "uhd.resampler",
        "uhd.encoder",
        "uhd.parts",
        "uhd.merge",
    },
    "uhd.nano": {
        "uhd.nano",
        "uhd.slicing",
        "uhd.schema",
        "uhd.pixels",
        "uhd.batch",
        "uhd.vision",
        "uhd.resampler",
        "uhd.encoder",
        "uhd.hf",
    },
    "uhd.demo": {
        "uhd.slicing",
        "uhd.schema",
        "uhd.pixels",
        "uhd.batch",
        "uhd.vision",
        "uhd.resampler",
        "uhd.encoder",
        "uhd.hf",
        "uhd.nano",
    },
    "uhd.cli": {
        "uhd",
        "uhd.environment",
        "uhd.slicing",
        "uhd.schema",
        "uhd.pixels",
        "uhd.draw",
        "uhd.compare",
        "uhd.encoder",
        "uhd.token_files",
        "uhd.demo",
        "uhd.hf",
    },
}


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


def modules():
    for folder, package in (("uhd", "uhd"), ("kernels/uhd_kernels", "uhd_kernels")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            dotted = ".".join((package, *path.relative_to(ROOT / folder).with_suffix("").parts))
            yield dotted.removesuffix(".__init__"), path


def imports(path, module):
    """(module, name) of every import from this project anywhere in a file, relative ones resolved."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            pairs = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            pairs = [(".".join(filter(None, (base, node.module or ""))), alias.name) for alias in node.names]
        else:
            continue
        yield from (pair for pair in pairs if pair[0].split(".")[0] in ("uhd", "uhd_kernels"))


def imported(path, module):
    """Project modules named by import statements anywhere in a file."""
    for base, name in imports(path, module):
        yield base
        if base == "uhd" and name:
            yield f"uhd.{name}"


def part_of(module):
    return max((part for part in ALLOWED if module == part or module.startswith(part + ".")), key=len, default="uhd")


def test_imports_point_down():
    checked = 0
    for module, path in modules():
        if module == "uhd":
            continue  # names its parts for type checkers only, and loads them on first use
        for name in imported(path, module):
            checked += 1
            assert part_of(name) in ALLOWED[part_of(module)] | EVERYWHERE, f"{module} imports {name}"
    assert checked > 40


@pytest.mark.parametrize("room", ["uhd.slicing", "uhd.schema", "uhd.pixels", "uhd.compare"])
def test_files_import_in_no_circle(room):
    """Lazy imports and those for type checkers count, and so do those through a package's own names."""
    files = {module: path for module, path in modules() if module == room or module.startswith(f"{room}.")}
    graph = {module: set(named_files(path, module, files)) - {module} for module, path in files.items()}
    assert any(graph.values())
    list(graphlib.TopologicalSorter(graph).static_order())  # raises, naming the circle


def named_files(path, module, files):
    """Those of the files that a file's imports name; a package stands for its ``__init__``."""
    for base, name in imports(path, module):
        target = f"{base}.{name}" if f"{base}.{name}" in files else base
        if target in files:
            yield target


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
    users = {module for module, path in modules() for name in imported(path, module) if name.startswith("uhd_kernels")}
    assert {user for user in users if user.startswith("uhd.")} == {"uhd.resampler.attention"}


def test_every_public_name_loads():
    import uhd

    for name in uhd.__all__:
        assert getattr(uhd, name) is not None
    assert set(uhd.__all__) <= set(dir(uhd))
    with pytest.raises(AttributeError, match="no attribute 'Slicer'"):
        uhd.Slicer  # noqa: B018
