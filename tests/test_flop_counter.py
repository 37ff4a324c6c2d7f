"""The counter of matrix products against numbers written by hand: no two sizes of a product are alike."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from uhd_kernels.op import attention_op

from uhd.flop_counter import count_flops
from uhd.positions import interpolate_pos_embed


def ones(*shape, **keywords):
    return torch.ones(shape, **keywords)


@pytest.mark.parametrize(
    "forward, wanted",
    [
        (lambda: F.linear(ones(5, 3), ones(4, 3)), 2 * 5 * 3 * 4),
        (lambda: F.linear(ones(2, 5, 3), ones(4, 3), ones(4)), 2 * 2 * 5 * 3 * 4),
        (lambda: ones(5, 3) @ ones(3, 4), 2 * 5 * 3 * 4),
        (lambda: ones(7, 5, 3) @ ones(3, 4), 2 * 7 * 5 * 3 * 4),
        (lambda: ones(7, 1, 5, 3) @ ones(2, 3, 4), 2 * 7 * 2 * 5 * 3 * 4),
        (lambda: torch.bmm(ones(7, 5, 3), ones(7, 3, 4)), 2 * 7 * 5 * 3 * 4),
        (lambda: torch.addmm(ones(5, 1), ones(5, 3), ones(3, 4)), 2 * 5 * 3 * 4),
        (lambda: torch.baddbmm(ones(7, 5, 4), ones(7, 5, 3), ones(7, 3, 4)), 2 * 7 * 5 * 3 * 4),
        (lambda: torch.einsum("qhd,nhd->hqn", ones(5, 7, 3), ones(4, 7, 3)), 2 * 7 * 5 * 3 * 4),
        (lambda: (ones(5, 3) * 2 + 1).softmax(-1).sum(), 0),
        (lambda: F.interpolate(ones(1, 2, 3, 4), (5, 6), mode="bilinear"), 0),
    ],
)
def test_products(forward, wanted):
    assert count_flops(forward) == wanted


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
@pytest.mark.parametrize("kind", ["plain", "masked", "causal"])
def test_attention_is_counted_over_all_pairs_whichever_kernel_runs(kind, backend, device):
    with torch.device(device), sdpa_kernel([backend, SDPBackend.MATH]):  # not every kernel takes everything
        q, k = ones(2, 7, 5, 8), ones(2, 7, 9, 8)
        mask = ones(5, 9, dtype=torch.bool) if kind == "masked" else None
        found = count_flops(lambda: F.scaled_dot_product_attention(q, k, k, mask, is_causal=kind == "causal"))
    assert found == 4 * 2 * 7 * 5 * 9 * 8


def test_values_of_another_width():
    q, k, v = ones(2, 7, 5, 8), ones(2, 7, 9, 8), ones(2, 7, 9, 4)
    assert count_flops(lambda: F.scaled_dot_product_attention(q, k, v)) == 2 * 2 * 7 * 5 * 9 * (8 + 4)


def test_shared_keys_are_counted_for_every_head():
    q, kv = ones(2, 6, 5, 8), ones(2, 3, 9, 8)
    found = count_flops(lambda: F.scaled_dot_product_attention(q, kv, kv, enable_gqa=True))
    assert found == 4 * 2 * 6 * 5 * 9 * 8


@pytest.mark.parametrize("weights", [True, False])
def test_a_layer_of_torch(weights):
    layer, queries, keys = nn.MultiheadAttention(8, 2, batch_first=True).eval(), ones(3, 5, 8), ones(3, 9, 8)
    wanted = 2 * 3 * 8 * 8 * (5 + 9 + 9 + 5) + 4 * 3 * 5 * 9 * 8
    assert count_flops(lambda: layer(queries, keys, keys, need_weights=weights)) == wanted


def test_resizing_of_position_tables_is_left_out():
    table, x = ones(4, 3), ones(6, 3)
    assert count_flops(lambda: F.linear(x + interpolate_pos_embed(table, (2, 2), (2, 3)), ones(5, 3))) == 2 * 6 * 3 * 5


def test_our_own_operator():
    """Every key belongs to one view and meets its latents."""
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    q, kv = ones(5, 2, 8), ones(9, 2, 8)
    assert count_flops(lambda: attention_op(q, kv, kv, bounds, 5, None, None, 1.0, "sdpa")) == 4 * 5 * 9 * 2 * 8


@torch.library.custom_op("uhd_tests::product", mutates_args=())
def own_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a @ b


def backward():
    with torch.enable_grad():
        x = ones(1, 2, 5, 8).requires_grad_()
        F.scaled_dot_product_attention(x, x, x).sum().backward()


@pytest.mark.parametrize(
    "forward, named",
    [
        (lambda: F.conv2d(ones(1, 3, 8, 8), ones(4, 3, 2, 2)), "aten.convolution.default"),
        (lambda: torch.mv(ones(5, 3), ones(3)), "aten.mv.default"),
        (lambda: F.bilinear(ones(5, 3), ones(5, 4), ones(2, 3, 4)), "aten._trilinear.default"),
        (lambda: own_product(ones(5, 3), ones(3, 4)), "uhd_tests.product.default"),
        (lambda: torch.inference_mode()(F.linear)(ones(5, 3), ones(4, 3)), "aten.linear.default"),
        (backward, "backward"),
    ],
)
def test_a_product_that_would_be_missed_is_refused(forward, named):
    with pytest.raises(NotImplementedError, match=rf"{named}.* may multiply matrices"):
        count_flops(forward)
