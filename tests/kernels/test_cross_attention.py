"""varlen_cross_attention: the reference against scalar arithmetic, the others against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from uhd_kernels import calls, varlen_cross_attention
from uhd_kernels.reference import cross_attention_backward

from tests.kernels.ways import DTYPES, IMPLS, NUMPY

pytestmark = NUMPY

# lengths, first table row of each view, table rows
CASES = {
    "one view": ([5], [0], 5),
    "one row": ([1], [3], 4),
    "equal lengths, one stretch": ([4, 4, 4], [2, 2, 2], 6),
    "equal lengths, two stretches": ([4, 4, 4], [0, 5, 0], 9),
    "ragged, out of order": ([7, 1, 3, 7, 1], [0, 7, 8, 0, 2], 11),
    "with empty views": ([0, 6, 0, 2], [0, 1, 7, 3], 7),
    "only empty views": ([0, 0], [1, 0], 1),
}


def make(lengths, offsets, rows, *, latents=3, heads=2, dim=6, dtype=torch.float64, table=True, seed=0):
    """Leaf tensors and index tensors: (q, k, v, key_positions or None), cu_seqlens, keyword arguments."""
    random = torch.Generator().manual_seed(seed)

    def leaf(n):
        return torch.randn(n, heads, dim, generator=random, dtype=torch.float64).to(dtype).requires_grad_()

    q, k, v = leaf(latents), leaf(sum(lengths)), leaf(sum(lengths))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    if not table:
        return (q, k, v), cu_seqlens, {}
    key_positions = leaf(rows)
    keywords = {"key_positions": key_positions, "position_offsets": torch.tensor(offsets, dtype=torch.int32)}
    return (q, k, v, key_positions), cu_seqlens, keywords


def run(leaves, cu_seqlens, keywords, longest, impl, **more):
    """Output, and the gradient of every leaf under one fixed random cotangent."""
    q, k, v = leaves[:3]
    out = varlen_cross_attention(q, k, v, cu_seqlens, longest, impl=impl, **keywords, **more)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad(out, leaves, cotangent)]


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_sdpa_equals_reference_with_gradients(case, table):
    lengths, offsets, rows = CASES[case]
    leaves, cu_seqlens, keywords = make(lengths, offsets, rows, table=table)
    wanted = run(leaves, cu_seqlens, keywords, max(lengths), "reference")
    for impl in ("sdpa", "auto"):
        got = run(leaves, cu_seqlens, keywords, max(lengths), impl)
        for name, a, b in zip(("out", "dq", "dk", "dv", "dpositions"), got, wanted, strict=False):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)), min_size=1, max_size=7),
    st.sampled_from([(1, 1, 1), (1, 3, 5), (9, 2, 16), (64, 1, 24)]),
)
def test_sdpa_equals_reference_on_any_views(views, sizes):
    lengths, offsets = [n for n, _ in views], [o for _, o in views]
    latents, heads, dim = sizes
    leaves, cu_seqlens, keywords = make(lengths, offsets, 14, latents=latents, heads=heads, dim=dim)
    got = run(leaves, cu_seqlens, keywords, 9, "sdpa")
    for a, b in zip(got, run(leaves, cu_seqlens, keywords, 9, "reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_reference_equals_scalar_arithmetic():
    lengths, offsets, rows = CASES["with empty views"]
    (q, k, v, table), cu_seqlens, keywords = make(lengths, offsets, rows, latents=2, dim=3)
    got = varlen_cross_attention(q, k, v, cu_seqlens, 6, scale=0.7, impl="reference", **keywords)
    q, k, v, table = (x.tolist() for x in (q, k, v, table))
    starts = cu_seqlens.tolist()
    for view, (length, offset) in enumerate(zip(lengths, offsets, strict=True)):
        for latent in range(2):
            for head in range(2):
                logits = []
                for i in range(length):
                    key = [k[starts[view] + i][head][c] + table[offset + i][head][c] for c in range(3)]
                    logits.append(0.7 * sum(q[latent][head][c] * key[c] for c in range(3)))
                total = sum(math.exp(x) for x in logits)
                for c in range(3):
                    want = sum(math.exp(x) / total * v[starts[view] + i][head][c] for i, x in enumerate(logits))
                    assert got[view, latent, head, c].item() == pytest.approx(want, abs=1e-12)


def test_reference_gradcheck():
    leaves, cu_seqlens, keywords = make([3, 0, 1, 3], [0, 0, 2, 1], 4, latents=2, dim=2)

    def attention(q, k, v, key_positions):
        changed = {**keywords, "key_positions": key_positions}
        return varlen_cross_attention(q, k, v, cu_seqlens, 3, **changed, impl="reference")

    assert torch.autograd.gradcheck(attention, leaves)


def test_default_scale_is_the_root_of_the_head_dim():
    (q, k, v), cu_seqlens, _ = make([5, 2], [0, 0], 0, dim=9, table=False)
    default = varlen_cross_attention(q, k, v, cu_seqlens, 5)
    torch.testing.assert_close(default, varlen_cross_attention(q, k, v, cu_seqlens, 5, scale=1 / 3))
    assert not torch.allclose(default, varlen_cross_attention(q, k, v, cu_seqlens, 5, scale=1.0))


@pytest.mark.parametrize("impl", IMPLS)
def test_empty_view_is_zero_and_sends_zero_gradients(impl):
    leaves, cu_seqlens, keywords = make([0, 4], [2, 0], 4, dtype=DTYPES.get(impl, torch.float64))
    q, k, v, _ = leaves
    out = varlen_cross_attention(q, k, v, cu_seqlens, 4, impl=impl, **keywords)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert out[1].abs().min() > 0
    for grad in torch.autograd.grad(out[0].sum(), leaves):
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("impl", IMPLS)
def test_nan_in_one_view_stays_there(impl):
    (q, k, v), cu_seqlens, _ = make([3, 4, 3], [0] * 3, 0, table=False, dtype=DTYPES.get(impl, torch.float64))
    with torch.no_grad():
        k[3:7], v[3:7] = math.nan, math.nan
    out = varlen_cross_attention(q, k, v, cu_seqlens, 4, impl=impl)
    assert out[1].isnan().all()
    assert not out[[0, 2]].isnan().any()
    assert not torch.autograd.grad(out[0].sum(), k)[0][:3].isnan().any()


@pytest.mark.parametrize("impl", IMPLS)
def test_no_views_and_longer_max_seqlen(impl):
    (q, k, v, table), cu_seqlens, keywords = make([], [], 4, dtype=DTYPES.get(impl, torch.float64))
    out = varlen_cross_attention(q, k, v, cu_seqlens, 9, impl=impl, **keywords)
    assert out.shape == (0, 3, 2, 6)
    for x, grad in zip((q, k, table), torch.autograd.grad(out.sum(), (q, k, table), allow_unused=True), strict=True):
        if impl == "triton" or x is q:  # elsewhere autograd itself sees that nothing else was used
            assert torch.equal(grad, torch.zeros_like(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_plain_pytorch(dtype):
    """Error against float64 at most twice that of the formula written out in the same dtype."""
    lengths, offsets = [65, 17, 65, 1], [0, 3, 0, 9]
    leaves, cu_seqlens, keywords = make(lengths, offsets, 70, latents=9, dim=20, dtype=dtype)
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    exact = run(doubles, cu_seqlens, {**keywords, "key_positions": doubles[3]}, 65, "reference")
    got = run(leaves, cu_seqlens, keywords, 65, "sdpa")

    q, k, v, table = leaves
    plain = []
    for n, o, start in zip(lengths, offsets, cu_seqlens.tolist(), strict=False):
        keys = k[start : start + n] + table[o : o + n]
        weights = (torch.einsum("qhd,nhd->hqn", q, keys) * 20**-0.5).softmax(-1)
        plain.append(torch.einsum("hqn,nhd->qhd", weights, v[start : start + n]))
    plain = torch.stack(plain)
    cotangent = torch.randn(plain.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(dtype)
    plain = [plain, *torch.autograd.grad(plain, leaves, cotangent)]
    for name, a, b, want in zip(("out", "dq", "dk", "dv", "dpositions"), got, plain, exact, strict=True):
        assert a.dtype == dtype
        error, allowed = (a.double() - want).abs().max(), 2 * (b.double() - want).abs().max()
        assert error <= allowed + torch.finfo(dtype).eps, f"{name}: {error} against {allowed}"


def test_lengths_and_offsets_are_fetched_together(monkeypatch):
    """Each fetch from a device waits for all queued work, so there must be one, not one a view or one a tensor."""
    (q, k, v, _), cu_seqlens, keywords = make(*CASES["ragged, out of order"])
    fetches = []
    fetch = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: fetches.append(x) or fetch(x))
    monkeypatch.setattr(torch.Tensor, "item", lambda x: pytest.fail("a second wait"))
    varlen_cross_attention(q, k, v, cu_seqlens, 7, **keywords)
    assert len(fetches) == 1


def arguments(**changes):
    (q, k, v, _), cu_seqlens, keywords = make([3, 2], [0, 1], 4)
    values = {"q": q, "k": k, "v": v, "cu_seqlens": cu_seqlens, "max_seqlen": 3, **keywords}
    return {**values, **{name: change(values[name]) for name, change in changes.items()}}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": lambda x: x[0]}, ValueError, r"expected q \(Q, H, d\)"),
        ({"v": lambda x: x[None]}, ValueError, r"v \(1, 5, 2, 6\)"),
        ({"v": lambda x: x[:-1]}, ValueError, "k and v must have one shape"),
        ({"q": lambda x: x[:, :1]}, ValueError, "agree in heads and head dim"),
        ({"q": lambda x: x[..., :4]}, ValueError, "agree in heads and head dim"),
        ({"k": lambda x: x.float()}, TypeError, "share one floating dtype"),
        ({"v": lambda x: x.to("meta")}, ValueError, "on one device"),
        ({"cu_seqlens": lambda x: x.long()}, TypeError, "cu_seqlens must be int32"),
        ({"cu_seqlens": lambda x: x[None]}, ValueError, "cu_seqlens must have one dimension"),
        ({"cu_seqlens": lambda x: x[:0]}, ValueError, "cu_seqlens is empty"),
        ({"cu_seqlens": lambda x: x.to("meta")}, ValueError, "cu_seqlens must be on cpu or on the host"),
        ({"cu_seqlens": lambda x: x + 1}, ValueError, "from 0 to N = 5"),
        ({"cu_seqlens": lambda x: x - torch.tensor([0, 0, 1]).int()}, ValueError, "from 0 to N = 5"),
        ({"cu_seqlens": lambda x: x + torch.tensor([0, 3, 0]).int()}, ValueError, "must not fall; view 1"),
        ({"max_seqlen": lambda x: 2}, ValueError, "max_seqlen=2, but view 0 has 3 rows"),
        ({"key_positions": lambda x: None}, ValueError, "go together"),
        ({"position_offsets": lambda x: None}, ValueError, "go together"),
        ({"position_offsets": lambda x: x[:1]}, ValueError, "1 entries for 2 views"),
        ({"position_offsets": lambda x: x.long()}, TypeError, "position_offsets must be int32"),
        ({"position_offsets": lambda x: x + 2}, ValueError, "view 0 asks for rows 2:5 of key_positions, which has 4"),
        ({"position_offsets": lambda x: x - 1}, ValueError, "view 0 asks for rows -1:2"),
        ({"key_positions": lambda x: x[:, :1]}, ValueError, r"key_positions must be \(L, 2, 6\)"),
        ({"key_positions": lambda x: x.float()}, TypeError, "cast the table"),
        ({"key_positions": lambda x: x.to("meta")}, ValueError, "move the table"),
    ],
)
def test_errors_name_what_came(changes, error, message):
    with pytest.raises(error, match=message):
        varlen_cross_attention(**arguments(**changes))


def test_unknown_implementation_lists_the_available_ones():
    with pytest.raises(ValueError, match=r"impl='flash' is unknown; choose one of \['auto', 'triton', 'sdpa', 'ref"):
        varlen_cross_attention(**arguments(), impl="flash")


def test_triton_on_the_cpu_says_why_not():
    with pytest.raises(ValueError, match=r"impl='triton' cannot run: the tensors are on the CPU.*TRITON_INTERPRET"):
        varlen_cross_attention(**arguments(), impl="triton")


def test_auto_on_the_cpu_is_sdpa_and_the_counter_says_so():
    before = dict(calls)
    varlen_cross_attention(**arguments())
    assert calls["sdpa"] == before.get("sdpa", 0) + 1
    assert calls["triton"] == before.get("triton", 0) == 0


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_written_out_gradients_are_those_of_autograd(case, table):
    lengths, offsets, rows = CASES[case]
    leaves, cu_seqlens, keywords = make(lengths, offsets, rows, table=table)
    wanted = run(leaves, cu_seqlens, keywords, max(lengths), "reference")
    cotangent = torch.randn(wanted[0].shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    got = cross_attention_backward(
        cotangent,
        *(x.detach() for x in leaves[:3]),
        cu_seqlens.tolist(),
        key_positions=leaves[3].detach() if table else None,
        offsets=offsets,
        scale=6**-0.5,
    )
    assert (got[3] is None) == (not table)
    for a, b in zip(got, wanted[1:], strict=False):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
