"""Compiled layers, packed weights and int8: what they compute, when they stand back, that nothing stale is used."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.tiny import stirred
from tests.vision import parts
from uhd.torch_private import packed_products
from uhd.vision import CompressedViT, CompressedViTConfig, ViT
from uhd.vision import compiled as compiled_module
from uhd.vision.blocks import Block
from uhd.vision.compiled import FastBlocks
from uhd.vision.int8 import Int8Linear, int8_linear, quantize_linears

SIZES = {"width": 32, "depth": 3, "mlp_width": 48, "num_registers": 0, "pre_norm": True, "position_grid_hw": (4, 4)}
CONFIG = dataclasses.replace(parts.CONFIG, **SIZES)
GRIDS = [(2, 3), (3, 2), (4, 4), (1, 6), (5, 1)]
ACTIVATIONS = ["gelu", "gelu_tanh", "quick_gelu", "swiglu"]


def make(dtype: torch.dtype = torch.float32, **changes) -> ViT:
    torch.manual_seed(0)
    return stirred(ViT(dataclasses.replace(CONFIG, **changes))).requires_grad_(False).to(dtype)


def make_compressed(dtype: torch.dtype = torch.float32) -> CompressedViT:
    torch.manual_seed(0)
    config = CompressedViTConfig(**CONFIG.to_dict(), compress_after=(1,))
    return CompressedViT(config).eval().requires_grad_(False).to(dtype)


def patches(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return parts.random_patches(GRIDS).to(dtype)


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


def ran(vit: ViT, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the blocks' ways a call took."""
    taken = []
    ways = {"compiled": (FastBlocks, "_run"), "modules": (Block, "forward")}
    for name, (owner, method) in ways.items():
        real = getattr(owner, method)

        def spy(*args, name=name, real=real):
            taken.append(name)
            return real(*args)

        monkeypatch.setattr(owner, method, spy)
    real = compiled_module.fused_block
    monkeypatch.setattr(compiled_module, "fused_block", lambda *args: (taken.append("fused"), real(*args))[1])
    return taken


def take(monkeypatch: pytest.MonkeyPatch, products: str) -> None:
    """Take these products; skip where oneDNN has not what they ask for."""
    monkeypatch.setenv("UHD_PRODUCTS", products)
    for name, way in (pair.split("=") for pair in products.split(",")):
        if way == "packed" and name == "bfloat16":
            try:
                packed_products().pack(torch.zeros(16, 16, dtype=torch.bfloat16), 4)
            except RuntimeError as reason:
                pytest.skip(f"oneDNN packs no bfloat16 weights here: {reason}")


