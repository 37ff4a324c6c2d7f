"""Interpolated tables, bucket ids and sines against the goldens, and what must hold for any grid."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import refuses
from uhd.positions import bucket_position_ids, interpolate_pos_embed, sincos_2d

GOLDEN = np.load(Path(__file__).parent / "golden" / "pos_embed.npz")

# key prefix -> (table, side, antialias, rows before the grid's)
TABLES = {
    "clip_v1": (GOLDEN["clip_table"][1:], 24, False, 1),
    "clip_march2024_padded": (GOLDEN["clip_table"][1:], 24, False, 1),
    "get_abs_pos_8to": (GOLDEN["abs_pos_table_8x8"], 8, False, 0),
    "get_abs_pos_sincos12to": (GOLDEN["sincos_v1_dim16_grid12"], 12, False, 0),
    "moonvit": (GOLDEN["moonvit_table_16x16"].reshape(256, 8), 16, False, 0),
    "timm_resample": (GOLDEN["timm_table_27x27"], 27, True, 0),
}
RESIZED = [key for key in GOLDEN.files if key.rsplit("_", 1)[0] in TABLES]
IDS = [key for key in GOLDEN.files if key.startswith("ids_")]
sides = st.integers(1, 40)


def size_of(key: str) -> tuple[int, int]:
    rows, columns = key.rsplit("_", 1)[1].split("x")
    return int(rows), int(columns)


@pytest.mark.parametrize("key", RESIZED)
def test_resized_tables_equal_the_references(key: str) -> None:
    table, side, antialias, before = TABLES[key.rsplit("_", 1)[0]]
    rows, columns = size_of(key)
    ours = interpolate_pos_embed(torch.tensor(table), (side, side), (rows, columns), antialias=antialias)
    theirs = torch.tensor(GOLDEN[key])[before : before + rows * columns]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_goldens_keep_the_extremes() -> None:
    assert {size_of(key) for key in RESIZED} >= {(1, 1), (1, 576), (48, 12), (19, 29), (29, 19), (32, 32)}
    assert len(IDS) == 72


@pytest.mark.parametrize("key", IDS)
def test_bucket_ids_equal_the_references(key: str) -> None:
    code, side = re.fullmatch(r"ids_(hf|remote26)_side(\d+)_\d+x\d+", key).groups()
    rule = {"hf": "transformers", "remote26": "remote"}[code]
    assert bucket_position_ids(size_of(key), int(side), rule).tolist() == GOLDEN[key].tolist()


@pytest.mark.parametrize("key", [key for key in IDS if key.startswith(("ids_hf_side70", "ids_hf_side14"))])
def test_integer_buckets_are_what_transformers_means(key: str) -> None:
    side = int(key.split("side")[1].split("_")[0])
    assert bucket_position_ids(size_of(key), side).tolist() == GOLDEN[key].tolist()


def test_the_remote_rule_moves_four_of_49_rows() -> None:
    exact = bucket_position_ids((49, 1), 70) // 70
    remote = bucket_position_ids((49, 1), 70, "remote") // 70
    assert (exact - remote).nonzero().flatten().tolist() == [7, 14, 35, 42]


@given(sides, sides, st.integers(1, 80), st.sampled_from(["integer", "transformers", "remote"]))
def test_bucket_ids_stay_in_the_table_and_in_order(rows: int, columns: int, side: int, rule: str) -> None:
    ids = bucket_position_ids((rows, columns), side, rule).view(rows, columns)
    assert ids.min() == 0
    assert ids.max() < side * side
    assert (ids.diff(dim=0) >= 0).all()
    assert (ids.diff(dim=1) >= 0).all()
    if rule == "integer":
        want = [[(i * side // rows) * side + j * side // columns for j in range(columns)] for i in range(rows)]
        assert ids.tolist() == want


def test_equal_counts_on_another_grid_are_interpolated() -> None:
    table = torch.randn(8 * 32, 4)
    resized = interpolate_pos_embed(table, (8, 32), (16, 16))
    assert resized.shape == table.shape
    assert (resized - table).abs().mean() > 0.1


@pytest.mark.parametrize(
    "mode, antialias", [("bicubic", True), ("bilinear", False), ("bilinear", True), ("nearest", 0)]
)
@given(source=st.tuples(sides, sides), target=st.tuples(sides, sides))
@settings(max_examples=25)
def test_every_mode_keeps_axes_apart(mode: str, antialias: bool, source: tuple, target: tuple) -> None:
    """A table of row numbers has equal columns after any resize; the transposed table gives the transposed result."""
    rows = torch.arange(source[0], dtype=torch.float32)[:, None].expand(source)
    resized = interpolate_pos_embed(rows.reshape(-1, 1), source, target, mode, bool(antialias)).view(target)
    torch.testing.assert_close(resized, resized[:, :1].expand(target), rtol=1e-5, atol=1e-4)
    flipped = interpolate_pos_embed(rows.T.reshape(-1, 1), source[::-1], target[::-1], mode, bool(antialias))
    torch.testing.assert_close(flipped.view(target[::-1]).T, resized, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("target", [(9, 1), (1, 9), (1, 1), (2, 1), (3, 4)])
def test_antialias_is_one_resize_after_the_other(mode: str, target: tuple[int, int]) -> None:
    """Also to one column, where torch's own two-axis resize on the CPU repeats its first row."""
    table = torch.randn(4 * 6, 3, dtype=torch.float64)
    ours = interpolate_pos_embed(table, (4, 6), target, mode, True)
    along = [
        F.interpolate(torch.eye(n, dtype=torch.float64)[None, :, None], (1, m), mode=mode, antialias=True)
        for n, m in zip((4, 6), target, strict=True)
    ]
    expected = torch.einsum("hi,hwd,wj->ijd", along[0][0, :, 0], table.view(4, 6, 3), along[1][0, :, 0])
    torch.testing.assert_close(ours, expected.flatten(0, 1))


