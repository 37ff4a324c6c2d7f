"""What holds for every compressor, whatever it does with the features, and outputs that were recorded."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.resampler.parts import (
    ALL,
    LATENTS,
    MODULES,
    RELEASED,
    cases,
    features_for,
    grids_for,
    per_view,
    randomised,
    recorded,
    released,
)

every_part = pytest.mark.parametrize("name", ALL)


@pytest.mark.parametrize("tag", [tag for tag in RELEASED if tag != "v2_hiwin_g4"])  # whose features are of levels
def test_equals_the_release(tag):
    module = released(tag)
    tall = {h > w for _, grids, _ in cases(tag) for h, w in grids if h != w}
    assert tall == {True, False} or tag == "v1_spatial_g12"  # of which only tall maps are kept
    with torch.no_grad():
        for x, grids, y in cases(tag):
            torch.testing.assert_close(module(x, grids), y, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tag", RELEASED)
def test_state_dict_round_trip(tag):
    state, module = recorded(tag)[0], released(tag)
    saved = module.state_dict()
    assert len(saved) == len(state) - (5 if tag == "v2_hiwin_g4" else 0)  # its dead `query`, `kv_proj` and level 8
    assert all(torch.equal(saved[name], state[name]) for name in saved)
    with torch.no_grad():
        next(module.parameters()).zero_()
    assert all(tensor.any() for tensor in state.values()), "the module must own its weights"


def by_view(module, features, grids):
    """The tokens of every view, (Q, D) each."""
    lengths = module.output_lengths(grids)
    return module(features, grids).reshape(-1, module.out_dim).split(lengths)


@every_part
def test_widths_and_lengths_are_told_before_anything_runs(name):
    module, grids = randomised(name), grids_for(name)
    lengths = module.output_lengths(grids)
    out = module(features_for(module, grids), grids)
    if module.tokens_per_view is None:
        assert out.shape == (sum(lengths), module.out_dim)
    else:
        assert lengths == [module.tokens_per_view] * len(grids)
        assert out.shape == (len(grids), module.tokens_per_view, module.out_dim)
    assert module.output_lengths([]) == []
    assert module(features_for(module, []), []).shape == (0, *out.shape[1:])


@every_part
def test_packed_equals_single_and_views_do_not_mix(name):
    module, grids = randomised(name), grids_for(name)
    features = features_for(module, grids)
    together = by_view(module, features, grids)
    views = list(per_view(features, grids))
    for own, (x, grid) in zip(together, views, strict=True):
        torch.testing.assert_close(own, by_view(module, x, [grid])[0])
    order = [3, 0, 4, 2, 1]
    shuffled = by_view(module, torch.cat([views[i][0] for i in order]), [grids[i] for i in order])
    for own, i in zip(shuffled, order, strict=True):
        torch.testing.assert_close(own, together[i])
    views[1][0][:] = math.nan  # the second view, in place
    poisoned = by_view(module, features, grids)
    assert poisoned[1].isnan().any()
    for i in (0, 2, 3, 4):
        torch.testing.assert_close(poisoned[i], together[i])


@settings(max_examples=40)
@given(name=st.sampled_from(ALL), grids=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=4))
def test_any_grids_give_finite_tokens(name, grids):
    module, grids = randomised(name), grids_for(name, grids)
    with torch.no_grad():
        assert module(features_for(module, grids), grids).isfinite().all()


BLIND = ("MLP", "no positions", "paper, 1 latent, equal widths")  # one latent's table is the same everywhere


@pytest.mark.parametrize("name", [name for name in ALL if name not in BLIND])
def test_same_features_on_another_grid_give_other_tokens(name):
    module = randomised(name)
    wide, tall = grids_for(name, [(2, 6)]), grids_for(name, [(6, 2)])
    x = features_for(module, wide)
    assert not torch.allclose(module(x, wide), module(x, tall), atol=1e-3)


@every_part
def test_gradients_reach_everything_that_can_learn(name):
    module, grids = randomised(name), grids_for(name)
    features = features_for(module, grids).requires_grad_()
    out = module(features, grids)
    (out * torch.randn(out.shape, dtype=out.dtype)).sum().backward()
    assert (features.grad.abs().amax(1) > 0).all()
    for parameter_name, parameter in module.named_parameters():
        grad = parameter.grad
        if parameter_name.endswith("attn.in_proj_bias"):  # one bias for all keys: softmax cannot see it
            grad = torch.cat([grad[: module.out_dim], grad[2 * module.out_dim :]])
        assert grad.abs().min() > 0, parameter_name


@pytest.mark.parametrize("name", ["paper, 9 latents", "spatial, as released", "rewrite", "pyramid", "merger"])
def test_gradients_by_finite_differences(name):
    module, grids = randomised(name), grids_for(name, [(2, 3), (1, 1)])
    features = features_for(module, grids).requires_grad_()
    project = torch.randn(module.out_dim, dtype=torch.float64)
    # few outputs keep the numerical side cheap
    assert torch.autograd.gradcheck(lambda x: module(x, grids) @ project, features, fast_mode=True)


@every_part
def test_made_again_from_json_and_weights(name):
    module, grids = randomised(name, dtype=torch.float32), grids_for(name)
    if name in LATENTS:
        config = type(module.config).from_dict(json.loads(json.dumps(module.config.to_dict())))
        assert config == module.config
        with pytest.raises(ValueError, match=r"heads"):
            type(config).from_dict({**config.to_dict(), "heads": 3})
        again = MODULES[type(config)](config)
    else:
        again = type(module)(**json.loads(json.dumps(module.to_dict())))
    again.load_state_dict(module.state_dict())
    features = features_for(module, grids)
    assert torch.equal(again(features, grids), module(features, grids))


@every_part
def test_bfloat16_weights_and_autocast(name):
    module, grids = randomised(name, dtype=torch.float32), grids_for(name)
    features = features_for(module, grids)
    exact = module(features, grids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = module(features, grids)
    low = module.bfloat16()(features.bfloat16(), grids)
    assert low.dtype == torch.bfloat16
    for out in (mixed.float(), low.float()):
        assert (out - exact).norm() / exact.norm() < 0.05
    with pytest.raises(TypeError, match=r"features are torch.float64 and the weights torch.bfloat16"):
        module(features.double(), grids)


@every_part
def test_weights_need_not_be_parameters(name):
    """FSDP1 without `use_orig_params` makes plain tensors of them, and so does DataParallel."""
    module, grids = randomised(name), grids_for(name)
    features = features_for(module, grids)
    wanted = module(features, grids)
    for part in module.modules():
        for key, weight in list(part.named_parameters(recurse=False)):
            delattr(part, key)
            setattr(part, key, weight.detach())
    assert not list(module.parameters())
    assert torch.equal(module(features, grids), wanted)


@every_part
def test_bad_input_says_what_was_expected(name):
    module, grids = randomised(name), grids_for(name)
    features = features_for(module, grids)
    with pytest.raises(ValueError, match=r"features have \d+ rows, but the 5 grids add up to \d+"):
        module(features[:-1], grids)
    with pytest.raises(ValueError, match=rf"expected \(N, {module.in_dim}\)"):
        module(features[:, :-1], grids)
    with pytest.raises(ValueError, match=r"grids\[0\] must be at least \(1, 1\)"):
        module(features, [(0, 5)])
