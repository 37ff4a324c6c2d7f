"""Where tokens looked: mass, place, and that the weights are those by which tokens were made."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import uhd
from tests.tiny import IMAGES, noise, perceiver, refuses, stirred, tiny_encoder
from uhd.pixels import PixelSettings
from uhd.resampler import (
    MergeProjector,
    MLPProjector,
    PixelShuffleProjector,
    PoolProjector,
    PyramidConfig,
    PyramidResampler,
    RewriteConfig,
    RewriteResampler,
    SpatialConfig,
    SpatialResampler,
)
from uhd.slicing import find, patch_box

SIZES = {"width": 24, "vision_width": 32, "num_heads": 2, "num_latents": 4}
COMPRESSORS = {
    "perceiver": (perceiver, None),
    "deep": (lambda: perceiver(depth=3, ffn_ratio=2.0), None),
    "spatial": (lambda: SpatialResampler(SpatialConfig(**SIZES)), None),
    "spatial as released": (
        lambda: SpatialResampler(SpatialConfig(**{**SIZES, "num_latents": 81}, aligned=False)),
        None,
    ),
    "pyramid": (lambda: PyramidResampler(PyramidConfig(**SIZES, upsample=True)), None),
    "rewrite": (lambda: RewriteResampler(RewriteConfig(**SIZES)), None),
    "mlp": (lambda: MLPProjector(32, 24), "llava-1.5"),
    "newlines": (lambda: MLPProjector(32, 24), "llava-next"),
    "shuffle": (lambda: PixelShuffleProjector(32, 24), "internvl"),
    "pool": (lambda: PoolProjector(32, 24, factor=1), "llava-next"),
}
RAMP = PixelSettings(mean=(0.0,) * 3, std=(1.0,) * 3)


def rule(name):
    """With views of 56 px and patches of 14, as the tiny encoder has."""
    return None if name is None else find(name).for_vision(image_size=56, patch_size=14)


class Means(nn.Module):
    """A vision encoder whose features are each patch's mean red, green and blue."""

    patch_size = stride = 14
    image_size, out_dim = 56, 3

    def forward(self, patches, grids):
        return patches.unflatten(1, (3, -1)).mean(-1)


class Same(MLPProjector):
    """Tokens that are features."""

    def __init__(self):
        super().__init__(3, 3)
        self.mlp = nn.Identity()


