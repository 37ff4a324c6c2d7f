"""The Triton kernels on the CPU. Not collected by itself: `test_triton.py` runs it where Triton interprets.

The interpreter is chosen when Triton is imported (TRITON_INTERPRET=1), so these need a process of their own.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from triton.runtime import interpreter
from uhd_kernels import calls, cross_attention, varlen_cross_attention

from tests.kernels.ways import NUMPY

pytestmark = NUMPY
NAMES = ("out", "dq", "dk", "dv", "dtable")

# lengths, first table row of each view, table rows, latents, heads, head dim
CASES = {
    "Q64-D64 with empty views": ([0, 17, 0, 63], [0, 3, 9, 0], 70, 64, 2, 64),
    "Q64-D64 two full views": ([551, 576], [9, 0], 576, 64, 1, 64),
    "Q144-D72": ([63, 1], [4, 0], 67, 144, 2, 72),
    "Q144-D128 more than one block": ([1, 80], [79, 0], 80, 144, 1, 128),
    "Q1-D128": ([1, 17, 130], [129, 3, 0], 130, 1, 2, 128),
    "Q1-D32 only empty views": ([0, 0], [0, 1], 2, 1, 1, 32),
    "Q256-D80 two launches forward": ([33], [2], 40, 256, 1, 80),
    "Q9-D4 padded inside": ([5, 12], [0, 5], 17, 9, 3, 4),
    "Q65-D96": ([40], [0], 40, 65, 1, 96),
}


@pytest.fixture(autouse=True)
def only_triton():
    """Every test is about the kernels, so nothing else may have computed."""
    calls.clear()
    yield
    assert calls["triton"] > 0
    assert calls["triton"] >= calls["sdpa"], "SDPA is there to compare with"


def processors(monkeypatch, number, arch=90):
    """Pretend a chip of so many processors: with more than there are programs, keys are split."""
    monkeypatch.setattr(cross_attention, "chip", lambda device: (arch, number))


def configured_for(monkeypatch, width):
    """Take the configurations of that dtype whatever the data's: 16 bits have other tiles and another backward."""

    def instead(choose):
        return lambda arch, dim, _, latents: choose(arch, dim, width, latents)

    for name in ("forward_config", "backward_config"):
        monkeypatch.setattr(cross_attention, name, instead(getattr(cross_attention, name)))


def make(case, dtype, *, seed=0, table=True):
    lengths, _, rows, latents, heads, dim = CASES[case]
    random = torch.Generator().manual_seed(seed)
    sizes = (latents, sum(lengths), sum(lengths), rows)[: 4 if table else 3]
    leaves = [torch.randn(n, heads, dim, generator=random, dtype=torch.float64).to(dtype) for n in sizes]
    return [x.requires_grad_() for x in leaves]


def attend(case, impl, q, k, v, table=None, **more):
    lengths, offsets = CASES[case][:2]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    keywords = {}
    if table is not None:
        keywords = {"key_positions": table, "position_offsets": torch.tensor(offsets, dtype=torch.int32)}
    return varlen_cross_attention(q, k, v, cu_seqlens, max(lengths), **keywords, impl=impl, **more)


def with_gradients(out, leaves):
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return [out, *torch.autograd.grad(out, leaves, cotangent.to(out.dtype))]


def plain(case, q, k, v, table=None):
    """The formula written out in the dtype of the input, as anyone would without a kernel."""
    lengths, offsets = CASES[case][:2]
    views, start = [], 0
    for length, offset in zip(lengths, offsets, strict=True):
        keys, values = k[start : start + length], v[start : start + length]
        if table is not None:
            keys = keys + table[offset : offset + length]
        weights = (torch.einsum("qhd,nhd->hqn", q, keys) * q.shape[-1] ** -0.5).softmax(-1)
        views.append(torch.einsum("hqn,nhd->qhd", weights, values))
        start += length
    return torch.stack(views)


def compare(case, leaves, got):
    """At most twice the error of plain PyTorch (the worse of formula and SDPA) against float64.

    Besides, logits are rounded to float32 once in the forward and once, in another order, in the backward. That
    changes a weight by as much as the logit is large, which shows where plain PyTorch is exact: a view of one key.
    """
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    exact = with_gradients(attend(case, "reference", *doubles), doubles)
    formula = with_gradients(plain(case, *leaves), leaves)
    fused = with_gradients(attend(case, "sdpa", *leaves), leaves)
    logit = (
        (torch.einsum("qhd,nhd->qhn", *(x.detach() for x in doubles[:2])) * leaves[0].shape[-1] ** -0.5).abs().max()
        if exact[0].any()
        else 0
    )
    for name, a, b, c, want in zip(NAMES, got, formula, fused, exact, strict=False):
        assert a.dtype == b.dtype
        assert a.shape == want.shape
        error, *rough = ((x.double() - want).norm() for x in (a, b, c))
        allowed = 2 * max(rough) + 2 * torch.finfo(torch.float32).eps * logit * want.norm()
        assert error <= allowed, f"{name}: {error} against {allowed}"


