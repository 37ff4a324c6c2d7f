"""Views of many images, packed: counts agree, nothing moves, and every operation has its inverse."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import skimage.data
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.tiny import noise, picture, refuses
from uhd.batch import SliceBatch
from uhd.pixels import PixelSettings, patchify, render, unpatchify
from uhd.pixels.normalize import normalize
from uhd.slicing import SlicingConfig, plan

SMALL = SlicingConfig(image_size=28, patch_size=7, max_slices=5, clamp=True, tokens_per_view=4)
PIXELS = PixelSettings(mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
SIZES = st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), max_size=4)


def batch_of(*sizes: tuple[int, int]) -> SliceBatch:
    return SliceBatch.from_images([picture(*size) for size in sizes], [plan(size, SMALL) for size in sizes])


def assert_same(one: SliceBatch, other: SliceBatch) -> None:
    assert torch.equal(one.patches, other.patches)
    assert torch.equal(one.cu_seqlens, other.cu_seqlens)
    assert (one.grids, one.plans, one.patches.dtype) == (other.grids, other.plans, other.patches.dtype)


@given(SIZES)
def test_a_batch_holds_every_view_of_every_image(sizes):
    batch = batch_of(*sizes)
    views = [array for size in sizes for array in render(picture(*size), plan(size, SMALL))]
    assert batch.num_views == len(views) == sum(batch.views_per_image)
    assert len(batch.views_per_image) == len(sizes)
    assert batch.patches.shape[0] == sum(p.num_patches for p in batch.plans) == sum(batch.lengths)
    assert batch.max_seqlen == max(batch.lengths, default=0)
    assert batch.cu_seqlens.dtype == torch.int32
    for place, (view, part, grid) in enumerate(zip(views, batch.split(), batch.grids, strict=True)):
        start, stop = batch.cu_seqlens[place : place + 2].tolist()
        assert torch.equal(batch.patches[start:stop], part)
        assert (unpatchify(part.numpy(), grid, 7) == view).all()


@given(SIZES)
def test_cat_inverts_split_images(sizes):
    batch = batch_of(*sizes)
    parts = batch.split_images()
    assert len(parts) == len(sizes)
    for part, size in zip(parts, sizes, strict=True):
        assert_same(part, batch_of(size))  # a batch of one is the same as its part of many
    assert_same(SliceBatch.cat(parts), batch)


@settings(max_examples=20)
@given(SIZES, SIZES)
def test_cat_keeps_order(left, right):
    assert_same(SliceBatch.cat([batch_of(*left), batch_of(*right)]), batch_of(*left, *right))


def test_real_photos():
    photos = [getattr(skimage.data, name)() for name in ("astronaut", "page", "text", "coffee")]
    plans = [plan(photo.shape[:2]) for photo in photos]
    batch = SliceBatch.from_images(photos, plans, settings=PIXELS)
    assert batch.patches.dtype == torch.uint8
    assert batch.patches.shape == (sum(p.num_patches for p in plans), 588)
    assert batch.views_per_image == tuple(p.num_views for p in plans)
    overview = batch.split_images()[3].split()[-1]
    coffee = Image.fromarray(photos[3]).resize(plans[3].overview_hw[::-1], Image.Resampling.BICUBIC)
    assert (overview.numpy() == patchify(np.asarray(coffee), 14)).all()


def test_sides_that_no_patch_divides_are_floored():
    """SigLIP's 384 px with patch 14: 27 patches a side."""
    found = plan((300, 384), SlicingConfig(image_size=384, max_slices=1))
    canvas = replace(found.canvases[0], size_hw=(300, 384), content_hw=(300, 384), view_hw=(300, 384))
    canvas = replace(canvas, tiles=(canvas.tiles[0]._replace(bottom=300, right=384),))
    found = replace(found, canvases=(canvas,))
    batch = SliceBatch.from_images([picture(300, 384)], [found])
    assert batch.grids == ((21, 27),)
    assert (unpatchify(batch.patches.numpy(), (21, 27), 14) == noise(300, 384)[:294, :378]).all()


def test_empty_batches():
    empty = SliceBatch.from_images([], [])
    assert (empty.num_views, empty.max_seqlen, empty.lengths, empty.views_per_image) == (0, 0, (), ())
    assert empty.cu_seqlens.tolist() == [0]
    assert empty.split() == ()
    assert empty.split_images() == []
    assert SliceBatch.from_images([], [], patch_size=14).patches.shape == (0, 588)
    assert SliceBatch.from_images([], [], patch_size=14).normalized(PIXELS).patches.shape == (0, 588)
    some = batch_of((40, 70))
    assert_same(SliceBatch.cat([empty, some, empty]), some)
    assert_same(SliceBatch.cat([]), empty)
    assert_same(SliceBatch.cat([empty, empty]), empty)


