"""Names that torch and transformers do not publish: a file each that knows them, and what runs once they are gone."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from uhd_kernels import varlen_cross_attention
from uhd_kernels.op import attention_op

from uhd import machine, torch_private
from uhd.hf import versions
from uhd.torch_private import has_hooks, in_functorch, int8_product
from uhd.vision import ViT, ViTConfig, compiled
from uhd.vision.compiled import FastBlocks

ROOT = Path(__file__).parent.parent
KNOW = {
    "torch": ("uhd/torch_private.py", "kernels/uhd_kernels/torch_private.py"),
    "transformers": ("uhd/hf/versions.py",),
}
GRIDS = [(2, 3), (4, 2)]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


class Uses(ast.NodeVisitor):
    """Collects the dotted private names of one library that a file reaches from its imports."""

    def __init__(self, library: str) -> None:
        self.library = library
        self.known: dict[str, str] = {}  # name in the file -> dotted name
        self.found: list[str] = []

    def add(self, dotted: str | None) -> None:
        if dotted and dotted.split(".")[0] == self.library and any(map(is_private, dotted.split("."))):
            self.found.append(dotted)

    def dotted(self, node: ast.expr) -> str | None:
        if isinstance(node, ast.Name):
            return self.known.get(node.id)
        if isinstance(node, ast.Attribute) and (owner := self.dotted(node.value)):
            return f"{owner}.{node.attr}"
        return None

    def visit_Import(self, node: ast.Import) -> None:
        for each in node.names:
            self.add(each.name)
            name = each.name if each.asname else each.name.split(".")[0]
            self.known[each.asname or name] = name

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for each in node.names if not node.level else ():
            self.add(f"{node.module}.{each.name}")
            self.known[each.asname or each.name] = f"{node.module}.{each.name}"

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        if (dotted := self.dotted(node.value)) and isinstance(node.targets[0], ast.Name):
            self.known[node.targets[0].id] = dotted

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if dotted := self.dotted(node):
            self.add(dotted)
        else:
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        texts = [
            each.value if isinstance(each, ast.Constant) and isinstance(each.value, str) else None
            for each in node.args
        ]
        if isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            owner = self.dotted(node.args[0])
            computed = "_computed" if owner != self.library else ""  # dtypes are looked up in torch itself
            self.add(owner and f"{owner}.{texts[1] or computed}")
        else:
            for text in texts:
                self.add(text)


def private_uses(source: str, library: str) -> list[str]:
    uses = Uses(library)
    uses.visit(ast.parse(source))
    return uses.found


BASES = {
    "torch": (nn.Module, torch.Tensor),
    "transformers": (
        transformers.PreTrainedModel,
        transformers.PreTrainedConfig,
        transformers.ProcessorMixin,
        transformers.GenerationMixin,
        transformers.PreTrainedTokenizerBase,
        versions.PilBackend,
        versions.VideoProcessorBase,
    ),
}
"""Classes whose private names a subclass, or who holds an instance, may reach without an import."""
LISTED = {
    "torch": {*torch_private.OVERRIDDEN, *torch_private.MODULE_STATE},
    "transformers": {name for names in versions.HOOKS.values() for name in names},
}


def reached(source: str, bases: tuple[type, ...]) -> set[str]:
    """Private names of these classes that a file reads, calls or defines anew."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.ClassDef):
            for item in node.body:
                targets = item.targets if isinstance(item, ast.Assign) else [getattr(item, "target", None)]
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
                names |= {item.name} if isinstance(item, ast.FunctionDef) else set()
    return {name for name in names if is_private(name) and any(hasattr(base, name) for base in bases)}


@pytest.mark.parametrize("library", BASES)
def test_private_names_of_classes_are_listed(library: str) -> None:
    sources = [path for path in (ROOT / "uhd").rglob("*.py") if path.relative_to(ROOT).as_posix() not in KNOW[library]]
    known = LISTED[library] | {name for other in set(BASES) - {library} for name in LISTED[other]}
    torchs = set() if library == "torch" else {name for base in BASES["torch"] for name in dir(base)}
    unlisted = {path.name: reached(path.read_text(), BASES[library]) - known - torchs for path in sources}
    assert {name: names for name, names in unlisted.items() if names} == {}
    assert reached("class A(Module):\n    def _apply(self, f): return t._version", BASES["torch"]) == {
        "_apply",
        "_version",
    }


