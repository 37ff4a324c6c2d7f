"""The Triton kernels and their launches. Imported only when they are about to run: Triton may be absent.

One program takes the latents of a (view, head), so that every key and value is read once, forward and backward.
Gradients have one writer each and sums a fixed order: no atomics, and the same bits in every run.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from importlib.metadata import version

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import InterpreterError

from uhd_kernels.configs import backward_config, forward_config, padded_dim, split_keys

LOG2_E = 1.4426950408889634
# One compiled kernel serves any number of these, and offsets that start anywhere in the index they come in.
COUNTS = ["latents", "heads", "views"]
# Blocks of the small kernels, which only move data.
ROWS = 16
SUM_BLOCK = 512
TABLE_ROWS, TABLE_COLUMNS = 16, 128


@triton.jit
def _load_rows(ptr, rows, row_stride, valid, dims, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """(rows, BLOCK_D), zeros where not valid or past the head dim."""
    at = ptr + rows[:, None] * row_stride + dims[None, :]
    if HEAD_DIM == BLOCK_D:
        return tl.load(at, mask=valid[:, None], other=0.0)
    return tl.load(at, mask=valid[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _store_rows(ptr, values, rows, row_stride, valid, dims, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    at = ptr + rows[:, None] * row_stride + dims[None, :]
    mask = valid[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(at, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _program(cu_ptr, heads, keys_per_split):
    """Head, view and split; the view's first row, and the part [low, high) of it that belongs to this split.

    Heads vary fastest over programs: those that run together read whole rows of k and v.
    """
    head = tl.program_id(0) % heads
    view = tl.program_id(0) // heads
    split = tl.program_id(1)
    start = tl.load(cu_ptr + view)
    length = tl.load(cu_ptr + view + 1) - start
    low = split * keys_per_split
    return head, view, split, start.to(tl.int64), low, tl.minimum(length, low + keys_per_split)


@triton.jit
def _attend(q, keys, values, valid, best, total, mixed, scale):
    """One step of online softmax, base 2: the running maximum, sum and weighted values of a tile of latents."""
    logits = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
    logits = tl.where(valid[None, :], logits, float("-inf"))
    new_best = tl.maximum(best, tl.max(logits, 1))
    weights = tl.exp2(logits - new_best[:, None])
    shrink = tl.exp2(best - new_best)
    total = total * shrink + tl.sum(weights, 1)
    mixed = mixed * shrink[:, None]
    mixed = tl.dot(weights.to(values.dtype), values, mixed, input_precision="ieee")
    return new_best, total, mixed


@triton.jit
def _finish(
    out_ptr, lse_ptr, mixed, best, total, rows, latents, row_stride, dims,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A view or split without keys leaves total = 0: its output is 0 and its logsumexp -inf."""
    empty = total == 0.0
    mixed = mixed / tl.where(empty, 1.0, total)[:, None]
    _store_rows(out_ptr, mixed, rows, row_stride, rows < latents, dims, HEAD_DIM, BLOCK_D)
    lse = tl.where(empty, float("-inf"), best + tl.log2(tl.where(empty, 1.0, total)))
    tl.store(lse_ptr + rows, lse, mask=rows < latents)


@triton.jit
def _nothing_yet(TILE: tl.constexpr, BLOCK_D: tl.constexpr):
    best = tl.full([TILE], float("-inf"), tl.float32)
    return best, tl.zeros([TILE], tl.float32), tl.zeros([TILE, BLOCK_D], tl.float32)