def test_normalize_applies_mean_and_std_to_each_channel():
    view = np.random.default_rng(3).integers(0, 256, (21, 14, 3), dtype=np.uint8)
    patches = torch.from_numpy(patchify(view, 7))
    before = patches.clone()
    result = normalize(patches, PIXELS)
    assert result.dtype == torch.float32
    expected = (view / 255 - np.array(PIXELS.mean)) / np.array(PIXELS.std)
    np.testing.assert_allclose(unpatchify(result.numpy(), (3, 2), 7), expected, atol=1e-6)
    assert torch.equal(patches, before)


def test_normalize_refuses_what_it_cannot_know():
    raw = torch.zeros(2, 147, dtype=torch.uint8)
    refuses("from_preprocessor", normalize, raw, PixelSettings())
    refuses("may be normalised already", normalize, normalize(raw, PIXELS), PIXELS, error=TypeError)
    refuses(r"got \(2, 146\)", normalize, raw[:, :146], PIXELS)


def test_to_casts_normalised_patches_only():
    batch = batch_of((40, 70), (25, 90))
    assert_same(batch.to("cpu"), batch)
    assert_same(batch.to("cpu", torch.uint8), batch)
    floats = batch.normalized(PIXELS)
    half = floats.to("cpu", torch.bfloat16)
    assert half.patches.dtype == torch.bfloat16
    assert half.cu_seqlens.dtype == torch.int32
    assert torch.equal(half.patches, floats.patches.to(torch.bfloat16))
    assert_same(floats.to(dtype=torch.float64).to(dtype=torch.float32), floats)
    refuses("normalized", batch.to, "cpu", torch.float32, error=TypeError)
    assert batch.to("meta").cu_seqlens.device.type == "meta"


def test_normalised_batches_split_and_join_too():
    batch = batch_of((40, 70), (25, 90)).normalized(PIXELS)
    assert_same(SliceBatch.cat(batch.split_images()), batch)
    refuses("one dtype", SliceBatch.cat, [batch, batch_of((40, 70))], error=TypeError)


def test_pin_memory_pins_both_tensors(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self.shape) or self.clone())
    batch = batch_of((40, 70))
    assert_same(batch.pin_memory(), batch)
    assert pinned == [batch.patches.shape, batch.cu_seqlens.shape]


def test_images_views_and_plans_must_agree():
    image, found = noise(40, 70), plan((40, 70), SMALL)
    refuses("got 1 images and 2 plans", SliceBatch.from_images, [image], [found, found])
    refuses("got 2 lists of views and 1 plans", SliceBatch.from_views, [[], []], [found])
    refuses(r"plan is for an image of 40x70 .* 70x40", SliceBatch.from_images, [noise(70, 40)], [found])
    views = render(image, found)
    assert_same(SliceBatch.from_views([views], [found]), SliceBatch.from_images([image], [found]))
    with pytest.raises(ValueError, match=rf"image 1 has {len(views)} views, got {len(views) - 1}"):
        SliceBatch.from_views([views, views[:-1]], [found, found])
    refuses("view 0 .* is planned as uint8", SliceBatch.from_views, [[views[0][:-7], *views[1:]]], [found])
    refuses("got float64", SliceBatch.from_views, [[views[0] / 255, *views[1:]]], [found])
    other = plan((40, 70), replace(SMALL, patch_size=14))
    refuses(r"one patch size, got \[7, 14\]", SliceBatch.from_images, [image, image], [found, other])
    with pytest.raises(ValueError, match=r"one patch size, got \[7, 14\]"):
        SliceBatch.cat([SliceBatch.from_images([image], [found]), SliceBatch.from_images([image], [other])])


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (lambda b: {"patches": b.patches[1:]}, ValueError, r"hold 45 patches, the tensor is \(44, 147\)"),
        (lambda b: {"patches": b.patches[:, :-1]}, ValueError, "147 values, got 146"),
        (lambda b: {"patches": b.patches.int()}, TypeError, "got torch.int32"),
        (lambda b: {"cu_seqlens": b.cu_seqlens.long()}, TypeError, "got torch.int64"),
        (lambda b: {"cu_seqlens": b.cu_seqlens[:-1]}, ValueError, "cu_seqlens of 4 views"),
        (lambda b: {"cu_seqlens": b.cu_seqlens.flip(0)}, ValueError, r"got \[45, "),
        (lambda b: {"cu_seqlens": b.cu_seqlens.to("meta")}, ValueError, "on meta"),
        (lambda b: {"grids": b.grids[1:]}, ValueError, "have 4 views, there are 3 grids"),
        (lambda b: {"plans": ()}, ValueError, "0 plans have 0 views, there are 4 grids"),
        (lambda b: {"grids": tuple(g[::-1] for g in b.grids)}, ValueError, "view 0 is planned as"),
    ],
)
def test_a_batch_whose_parts_disagree_is_refused(changes, error, message):
    batch = batch_of((40, 70))
    refuses(message, replace, batch, **changes(batch), error=error)
