"""The perceiver resampler against nn.MultiheadAttention; its recorded outputs are in test_all.py."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tests.resampler.parts import GRIDS, PERCEIVERS, composed, features_for, per_view, randomised
from uhd.resampler import PerceiverConfig, PerceiverResampler, attention, sincos_2d


@pytest.mark.parametrize("name", PERCEIVERS)
def test_equals_multihead_attention(name):
    module = randomised(PERCEIVERS[name])
    features = features_for(module)
    out = module(features, GRIDS)
    assert out.shape == (5, module.config.num_latents, module.config.width)
    # W k + W p is summed in another order than W (k + p).
    torch.testing.assert_close(out, composed(module, features, GRIDS), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", ["paper", "2.5"])
def test_gradients_equal_those_of_multihead_attention(name):
    module = randomised(PERCEIVERS[name])
    features = features_for(module).requires_grad_()
    weights = torch.randn(module(features, GRIDS).shape, dtype=torch.float64)
    (module(features, GRIDS) * weights).sum().backward()
    got = features.grad.clone()
    (wanted,) = torch.autograd.grad((composed(module, features, GRIDS) * weights).sum(), features)
    torch.testing.assert_close(got, wanted, atol=1e-9, rtol=1e-9)
    _, of_keys, _ = module.attn.in_proj_bias.grad.chunk(3)
    assert of_keys.abs().max() < 1e-9  # keys share one bias, which softmax cannot see


def test_gradcheck_through_the_table_projection():
    config = PerceiverConfig(width=8, vision_width=5, num_heads=2, num_latents=4)
    module = randomised(config)
    grids = [(2, 3), (1, 1), (2, 3)]

    def run(weight, features):
        return torch.func.functional_call(module, {"attn.in_proj_weight": weight}, (features, grids))

    weight = module.attn.in_proj_weight.detach().requires_grad_()
    assert torch.autograd.gradcheck(run, (weight, features_for(module, grids).requires_grad_()))


def test_all_attention_goes_through_the_kernel_package(monkeypatch):
    calls = []
    kernel = attention.varlen_cross_attention

    def spy(q, k, v, cu_seqlens, max_seqlen, **keywords):
        calls.append((tuple(q.shape), tuple(k.shape), tuple(keywords["key_positions"].shape), keywords["impl"]))
        return kernel(q, k, v, cu_seqlens, max_seqlen, **keywords)

    monkeypatch.setattr(attention, "varlen_cross_attention", spy)
    module = randomised(PERCEIVERS["paper, 9 latents"])
    features = features_for(module)
    auto = module(features, GRIDS)
    module.attention_impl = "reference"
    torch.testing.assert_close(module(features, GRIDS), auto)
    distinct = 15 + 8 + 7 + 36  # the repeated (3, 5) is projected once
    shapes = ((9, 3, 8), (81, 3, 8), (distinct, 3, 8))
    assert calls == [(*shapes, "auto"), (*shapes, "reference")]
    module.attention_impl = "fastest"
    with pytest.raises(ValueError, match="impl='fastest' is (unknown|not available)"):
        module(features, GRIDS)


def test_depth_with_ffn_trains_and_is_read_back_from_its_weights():
    config = PerceiverConfig(width=16, vision_width=8, num_heads=2, num_latents=4, depth=2, ffn_ratio=2.0)
    torch.manual_seed(0)
    module = PerceiverResampler(config)
    features = features_for(module)
    target = torch.stack([x.mean(0).repeat(4, 2) for x, _ in per_view(features, GRIDS)])
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(module(features, GRIDS), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters())

    again = PerceiverResampler.from_state_dict(module.state_dict(), variant="paper", num_heads=2)
    assert again.config == config
    assert torch.equal(again(features, GRIDS), module(features, GRIDS))


def test_initialisation_as_released():
    torch.manual_seed(0)
    module = PerceiverResampler(PerceiverConfig(width=256, vision_width=192, num_heads=8))
    for weight in (module.query, module.kv_proj.weight, module.attn.out_proj.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert module.proj.std().item() == pytest.approx(256**-0.5, rel=0.05)
    bound = math.sqrt(6 / (256 + 3 * 256))  # Xavier, uniform, of the stacked matrix
    assert module.attn.in_proj_weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert module.attn.in_proj_weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert not module.attn.in_proj_bias.any()
    assert not module.attn.out_proj.bias.any()


def test_positions_stay_frozen_and_are_saved_only_where_the_release_has_them():
    for name, config in PERCEIVERS.items():
        module = PerceiverResampler(config).requires_grad_(True)
        assert ("pos_embed" in module.state_dict()) == (name not in ("2.5", "no positions"))
        assert "pos_embed" not in dict(module.named_parameters())


def test_positions_survive_an_empty_start():
    """Built on meta, materialised, and reset, as sharded training does."""
    with torch.device("meta"):
        module = PerceiverResampler(PERCEIVERS["paper"])
    module.to_empty(device="cpu").reset_parameters()
    assert torch.equal(module.pos_embed, sincos_2d(24, (8, 8)))
