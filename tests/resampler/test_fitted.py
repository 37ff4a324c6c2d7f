"""Latents fitted to views: one by one or together, trained, folded, cast, saved, encoded, refused."""

import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.tiny import refuses
from uhd import SliceBatch, VisualEncoder, register_strategy
from uhd.export.graph import described
from uhd.grids import split_views
from uhd.nano.build import NanoConfig, build_nano
from uhd.positions import sincos_2d
from uhd.resampler import PerceiverConfig, PerceiverResampler, SpatialConfig, SpatialResampler, folded
from uhd.resampler.config import FITTED_POSITIONS
from uhd.slicing import SlicePlan

GRIDS = [(2, 7), (4, 4), (8, 5), (4, 4), (3, 3)]
LATENTS = [(2, 4), (3, 3), (6, 4), None, (2, 4)]


def made(**fields):
    torch.manual_seed(0)
    fields = {"width": 32, "vision_width": 24, "num_heads": 4, "num_latents": 9, **fields}
    module = PerceiverResampler(PerceiverConfig(**fields))
    for name, parameter in module.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return module.eval()


def features(grids=GRIDS, width=24):
    torch.manual_seed(1)
    return torch.randn(sum(h * w for h, w in grids), width)


def by_definition(module, x, grid_hw, latents_hw):
    """One view through `torch.nn.MultiheadAttention`, with positions and latents by `interpolate`."""

    def resized(table, mode, source_hw=(3, 3), to_hw=latents_hw):
        image = table.T.unflatten(1, source_hw)[None]
        return F.interpolate(image, to_hw, mode=mode, align_corners=False)[0].flatten(1).T

    width = module.out_dim
    source_hw = latents_hw if module.config.fitted_position == "direct" else (3, 3)
    positions = sincos_2d(width, source_hw)
    attention = torch.nn.MultiheadAttention(width, module.attn.num_heads)
    attention.load_state_dict(module.attn.state_dict())
    queries = module.ln_q(resized(module.query, "bilinear")) + resized(positions, "bicubic", source_hw)
    values = module.ln_kv(module.kv_proj(x))
    keys = values + resized(positions, "bicubic", source_hw, grid_hw)
    mixed = attention(queries, keys, values, need_weights=False)[0]
    return module.ln_post(mixed) @ module.proj


@pytest.mark.parametrize("fitted_position", FITTED_POSITIONS)
@pytest.mark.parametrize("way", ["plain", "absorbed", "narrow"])
def test_every_view_gets_the_grid_it_asks_for(way, fitted_position):
    module, x = made(fitted_position=fitted_position), features()
    module.inference = way
    with torch.no_grad():
        found = module(x, GRIDS, LATENTS)
        views = split_views(x, GRIDS)
        wanted = [
            by_definition(module, view, grid, latents or (3, 3))
            for view, grid, latents in zip(views, GRIDS, LATENTS, strict=True)
        ]
    assert found.shape == (8 + 9 + 24 + 9 + 8, 32)
    torch.testing.assert_close(found, torch.cat(wanted), atol=2e-5, rtol=2e-5)


def test_their_own_square_is_what_it_was_to_the_bit():
    module, x = made(), features()
    with torch.no_grad():
        whole = module(x, GRIDS)
        assert torch.equal(module(x, GRIDS, [(3, 3)] * 5), whole.flatten(0, 1))
        assert torch.equal(module(x, GRIDS, [None] * 5), whole.flatten(0, 1))
        assert module(x[:0], [], []).shape == (0, 32)


def test_neighbours_in_a_long_view_stay_as_far_apart_as_in_the_square():
    def nearest(module, latents_hw):
        table = module.query_table(latents_hw)
        return torch.pdist(table).min().item()

    stretched, direct = made(), made(fitted_position="direct")
    assert nearest(direct, (2, 12)) == pytest.approx(nearest(direct, (3, 3)))
    assert nearest(stretched, (2, 12)) < 0.5 * nearest(stretched, (3, 3))
    assert torch.equal(direct.query_table((3, 3)), direct.pos_embed)


def test_views_own_index_stays_that_of_the_keys():
    module = made(fitted_position="direct", key_position="direct")
    assert torch.equal(module.key_table((2, 5), (2, 3)), sincos_2d(32, (2, 5)))
    with torch.no_grad():
        fitted = module(features(), GRIDS, LATENTS)
        module.inference = "narrow"
        torch.testing.assert_close(module(features(), GRIDS, LATENTS), fitted, atol=2e-5, rtol=2e-5)


