"""How the encoder runs at inference: in steps, compiled, quantised."""

from __future__ import annotations

import copy
import threading
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import uhd.packed_encoder as encoder_module
from tests.tiny import IMAGES, noise, refuses, tiny_encoder, vit
from uhd import shortcuts
from uhd.packed_encoder import split_steps
from uhd.resampler import MergeProjector, MLPProjector, PixelShuffleProjector
from uhd.shortcuts import at_its_fastest
from uhd.slicing import SlicingConfig
from uhd.torch_private import PackedProducts
from uhd.vision import VisionTower, compress_vit


@given(st.lists(st.integers(1, 50), max_size=30), st.one_of(st.none(), st.integers(1, 120)))
def test_steps_cover_every_view_in_order(sizes, bound):
    steps = split_steps(sizes, bound)
    assert [i for step in steps for i in range(len(sizes))[step]] == list(range(len(sizes)))
    totals = [sum(sizes[step]) for step in steps]
    for step, total in zip(steps, totals, strict=True):
        assert bound is None or total <= bound or len(range(len(sizes))[step]) == 1
    for step, total in zip(steps[1:], totals, strict=False):  # none is closed before it must be
        assert total + sizes[step.start] > bound


def patches_seen(encoder):
    """Patches of every call of the vision encoder."""
    seen = []
    encoder.vision.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    return seen


@pytest.mark.parametrize("bound", [1, 7, 30, 100, 10**6])
@pytest.mark.parametrize("packed", [False, True])
def test_a_bound_on_patches_changes_nothing_else(bound, packed):
    parts = {}
    if packed:
        parts = {
            "compressor": MergeProjector(32, 24),
            "slicing": SlicingConfig(image_size=56, patch_size=14, merge=2, tokens_per_view=None),
        }
    encoder = tiny_encoder(**parts)
    seen = patches_seen(encoder)
    wanted = encoder(IMAGES)
    total = sum(seen)
    assert len(seen) == 1
    seen.clear()
    encoder.max_patches_per_step = bound
    got = encoder(IMAGES)
    largest = max(h * w for image in got for h, w in (view.patches_hw for view in image.plan.views))
    assert sum(seen) == total
    assert max(seen) <= max(bound, largest)
    assert len(seen) == 1 if bound >= total else len(seen) > 1
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.layout == theirs.layout
        torch.testing.assert_close(ours.tokens, theirs.tokens, rtol=1e-4, atol=1e-5)


def test_gradients_are_the_same_in_steps():
    whole, steps = tiny_encoder().train(), tiny_encoder().train()
    steps.max_patches_per_step = 20
    for encoder in (whole, steps):
        torch.cat([image.tokens for image in encoder(IMAGES)]).square().mean().backward()
    for (name, ours), theirs in zip(steps.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_steps_of_a_cpu_fit_its_threads(monkeypatch):
    monkeypatch.setattr(encoder_module, "STEP_NUMBERS", 25 * 64)  # 64: the MLP's width
    encoder = tiny_encoder()
    seen = patches_seen(encoder)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    encoder(IMAGES)
    assert len(seen) > 1
    assert max(seen) <= 50
    seen.clear()
    encoder.train()(IMAGES)  # activations are kept anyway
    assert len(seen) == 1


def test_a_bound_can_be_an_integer_of_numpy():
    encoder = tiny_encoder(max_patches_per_step=np.int64(20))
    seen = patches_seen(encoder)
    encoder(IMAGES)
    assert max(seen) <= 20


def test_steps_of_a_backbone_that_tells_no_width(monkeypatch):
    monkeypatch.setattr(encoder_module, "STEP_PATCHES", 20)
    tower = VisionTower(nn.Conv2d(3, 32, 14, 14), patch_size=14, out_dim=32)
    encoder = tiny_encoder(vision=tower, slicing=SlicingConfig(image_size=56, patch_size=14))
    seen = patches_seen(encoder)
    encoder(IMAGES)
    assert len(seen) > 1
    assert max(seen) <= 20


PROJECTORS = {
    "merge": (lambda: MergeProjector(32, 24), {"merge": 2}),
    "mlp": (lambda: MLPProjector(32, 24), {}),
    "shuffle": (lambda: PixelShuffleProjector(32, 24, factor=2), {"merge": 2}),
}


@pytest.mark.parametrize("name", PROJECTORS)
def test_projectors_compute_in_the_fastest_dtype(name, monkeypatch):
    build, changes = PROJECTORS[name]
    slicing = SlicingConfig(image_size=56, patch_size=14, tokens_per_view=None, **changes)
    exact = tiny_encoder(compressor=build(), slicing=slicing).requires_grad_(False)
    half = copy.deepcopy(exact).to(torch.bfloat16)
    exact = copy.deepcopy(half).double()
    wanted, eager = exact(IMAGES)[3].tokens, half(IMAGES)[3].tokens
    names, kinds = list(half.state_dict()), {each.dtype for each in half.parameters()}
    monkeypatch.setenv("UHD_PRODUCTS", "bfloat16=float32")
    called = []
    monkeypatch.setattr(
        encoder_module,
        "at_its_fastest",
        lambda module, x: called.append(made := at_its_fastest(module, x)) or made,
    )
    got = half(IMAGES)[3].tokens
    assert {each.dtype for each in called[0].parameters()} == {torch.float32}
    assert got.dtype == torch.bfloat16
    assert (got - wanted).norm() <= 2 * (eager - wanted).norm()
    assert list(half.state_dict()) == names
    assert {each.dtype for each in half.parameters()} == kinds == {torch.bfloat16}
    with torch.no_grad():
        next(half.compressor.parameters()).mul_(2)  # nothing is kept
    assert not torch.equal(half(IMAGES)[3].tokens, got)


@pytest.mark.parametrize("name", [*PROJECTORS, "window"])
def test_projectors_multiply_by_onednn_where_it_is_faster(name, monkeypatch):
    if name == "window":
        vision = compress_vit(vit(), after=1)
        parts, changes = {"vision": vision, "compressor": MLPProjector(vision.out_dim, 24)}, {"merge": 2}
    else:
        build, changes = PROJECTORS[name]
        parts = {"compressor": build()}
    slicing = SlicingConfig(image_size=56, patch_size=14, tokens_per_view=None, **changes)
    encoder = tiny_encoder(**parts, slicing=slicing).requires_grad_(False)
    monkeypatch.setenv("UHD_PRODUCTS", "native")
    wanted = encoder(IMAGES)[3].tokens
    monkeypatch.setenv("UHD_PRODUCTS", "float32=onednn")
    used, product = [], shortcuts.packed_products().product
    kept = PackedProducts(None, lambda x, weight, *rest: used.append(weight) or product(x, weight, *rest))
    monkeypatch.setattr(shortcuts, "packed_products", lambda: kept)
    got = encoder(IMAGES)[3].tokens
    layers = encoder.vision.compressors if name == "window" else encoder.compressor
    weights = {each.weight.data_ptr() for each in layers.modules() if isinstance(each, nn.Linear)}
    assert weights <= {weight.data_ptr() for weight in used}  # no copies
    assert {type(each) for each in layers.modules() if isinstance(each, nn.Linear)} == {nn.Linear}
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "why", ["gradients", "hook", "autocast", "float32", "compiled", "float input with gradient", "meta", "counted"]
)
def test_a_module_stays_itself_where_it_must(why, monkeypatch):
    monkeypatch.setenv("UHD_PRODUCTS", "bfloat16=float32")
    module = MLPProjector(32, 24).to(torch.float32 if why == "float32" else torch.bfloat16)
    module.requires_grad_(why == "gradients")
    x = torch.zeros(2, 32, dtype=torch.bfloat16, requires_grad="input" in why)
    if why == "hook":
        next(part for part in module.modules() if isinstance(part, nn.Linear)).register_forward_hook(print)
    if why == "compiled":
        module.mlp.compile(backend="eager")
    if why == "meta":
        module, x = module.to(why), x.to(why)
    counted = FlopCounterMode(display=False) if why == "counted" else nullcontext()  # it knows torch's products only
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=why == "autocast"), counted:
        assert at_its_fastest(module, x) is module
    if why in ("gradients", "float input with gradient"):
        module.lock = threading.Lock()  # which nothing can copy
        with torch.no_grad():
            assert at_its_fastest(module, x) is not module