class Blocks(PixelShuffleProjector):
    """Tokens that are the means of blocks."""

    def __init__(self):
        super().__init__(3, 3, factor=2)

    def compress(self, features, grids):
        parts = zip(features.split([h * w for h, w in grids]), grids, strict=True)
        maps = [part.view(h // 2, 2, w // 2, 2, 3).mean((1, 3)).flatten(0, 1) for part, (h, w) in parts]
        return torch.cat(maps)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_every_map_sums_to_one_and_heads_are_one_dimension_more(name):
    make, strategy = COMPRESSORS[name]
    encoder = tiny_encoder(stirred(make()), slicing=rule(strategy))
    found, by_head = encoder.attention(IMAGES), encoder.attention(IMAGES, (9, 14), heads=True)
    for image, maps, heads, flat in zip(IMAGES, found, by_head, encoder.attention(IMAGES, (9, 14)), strict=True):
        plan = encoder.plan(image.shape[:2])
        assert maps.dtype == torch.float32
        assert not maps.requires_grad
        assert maps.shape == (plan.num_visual_tokens, *maps.shape[1:])
        assert max(maps.shape[1:]) == 256
        torch.testing.assert_close(maps.sum((1, 2)), torch.ones(len(maps)), atol=1e-5, rtol=0)
        assert maps.min() >= 0
        assert heads.shape == (len(maps), getattr(encoder.compressor, "num_heads", heads.shape[1]), 9, 14)
        torch.testing.assert_close(heads.sum((2, 3)), torch.ones(heads.shape[:2]), atol=1e-5, rtol=0)
        torch.testing.assert_close(heads.mean(1), flat)


def expected_sizes(least, most):
    """Twenty of (height, width)."""
    return np.random.default_rng(7).integers(least, most, (20, 2)).tolist()


@pytest.mark.parametrize(
    "strategy, compressor, changes, sizes",
    [
        ("llava-uhd-safe", Same, {"tokens_per_view": None}, 20),
        ("llava-uhd-safe", Blocks, {"tokens_per_view": None, "merge": 2}, 20),
        ("llava-1.5", Same, {}, 20),
        ("llava-next", Same, {}, 20),
        ("internvl", Blocks, {}, 20),
        ("llava-onevision", Same, {}, 2),
    ],
)
def test_a_map_tells_the_pixels_that_a_token_was_made_of(strategy, compressor, changes, sizes):
    """On ramps a token's mean colour is where it looked, by whatever way of cutting, padding and putting together."""
    encoder = uhd.VisualEncoder(Means(), compressor(), slicing=rule(strategy).replace(**changes), pixels=RAMP).eval()
    seen = 0
    for height, width in expected_sizes(40, 260)[:sizes]:
        y, x = np.mgrid[:height, :width]
        ramps = np.stack([(y + 0.5) / height * 255, (x + 0.5) / width * 255, np.full_like(y, 255)], -1)
        image = np.rint(ramps).astype(np.uint8)
        (maps,), (encoded,) = encoder.attention([image], (height, width)), encoder([image])
        tokens = encoded.tokens
        if encoded.plan.packing is not None:
            learned = encoder.packer.newline, encoder.packer.separator
            own = [torch.equal(row, each) for row in tokens for each in learned if each is not None]
            kinds = sum(each is not None for each in learned)
            tokens = tokens[~torch.tensor(own).view(-1, kinds).any(1)]
        assert len(tokens) == len(maps)
        whole = tokens[:, 2] > 0.999  # nothing of a padding, which has another blue
        looked = torch.einsum("thw,hwc->tc", maps, torch.from_numpy(ramps).float() / 255)
        torch.testing.assert_close(looked[whole, :2], tokens[whole, :2], atol=0.012, rtol=0)
        seen += int(whole.sum())
    assert seen > 60


@pytest.mark.parametrize("strategy", ["llava-uhd-safe", "llava-next", "internvl", "llava-1.5", "square-stretch-384"])
def test_the_patch_that_latents_must_look_at_is_found_at_its_pixels(strategy):
    resampler = perceiver(vision_width=3, key_position="none", num_latents=4)
    with torch.no_grad():  # one hot: the key's first number is brightness, and the queries are it, enormous
        resampler.kv_proj.weight.zero_()
        resampler.kv_proj.weight[:4] = torch.tensor([[1.0, 0, 0], [-1.0, 0, 0], [0, 1.0, 0], [0, -1.0, 0]])
        resampler.attn.in_proj_weight.zero_()
        resampler.attn.in_proj_bias.zero_()
        resampler.attn.in_proj_weight[24, 0] = resampler.attn.in_proj_weight[24 + 12, 0] = 1
        resampler.attn.in_proj_bias[[0, 12]] = 1e5
    encoder = uhd.VisualEncoder(Means(), resampler, slicing=rule(strategy), pixels=RAMP).eval()
    rng, found = np.random.default_rng(3), 0
    for height, width in expected_sizes(130, 330):
        plan = encoder.plan((height, width))
        inside = [
            (view, patch, box)
            for view in plan.views
            for patch in np.ndindex(view.patches_hw)
            if min(box := [float(edge) for edge in patch_box(plan, view.index, patch)]) >= 0
            and box[2] <= height
            and box[3] <= width
            and min(box[2] - box[0], box[3] - box[1]) >= 3
        ]
        if not inside:
            continue  # a strip between two bands of padding, or much enlarged
        view, _, (top, left, bottom, right) = inside[int(rng.integers(len(inside)))]
        found += 1
        image = np.zeros((height, width, 3), np.uint8)
        image[..., 1:] = 255  # so that LayerNorm grows with red
        image[math.ceil(top) : int(bottom), math.ceil(left) : int(right), 0] = 255
        resampler.inference = ("plain", "absorbed", "narrow")[found % 3]
        (maps,) = encoder.attention([image], (height, width))
        starts = np.cumsum([0] + [v.num_tokens for v in plan.views])
        own = maps[starts[view.index] : starts[view.index + 1]].double().numpy()
        box = np.zeros((height, width))
        rows, columns = (
            np.clip(np.minimum(np.arange(n) + 1, b) - np.maximum(np.arange(n), a), 0, None)
            for n, a, b in ((height, top, bottom), (width, left, right))
        )
        box = np.outer(rows, columns) / ((bottom - top) * (right - left))
        np.testing.assert_allclose(own, np.broadcast_to(box, own.shape), atol=1e-6)
    assert found == 20 or (strategy == "llava-1.5" and found > 12)


@pytest.mark.parametrize("path", ["plain", "absorbed", "narrow"])
@pytest.mark.parametrize("key_position", ["interpolated", "direct", "none"])
def test_weights_are_those_that_every_path_multiplies_by(path, key_position):
    resampler = stirred(perceiver(key_position=key_position))
    resampler.inference = path
    grids = [(2, 5), (4, 3)]
    features = torch.randn(22, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        tokens, weights = resampler(features, grids), resampler.attention_weights(features, grids)
        values = nn.functional.linear(
            resampler.ln_kv(resampler.kv_proj(features)),
            *(part.chunk(3)[2] for part in (resampler.attn.in_proj_weight, resampler.attn.in_proj_bias)),
        )
        for token, own, value in zip(tokens, weights, values.split([10, 12]), strict=True):
            mixed = torch.einsum("qhn,nhd->qhd", own, value.unflatten(1, (2, 12))).flatten(1)
            again = resampler.ln_post(resampler.attn.out_proj(mixed)) @ resampler.proj
            torch.testing.assert_close(again, token, atol=2e-5, rtol=1e-4)


def test_window_weights_are_those_that_the_values_are_multiplied_by():
    """Values are one linear step from the tokens' inside: a change of one feature's value moves what looked at it."""
    spatial = stirred(SpatialResampler(SpatialConfig(**SIZES)))
    grids, kept = [(3, 5), (4, 2)], {}
    features = torch.randn(23, 32, generator=torch.Generator().manual_seed(1))
    hook = spatial.attn.out_proj.register_forward_pre_hook(lambda _, given: kept.update(x=given[0]))
    with torch.no_grad():
        spatial(features, grids)
        hook.remove()
        value = nn.functional.linear(spatial.ln_kv(spatial.kv_proj(features)), spatial.attn.in_proj_weight.chunk(3)[2])
        for mixed, own, part in zip(
            kept["x"], spatial.attention_weights(features, grids), value.split([15, 8]), strict=True
        ):
            again = torch.einsum("qhn,nhd->qhd", own, part.unflatten(1, (2, 12))).flatten(1)
            torch.testing.assert_close(again + spatial.attn.in_proj_bias.chunk(3)[2], mixed, atol=2e-5, rtol=1e-4)


def test_maps_do_not_depend_on_the_batch_nor_on_steps():
    encoder = tiny_encoder(stirred(perceiver()))
    together = encoder.attention(IMAGES)
    encoder.max_patches_per_step = 5
    for one, image, maps in zip(encoder.attention(encoder.prepare(IMAGES)), IMAGES, together, strict=True):
        torch.testing.assert_close(one, maps, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(encoder.attention([image])[0], maps, atol=1e-6, rtol=1e-4)


def test_padding_is_left_out_and_a_token_of_padding_alone_is_even():
    encoder = uhd.VisualEncoder(Means(), Same(), slicing=rule("llava-1.5"), pixels=RAMP).eval()
    (maps,) = encoder.attention([noise(20, 80)], (20, 80))  # a square of 80: rows 30 to 50 are the image
    rows = maps.view(4, 4, 20, 80)
    torch.testing.assert_close(rows[0], torch.full((4, 20, 80), 1 / 1600), rtol=1e-4, atol=0)
    assert rows[1, :, :10].sum() == pytest.approx(4)  # half of its patches is padding: rows 20 to 40
    assert rows[1, 2, :10, 40:60].sum() == pytest.approx(1)


def test_merged_rounds_are_blocks_and_a_stride_is_a_feature():
    merge = MergeProjector(32, 24, rounds=2)
    (weights,) = merge.attention_weights(torch.zeros(32, 32), [(4, 8)])
    assert weights.shape == (2, 1, 32)
    assert weights[1, 0].view(4, 8)[:, 4:].eq(1 / 16).all()
    (pooled,) = PoolProjector(32, 24, factor=2, mode="bilinear").attention_weights(torch.zeros(12, 32), [(3, 4)])
    torch.testing.assert_close(pooled.sum(-1), torch.ones(4, 1))
    assert pooled[3, 0].view(3, 4)[:, :2].eq(0).all()


def test_what_cannot_be_told_is_refused():
    class Own(nn.Module):
        out_dim, tokens_per_view = 24, 1

        def forward(self, features, grids):
            return features.new_zeros(len(grids), 1, 24)

    refuses("Own does not tell where its tokens look", tiny_encoder(Own()).attention, IMAGES)
    refuses("size_hw must be at least", tiny_encoder().attention, IMAGES, (0, 4))
    refuses("size_hw must be two integers", tiny_encoder().attention, IMAGES, 4, error=TypeError)
    wrong = tiny_encoder(perceiver())
    wrong.compressor.attention_weights = lambda features, grids: [torch.ones(3, 1, h * w) for h, w in grids]
    refuses("the compressor tells where .3, 3, 3. look", wrong.attention, IMAGES[:1])
    assert tiny_encoder().attention([]) == []