def test_settings_of_earlier_files_are_read():
    config = PerceiverConfig(width=32, vision_width=24, num_heads=4)
    earlier = {key: value for key, value in config.to_dict().items() if key != "fitted_position"}
    assert PerceiverConfig.from_dict(earlier) == config
    refuses("fitted_position", config.replace, fitted_position="stretched")


def test_views_of_more_latents_than_the_layer_has_are_not_folded_unasked(monkeypatch):
    monkeypatch.setattr(folded, "cheapest", lambda config, grids, among=folded.PATHS: among[-1])
    module, x = made(), features()
    with torch.no_grad():
        assert module.inference_path(GRIDS, x) == "narrow"
        found = module(x, GRIDS, LATENTS)
        assert set(module._folded._kept["narrow"][3]) == {(2, 4), None}  # and not (6, 4)
        alone = [
            module(view, [grid], [hw]) for view, grid, hw in zip(split_views(x, GRIDS), GRIDS, LATENTS, strict=True)
        ]
        torch.testing.assert_close(found, torch.cat(alone), atol=1e-6, rtol=1e-6)
        module.inference = "plain"
        assert torch.equal(found[17:41], module(x, GRIDS, LATENTS)[17:41])


def test_folded_weights_follow_the_weights_and_are_bounded(monkeypatch):
    module, x = made(), features()
    module.inference = "narrow"
    made_now, fold = [], folded.fold_values
    monkeypatch.setattr(folded, "GRIDS", 2)
    monkeypatch.setattr(folded, "fold_values", lambda *how: made_now.append(1) or fold(*how))
    with torch.no_grad():
        before = module(x, GRIDS, LATENTS)
        module(x, GRIDS, LATENTS)
        assert len(module._folded._kept["narrow"][3]) == 2  # of three grids
        assert len(made_now) == 1  # for all of them
        module.query[4] = torch.arange(32.0).cos()
        after = module(x, GRIDS, LATENTS)
        module.inference = "plain"
        torch.testing.assert_close(after, module(x, GRIDS, LATENTS), atol=2e-5, rtol=2e-5)
    assert not torch.allclose(before, after, atol=1e-3)


def test_gradients_reach_all_weights_and_deeper_layers_are_fitted():
    module = made(depth=2, ffn_ratio=2.0).train()
    x = features().requires_grad_()
    found = module(x, GRIDS, LATENTS)
    one = module(x[:14], GRIDS[:1], LATENTS[:1])
    torch.testing.assert_close(found[:8], one, atol=2e-5, rtol=2e-5)
    found.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (*module.parameters(), x))
    assert module.query.grad.abs().min() > 0


def test_where_tokens_look_is_told_for_each_grid():
    module, x = made(), features()
    weights = module.attention_weights(x, GRIDS, LATENTS)
    assert [tuple(own.shape) for own in weights] == [
        ((h or 3) * (w or 3), 4, rows * columns)
        for (h, w), (rows, columns) in zip([latents or (3, 3) for latents in LATENTS], GRIDS, strict=True)
    ]
    alone = module.attention_weights(x[-9:], [(3, 3)], [(2, 4)])[0]
    torch.testing.assert_close(weights[-1], alone)


def test_what_cannot_be_fitted_is_refused():
    module, x = made(), features()
    refuses("4 grids of latents for 5 views", module, x, GRIDS, LATENTS[:4])
    refuses(r"latents\[0\] must be at least \(1, 1\)", module, x, GRIDS, [(0, 3), *LATENTS[1:]])
    free = made(num_latents=8, query_position=False, key_position="direct")
    assert free.fits_latents is False
    refuses(r"8 latents are no square grid, so they cannot be fitted to \(2, 4\)", free, x, GRIDS, LATENTS)


# encoders and models


SIZE_HW = [(60, 64), (30, 110), (14, 80), (20, 24)]


def nano(**options):
    config = NanoConfig(side=16, patch_size=4, width=32, vision_depth=1, text_depth=1)
    return build_nano(config, slicing=config.slicing.replace(**options)).eval()


def images():
    drawn = torch.Generator().manual_seed(2)
    return [Image.fromarray(torch.randint(0, 255, hw, generator=drawn, dtype=torch.uint8).numpy()) for hw in SIZE_HW]


OPTIONS = [{"latents": "fitted"}, {"one_view_below": 2.5}, {"latents": "fitted", "one_view_below": 2.5}]


