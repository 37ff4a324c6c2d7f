"""What holds for every packed ViT, whether or not it merges patches inside."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.vision.parts import MODELS, assert_near, grids_for, lengths, random_patches

every_model = pytest.mark.parametrize("name", MODELS)
some_grids = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=5)


@given(grids=some_grids, name=st.sampled_from(sorted(MODELS)), data=st.data())
@settings(max_examples=40)
def test_packed_equals_one_view_at_a_time_in_any_order(grids, name, data):
    vit, grids = MODELS[name](), grids_for(name, grids)
    patches, out_grids = random_patches(grids), vit.output_grids(grids)
    parts, order = patches.split(lengths(grids)), data.draw(st.permutations(range(len(grids))))
    with torch.no_grad():
        together = vit(patches, grids).split(lengths(out_grids))
        for part, grid, ours in zip(parts, grids, together, strict=True):
            assert_near(ours, vit(part, [grid]))
        permuted = vit(torch.cat([parts[i] for i in order]), [grids[i] for i in order])
    assert_near(permuted, torch.cat([together[i] for i in order]))


@every_model
def test_views_do_not_mix(name):
    vit, grids = MODELS[name](), grids_for(name)
    patches, own = random_patches(grids), lengths(vit.output_grids(grids))[0]
    changed = patches.clone()
    changed[: lengths(grids)[0]] += 1
    with torch.no_grad():
        difference = (vit(patches, grids) - vit(changed, grids)).abs().amax(dim=1)
    assert (difference[:own] > 1e-3).all()
    assert difference[own:].max() < 1e-5


@every_model
def test_grids_of_equal_length_are_told_apart(name):
    vit, (wide, tall) = MODELS[name](), grids_for(name, [(1, 2), (2, 1)])
    patches = random_patches([wide])
    with torch.no_grad():
        assert (vit(patches, [wide]) - vit(patches, [tall])).abs().max() > 1e-3


@every_model
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_reach_every_parameter(name, recompute):
    vit, grids = MODELS[name]().train(), grids_for(name)
    vit.gradient_checkpointing = recompute
    patches = random_patches(grids).requires_grad_()
    vit(patches, grids).square().mean().backward()
    assert (patches.grad.abs().amax(1) > 0).all()
    blind = ["compressors.1.down.bias", "compressors.4.down.bias"] if name == "adaptive, twice" else []
    for parameter, tensor in vit.named_parameters():
        largest = tensor.grad.abs().max()  # softmax over a window does not see what is added to all of it
        assert largest < 1e-6 if parameter in blind else largest > 1e-6, parameter


@every_model
def test_hidden_states_do_not_change_the_features(name):
    vit, grids = MODELS[name](), grids_for(name)
    with torch.no_grad():
        features, states = vit(random_patches(grids), grids, hidden_states=True)
        assert_near(features, vit(random_patches(grids), grids))
    assert len(states) == len(vit.blocks) + 1
    features, states = vit(random_patches([]), [], hidden_states=True)
    assert features.shape == (0, 16)
    assert [state.shape for state in states] == [(0, 16)] * (len(vit.blocks) + 1)


@every_model
def test_saved_and_loaded(tmp_path, name):
    model, grids = MODELS[name](), grids_for(name)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    (tmp_path / "vit.json").write_text(json.dumps(model.config.to_dict()))
    config = type(model.config).from_dict(json.loads((tmp_path / "vit.json").read_text()))
    assert config == model.config
    again = type(model)(config).eval()
    again.load_state_dict(load_file(tmp_path / "vit.safetensors"))
    with torch.no_grad():
        assert torch.equal(again(random_patches(grids), grids), model(random_patches(grids), grids))
    with pytest.raises(ValueError, match="droppath"):
        type(config).from_dict({**config.to_dict(), "droppath": 0.1})