@given(source=sides, target=st.tuples(sides, sides))
@settings(max_examples=25)
def test_nearest_is_the_integer_bucket(source: int, target: tuple[int, int]) -> None:
    table = torch.arange(source * source, dtype=torch.float64)[:, None]
    ids = interpolate_pos_embed(table, (source, source), target, "nearest").flatten()
    assert ids.long().tolist() == bucket_position_ids(target, source).tolist()


@pytest.mark.parametrize("mode, antialias", [("bicubic", False), ("bicubic", True), ("bilinear", False)])
@given(source=st.tuples(sides, sides), target=st.tuples(sides, sides.filter(lambda n: n > 1)))
@settings(max_examples=25)
def test_resized_tables_equal_torch(mode: str, antialias: bool, source: tuple, target: tuple) -> None:
    table = torch.randn(source[0] * source[1], 3, dtype=torch.float64)
    image = table.T.unflatten(1, source)[None]
    theirs = F.interpolate(image, target, mode=mode, antialias=antialias).flatten(2)[0].T
    torch.testing.assert_close(interpolate_pos_embed(table, source, target, mode, antialias), theirs)
    exact = interpolate_pos_embed(table.float(), source, target, mode, antialias)
    torch.testing.assert_close(exact, theirs.float(), atol=1e-4, rtol=0)


def test_autocast_leaves_tables_exact() -> None:
    table = torch.randn(16, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = interpolate_pos_embed(table, (4, 4), (3, 7))
    assert torch.equal(mixed, interpolate_pos_embed(table, (4, 4), (3, 7)))


def test_half_precision_is_computed_in_float32() -> None:
    table = torch.randn(24 * 24, 8).bfloat16()
    ours = interpolate_pos_embed(table, (24, 24), (19, 29))
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, interpolate_pos_embed(table.float(), (24, 24), (19, 29)).bfloat16())