@pytest.mark.parametrize("library", KNOW)
def test_only_the_files_that_know_them_use_private_names(library: str) -> None:
    sources = {
        path.relative_to(ROOT).as_posix(): path for room in ("uhd", "kernels") for path in (ROOT / room).rglob("*.py")
    }
    found = {
        name: private_uses(path.read_text(), library) for name, path in sources.items() if name not in KNOW[library]
    }
    assert len(found) > 90
    assert {name: uses for name, uses in found.items() if uses} == {}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch\ntorch._int_mm(a, b)", ["torch._int_mm"]),
        ("import torch._dynamo", ["torch._dynamo"]),
        ("import torch._dynamo as d\nd.reset()", ["torch._dynamo", "torch._dynamo.reset"]),
        ("from torch._C import x", ["torch._C.x"]),
        ("from torch.cpu import _is_amx_tile_supported as amx", ["torch.cpu._is_amx_tile_supported"]),
        ("from torch import nn\nnn.Module._apply(m, f)", ["torch.nn.Module._apply"]),
        ("import torch.nn.functional as F\nF._pad", ["torch.nn.functional._pad"]),
        ("import torch\nops = torch.ops.mkldnn\nops._f.binary(x)", ["torch.ops.mkldnn._f.binary"]),
        ("import torch\nhasattr(torch, '_int_mm')", ["torch._int_mm"]),
        ("import torch\ngetattr(torch.cpu, name)", ["torch.cpu._computed"]),
        ("import_module('torch._inductor')", ["torch._inductor"]),
        ("import torch\ndef f():\n    return torch.ops._C.f(torch._x)", ["torch.ops._C.f", "torch._x"]),
        ("import torch\ntorch.__version__\ntorch.ops.mkldnn\ngetattr(torch, 'int4')\nself._x\n_y(torch)", []),
        ("from .torch import _x", []),
        ("'torch._C'", []),
    ],
)  # fmt: skip
def test_private_uses_are_seen(source: str, found: list[str]) -> None:
    assert private_uses(source, "torch") == found


@pytest.fixture
def vit() -> ViT:
    torch.manual_seed(0)
    vit = ViT(ViTConfig(patch_size=2, width=32, depth=2, heads=2, mlp_width=48, position_grid_hw=(4, 4)))
    return vit.eval().requires_grad_(False)


@pytest.mark.parametrize("gone", ["_linear_pointwise", "_reorder_linear_weight"])
def test_without_onednn_operators_no_weights_are_packed(gone: str, vit: ViT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UHD_PRODUCTS", "bfloat16=packed")
    vit, x = vit.to(torch.bfloat16), torch.randn(14, vit.config.patch_dim, dtype=torch.bfloat16)
    wanted = vit(x, GRIDS)
    left = {"_linear_pointwise", "_reorder_linear_weight"} - {gone}
    monkeypatch.setattr(
        torch.ops, "mkldnn", SimpleNamespace(**{name: getattr(torch.ops.mkldnn, name) for name in left})
    )
    monkeypatch.setattr(compiled, "fused_block", None)
    vit.compile_blocks("none")
    torch.testing.assert_close(vit(x, GRIDS), wanted, rtol=0.02, atol=0.02)


def test_without_word_of_transforms_the_modules_run(vit: ViT, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(14, vit.config.patch_dim)
    wanted = vit(x, GRIDS)
    assert not in_functorch()
    monkeypatch.delattr(torch._C._functorch, "peek_interpreter_stack")
    assert in_functorch()
    monkeypatch.setattr(FastBlocks, "_run", None)
    vit.compile_blocks("none")
    assert torch.equal(vit(x, GRIDS), wanted)


def test_without_word_of_dispatch_modes_products_are_torch_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UHD_PRODUCTS", "bfloat16=float32")
    asked = torch.bfloat16, torch.device("cpu"), 1
    assert machine.product_of(*asked) == (torch.float32, "native")
    monkeypatch.delattr(torch.utils._python_dispatch, "is_in_torch_dispatch_mode")
    assert machine.product_of(*asked) == (torch.bfloat16, "native")


@pytest.mark.parametrize("name", ["_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"])
def test_a_module_that_hides_its_hooks_counts_as_one_with_hooks(name: str) -> None:
    layer = nn.Linear(2, 2)
    assert not has_hooks(layer)
    hooks = vars(layer).pop(name)
    assert has_hooks(layer)
    vars(layer)[name] = {**hooks, 0: print}
    assert has_hooks(layer)


def test_without_int8_products_the_sums_are_as_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    a, b = (torch.randint(100, 128, shape, dtype=torch.int8) for shape in ((20, 3000), (3000, 24)))
    wanted = int8_product(a, b)
    assert not torch.equal((a.float() @ b.float()).int(), wanted), "float32 would do"
    monkeypatch.delattr(torch, "_int_mm")
    assert torch.equal(int8_product(a, b), wanted)


def test_int8_products_that_saturate_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As oneDNN's do on a CPU without VNNI."""
    a, b = torch.full((20, 64), 127, dtype=torch.int8), torch.full((64, 8), -127, dtype=torch.int8)
    monkeypatch.setattr(torch_private, "_INT8_IS_EXACT", {})
    monkeypatch.setattr(torch, "_int_mm", lambda x, y: (x.int() @ y.int()).clamp(-(2**15), 2**15 - 1))
    assert (int8_product(a, b) == -64 * 127**2).all()


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_without_word_of_vmap_only_the_operator_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, bounds = torch.randn(2, 3, 2, 6), torch.randn(5, 2, 6), torch.tensor([0, 2, 5], dtype=torch.int32)
    monkeypatch.delattr(torch._C._functorch, "is_batchedtensor")
    found = torch.vmap(lambda one: varlen_cross_attention(one, k, k, bounds, 3, impl="sdpa"))(q)
    wanted = [varlen_cross_attention(one, k, k, bounds, 3, impl="sdpa") for one in q]
    torch.testing.assert_close(found, torch.stack(wanted))
    with pytest.raises(ValueError, match="cannot be mapped with vmap"):
        torch.vmap(lambda one: attention_op(one, k, k, bounds, 3, None, None, 1.0, "sdpa"))(q)