@pytest.mark.parametrize("backend", ["none", "eager"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_compiled_layers_give_what_the_modules_give(activation: str, backend: str) -> None:
    vit, x = make(activation=activation), patches()
    wanted = vit(x, GRIDS)
    vit.compile_blocks(backend)
    torch.testing.assert_close(vit(x, GRIDS), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(vit(x[:6], GRIDS[:1]), wanted[:6], rtol=1e-5, atol=1e-5)  # another number of tokens
    vit.compile_blocks(None)
    assert torch.equal(vit(x, GRIDS), wanted)


@pytest.mark.parametrize("changes", [{"layer_scale": None}, {"qkv_bias": False}, {"class_token": False}])
def test_other_blocks_too(changes: dict) -> None:
    if "class_token" in changes:
        changes["position_prefix"] = 0
    vit = make(**changes)
    wanted = vit(patches(), GRIDS)
    vit.compile_blocks("none")
    torch.testing.assert_close(vit(patches(), GRIDS), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
def test_inductor_compiles_them(activation: str) -> None:
    vit = make(activation=activation)
    wanted = vit(patches(), GRIDS)
    vit.compile_blocks()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # of the compiler's own
        torch.testing.assert_close(vit(patches(), GRIDS), wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(vit(patches()[:6], GRIDS[:1]), wanted[:6], rtol=1e-4, atol=1e-5)
    assert vit._fast_blocks.backend == "inductor"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_on_a_plain_cpu_compute_in_float32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, "bfloat16=float32,float16=float32")
    vit, x = make(dtype, depth=24), patches(dtype)
    exact = copy.deepcopy(vit).double()(x.double(), GRIDS)
    got = vit(x, GRIDS)
    assert got.dtype == dtype
    vit.compile_blocks("none")
    assert torch.equal(vit(x, GRIDS), got)
    # what is rounded before and after the blocks is half of that; rounded inside so many blocks too it is twice that
    assert error(got, exact) < torch.finfo(dtype).eps


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("scale", [None, 0.5])
def test_packed_weights_on_a_matrix_unit(activation: str, scale: float | None, monkeypatch) -> None:
    take(monkeypatch, "bfloat16=packed")
    vit, x = make(torch.bfloat16, activation=activation, layer_scale=scale), patches(torch.bfloat16)
    exact = copy.deepcopy(vit).double()(x.double(), GRIDS)
    eager = vit(x, GRIDS)
    taken = ran(vit, monkeypatch)
    vit.compile_blocks("none")
    got = vit(x, GRIDS)
    assert taken == ["fused"] * CONFIG.depth
    assert error(got, exact) <= 2 * error(eager, exact)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("scale", [None, 0.5])
def test_packed_layers_are_exact_where_numbers_are(activation: str, scale: float | None) -> None:
    vit = make(activation=activation, layer_scale=scale)
    halves, x = compiled_module.Halves.of(vit.blocks[0]), torch.randn(12, 32)
    layers = {name: getattr(halves, name).weight for name in ("qkv", "proj", "fc1", "fc2")}
    packed = {name: packed_products().pack(weight, len(x)) for name, weight in layers.items()}
    mix = vit.blocks[0].attn.mix
    got = compiled_module.fused_block(halves, packed, x, lambda qkv: mix(qkv, [(2, 6)]))
    torch.testing.assert_close(got, vit.blocks[0](x, [(2, 6)]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", ["in place", "data", "one entry", "load", "replaced"])
def test_packed_weights_are_never_stale(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, "bfloat16=packed")
    vit, x = make(torch.bfloat16), patches(torch.bfloat16)
    vit.compile_blocks("none")
    before = vit(x, GRIDS)
    layer = vit.blocks[1].mlp.fc2
    if change == "in place":
        with torch.no_grad():
            layer.weight.mul_(1.5)
    elif change == "data":  # leaves no trace in the version
        layer.weight.data.mul_(1.5)
    elif change == "one entry":
        layer.weight.data[3, 5] += 2
    elif change == "load":
        layer.load_state_dict({"weight": layer.weight * 1.5, "bias": layer.bias})
    else:
        layer.weight = nn.Parameter(layer.weight * 1.5, requires_grad=False)
    after = vit(x, GRIDS)
    vit.compile_blocks("none")  # packed from nothing
    assert torch.equal(after, vit(x, GRIDS))
    assert not torch.equal(before, after)


def test_a_watched_compressor_runs_as_it_is_between_fast_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, "bfloat16=float32")
    vit = make_compressed(torch.bfloat16)
    grids, x = [(2, 4), (4, 2)], torch.randn(16, CONFIG.patch_dim, dtype=torch.bfloat16)
    wanted, seen = vit(x, grids), []
    vit.compile_blocks("none")
    vit.compressors["1"].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    assert error(vit(x, grids), wanted) < 0.05
    assert seen == [torch.bfloat16]


def test_the_compressors_inside_a_vit_keep_their_dtype() -> None:
    vit = make_compressed()
    grids, x = [(2, 4), (4, 2), (4, 6)], torch.randn(40, CONFIG.patch_dim)
    wanted = vit(x, grids)
    half = copy.deepcopy(vit).to(torch.bfloat16)
    half.compile_blocks("none")
    assert error(half(x.to(torch.bfloat16), grids), wanted) < 0.05
    vit.compile_blocks("none")
    torch.testing.assert_close(vit(x, grids), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("why", ["gradients", "hook", "autocast", "wrapped", "hidden states", "mixed dtypes"])
def test_the_modules_run_where_they_must(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vit, x = make(), patches()
    vit.compile_blocks("none")
    taken, how = ran(vit, monkeypatch), {}
    if why == "gradients":
        vit.blocks[0].mlp.fc1.weight.requires_grad_(True)
    elif why == "hook":
        vit.blocks[1].attn.proj.register_forward_hook(lambda *args: None)
    elif why == "wrapped":
        vit.blocks[1].attn.proj = nn.Sequential(vit.blocks[1].attn.proj)
    elif why == "hidden states":
        how = {"hidden_states": True}
    elif why == "mixed dtypes":
        vit.blocks[0].norm1 = nn.LayerNorm(32, dtype=torch.float64)
        vit.blocks[0].norm1.forward = lambda x: x
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=why == "autocast"):
        vit(x, GRIDS, **how)
    assert taken == ["modules"] * CONFIG.depth
    if why == "gradients":
        with torch.no_grad():
            vit(x, GRIDS)
        assert taken[CONFIG.depth :] == ["compiled"] * (2 * CONFIG.depth)


@pytest.mark.parametrize("how", ["float32", "packed", "int8"])
def test_gradients_of_what_runs_between_the_blocks(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "packed":
        take(monkeypatch, "bfloat16=packed")
    dtype = torch.bfloat16 if how == "packed" else torch.float32
    vit, x = make_compressed(dtype), torch.randn(40, CONFIG.patch_dim, dtype=dtype)
    vit.compressors.requires_grad_(True)
    weights = torch.randn(10, CONFIG.width)

    def gradients() -> list[torch.Tensor]:
        vit.zero_grad()
        (vit(x, [(2, 4), (4, 2), (4, 6)]) * weights).sum().backward()
        return [parameter.grad.clone() for parameter in vit.compressors.parameters()]

    wanted = gradients()
    vit.compile_blocks("none")
    if how == "int8":
        quantize_linears(vit.blocks)
        with pytest.raises(RuntimeError, match="no gradients"):
            gradients()
    else:
        assert all(error(got, grad) < 0.05 for got, grad in zip(gradients(), wanted, strict=True))


def test_training_goes_on_as_if_nothing_were_compiled() -> None:
    vit, x = make(), patches()
    plain = copy.deepcopy(vit).requires_grad_(True)
    vit.requires_grad_(True).compile_blocks("none")
    for model in (plain, vit):
        model.train()(x, GRIDS).square().mean().backward()
    for ours, theirs in zip(vit.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def counting(compiled: list[int]):
    return lambda graph, inputs: compiled.append(1) or graph.forward


def test_each_vit_compiles_its_own() -> None:
    compiled = []
    with torch.compiler.config.patch(recompile_limit=1):  # variants of a code, of all who share it
        for eps in (1e-6, 1e-5, 1e-4):
            vit = make(eps=eps, depth=1)
            vit.compile_blocks(counting(compiled))
            vit(patches(), GRIDS)
    assert len(compiled) == 2 * 3


def test_modes_and_the_smallest_inputs_compile_nothing_more() -> None:
    vit, compiled = make(class_token=False, position_prefix=0), []
    wanted = vit(patches()[:1], [(1, 1)])
    vit.compile_blocks(counting(compiled))
    vit(patches(), GRIDS)
    assert len(compiled) == 2
    assert vit(patches()[:0], []).shape == (0, 32)
    torch.testing.assert_close(vit(patches()[:1], [(1, 1)]), wanted, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        vit(patches()[:6], GRIDS[:1])
    assert len(compiled) == 2


def test_an_unknown_backend_is_refused_at_once() -> None:
    for backend in ("inducter", 3):
        with pytest.raises(ValueError, match=f"'none', .*'inductor'.*got {backend!r}"):
            make().compile_blocks(backend)


def test_a_python_that_torch_cannot_compile_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args, **how):
        raise RuntimeError("not supported on this Python")

    vit, x = make(), patches()
    wanted = vit(x, GRIDS)
    vit.compile_blocks()
    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.warns(RuntimeWarning, match="not supported on this Python"):
        torch.testing.assert_close(vit(x, GRIDS), wanted, rtol=1e-5, atol=1e-5)


def test_a_failing_compiler_is_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    vit, x = make(), patches()
    wanted = vit(x, GRIDS)
    vit.compile_blocks(broken)
    with pytest.warns(RuntimeWarning, match="torch.compile failed .*uncompiled"):
        torch.testing.assert_close(vit(x, GRIDS), wanted, rtol=1e-5, atol=1e-5)
    vit(x, GRIDS)  # warnings are errors here
    with pytest.raises(ValueError, match="grids hold"):
        vit(x[1:], GRIDS)


def test_copies_and_pickles_compile_anew() -> None:
    vit, x = make(), patches()
    vit.compile_blocks("eager")
    wanted = vit(x, GRIDS)
    for other in (copy.deepcopy(vit), pickle.loads(pickle.dumps(vit))):
        assert other._fast_blocks.backend == "eager"
        assert not other._fast_blocks._compiled
        torch.testing.assert_close(other(x, GRIDS), wanted)


@pytest.mark.parametrize("backend", [None, "none"])
@pytest.mark.parametrize("way", ["onednn", "packed"])
def test_float32_by_onednn(way: str, backend: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    vit, x = make(), patches()
    wanted = vit(x, GRIDS)
    vit.compile_blocks(backend)
    take(monkeypatch, f"float32={way}")
    taken = ran(vit, monkeypatch)
    torch.testing.assert_close(vit(x, GRIDS), wanted, rtol=1e-5, atol=1e-5)
    assert taken == ["fused"] * CONFIG.depth
    assert (vit._fast_blocks._packed is not None) == (way == "packed" and backend == "none")
    vit.blocks[0].mlp.fc1.weight.requires_grad_(True)
    vit(x, GRIDS).sum().backward()
    assert taken[CONFIG.depth :] == ["modules"] * CONFIG.depth
    assert vit.blocks[0].mlp.fc1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("products", ["bfloat16=native", "bfloat16=onednn", "bfloat16=packed"])
def test_attention_by_products(products: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vit, x = make(torch.bfloat16), patches(torch.bfloat16)
    exact = copy.deepcopy(vit).double()(x.double(), GRIDS)
    eager = vit(x, GRIDS)
    take(monkeypatch, f"{products},bfloat16 attention=products")
    called, real = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args: called.append(1) or real(*args))
    got = vit(x, GRIDS)
    assert not called
    assert 0 < error(got, exact) <= 2 * error(eager, exact)


def test_a_device_without_autocast_has_its_own_products() -> None:
    vit = make().to("meta")
    assert vit(patches().to("meta"), GRIDS).shape == (len(patches()), 32)


def test_int8_layers_are_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    vit, x = make(), patches()
    quantize_linears(vit.blocks)
    wanted = vit(x, GRIDS)
    take(monkeypatch, "float32=packed")
    for backend in (None, "none"):
        vit.compile_blocks(backend)
        torch.testing.assert_close(vit(x, GRIDS), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_int8_layer_rounds_and_no_more(bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(48, 20, bias=bias).to(dtype)
    linear.weight.data[3] = 0  # a row of zeros has no scale of its own
    layer, x = Int8Linear(linear), torch.randn(3, 5, 48, dtype=dtype)
    x[1, 2] = 0
    got, wanted = layer(x), linear(x)
    assert got.shape == wanted.shape
    assert got.dtype == dtype
    assert 1e-4 < error(got.detach(), wanted.detach()) < 0.015
    steps = x.float().abs().amax(-1, keepdim=True) / 127 * 0.5
    most = steps * linear.weight.float().abs().sum(1) + layer.scale * 0.5 * x.float().abs().sum(-1, keepdim=True)
    slack = 0.05 if dtype == torch.bfloat16 else 1e-3
    assert ((got - wanted).float().abs() <= 1.01 * most + slack).all()
    assert torch.equal(got[1, 2], torch.zeros(20, dtype=dtype) if not bias else linear.bias)


def test_int8_products_are_exact_integers() -> None:
    weight = torch.tensor([[127, -127, 5], [1, 0, -2]], dtype=torch.int8)
    x = torch.tensor([[127.0, 127.0, 0.0], [-2.0, 0.0, 127.0]])  # its own quantisation
    got = int8_linear(x, weight, torch.tensor([1.0, 0.5]), torch.tensor([0.25, 0.0]))
    assert got.tolist() == [[0.25, 63.5], [-254 + 635 + 0.25, -128.0]]


@pytest.mark.parametrize("backend", [None, "none", "eager"])
def test_a_quantised_vit_is_near_and_runs_either_way(backend: str | None) -> None:
    vit, x = make(), patches()
    wanted = vit(x, GRIDS)
    assert quantize_linears(vit.blocks) == 4 * CONFIG.depth
    vit.compile_blocks(backend)
    got = vit(x, GRIDS)
    assert 1e-4 < error(got, wanted) < 0.05
    assert quantize_linears(vit.blocks) == 0


def test_int8_layers_refuse_gradients() -> None:
    layer = Int8Linear(nn.Linear(8, 4))
    with pytest.raises(RuntimeError, match="no gradients"):
        layer(torch.randn(2, 8, requires_grad=True))
    with torch.no_grad():
        assert layer(torch.randn(2, 8, requires_grad=True)).shape == (2, 4)


@pytest.mark.parametrize("shape", [(8,), (0, 8), (2, 0, 8), (2, 3, 8)])
def test_int8_layers_take_the_shapes_that_linear_takes(shape: tuple[int, ...]) -> None:
    linear = nn.Linear(8, 4)
    x = torch.randn(shape)
    torch.testing.assert_close(Int8Linear(linear)(x), linear(x), rtol=0, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_scales_stay_in_float32(dtype: torch.dtype) -> None:
    layer = Int8Linear(nn.Linear(8, 4).eval())
    assert not layer.training
    scale = layer.scale.clone()
    layer = nn.Sequential(layer).to(dtype)[0]
    assert torch.equal(layer.scale, scale)
    assert (layer.scale.dtype, layer.bias.dtype) == (torch.float32, dtype)
    assert layer(torch.randn(2, 8, dtype=dtype)).dtype == dtype
    assert layer.to("meta").scale.is_meta


def test_other_weights_do_not_load_into_int8_layers() -> None:
    linear, other = nn.Linear(8, 4), nn.Linear(8, 4)
    layer, x = Int8Linear(linear), torch.randn(2, 8)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"torch.float32, this layer is int8: load before quantising"):
            layer.load_state_dict(other.state_dict(), strict=strict)
    layer.load_state_dict(Int8Linear(other).state_dict())
    torch.testing.assert_close(layer(x), other(x), rtol=0, atol=0.1)


def test_only_plain_linear_layers_are_quantised() -> None:
    vit = make()
    called = []
    vit.blocks[0].mlp.fc1.register_forward_hook(lambda *args: called.append(1))
    wrapped = nn.ModuleDict({"base_layer": vit.blocks[1].attn.qkv})  # as PEFT does
    wrapped.forward = wrapped["base_layer"].forward
    vit.blocks[1].attn.qkv = wrapped
    wanted = vit(patches(), GRIDS)
    called.clear()
    assert quantize_linears(vit.blocks) == 4 * CONFIG.depth - 2
    assert error(vit(patches(), GRIDS), wanted) < 0.05
    assert called == [1]
    assert type(wrapped["base_layer"]) is nn.Linear
