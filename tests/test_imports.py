"""What loads what: the planner is free of tensor libraries, and imports point down only."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "timm", "PIL")

# what each part may import of this project
ALLOWED = {
    "uhd_kernels": {"uhd_kernels"},
    "uhd.slicing": {"uhd.slicing"},
    "uhd.schema": {"uhd.schema", "uhd.slicing"},
    "uhd.pixels": {"uhd.pixels", "uhd.slicing"},
    "uhd.batch": {"uhd.slicing", "uhd.pixels"},
    "uhd.loading": {"uhd.slicing", "uhd.schema", "uhd.pixels", "uhd.batch"},
    "uhd.packed": set(),
    "uhd.torch_private": set(),
    "uhd.inference": {"uhd.torch_private"},
    "uhd.vision": {"uhd.vision", "uhd.packed", "uhd.inference", "uhd.torch_private"},
    "uhd.resampler": {"uhd.resampler", "uhd.packed", "uhd.inference", "uhd_kernels"},
    "uhd.merge": {"uhd.schema"},
    "uhd.draw": {"uhd.slicing", "uhd.schema", "uhd.pixels"},
    "uhd.charts": set(),
    "uhd.compare": {"uhd", "uhd.slicing", "uhd.pixels", "uhd.charts"},
    "uhd.testing": {"uhd.slicing"},
    "uhd.parts": {"uhd.pixels", "uhd.vision", "uhd.resampler"},
    "uhd.token_files": {"uhd.slicing", "uhd.schema", "uhd.encoder", "uhd.parts"},
    "uhd.encoder": {
        "uhd.inference",
        "uhd.parts",
        "uhd.slicing",
        "uhd.schema",
        "uhd.pixels",
        "uhd.batch",
        "uhd.loading",
        "uhd.packed",
        "uhd.vision",
        "uhd.resampler",
    },
    "uhd.pretrained": {
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


def imported(path, module):
    """Project modules named by import statements anywhere in a file, relative ones resolved."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            names = [".".join(filter(None, (base, node.module or "")))]
            names += [f"{names[0]}.{alias.name}" for alias in node.names if names[0] == "uhd"]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in ("uhd", "uhd_kernels"))


def part_of(module):
    return max((part for part in ALLOWED if module == part or module.startswith(part + ".")), key=len, default="uhd")


def test_imports_point_down():
    checked = 0
    for module, path in modules():
        if module == "uhd":
            continue  # names its parts for type checkers only, and loads them on first use
        for name in imported(path, module):
            checked += 1
            assert part_of(name) in ALLOWED[part_of(module)], f"{module} imports {name}"
    assert checked > 40


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