@pytest.mark.parametrize("mode", ["bicubic", "bilinear", "nearest"])
def test_gradients_reach_the_table(mode: str) -> None:
    table = torch.randn(3 * 5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: interpolate_pos_embed(t, (3, 5), (4, 7), mode), (table,))


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ((torch.zeros(577, 8), (24, 24), (3, 4)), ValueError, "576 rows; got .577, 8."),
        ((torch.zeros(6, 8), (2, 3), (0, 4)), ValueError, r"dst_hw must be at least \(1, 1\); got \(0, 4\)"),
        ((torch.zeros(6, 8), (2, 3), (1.5, 4)), TypeError, "dst_hw must be two integers"),
        ((torch.zeros(6, 8), 6, (2, 2)), TypeError, "src_hw must be two integers"),
        ((torch.zeros(6, 8), (2, 3), (2, 2), "area"), ValueError, "bicubic, bilinear, nearest; got 'area'"),
        ((torch.zeros(6, 8), (2, 3), (2, 2), "nearest", True), ValueError, "antialias needs"),
        ((torch.zeros(6, 8, dtype=torch.int64), (2, 3), (2, 2)), TypeError, "floating point; got torch.int64"),
    ],
)
def test_bad_tables_raise(arguments: tuple, error: type[Exception], words: str) -> None:
    refuses(words, interpolate_pos_embed, *arguments, error=error)


def test_bad_buckets_raise() -> None:
    refuses("grid_hw", bucket_position_ids, (0, 3), 70)
    refuses("table_side", bucket_position_ids, (2, 3), 0)
    refuses("rule must be one of", bucket_position_ids, (2, 3), 70, "float")


# --- sines and cosines


@pytest.mark.parametrize(("dim", "grid_hw"), [(4, (1, 1)), (16, (5, 7)), (24, (70, 3)), (32, (1, 48)), (64, (8, 8))])
def test_sines_equal_the_float64_formula(dim, grid_hw):
    rows, columns = grid_hw
    table = sincos_2d(dim, grid_hw)
    assert table.dtype == torch.float32
    want = np.empty((rows * columns, dim))
    quarter = dim // 4
    for y, x, k in np.ndindex(rows, columns, quarter):
        angles = np.array([x, y]) * 10000.0 ** (-k / quarter)
        want[y * columns + x, k::quarter] = np.stack([np.sin(angles), np.cos(angles)], axis=1).flatten()
    np.testing.assert_allclose(table.numpy(), want, atol=1e-5)


def test_first_half_is_x_and_rows_are_row_major():
    """Row 9 of MAE's 8 x 8 table of width 16, that is y = 1, x = 1, and row 2: numbers of the reference."""
    table = sincos_2d(16, (8, 8))
    one = [0.84147102, 0.09983342, 0.00999983, 0.001, 0.54030228, 0.99500418, 0.99995, 0.9999995]
    two = [0.90929741, 0.19866933, 0.01999867, 0.002, -0.41614684, 0.98006660, 0.9998, 0.999998]
    zero = [0, 0, 0, 0, 1, 1, 1, 1]
    torch.testing.assert_close(table[9], torch.tensor(one + one), atol=1e-6, rtol=0)
    torch.testing.assert_close(table[2], torch.tensor(two + zero, dtype=torch.float32), atol=1e-6, rtol=0)


def test_the_sines_of_a_smaller_grid_are_a_crop_of_a_larger():
    large = sincos_2d(24, (70, 70)).reshape(70, 70, 24)
    assert torch.equal(sincos_2d(24, (5, 17)).reshape(5, 17, 24), large[:5, :17])


@pytest.mark.parametrize(("dim", "grid_hw"), [(18, (4, 4)), (0, (4, 4)), (-4, (4, 4)), (16, (0, 3)), (16, (3, -1))])
def test_bad_sines_raise(dim, grid_hw):
    refuses(r"multiple of 4|at least 1 patch", sincos_2d, dim, grid_hw)