@pytest.mark.parametrize("options", OPTIONS, ids=["fitted", "one view", "both"])
def test_an_encoder_gives_what_the_plan_counts(options, tmp_path):
    model = nano(**options)
    encoder, pictures = model.visual, images()
    with torch.no_grad():
        together = encoder(pictures)
        for picture, found in zip(pictures, together, strict=True):
            assert len(found.tokens) == found.plan.num_visual_tokens == sum(v.num_tokens for v in found.plan.views)
            assert any(view.latents_hw not in (None, (3, 3)) for one in together for view in one.plan.views)
            torch.testing.assert_close(encoder([picture])[0].tokens, found.tokens, atol=1e-5, rtol=1e-4)
        encoder.max_patches_per_step = 20
        for stepped, found in zip(encoder(pictures), together, strict=True):
            torch.testing.assert_close(stepped.tokens, found.tokens, atol=1e-5, rtol=1e-4)
        in_steps = encoder.attention(pictures, size_hw=(8, 8))
        encoder.max_patches_per_step = None
        maps = encoder.attention(pictures, size_hw=(8, 8))
        assert [len(own) for own in maps] == [found.plan.num_visual_tokens for found in together]
        for own, stepped in zip(maps, in_steps, strict=True):
            torch.testing.assert_close(own, stepped, atol=1e-5, rtol=1e-4)
        encoder.save_pretrained(tmp_path / "encoder")
        again = VisualEncoder.from_pretrained(tmp_path / "encoder")
        assert again.slicing == encoder.slicing
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(again(pictures), together, strict=True))
        batch = model.processor(
            text=["<image>all?"] * 4, images=[[one] for one in pictures], padding=True, return_tensors="pt"
        )
        out = model(**batch).logits
        from_sizes = model(**{key: value for key, value in batch.items() if key != "image_plans"}).logits
        encoded = model.processor(
            text=["<image>all?"] * 4, images=[[one] for one in together], padding=True, return_tensors="pt"
        )
        assert torch.equal(out, from_sizes)
        torch.testing.assert_close(model(**encoded).logits, out, atol=1e-4, rtol=1e-4)
        reference = torch.cat([found.tokens for found in together])
        half = torch.cat([found.tokens for found in encoder.to(torch.bfloat16)(pictures)]).float()
        assert (half - reference).abs().max() < 0.05 * reference.abs().max()


def test_tokens_are_the_plans_whatever_the_resampler_has():
    model = nano(latents="fitted", tokens_per_view=5)
    assert model.visual.slicing.tokens_per_view == 5
    with torch.no_grad():
        counts = [len(found.tokens) for found in model.visual(images())]
    assert counts == [model.visual.plan(hw).num_visual_tokens for hw in SIZE_HW]
    assert max(counts) <= 25
    assert nano(one_view_below=2.5, tokens_per_view=5).visual.slicing.tokens_per_view == 9


def test_parts_that_cannot_are_refused_by_name():
    model = nano(latents="fitted")
    spatial = SpatialResampler(SpatialConfig(width=32, vision_width=32, num_heads=4, num_latents=9))
    parts = {"pixels": model.visual.pixels, "check_image_size": False}
    refuses(
        "slicing 'nano' fits latents to views .*, SpatialResampler does not",
        VisualEncoder,
        model.visual.vision,
        spatial,
        slicing=model.visual.slicing,
        **parts,
    )
    plain = VisualEncoder(model.visual.vision, spatial, slicing=model.visual.slicing.replace(latents="fixed"), **parts)
    own = [model.visual.plan(SIZE_HW[2])]
    batch = SliceBatch.from_images(images()[2:3], own)
    refuses(r"is planned with \(2, 4\) latents, and SpatialResampler does not fit", plain, batch)
    refuses(r"is planned with \(2, 4\) latents, and SpatialResampler does not fit", plain.attention, batch)
    refuses("'nano' fits latents to views, a graph has one number", described, model.visual)
    assert SlicePlan.from_dict(json.loads(json.dumps(own[0].to_dict()))) == own[0]


def test_a_graph_refuses_a_rule_of_ones_own_whose_plans_fit_latents():
    model = nano()
    fitted = model.visual.slicing.replace(latents="fitted")
    register_strategy("fits-by-itself", fitted_by_itself := lambda size_hw: fitted.plan(size_hw))
    model.visual.slicing = fitted_by_itself
    (found,) = model.visual(images()[2:3])
    assert (found.plan.views[0].latents_hw, len(found.tokens)) == ((2, 4), found.plan.num_visual_tokens)
    refuses(r"plans a view with \(2, 4\) latents, a graph has one", described(model.visual).cut, images()[2])
