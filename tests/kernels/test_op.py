"""The operator seen by autograd and torch.compile, and what surrounds it: autocast, checkpointing, vmap, no Triton."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from uhd_kernels import calls, varlen_cross_attention
from uhd_kernels.op import attention_backward_op, attention_op

from tests.kernels.ways import DTYPES, IMPLS, INTERPRETED, NUMPY, PORTABLE

ROOT = Path(__file__).parents[2]
BOUNDS, OFFSETS, LONGEST = [0, 4, 4, 9, 10], [0, 1, 1, 6], 5
pytestmark = NUMPY


def leaves(dtype=torch.float64, *, seed=0):
    random = torch.Generator().manual_seed(seed)
    sizes = (3, 10, 10, 7)  # q, k, v, table
    return [torch.randn(n, 2, 6, generator=random, dtype=torch.float64).to(dtype).requires_grad_() for n in sizes]


def attend(q, k, v, table, *, impl="auto", **more):
    cu_seqlens, offsets = torch.tensor(BOUNDS, dtype=torch.int32), torch.tensor(OFFSETS, dtype=torch.int32)
    keywords = {} if table is None else {"key_positions": table, "position_offsets": offsets}
    return varlen_cross_attention(q, k, v, cu_seqlens, LONGEST, **keywords, impl=impl, **more)


def gradients(out, inputs):
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)
    return torch.autograd.grad(out, inputs, cotangent)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of opcheck itself
@pytest.mark.parametrize(("impl", "table"), [("sdpa", True), ("reference", False), *[("triton", True)] * INTERPRETED])
def test_opcheck(impl, table):
    q, k, v, rows = leaves(DTYPES.get(impl, torch.float64))
    cu_seqlens, offsets = torch.tensor(BOUNDS, dtype=torch.int32), torch.tensor(OFFSETS, dtype=torch.int32)
    arguments = (q, k, v, cu_seqlens, LONGEST, rows if table else None, offsets if table else None, 0.4, impl)
    results = torch.library.opcheck(attention_op, arguments)
    assert len(results) == 4
    assert set(results.values()) == {"SUCCESS"}
    with torch.no_grad():
        out, lse, index = attention_op(*arguments)
        grad = torch.randn_like(out)
    arguments = (grad, q, k, v, out, lse, index, LONGEST, rows if table else None, 0.4, impl, table)
    torch.library.opcheck(attention_backward_op, [x.detach() if torch.is_tensor(x) else x for x in arguments])


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
@pytest.mark.parametrize("table", [False, True])
def test_compiles_to_one_graph(impl, table):
    inputs = leaves(DTYPES.get(impl, torch.float64))
    inputs = inputs if table else [*inputs[:3], None]
    given = [x for x in inputs if x is not None]
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    calls.clear()
    got = compiled(*inputs, impl=impl)
    slopes, ran = gradients(got, given), "sdpa" if impl == "auto" else impl
    assert calls == {ran: 1, f"{ran} backward": 1}
    wanted = attend(*inputs, impl=impl)
    torch.testing.assert_close(got, wanted)
    for a, b in zip(slopes, gradients(wanted, given), strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_code_follows_autocast_and_runs_where_there_is_none():
    inputs = leaves(torch.float32)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compiled(*inputs), attend(*inputs))
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32, device="meta")
    q, k, v, _ = (x.detach().to("meta") for x in inputs)
    compiled = torch.compile(varlen_cross_attention, fullgraph=True, backend="aot_eager")
    assert compiled(q, k, v, cu_seqlens, LONGEST).shape == (4, 3, 2, 6)


def test_bad_values_raise_from_compiled_code_too():
    """What can only be seen in the numbers is checked where they are read, which is inside the operator."""
    q, k, v, _ = leaves()
    compiled = torch.compile(varlen_cross_attention, fullgraph=True, backend="eager")
    with pytest.raises(ValueError, match="must not fall; view 1"):
        compiled(q, k, v, torch.tensor([0, 6, 3, 10], dtype=torch.int32), 10)


@pytest.mark.parametrize("impl", PORTABLE)
def test_compiles_without_views(impl):
    q = torch.randn(3, 2, 6, requires_grad=True)
    k = torch.zeros(0, 2, 6, requires_grad=True)
    compiled = torch.compile(varlen_cross_attention, fullgraph=True, backend="aot_eager")
    out = compiled(q, k, k, torch.zeros(1, dtype=torch.int32), 0, impl=impl)
    assert out.shape == (0, 3, 2, 6)
    assert torch.equal(torch.autograd.grad(out.sum(), q)[0], torch.zeros_like(q))


@pytest.mark.slow
@pytest.mark.parametrize("impl", PORTABLE)
def test_compiles_with_inductor(impl):
    inputs = leaves(torch.float32)
    got = torch.compile(attend, fullgraph=True)(*inputs, impl=impl)
    wanted = attend(*inputs, impl=impl)
    torch.testing.assert_close(got, wanted)
    for a, b in zip(gradients(got, inputs), gradients(wanted, inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_casts_like_attention_does(impl):
    inputs = leaves(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend(*inputs, impl=impl)
        mixed = attend(inputs[0], *(x.bfloat16() for x in inputs[1:]), impl=impl)
    low = [x.bfloat16() for x in inputs]
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, attend(*low, impl=impl))
    assert torch.equal(out, mixed)
    for grad, x in zip(gradients(out, inputs), inputs, strict=True):
        assert grad.dtype == x.dtype == torch.float32
        assert grad.abs().max() > 0


def test_autocast_leaves_float64_alone():
    inputs = leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attend(*inputs), attend(*inputs))
        assert attend(*inputs).dtype == torch.float64


@pytest.mark.parametrize("impl", IMPLS)
def test_no_grad_keeps_nothing_for_a_backward(impl):
    with torch.no_grad():
        out = attend(*leaves(DTYPES.get(impl, torch.float64)), impl=impl)
    assert out.grad_fn is None


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, impl):
    inputs = leaves(DTYPES.get(impl, torch.float64))
    calls.clear()
    out = checkpoint(partial(attend, impl=impl), *inputs, use_reentrant=reentrant)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)
    out.backward(cotangent)
    assert calls[impl] == 2
    for x, wanted in zip(inputs, gradients(attend(*inputs, impl=impl), inputs), strict=True):
        torch.testing.assert_close(x.grad, wanted)


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
def test_vmap_is_refused(impl):
    q, k, v, _ = leaves()
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32)
    with pytest.raises(ValueError, match="cannot be mapped with vmap"):
        torch.vmap(lambda one: varlen_cross_attention(one, k, v, cu_seqlens, LONGEST, impl=impl))(q[None])
    with pytest.raises(ValueError, match="cannot be mapped with vmap"):
        torch.vmap(lambda one: attention_op(one, k, v, cu_seqlens, LONGEST, None, None, 1.0, "sdpa"))(q[None])


def python(code):
    path = f"import sys; sys.path.insert(0, {str(ROOT / 'kernels')!r}); "
    return subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True, timeout=300)


USE = """
import torch, uhd_kernels
from uhd_kernels import varlen_cross_attention
q, k = torch.randn(3, 2, 6, requires_grad=True), torch.randn(5, 2, 6)
cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
for impl in ("auto", "sdpa", "reference"):
    varlen_cross_attention(q, k, k, cu_seqlens, 3, impl=impl).sum().backward()
"""


def test_portable_use_does_not_import_triton():
    found = python(USE + "print([name for name in sys.modules if name.split('.')[0] == 'triton'])")
    assert found.stdout.strip() == "[]", found.stderr


def test_works_where_triton_is_not_installed():
    code = "sys.modules['triton'] = None\n" + USE
    code += "try: varlen_cross_attention(q, k, k, cu_seqlens, 3, impl='triton')\nexcept ValueError as e: print(e)"
    found = python(code)
    assert found.stdout.strip().startswith("impl='triton' cannot run: Triton is not installed"), found.stderr