@triton.jit(do_not_specialize=["first_latent", *COUNTS], do_not_specialize_on_alignment=["offsets_ptr"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, cu_ptr, offsets_ptr, out_ptr, lse_ptr,
    first_latent, latents, heads, views, keys_per_split, scale,
    q_row, q_head, k_row, k_head, v_row, v_head, table_row, table_head,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_TABLE: tl.constexpr,
    TILE_1: tl.constexpr, TILE_2: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out (splits, views, latents, heads, HEAD_DIM) and lse (splits, views, heads, latents), base 2."""
    head, view, split, start, low, high = _program(cu_ptr, heads, keys_per_split)
    dims = tl.arange(0, BLOCK_D)
    q_ptr += head * q_head
    rows_1 = first_latent + tl.arange(0, TILE_1)
    q_1 = _load_rows(q_ptr, rows_1, q_row, rows_1 < latents, dims, HEAD_DIM, BLOCK_D)
    best_1, total_1, mixed_1 = _nothing_yet(TILE_1, BLOCK_D)
    if TILE_2 > 0:
        rows_2 = first_latent + TILE_1 + tl.arange(0, TILE_2)
        q_2 = _load_rows(q_ptr, rows_2, q_row, rows_2 < latents, dims, HEAD_DIM, BLOCK_D)
        best_2, total_2, mixed_2 = _nothing_yet(TILE_2, BLOCK_D)

    k_ptr += start * k_row + head * k_head
    v_ptr += start * v_row + head * v_head
    if HAS_TABLE:
        table_ptr += tl.load(offsets_ptr + view).to(tl.int64) * table_row + head * table_head
    for first in range(low, high, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        valid = rows < high
        keys = _load_rows(k_ptr, rows, k_row, valid, dims, HEAD_DIM, BLOCK_D)
        if HAS_TABLE:
            keys += _load_rows(table_ptr, rows, table_row, valid, dims, HEAD_DIM, BLOCK_D)
        values = _load_rows(v_ptr, rows, v_row, valid, dims, HEAD_DIM, BLOCK_D)
        best_1, total_1, mixed_1 = _attend(q_1, keys, values, valid, best_1, total_1, mixed_1, scale)
        if TILE_2 > 0:
            best_2, total_2, mixed_2 = _attend(q_2, keys, values, valid, best_2, total_2, mixed_2, scale)

    cell = (split * views + view).to(tl.int64) * heads * latents
    out_ptr += (cell + head) * HEAD_DIM
    lse_ptr += cell + head * latents
    row = heads * HEAD_DIM
    _finish(out_ptr, lse_ptr, mixed_1, best_1, total_1, rows_1, latents, row, dims, HEAD_DIM, BLOCK_D)
    if TILE_2 > 0:
        _finish(out_ptr, lse_ptr, mixed_2, best_2, total_2, rows_2, latents, row, dims, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=[*COUNTS, "splits"])
def combine_kernel(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, latents, heads, views, splits,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Joins the splits of a few latents of one (view, head), in their order. Layouts as in `forward_kernel`."""
    head = tl.program_id(0) % heads
    view = tl.program_id(0) // heads
    latent = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = latent < latents
    dims = tl.arange(0, BLOCK_D)
    row = heads * HEAD_DIM
    cell = view.to(tl.int64) * heads * latents
    step = views.to(tl.int64) * heads * latents
    lse_at = cell + head * latents + latent

    best = tl.full([BLOCK], float("-inf"), tl.float32)
    for split in range(splits):
        part_lse = tl.load(part_lse_ptr + split * step + lse_at, mask=inside, other=float("-inf"))
        best = tl.maximum(best, part_lse)
    base = tl.where(best == float("-inf"), 0.0, best)  # a view without keys
    total = tl.zeros([BLOCK], tl.float32)
    mixed = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for split in range(splits):
        part_lse = tl.load(part_lse_ptr + split * step + lse_at, mask=inside, other=float("-inf"))
        share = tl.exp2(part_lse - base)
        total += share
        at = part_ptr + (split * step + cell + head) * HEAD_DIM
        mixed += share[:, None] * _load_rows(at, latent, row, inside, dims, HEAD_DIM, BLOCK_D)
    total = tl.where(total == 0.0, 1.0, total)
    out_ptr += (cell + head) * HEAD_DIM
    _store_rows(out_ptr, mixed / total[:, None], latent, row, inside, dims, HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + lse_at, base + tl.log2(total), mask=inside)


@triton.jit
def _weights(q, keys, lse, valid, scale):
    """The softmax of a tile once more, from its logsumexp: (keys, latents).

    Keys first, so that the weights enter the products as they come, and the tensor cores get the long side (keys or
    head dim) as their rows also where there are few latents.
    """
    weights = tl.exp2(tl.dot(keys, tl.trans(q), input_precision="ieee") * scale - lse[None, :])
    return tl.where(valid[:, None], weights, 0.0)


@triton.jit
def _d_logits(weights, grad, dot, values):
    d_weights = tl.dot(values, tl.trans(grad), input_precision="ieee")
    return (weights * (d_weights - dot[None, :])).to(values.dtype)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=["offsets_ptr"])
def backward_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, cu_ptr, offsets_ptr, out_ptr, lse_ptr, grad_ptr, dq_ptr, dk_ptr, dv_ptr,
    latents, heads, views, keys_per_split, scale, log2_scale,
    q_row, q_head, k_row, k_head, v_row, v_head, table_row, table_head,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_TABLE: tl.constexpr,
    TILE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One pass over the keys, for latents that fit one tile: their gradient stays in registers.

    dk and dv (N, heads, HEAD_DIM) are final; dq (splits, views, latents, heads, HEAD_DIM) are float32 parts, without
    the scale; out and grad (views, latents, heads, HEAD_DIM).
    """
    head, view, split, start, low, high = _program(cu_ptr, heads, keys_per_split)
    dims = tl.arange(0, BLOCK_D)
    row = heads * HEAD_DIM
    cell = view.to(tl.int64) * heads * latents
    latent = tl.arange(0, TILE)
    inside = latent < latents
    q = _load_rows(q_ptr + head * q_head, latent, q_row, inside, dims, HEAD_DIM, BLOCK_D)
    grad = _load_rows(grad_ptr + (cell + head) * HEAD_DIM, latent, row, inside, dims, HEAD_DIM, BLOCK_D)
    out = _load_rows(out_ptr + (cell + head) * HEAD_DIM, latent, row, inside, dims, HEAD_DIM, BLOCK_D)
    dot = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    lse = tl.load(lse_ptr + cell + head * latents + latent, mask=inside, other=float("inf"))
    dq = tl.zeros([BLOCK_D, TILE], tl.float32)

    k_ptr += start * k_row + head * k_head
    v_ptr += start * v_row + head * v_head
    dk_ptr += start * row + head * HEAD_DIM
    dv_ptr += start * row + head * HEAD_DIM
    if HAS_TABLE:
        table_ptr += tl.load(offsets_ptr + view).to(tl.int64) * table_row + head * table_head
    for first in range(low, high, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        valid = rows < high
        keys = _load_rows(k_ptr, rows, k_row, valid, dims, HEAD_DIM, BLOCK_D)
        if HAS_TABLE:
            keys += _load_rows(table_ptr, rows, table_row, valid, dims, HEAD_DIM, BLOCK_D)
        values = _load_rows(v_ptr, rows, v_row, valid, dims, HEAD_DIM, BLOCK_D)
        weights = _weights(q, keys, lse, valid, log2_scale)
        dv = tl.dot(weights.to(grad.dtype), grad, input_precision="ieee")
        _store_rows(dv_ptr, dv, rows, row, valid, dims, HEAD_DIM, BLOCK_D)
        d_logits = _d_logits(weights, grad, dot, values)
        dq = tl.dot(tl.trans(keys), d_logits, dq, input_precision="ieee")
        dk = tl.dot(d_logits, q, input_precision="ieee") * scale
        _store_rows(dk_ptr, dk, rows, row, valid, dims, HEAD_DIM, BLOCK_D)

    dq_ptr += ((split * views + view).to(tl.int64) * heads * latents + head) * HEAD_DIM
    _store_rows(dq_ptr, tl.trans(dq), latent, row, inside, dims, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["latents", "heads"])
def row_dots_kernel(
    a_ptr, b_ptr, dot_ptr, latents, heads, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """a and b (views, latents, heads, HEAD_DIM) -> a . b (views, heads, latents)."""
    head = tl.program_id(0) % heads
    cell = (tl.program_id(0) // heads).to(tl.int64) * heads * latents
    latent = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dims = tl.arange(0, BLOCK_D)
    at = (cell + head) * HEAD_DIM
    a = _load_rows(a_ptr + at, latent, heads * HEAD_DIM, latent < latents, dims, HEAD_DIM, BLOCK_D)
    b = _load_rows(b_ptr + at, latent, heads * HEAD_DIM, latent < latents, dims, HEAD_DIM, BLOCK_D)
    dot = tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)
    tl.store(dot_ptr + cell + head * latents + latent, dot, mask=latent < latents)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=["offsets_ptr"])
def backward_many_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, cu_ptr, offsets_ptr, dot_ptr, lse_ptr, grad_ptr, dq_ptr, dk_ptr, dv_ptr,
    latents, heads, views, keys_per_split, scale, log2_scale,
    q_row, q_head, k_row, k_head, v_row, v_head, table_row, table_head,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_TABLE: tl.constexpr,
    TILE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`backward_kernel` for more latents than registers hold: dq is added up in the program's own part of dq_ptr.

    That part is small and used again for the next block of keys, so it stays in the cache; keys and values are still
    read once. The row sums of gradient times output come in dot_ptr (views, heads, latents).
    """
    head, view, split, start, low, high = _program(cu_ptr, heads, keys_per_split)
    dims = tl.arange(0, BLOCK_D)
    row = heads * HEAD_DIM
    cell = view.to(tl.int64) * heads * latents
    q_ptr += head * q_head
    grad_ptr += (cell + head) * HEAD_DIM
    dot_ptr += cell + head * latents
    lse_ptr += cell + head * latents
    dq_ptr += ((split * views + view).to(tl.int64) * heads * latents + head) * HEAD_DIM
    k_ptr += start * k_row + head * k_head
    v_ptr += start * v_row + head * v_head
    dk_ptr += start * row + head * HEAD_DIM
    dv_ptr += start * row + head * HEAD_DIM
    if HAS_TABLE:
        table_ptr += tl.load(offsets_ptr + view).to(tl.int64) * table_row + head * table_head
    if low >= high:
        for first_latent in range(0, latents, TILE):
            latent = first_latent + tl.arange(0, TILE)
            nothing = tl.zeros([TILE, BLOCK_D], tl.float32)
            _store_rows(dq_ptr, nothing, latent, row, latent < latents, dims, HEAD_DIM, BLOCK_D)
    begun = 0  # latents whose dq is there to be added to
    for first in range(low, high, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        valid = rows < high
        keys = _load_rows(k_ptr, rows, k_row, valid, dims, HEAD_DIM, BLOCK_D)
        if HAS_TABLE:
            keys += _load_rows(table_ptr, rows, table_row, valid, dims, HEAD_DIM, BLOCK_D)
        values = _load_rows(v_ptr, rows, v_row, valid, dims, HEAD_DIM, BLOCK_D)
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for first_latent in range(0, latents, TILE):
            latent = first_latent + tl.arange(0, TILE)
            inside = latent < latents
            q = _load_rows(q_ptr, latent, q_row, inside, dims, HEAD_DIM, BLOCK_D)
            grad = _load_rows(grad_ptr, latent, row, inside, dims, HEAD_DIM, BLOCK_D)
            dot = tl.load(dot_ptr + latent, mask=inside, other=0.0)
            lse = tl.load(lse_ptr + latent, mask=inside, other=float("inf"))
            weights = _weights(q, keys, lse, valid, log2_scale)
            dv = tl.dot(weights.to(grad.dtype), grad, dv, input_precision="ieee")
            d_logits = _d_logits(weights, grad, dot, values)
            dk = tl.dot(d_logits, q, dk, input_precision="ieee")
            dq = _load_rows(dq_ptr, latent, row, latent < begun, dims, HEAD_DIM, BLOCK_D)
            dq += tl.trans(tl.dot(tl.trans(keys), d_logits, input_precision="ieee"))
            _store_rows(dq_ptr, dq, latent, row, inside, dims, HEAD_DIM, BLOCK_D)
        _store_rows(dk_ptr, dk * scale, rows, row, valid, dims, HEAD_DIM, BLOCK_D)
        _store_rows(dv_ptr, dv, rows, row, valid, dims, HEAD_DIM, BLOCK_D)
        begun = latents
        tl.debug_barrier()  # the next block reads the dq that this one wrote


@triton.jit(do_not_specialize=["parts"])
def sum_parts_kernel(part_ptr, sum_ptr, parts, size, scale, BLOCK: tl.constexpr):
    """(parts, size) -> scale * sum, (size,); each number added up by one program in the order of the parts."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(parts):
        total += tl.load(part_ptr + at, mask=at < size, other=0.0)
        part_ptr += size
    tl.store(sum_ptr + at, (total * scale).to(sum_ptr.dtype.element_ty), mask=at < size)


@triton.jit(do_not_specialize=["views", "table_rows"], do_not_specialize_on_alignment=["offsets_ptr"])
def table_gradient_kernel(
    dk_ptr, cu_ptr, offsets_ptr, sum_ptr, views, table_rows, width,
    BLOCK_L: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """dk (N, width) -> (table_rows, width): each row of the table sums the keys that used it, view by view."""
    rows = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    columns = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    inside = (columns < width)[None, :]
    total = tl.zeros([BLOCK_L, BLOCK_W], tl.float32)
    for view in range(views):
        start = tl.load(cu_ptr + view)
        length = tl.load(cu_ptr + view + 1) - start
        keys = rows - tl.load(offsets_ptr + view)
        used = (keys >= 0) & (keys < length)
        at = (start + keys).to(tl.int64)[:, None] * width + columns[None, :]
        total += tl.load(dk_ptr + at, mask=used[:, None] & inside, other=0.0).to(tl.float32)
    at = rows.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(sum_ptr + at, total.to(sum_ptr.dtype.element_ty), mask=(rows < table_rows)[:, None] & inside)


# What runs here, as Triton decided when it decorated the kernels: real code for a GPU, or its interpreter on the CPU.
@triton.jit
def _loop_kernel(steps):
    for _ in range(steps):
        pass


INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)


@functools.cache
def interpreter_problem() -> str | None:
    """Why Triton's interpreter cannot run a kernel with a loop; None if it can. Ask only where Triton interprets."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's, of what it refuses in later releases
            _loop_kernel[(1,)](1)
    except InterpreterError as problem:
        return f"Triton {version('triton')}'s interpreter fails beside numpy {version('numpy')}: {problem}"
    return None


@functools.lru_cache
def chip(device: torch.device) -> tuple[int | str, int]:
    """(architecture for the table of configurations, number of processors)."""
    if device.type == "cpu":
        return 90, 1
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    if torch.version.hip:
        return "hip", processors
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor, processors


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    table: Tensor | None,
    offsets: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Checked input, all on one device -> out (V, Q, H, d) and logsumexp (V, H, Q) in float32, base 2."""
    dtype, (q, k, v, table) = q.dtype, _ready(q, k, v, table)
    latents, heads, dim = q.shape
    views = len(cu_seqlens) - 1
    arch, processors = chip(q.device)
    config = forward_config(arch, dim, dtype, latents)
    splits, keys_per_split = split_keys(views * heads, longest, config.block_n, processors)
    out = torch.empty(views, latents, heads, dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(views, heads, latents, dtype=torch.float32, device=q.device)
    part, part_lse = out, lse
    if splits > 1:
        part = torch.empty(splits, *out.shape, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(splits, *lse.shape, dtype=torch.float32, device=q.device)
    block_d, positions = padded_dim(dim), k if table is None else table
    if not views:
        return out.to(dtype), lse
    _check_reach(longest, q, k, v, table)
    with _on(q.device):
        for first in range(0, latents, sum(config.tiles)):
            forward_kernel[(views * heads, splits)](
                q, k, v, positions, cu_seqlens, offsets, part, part_lse,
                first, latents, heads, views, keys_per_split, scale * LOG2_E, *_strides(q, k, v, positions),
                HEAD_DIM=dim, BLOCK_D=block_d, HAS_TABLE=table is not None,
                TILE_1=config.tiles[0], TILE_2=config.tiles[1], BLOCK_N=config.block_n, **config.launch,
            )  # fmt: skip
        if splits > 1:
            combine_kernel[(views * heads, triton.cdiv(latents, ROWS))](
                part, part_lse, out, lse, latents, heads, views, splits, HEAD_DIM=dim, BLOCK_D=block_d, BLOCK=ROWS
            )
    return out.to(dtype), lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    table: Tensor | None,
    offsets: Tensor | None,
    scale: float,
    *,
    table_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of q, k, v and, where asked for, of the table; `out` and `lse` are those of `forward`."""
    dtype, (q, k, v, table) = q.dtype, _ready(q, k, v, table)
    grad, out = grad.to(q.dtype).contiguous(), out.to(q.dtype)
    latents, heads, dim = q.shape
    views = len(cu_seqlens) - 1
    arch, processors = chip(q.device)
    config = backward_config(arch, dim, dtype, latents)
    splits, keys_per_split = split_keys(views * heads, longest, config.block_n, processors)
    dk, dv = (torch.empty(k.shape, dtype=q.dtype, device=q.device) for _ in range(2))
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    part = torch.empty(splits, views, *q.shape, dtype=torch.float32, device=q.device)
    block_d, positions = padded_dim(dim), k if table is None else table
    if not views:
        nothing = torch.zeros_like(table, dtype=dtype) if table_gradient else None
        return dq.zero_().to(dtype), dk.to(dtype), dv.to(dtype), nothing
    with _on(q.device):
        kernel, sums = backward_kernel, out
        if latents > config.tiles[0]:
            kernel, sums = backward_many_kernel, torch.empty_like(lse)
            row_dots_kernel[(views * heads, triton.cdiv(latents, ROWS))](
                grad, out, sums, latents, heads, HEAD_DIM=dim, BLOCK_D=block_d, BLOCK=ROWS
            )
        kernel[(views * heads, splits)](
            q, k, v, positions, cu_seqlens, offsets, sums, lse, grad, part, dk, dv,
            latents, heads, views, keys_per_split, scale, scale * LOG2_E, *_strides(q, k, v, positions),
            HEAD_DIM=dim, BLOCK_D=block_d, HAS_TABLE=table is not None,
            TILE=config.tiles[0], BLOCK_N=config.block_n, **config.launch,
        )  # fmt: skip
        size = dq.numel()
        sum_parts_kernel[(triton.cdiv(size, SUM_BLOCK),)](part, dq, splits * views, size, scale, BLOCK=SUM_BLOCK)
        d_table = _table_gradient(dk, cu_seqlens, offsets, table) if table_gradient else None
    return tuple(None if x is None else x.to(dtype) for x in (dq, dk, dv, d_table))


def _table_gradient(dk: Tensor, cu_seqlens: Tensor, offsets: Tensor, table: Tensor) -> Tensor:
    total = torch.empty(table.shape, dtype=table.dtype, device=table.device)
    if not total.numel():
        return total
    rows, width = len(table), table.shape[1] * table.shape[2]
    grid = (triton.cdiv(rows, TABLE_ROWS), triton.cdiv(width, TABLE_COLUMNS))
    table_gradient_kernel[grid](
        dk, cu_seqlens, offsets, total, len(cu_seqlens) - 1, rows, width, BLOCK_L=TABLE_ROWS, BLOCK_W=TABLE_COLUMNS
    )
    return total


def _ready(*tensors: Tensor | None) -> list[Tensor | None]:
    """Contiguous in the last dimension, the one the kernels do not stride over.

    The interpreter computes bfloat16 with integers and gets it wrong, so there the kernels run on float32.
    """
    if INTERPRETED:
        tensors = [x.float() if x is not None and x.dtype == torch.bfloat16 else x for x in tensors]
    return [x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in tensors]


def _check_reach(longest: int, q: Tensor, *packed: Tensor | None) -> None:
    """Inside a view the kernels count in 32 bits."""
    step = max(x.stride(0) for x in (q, *packed) if x is not None)
    if longest * step >= 2**31:
        raise ValueError(
            f"a view of {longest} rows, {step} numbers apart, is past the 2**31 that the kernels count to: cut the "
            "view, make k and v contiguous, or use impl='sdpa'"
        )


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:2]]


def _on(device: torch.device):
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
