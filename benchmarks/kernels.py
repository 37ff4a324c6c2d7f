"""The cross-attention kernels: bytes, FLOPs and roofline of each shape; on a GPU also times, against other ways.

    python benchmarks/kernels.py [--dtype bf16] [--shapes 0,1] [--json FILE]

Nothing is timed before every contender has given the right output and gradients on that shape. Without a GPU only the
model is printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import platform
import sys
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels"))

from uhd_kernels import calls, varlen_cross_attention
from uhd_kernels.configs import backward_config, forward_config, split_keys

# architecture, processors, and the bytes and operations a second that a good kernel reaches: 4.3 of 4.8 TB/s (H200) or
# 3.0 of 3.35 (H100 SXM), 790 of 989 TFLOP/s (dense bf16) on both, all of 2.0 TB/s and 312 TFLOP/s on an A100 80 GB
CHIPS = {
    "H200": (90, 132, 4.3e12, 790e12),
    "H100": (90, 132, 3.0e12, 790e12),
    "A100": (80, 108, 2.0e12, 312e12),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Views that share a grid where they share a length: `rows` of the table are one stretch for each length."""

    lengths: tuple[int, ...]
    latents: int
    heads: int
    head_dim: int

    @property
    def name(self) -> str:
        views = {n: self.lengths.count(n) for n in dict.fromkeys(self.lengths)}
        counts = "+".join(f"{count}x{n}" for n, count in views.items())
        return f"{counts} keys, {self.latents} latents, {self.heads}x{self.head_dim}"

    @property
    def offsets(self) -> list[int]:
        starts = dict(zip(dict.fromkeys(self.lengths), accumulate([0, *dict.fromkeys(self.lengths)]), strict=False))
        return [starts[n] for n in self.lengths]

    @property
    def table_rows(self) -> int:
        return sum(set(self.lengths))


SHAPES = (
    Shape((576,), 64, 16, 64),
    Shape((576,) * 7, 64, 16, 64),
    Shape((576,) * 70, 64, 16, 64),
    Shape((576,) * 6 + (551,), 64, 16, 64),
    Shape((576,) * 7, 64, 32, 128),
    Shape((576,) * 70, 64, 32, 128),
    Shape((1024,) * 10, 144, 32, 128),
)