@pytest.mark.parametrize("bound", [0, -3, 2.5, np.float64(3), True, "many"])
def test_a_bound_is_a_positive_integer(bound):
    with pytest.raises(ValueError, match="max_patches_per_step must be a positive integer or None"):
        tiny_encoder(max_patches_per_step=bound)(IMAGES)


def test_wrong_counts_are_told_before_anything_runs():
    encoder = tiny_encoder(max_patches_per_step=4)
    seen = patches_seen(encoder)
    refuses("2 grids hold 10 patches in all; got 9", encoder.encode_packed, torch.zeros(9, 588), [(2, 3), (2, 2)])
    assert not seen


@pytest.mark.parametrize("backend", ["none", "eager"])
def test_a_compiled_encoder_gives_the_same_tokens(backend):
    encoder = tiny_encoder().requires_grad_(False)
    wanted = encoder(IMAGES)
    assert encoder.compile(backend=backend) is encoder
    for ours, theirs in zip(encoder(IMAGES), wanted, strict=True):
        torch.testing.assert_close(ours.tokens, theirs.tokens, rtol=1e-4, atol=1e-5)
    encoder.compile(backend=None)
    assert torch.equal(encoder(IMAGES)[0].tokens, wanted[0].tokens)


def test_compiling_does_not_touch_what_is_saved(tmp_path):
    encoder = tiny_encoder().requires_grad_(False)
    wanted, names = encoder(IMAGES), list(encoder.state_dict())
    encoder.compile(backend="none")
    assert list(encoder.state_dict()) == names
    encoder.save_pretrained(tmp_path)
    loaded = type(encoder).from_pretrained(tmp_path)
    assert torch.equal(loaded(IMAGES)[1].tokens, wanted[1].tokens)


def test_a_quantised_encoder_is_near_and_cannot_be_saved(tmp_path):
    encoder = tiny_encoder().requires_grad_(False)
    wanted = encoder([noise(100, 60)])[0].tokens
    quantised = copy.deepcopy(encoder).quantize()
    got = quantised([noise(100, 60)])[0].tokens
    assert 0 < (got - wanted).norm() < 0.05 * wanted.norm()
    refuses("save it before encoder.quantize", quantised.save_pretrained, tmp_path)
    assert not list(tmp_path.iterdir())
    refuses("no nn.Linear", quantised.quantize)


@pytest.mark.parametrize("verb", ["compile", "quantize"])
def test_other_backbones_are_their_owners_to_change(verb):
    tower = VisionTower(nn.Conv2d(3, 32, 14, 14), patch_size=14, out_dim=32)
    encoder = tiny_encoder(vision=tower, slicing=SlicingConfig(image_size=56, patch_size=14))
    refuses(f"{verb} its backbone before", getattr(encoder, verb), error=TypeError)
