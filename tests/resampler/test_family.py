"""The family's other resamplers: recorded outputs of their code, and what each does on its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.resampler.parts import GRIDS, LATENTS, RELEASED, SIZES, cases, features_for, randomised, recorded, released
from uhd.resampler import (
    PerceiverConfig,
    PerceiverResampler,
    PyramidConfig,
    PyramidResampler,
    RewriteConfig,
    RewriteResampler,
    SpatialConfig,
    SpatialResampler,
    sincos_2d,
)
from uhd.resampler.pyramid import upsampled
from uhd.resampler.windows import pool_hw

# --- recorded outputs


@pytest.mark.parametrize("tag", ["v1_spatial_g4", "v1_spatial_g12", "v1_spatial_g8_nokvproj"])
def test_spatial_pools_as_the_release_and_can_be_corrected(tag):
    state, info, data = recorded(tag)
    assert released(tag).tokens_per_view == info["grid_size"] ** 2
    corrected = SpatialResampler.from_state_dict(state, num_heads=info["num_heads"], aligned=True)
    tried = [grids[0] for _, grids, _ in cases(tag)]
    assert (7, 5) in tried, "the map that is thinner than its windows"
    assert len(tried) > 1
    for x, grids, y in cases(tag):
        assert list(pool_hw(grids[0])) == data["pool_{}x{}".format(*grids[0])].tolist()
        with torch.no_grad():
            assert (corrected(x, grids) - y).abs().max() > 1e-3


def test_pyramid_equals_the_release():
    module, data = released("v2_hiwin_g4"), recorded("v2_hiwin_g4")[2]
    grids = [(int(h), int(w)) for h, w in data["tgt_sizes"]]
    assert grids == [(6, 8), (8, 6)]
    levels = []
    for scale in (1, 2, 4):
        maps = [torch.tensor(data[f"img{view}_feat{scale}x"])[0] for view in range(len(grids))]
        assert [tuple(x.shape[1:]) for x in maps] == [(h * scale, w * scale) for h, w in grids]
        levels.append(torch.cat([x.flatten(1).T for x in maps]))
    with torch.no_grad():
        torch.testing.assert_close(module(levels, grids), torch.tensor(data["y"]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("tag", ["march2024_perceiver_g8", "v1_spatial_g4", "better_q16"])
def test_bad_weights_are_listed(tag):
    state, make = recorded(tag)[0], RELEASED[tag]
    fewer = {name: x for name, x in state.items() if name not in ("ln_kv.bias", "ln_kv.weight")}
    missing = r"missing \['ln_kv.bias', 'ln_kv.weight'\], unexpected \['resampler.proj'\]"
    with pytest.raises(ValueError, match=missing):
        make({**fewer, "resampler.proj": state["query"]}, num_heads=4)
    with pytest.raises(ValueError, match="expected 'query' with [23] axes"):
        make({f"resampler.{name}": x for name, x in state.items()}, num_heads=4)
    with pytest.raises(ValueError, match=r"'ln_kv.bias': \(\(31,\), \(32,\)\)"):
        make({**state, "ln_kv.bias": state["ln_kv.bias"][1:]}, num_heads=4)
    with pytest.raises(ValueError, match="cannot be divided among num_heads=7"):
        make(state, num_heads=7)


def test_weights_of_another_variant_are_listed():
    state = recorded("march2024_perceiver_g8")[0]
    with pytest.raises(ValueError, match=r"'minicpm-v-2.6': missing \[\], unexpected \['pos_embed'\]"):
        PerceiverResampler.from_state_dict(state, variant="minicpm-v-2.6", num_heads=4)
    with pytest.raises(ValueError, match="variant must be 'paper', .*, got 'llava'"):
        PerceiverResampler.from_state_dict(state, variant="llava", num_heads=4)


@pytest.mark.parametrize(
    "cls, changes, message",
    [
        (PerceiverConfig, {"num_heads": 5}, "width=24 cannot be divided among num_heads=5"),
        (PerceiverConfig, {"num_latents": 96}, "num_latents=96 is not a square"),
        (PerceiverConfig, {"num_latents": 96, "key_position": "direct"}, "num_latents=96 is not a square"),
        (PerceiverConfig, {"num_latents": 0}, "num_latents must be at least 1; got 0"),
        (PerceiverConfig, {"width": 18}, "multiple of 4"),
        (PerceiverConfig, {"depth": 0}, "depth must be at least 1; got 0"),
        (PerceiverConfig, {"ffn_ratio": -1.0}, "ffn_ratio=-1.0"),
        (PerceiverConfig, {"ffn_ratio": 0.001}, "ffn_ratio=0.001"),
        (PerceiverConfig, {"key_position": "learned"}, "key_position must be 'interpolated'"),
        (SpatialConfig, {"num_latents": 10}, "num_latents=10 is not a square"),
        (SpatialConfig, {"width": 18}, "multiple of 4"),
        (SpatialConfig, {"num_heads": 5}, "cannot be divided among num_heads=5"),
        (SpatialConfig, {"vision_width": 0}, "vision_width must be at least 1; got 0"),
        (RewriteConfig, {"table_side": 0}, "table_side must be at least 1; got 0"),
        (RewriteConfig, {"width": 18}, "multiple of 4"),
        (PyramidConfig, {"num_latents": 10}, "not a square"),
        (PyramidConfig, {"levels": (2, 1)}, "ascending"),
        (PyramidConfig, {"levels": (1, 3)}, r"levels=\(1, 3\): take some of \(1, 2, 4, 8\)"),
        (PyramidConfig, {"levels": ()}, "levels="),
        (PyramidConfig, {"levels": (2, 4), "upsample": True}, "with 1 among them"),
    ],
)
def test_bad_config(cls, changes, message):
    with pytest.raises(ValueError, match=message):
        cls(**{**SIZES, **changes})


# --- each on its own


def test_a_spatial_latent_depends_on_its_own_window():
    module = randomised("spatial")
    features = features_for(module, [(6, 9)])
    changed = features.clone()
    changed[0] += 1  # patch (0, 0), in the first of 3 x 3 windows
    moved = (module(changed, [(6, 9)]) - module(features, [(6, 9)])).abs().amax(dim=(0, 2)) > 1e-9
    assert moved.tolist() == [True] + [False] * 8


def test_initialisation_as_released():
    torch.manual_seed(0)
    sizes = {"width": 256, "vision_width": 192, "num_heads": 8, "num_latents": 64}
    spatial, pyramid = SpatialResampler(SpatialConfig(**sizes)), PyramidResampler(PyramidConfig(**sizes))
    for weight in (spatial.query, spatial.kv_proj.weight, pyramid.query_4, pyramid.cat_proj.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    for module in (spatial, pyramid):
        assert module.proj.std().item() == pytest.approx(256**-0.5, rel=0.05)
        assert torch.equal(module.pos_embed, sincos_2d(256, (8, 8)))
    assert not pyramid.feature_2x_embedding.any()
    rewrite = RewriteResampler(RewriteConfig(**sizes))
    assert rewrite.alpha.item() == 0
    assert torch.equal(rewrite.pos_embed, sincos_2d(256, (24, 24)))
    cut = 0.8796  # standard deviation of a unit normal that is cut at two
    assert rewrite.proj.weight.std().item() == pytest.approx(cut * 512**-0.5, rel=0.05)
    assert rewrite.query.std().item() == pytest.approx(cut * 256**-0.5, rel=0.05)


def test_the_rewrites_positions_start_switched_off_and_learn():
    config = LATENTS["rewrite"]
    torch.manual_seed(0)
    module = RewriteResampler(config)
    features = features_for(module, [(2, 6)])
    assert torch.equal(module(features, [(2, 6)]), module(features, [(3, 4)]))
    module(features, [(2, 6)]).square().sum().backward()
    assert module.alpha.grad.abs() > 0


def test_the_rewrites_separators_are_held_where_asked_for():
    assert "sep_embeddings" not in randomised("rewrite").state_dict()
    held = RewriteResampler(RewriteConfig(**SIZES, separators=True))
    assert held.sep_embeddings.shape == (3, 1, 24)
    assert held.sep_embeddings.std() > 0


def test_a_pyramid_takes_levels_or_makes_them():
    module = randomised("pyramid")
    features = features_for(module)
    levels = upsampled(features, GRIDS, (1, 2, 4))
    assert [len(level) for level in levels] == [len(features) * s * s for s in (1, 2, 4)]
    assert torch.equal(levels[0], features)
    assert torch.equal(module(levels, GRIDS), module(features, GRIDS))
    given = PyramidResampler(PyramidConfig(**SIZES)).double()
    given.load_state_dict(module.state_dict())
    assert torch.equal(given(levels, GRIDS), module(features, GRIDS))
    with pytest.raises(ValueError, match="features of the 3 levels .* got one tensor: give a list, or set upsample"):
        given(features, GRIDS)
    with pytest.raises(ValueError, match=r"the 3 levels \(1, 2, 4\), got 2"):
        given(levels[:2], GRIDS)
    with pytest.raises(ValueError, match="rows, but the 5 grids add up to"):
        given([levels[0], levels[1][:-1], levels[2]], GRIDS)
    with pytest.raises(ValueError, match="rows, but the 5 grids add up to"):
        module(features[1:], GRIDS)


def test_a_finer_level_of_a_pyramid_counts():
    module = randomised("pyramid")
    levels = upsampled(features_for(module), GRIDS, (1, 2, 4))
    before = module(levels, GRIDS)
    for level in range(3):
        other = list(levels)
        other[level] = levels[level] + torch.randn_like(levels[level])
        assert (module(other, GRIDS) - before).abs().max() > 1e-3
    single = PyramidResampler(PyramidConfig(**SIZES, levels=(1,)))
    assert single(levels[0].float(), GRIDS).shape == (5, 9, 24)


def test_attention_is_that_of_torch():
    """One view of one window: latents over all its pooled keys, by nn.MultiheadAttention."""
    torch.manual_seed(0)
    module = SpatialResampler(SpatialConfig(width=16, vision_width=16, num_heads=2, num_latents=1)).double()
    mha = nn.MultiheadAttention(16, 2, dtype=torch.float64)
    mha.load_state_dict(module.attn.state_dict())
    x = features_for(module, [(3, 3)])  # each of 3 x 3 bins is one patch
    kv = module.ln_kv(x)
    positions = sincos_2d(16, (1, 1)).double()  # a table of one row is the same everywhere
    y = mha(module.ln_q(module.query) + positions, kv + positions, kv)[0]
    # the table is resized in float32
    torch.testing.assert_close(module(x, [(3, 3)])[0], module.ln_post(y) @ module.proj, atol=1e-6, rtol=0)