@pytest.mark.parametrize(
    ("case", "width"),
    [(case, torch.float32) for case in CASES if not case.startswith(("Q64-D64 two", "Q144-D128"))]
    + [(case, torch.bfloat16) for case in CASES if case.startswith(("Q64", "Q144-D128", "Q1-D128"))],
)
def test_equals_the_reference(monkeypatch, case, width):
    configured_for(monkeypatch, width)
    leaves = make(case, torch.float32)
    compare(case, leaves, with_gradients(attend(case, "triton", *leaves), leaves))
    assert calls["triton"] == calls["triton backward"] == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["Q64-D64 with empty views", "Q144-D72"])
def test_low_precision(case, dtype):
    leaves = make(case, dtype)
    compare(case, leaves, with_gradients(attend(case, "triton", *leaves), leaves))


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100, "hip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("latents", [1, 64, 144])
@pytest.mark.parametrize("dim", [64, 72, 128])
def test_every_configuration_on_ragged_views(monkeypatch, arch, dtype, latents, dim):
    one = 1 if latents > 1 or dtype != torch.float32 else 2  # with one key and one latent, plain PyTorch has no error
    lengths = [0, one, 17, 63, 551, 576]
    monkeypatch.setitem(CASES, "all", (lengths, [0, 3, 0, 9, 2, 0], 576, latents, 1, dim))
    processors(monkeypatch, 1, arch)
    leaves = make("all", dtype)
    compare("all", leaves, with_gradients(attend("all", "triton", *leaves), leaves))


@pytest.mark.parametrize("case", ["Q64-D64 with empty views", "Q144-D128 more than one block"])
def test_split_keys(monkeypatch, case):
    """A chip with more processors than programs: keys are cut, and the parts are joined in their order."""
    leaves = make(case, torch.float32)
    processors(monkeypatch, 12)
    assert cross_attention.split_keys(4, 576, 64, 12) == (3, 192)
    assert cross_attention.split_keys(12, 576, 64, 12) == (1, 576)
    launched = []
    combine = cross_attention.combine_kernel

    class Spy:
        def __getitem__(self, grid):
            launched.append(grid)
            return combine[grid]

    monkeypatch.setattr(cross_attention, "combine_kernel", Spy())
    compare(case, leaves, with_gradients(attend(case, "triton", *leaves), leaves))
    assert len(launched) == 1


