"""Tables kept per grid: never stale, bounded, safe in threads, and not carried along."""

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from uhd.grids import GridTables, as_grid, check_grids
from uhd.resampler import PerceiverConfig, PerceiverResampler
from uhd.vision import ViT, ViTConfig

GRIDS = [(2, 3), (4, 1)]


def make_vit():
    return ViT(
        ViTConfig(image_size=6, patch_size=2, width=16, depth=1, heads=2, mlp_width=8, position_grid_hw=(3, 3))
    ).eval()


def make_perceiver():
    return PerceiverResampler(PerceiverConfig(width=16, vision_width=12, num_heads=2, num_latents=9)).eval()


CASES = {"vit": (make_vit, "positions", "_position_tables"), "perceiver": (make_perceiver, "pos_embed", "_key_tables")}


@pytest.fixture(params=CASES)
def case(request):
    torch.manual_seed(0)
    make, source, tables = CASES[request.param]
    return make, make(), source, tables, torch.randn(10, 12)


def fresh(make, module, x):
    other = make()
    other.load_state_dict(module.state_dict())
    return other(x, GRIDS)


def replace(module, source, value):
    if isinstance(getattr(module, source), nn.Parameter):
        value = nn.Parameter(value)
    setattr(module, source, value)


CHANGES = {
    "in place": lambda module, source: getattr(module, source).mul_(-3),
    "reassigned": lambda module, source: replace(module, source, getattr(module, source).detach() * -3),
    "data assigned": lambda module, source: setattr(getattr(module, source), "data", getattr(module, source) * -3),
    "loaded": lambda module, source: module.load_state_dict(
        {name: tensor * (-3 if name == source else 1) for name, tensor in module.state_dict().items()}
    ),
    "another dtype": lambda module, source: getattr(module.double().float(), source).mul_(-3),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@torch.no_grad()
def test_tables_follow_their_source(case, change):
    make, module, source, tables, x = case
    before = module(x, GRIDS)
    assert len(getattr(module, tables)) == 2
    change(module, source)
    after = module(x, GRIDS)
    assert not torch.allclose(before, after)
    assert torch.equal(after, fresh(make, module, x))


@torch.no_grad()
def test_a_freed_address_is_not_mistaken_for_the_source():
    """vector_to_parameters points parameters into another vector; the allocator soon gives its address again."""
    torch.manual_seed(0)
    vit, x = make_vit(), torch.randn(10, 12)
    base = nn.utils.parameters_to_vector(vit.parameters())
    step = torch.randn_like(base) * 0.1
    for _ in range(10):
        nn.utils.vector_to_parameters(base + step, vit.parameters())
        vit(x, GRIDS)
        nn.utils.vector_to_parameters(base.clone(), vit.parameters())
        nn.utils.vector_to_parameters(base - step, vit.parameters())
        assert torch.equal(vit(x, GRIDS), fresh(make_vit, vit, x))


@torch.no_grad()
def test_functional_calls_leave_nothing_behind(case):
    _, module, source, _, x = case
    want = module(x, GRIDS)
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    changed = functional_call(module, {**state, source: state[source] * -3}, (x, GRIDS))
    assert not torch.allclose(changed, want)
    assert torch.equal(module(x, GRIDS), want)


def test_a_table_made_in_inference_mode_serves_training(case):
    _, module, _, tables, x = case
    with torch.inference_mode():
        module(x, GRIDS)
        assert len(getattr(module, tables)) == 2
    module(x, GRIDS).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_gradients_reach_the_source_after_a_call_without(case):
    _, module, source, _, x = case
    with torch.no_grad():
        module(x, GRIDS)
    module(x, GRIDS).pow(2).sum().backward()
    if isinstance(getattr(module, source), nn.Parameter):
        assert getattr(module, source).grad.abs().sum() > 0


@torch.no_grad()
def test_copies_and_pickles_are_empty(case):
    _, module, _, tables, x = case
    want = module(x, GRIDS)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.copy(getattr(module, tables))):
        if isinstance(other, GridTables):
            assert len(other) == 0
        else:
            assert len(getattr(other, tables)) == 0
            assert torch.equal(other(x, GRIDS), want)


@torch.no_grad()
def test_compiled_without_a_graph_break(case):
    _, module, _, _, x = case
    compiled = torch.compile(lambda y: module(y, GRIDS), backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), module(x, GRIDS), atol=1e-6)


@torch.no_grad()
def test_threads_agree(case):
    _, module, _, tables, _ = case
    getattr(module, tables).kept_grids = 3
    grids = [[(rows, cols)] for rows in range(1, 5) for cols in range(1, 5)]
    inputs = [torch.randn(g[0][0] * g[0][1], 12) for g in grids]
    want = [module(x, g) for x, g in zip(inputs, grids, strict=True)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(6) as pool:
            got = list(pool.map(lambda i: module(inputs[i % 16], grids[i % 16]), range(400)))
    finally:
        sys.setswitchinterval(interval)
    assert all(torch.equal(tokens, want[i % 16]) for i, tokens in enumerate(got))


def test_the_least_recently_used_go_first():
    tables, made = GridTables(kept_grids=2), []

    def get(key, size=1):
        return tables.get((key,), None, lambda: made.append(key) or torch.zeros(size))

    for key in "abacab":
        get(key)
    assert made == ["a", "b", "c", "b"]
    assert len(tables) == 2
    tables.kept_bytes = 100
    get("large", 1000)
    assert len(tables) == 1  # the newest stays, however large


def test_grids_are_pairs_of_host_integers():
    assert check_grids([(2, np.int64(3))]) == check_grids(torch.tensor([[2, 3]])) == ((2, 3),)
    assert as_grid([4, 5]) == (4, 5)
    for bad in ([(2.0, 3)], [(2, 3, 4)], [7], torch.zeros(1, 2, device="meta")):
        with pytest.raises(TypeError, match="grids"):
            check_grids(bad)
    with pytest.raises(ValueError, match=r"grids\[1\] must be at least \(1, 1\)"):
        check_grids([(1, 1), (0, 2)])


@pytest.mark.parametrize("stem", [nn.Linear(12, 16), nn.Sequential(nn.Linear(12, 16))], ids=["linear", "sequential"])
def test_a_given_stem_is_left_alone(stem):
    weight = next(stem.parameters()).detach().clone()
    vit = ViT(make_vit().config, stem=stem)
    vit.reset_parameters()
    assert torch.equal(next(vit.stem.parameters()), weight)


def test_positions_survive_an_empty_start():
    """Built on meta, materialised, and reset, as sharded training does."""
    want = make_perceiver().pos_embed
    with torch.device("meta"):
        module = make_perceiver()
    module.to_empty(device="cpu").reset_parameters()
    assert torch.equal(module.pos_embed, want)