def model(shape: Shape, *, chip: str, dtype: torch.dtype) -> dict[str, float]:
    """Bytes and FLOPs of one call with a table of positions.

    `floor`: every input, the table included, read once and every output written once. `moved`: what the kernels
    exchange with memory. `in_cache`: what they exchange besides with a cache that holds it: the table for each further
    view, the latents, the parts of split keys, the program's own dq. `key_reads`: how often each key is read.
    """
    arch, processors, *_ = CHIPS[chip]
    size, cell = dtype.itemsize, shape.heads * shape.head_dim
    keys = sum(shape.lengths) * cell * size
    views, latents = len(shape.lengths), shape.latents * cell
    out, table, lse = views * latents * size, shape.table_rows * cell * size, views * shape.heads * shape.latents * 4
    forward = forward_config(arch, shape.head_dim, dtype, shape.latents)
    backward = backward_config(arch, shape.head_dim, dtype, shape.latents)
    programs, longest = views * shape.heads, max(shape.lengths)
    forward_splits, _ = split_keys(programs, longest, forward.block_n, processors)
    backward_splits, _ = split_keys(programs, longest, backward.block_n, processors)
    launches = -(-shape.latents // sum(forward.tiles))
    forward_parts = 2 * forward_splits * (4 * views * latents + lse) if forward_splits > 1 else 0  # written and read
    backward_parts = 2 * backward_splits * views * latents * 4  # dq in float32, likewise
    many = shape.latents > backward.tiles[0]
    steps = sum(-(-n // backward.block_n) for n in shape.lengths)
    forward_floor = 2 * keys + table + latents * size + out
    backward_floor = 4 * keys + 2 * table + 2 * latents * size + 2 * out
    return {
        "forward_floor": forward_floor,
        "forward_moved": forward_floor + 2 * (launches - 1) * keys + lse,
        "forward_key_reads": launches,
        "forward_in_cache": launches * keys - table + (views - 1) * latents * size + forward_parts,
        "forward_flops": 4 * sum(shape.lengths) * shape.latents * cell,
        # the table's gradient is a sum over dk, which is read once more for it
        "backward_floor": backward_floor,
        "backward_moved": backward_floor + backward_parts + lse + many * (2 * out + 2 * lse) + keys,
        "backward_key_reads": 1,
        "backward_in_cache": keys - table + many * steps * latents * (2 * size + 8),
        "backward_flops": 10 * sum(shape.lengths) * shape.latents * cell,
    }


def roofline_us(bytes_moved: float, flops: float, chip: str) -> float:
    *_, bandwidth, compute = CHIPS[chip]
    return 1e6 * max(bytes_moved / bandwidth, flops / compute)


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem on one device, with what a training loop would keep for its shape."""

    shape: Shape
    q: Tensor
    k: Tensor
    v: Tensor
    table: Tensor

    @classmethod
    def make(cls, shape: Shape, device: str, dtype: torch.dtype) -> Case:
        random = torch.Generator().manual_seed(0)
        rows = (shape.latents, sum(shape.lengths), sum(shape.lengths), shape.table_rows)
        leaves = (torch.randn(n, shape.heads, shape.head_dim, generator=random) for n in rows)
        return cls(shape, *(x.to(device, dtype).requires_grad_() for x in leaves))

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.v, self.table

    @property
    def bounds(self) -> list[int]:
        return [0, *accumulate(self.shape.lengths)]

    @functools.cached_property
    def rows(self) -> Tensor:
        starts = zip(self.shape.lengths, self.shape.offsets, strict=True)
        return torch.cat([torch.arange(start, start + n) for n, start in starts]).to(self.k.device)

    @functools.cached_property
    def mask(self) -> Tensor | None:
        """Of the padded keys, (V, 1, 1, longest); None where nothing is padded."""
        lengths = torch.tensor(self.shape.lengths)
        mask = None if len(set(self.shape.lengths)) == 1 else torch.arange(max(lengths)) < lengths[:, None]
        return mask if mask is None else mask[:, None, None].to(self.q.device)

    @functools.cached_property
    def cu_seqlens(self) -> tuple[Tensor, Tensor]:
        """Of the repeated latents, and of the keys."""
        latents = [self.shape.latents * view for view in range(len(self.shape.lengths) + 1)]
        return tuple(torch.tensor(each, dtype=torch.int32, device=self.q.device) for each in (latents, self.bounds))

    def keys(self) -> Tensor:
        """Keys plus positions, formed in memory: what everything but the kernel has to do first."""
        return self.k + self.table[self.rows]

    def ours(self, impl: str) -> Tensor:
        cu_seqlens = torch.tensor(self.bounds, dtype=torch.int32)
        offsets = torch.tensor(self.shape.offsets, dtype=torch.int32)
        positions = {"key_positions": self.table, "position_offsets": offsets}
        return varlen_cross_attention(
            self.q, self.k, self.v, cu_seqlens, max(self.shape.lengths), **positions, impl=impl
        )

    def per_view_sdpa(self) -> Tensor:
        keys = self.keys().split(self.shape.lengths)
        views = [
            F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (self.q, k, v)))
            for k, v in zip(keys, self.v.split(self.shape.lengths), strict=True)
        ]
        return torch.cat(views).transpose(1, 2)

    def padded_sdpa(self) -> Tensor:
        lengths = self.shape.lengths
        keys, values = (
            torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2)
            for x in (self.keys(), self.v)
        )
        latents = self.q.transpose(0, 1).expand(len(lengths), -1, -1, -1)
        return F.scaled_dot_product_attention(latents, keys, values, attn_mask=self.mask).transpose(1, 2)

    def varlen_flash(self) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        views, latents = len(self.shape.lengths), self.shape.latents
        queries = self.q.repeat(views, 1, 1)
        out = varlen_attn(queries, self.keys(), self.v, *self.cu_seqlens, latents, max(self.shape.lengths))
        return out.unflatten(0, (views, latents))

    def flex(self, *, compiled: bool = True) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        views, latents = len(self.shape.lengths), self.shape.latents
        queries, keys, values = (x.transpose(0, 1)[None] for x in (self.q.repeat(views, 1, 1), self.keys(), self.v))
        attend = _compiled(flex_attention) if compiled else flex_attention
        out = attend(queries, keys, values, block_mask=_block_mask(self.shape, str(self.q.device)))
        return out[0].transpose(0, 1).unflatten(0, (views, latents))

    def contenders(self) -> dict[str, Callable[[], Tensor]]:
        return {
            "triton": lambda: self.ours("triton"),
            "grouped SDPA": lambda: self.ours("sdpa"),
            "per-view SDPA": self.per_view_sdpa,
            "padded SDPA": self.padded_sdpa,
            "varlen flash": self.varlen_flash,
            "FlexAttention": self.flex,
        }


_compiled = functools.cache(functools.partial(torch.compile, dynamic=False))
_MASKS: dict[tuple[Shape, str], object] = {}


def _block_mask(shape: Shape, device: str):
    """Made once for a shape and kept: a training loop would reuse it, so its cost is left out of FlexAttention's."""
    from torch.nn.attention.flex_attention import create_block_mask

    if (shape, device) not in _MASKS:
        owner = torch.repeat_interleave(torch.arange(len(shape.lengths)), torch.tensor(shape.lengths)).to(device)

        def same_view(batch, head, query, key):
            return query // shape.latents == owner[key]

        rows = len(shape.lengths) * shape.latents
        _MASKS[shape, device] = create_block_mask(same_view, None, None, rows, sum(shape.lengths), device=device)
    return _MASKS[shape, device]


def results(case: Case, out: Tensor) -> list[Tensor]:
    """Output and gradients under one fixed cotangent."""
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out, *torch.autograd.grad(out, case.leaves, cotangent)]


def check(case: Case, compute: Callable[[], Tensor], exact: list[Tensor], plain: list[Tensor]) -> str | None:
    """What is wrong with a contender: it failed, or has more than three times the error of per-view SDPA."""
    try:
        got = results(case, compute())
    except Exception as error:  # a contender that is not there is a finding, not the end of the benchmark
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    for name, a, b, want in zip(("output", "dq", "dk", "dv", "dtable"), got, plain, exact, strict=True):
        error, allowed = ((x.double() - want).norm().item() for x in (a, b))
        if not error <= 3 * allowed + 1e-6 * want.norm().item():
            return f"wrong {name}: error {error:.2e}, per-view SDPA has {allowed:.2e}"
    return None


def exactly(case: Case) -> list[Tensor]:
    doubles = Case(case.shape, *(x.detach().double().requires_grad_() for x in case.leaves))
    return [x.detach() for x in results(doubles, doubles.ours("reference"))]


def time_us(call: Callable[[], object]) -> float:
    """Median of repeated runs, each with a cold cache."""
    from triton.testing import do_bench

    return 1e3 * do_bench(call, warmup=50, rep=200, return_mode="median")


def timings(case: Case) -> dict[str, dict[str, object]]:
    torch.compiler.reset()  # a function is compiled for eight shapes only
    exact, plain = exactly(case), results(case, case.per_view_sdpa())
    found = {}
    for name, compute in case.contenders().items():
        calls.clear()
        if problem := check(case, compute, exact, plain):
            found[name] = {"problem": problem}
            continue
        if name == "triton" and not (calls["triton"] and calls["triton backward"]):
            found[name] = {"problem": "another implementation ran"}
            continue
        with torch.no_grad():
            forward = time_us(compute)
        out = compute()
        cotangent = torch.randn_like(out)
        backward = time_us(lambda out=out, g=cotangent: torch.autograd.grad(out, case.leaves, g, retain_graph=True))
        found[name] = {"forward_us": forward, "backward_us": backward}
    return found


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        found["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        found["triton"] = "not installed"
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return found


def model_rows(shapes: list[Shape], dtype: torch.dtype) -> list[dict[str, object]]:
    rows = []
    for shape in shapes:
        for chip in CHIPS:
            row = {"shape": shape.name, "chip": chip, **model(shape, chip=chip, dtype=dtype)}
            for way in ("forward", "backward"):
                row[f"{way}_over_floor"] = row[f"{way}_moved"] / row[f"{way}_floor"]
                row[f"{way}_floor_us"] = roofline_us(row[f"{way}_floor"], row[f"{way}_flops"], chip)
                row[f"{way}_us"] = roofline_us(row[f"{way}_moved"], row[f"{way}_flops"], chip)
            rows.append(row)
    return rows


def print_model(rows: list[dict[str, object]]) -> None:
    print("\nModel: floor = inputs read once, outputs written once; MB between chip and memory; roofline time in us")
    columns = "".join(f"{name:>9}" for name in ("GFLOP", "floor", "moved", "ratio", "in cache", "reads", "us"))
    print(f"{'shape':44}{'chip':6}{'way':9}{columns}")
    for row in rows:
        for way in ("forward", "backward"):
            floor, moved, cached, flops = (row[f"{way}_{x}"] for x in ("floor", "moved", "in_cache", "flops"))
            print(
                f"{row['shape']:44}{row['chip']:6}{way:9}{flops / 1e9:9.2f}{floor / 1e6:9.1f}{moved / 1e6:9.1f}"
                f"{moved / floor:9.2f}{cached / 1e6:9.1f}{row[f'{way}_key_reads']:9}{row[f'{way}_us']:9.1f}"
            )


def print_times(shape: Shape, found: dict[str, dict[str, object]], row: dict[str, object] | None) -> None:
    print(f"\n{shape.name}")
    for name, result in found.items():
        if "problem" in result:
            print(f"  {name:16} not timed: {result['problem']}")
            continue
        text = f"  {name:16} forward {result['forward_us']:9.1f} us   backward {result['backward_us']:9.1f} us"
        if row is not None:
            ratios = (result[f"{way}_us"] / row[f"{way}_floor_us"] for way in ("forward", "backward"))
            text += "   = {:.2f} and {:.2f} times the roofline".format(*ratios)
        print(text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--shapes", help="numbers of shapes, counted from 0; all unless given")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write versions, model and times there")
    options = parser.parse_args(arguments)
    dtype = DTYPES[options.dtype]
    shapes = [SHAPES[int(i)] for i in options.shapes.split(",")] if options.shapes else list(SHAPES)
    report = {"versions": versions(), "dtype": options.dtype, "model": model_rows(shapes, dtype), "times": {}}
    print("  ".join(f"{name} {value}" for name, value in report["versions"].items()))
    print_model(report["model"])
    if torch.cuda.is_available():
        chip = next((name for name in CHIPS if name in report["versions"]["device"]), None)
        for shape in shapes:
            found = timings(Case.make(shape, "cuda", dtype))
            row = next((r for r in report["model"] if (r["shape"], r["chip"]) == (shape.name, chip)), None)
            print_times(shape, found, row)
            report["times"][shape.name] = found
    else:
        print("\nNothing was timed: torch sees no GPU here. The table above is arithmetic, not a measurement.")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1))
    failed = [found["triton"]["problem"] for found in report["times"].values() if "problem" in found["triton"]]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