@pytest.mark.parametrize("latents", [64, 144])
def test_keys_and_values_are_read_once_and_written_once(monkeypatch, latents):
    """Every load and store of the interpreted kernels, counted by address: forward, then backward."""
    monkeypatch.setitem(CASES, "counted", ([301, 0, 275], [0, 0, 0], 1, latents, 1, 64))
    configured_for(monkeypatch, torch.bfloat16)
    touched = {"load": [], "store": []}
    builder = interpreter.InterpreterBuilder
    for way in touched:
        original = getattr(builder, f"create_masked_{way}")
        position = 1 if way == "load" else 2  # of the mask, after the pointers (and the values to store)

        def spy(self, *arguments, way=way, original=original, position=position):
            touched[way].append(arguments[0].data[arguments[position].data])
            return original(self, *arguments)

        monkeypatch.setattr(builder, f"create_masked_{way}", spy)

    def times(way, x):
        """How often each number of a tensor was touched; the set of those counts."""
        first, size = x.data_ptr(), x.element_size()
        at = np.concatenate([np.asarray(a, dtype=np.uint64) for a in touched[way]]).astype(np.int64) - first
        at = at[(at >= 0) & (at < x.numel() * size)]
        return set(np.bincount(at // size, minlength=x.numel()).tolist())

    q, k, v = leaves = make("counted", torch.float32, table=False)
    out = attend("counted", "triton", *leaves)
    assert times("load", k) == times("load", v) == {1}
    assert times("store", out) == {1}
    moved = 4 * sum(a.size for way in touched for a in touched[way])
    floor = 4 * (q.numel() + k.numel() + v.numel() + out.numel())
    assert floor < moved < 1.3 * floor

    for way in touched:
        touched[way].clear()
    _, dk, dv = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert times("load", k) == times("load", v) == {1}
    assert times("store", dk) == times("store", dv) == {1}


@pytest.mark.parametrize("case", ["Q9-D4 padded inside", "Q144-D72"])
def test_without_a_table(monkeypatch, case):
    configured_for(monkeypatch, torch.bfloat16)
    leaves = make(case, torch.float32, table=False)
    compare(case, leaves, with_gradients(attend(case, "triton", *leaves), leaves))


@pytest.mark.parametrize(
    ("case", "number"),
    [("Q64-D64 with empty views", 1), ("Q144-D128 more than one block", 4), ("Q9-D4 padded inside", 9)],
)
def test_two_runs_give_the_same_bits(monkeypatch, case, number):
    processors(monkeypatch, number)
    leaves = make(case, torch.float16)
    first, second = (with_gradients(attend(case, "triton", *leaves), leaves) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.filterwarnings(
    "ignore:overflow encountered in exp2:RuntimeWarning"
)  # of keys past the end, dropped after
@pytest.mark.parametrize("sign", [-1, 1])
def test_large_logits_neither_overflow_nor_vanish(sign):
    """Keys that all point away from a latent: its logsumexp is so low that its inverse overflows float32."""
    case = "Q64-D64 with empty views"
    q, k, v = (x.detach().abs() for x in make(case, torch.float32, table=False))
    leaves = [(20 * q).requires_grad_(), (sign * 20 * k).requires_grad_(), v.requires_grad_()]
    got = with_gradients(attend(case, "triton", *leaves), leaves)
    want = with_gradients(attend(case, "reference", *leaves), leaves)
    for a, b in zip(got, want, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


@pytest.mark.parametrize("layout", ["k and v of one projection", "transposed heads", "transposed dims", "expanded"])
def test_inputs_that_are_not_contiguous(layout):
    case = "Q9-D4 padded inside"
    dense = make(case, torch.float32)

    def rearrange(x):
        x = x.detach()
        if layout == "k and v of one projection":
            return torch.stack([x, x], 1)[:, 0]
        if layout == "transposed heads":
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        if layout == "transposed dims":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        return x[:, :1].expand(-1, x.shape[1], -1)

    leaves = [rearrange(x).requires_grad_() for x in dense]
    assert all(not x.is_contiguous() for x in leaves)
    if layout == "k and v of one projection":
        leaves[3] = dense[3]  # whose rows are half as far apart, then
    compare(case, leaves, with_gradients(attend(case, "triton", *leaves), leaves))


def test_gradient_that_is_not_contiguous():
    case = "Q9-D4 padded inside"
    leaves = make(case, torch.float32)
    summed = torch.autograd.grad(attend(case, "triton", *leaves).sum(), leaves)  # its cotangent has strides 0
    out = attend(case, "triton", *leaves)
    for a, b in zip(summed, torch.autograd.grad(out, leaves, torch.ones_like(out)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.double(), "the dtype is torch.float64"),
        (lambda x: torch.zeros(len(x), 3, 129), "d from 1 to 128"),
        (lambda x: x.repeat(29, 1, 1), r"q \(Q, H, d\) is \(261, 3, 4\), and the kernels take Q from 1 to 256"),
        (lambda x: x.to("meta"), "the tensors are on meta"),
    ],
)
def test_what_the_kernels_cannot_take_is_refused_before_a_launch(change, message):
    calls["triton"] += 1  # nothing runs here, which is the point
    case = "Q9-D4 padded inside"
    q, k, v, table = make(case, torch.float32)
    q = change(q.detach())
    k, v, table = (torch.zeros(len(x), *q.shape[1:], dtype=q.dtype, device=q.device) for x in (k, v, table))
    with pytest.raises(ValueError, match=f"impl='triton' cannot run: .*{message}"):
        attend(case, "triton", q, k, v, table)
    assert calls["triton"] == 1


def test_an_interpreter_that_fails_is_refused_before_a_launch(monkeypatch):
    calls["triton"] += 1  # nothing runs here either
    monkeypatch.setattr(cross_attention, "interpreter_problem", lambda: "it cannot loop")
    with pytest.raises(ValueError, match="impl='triton' cannot run: it cannot loop; use impl='auto' or 'sdpa'"):
        attend("Q9-D4 padded inside", "triton", *make("Q9-D4 padded inside", torch.float32))
    assert calls["triton"] == 1


def test_a_view_past_32_bits_is_refused():
    calls["triton"] += 1  # nor here
    q = torch.zeros(1, 1, 16)
    far = torch.zeros(2**20 + 1).as_strided((2, 1, 16), (2**20, 0, 0))
    cross_attention._check_reach(2**11 - 1, q, q, far, None)
    with pytest.raises(ValueError, match=r"a view of 2048 rows, 1048576 numbers apart, is past the 2\*\*31"):
        cross_attention._check_reach(2**11, q, q, far, None)


def test_forward_mode_is_refused():
    """An operator without a forward-mode rule would give a zero tangent without a word."""
    q, k = torch.randn(3, 2, 16), torch.randn(5, 2, 16)
    bounds = torch.tensor([0, 4, 4, 5], dtype=torch.int32)

    def attend(latents):
        return varlen_cross_attention(latents, k, k, bounds, 4, impl="triton")

    assert attend(q).isfinite().all()
    with pytest.raises(ValueError, match="no forward-mode derivative"):
        torch.func.jvp(attend, (q,), (q,))
