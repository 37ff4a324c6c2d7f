"""What the default kernels take of a GPU, from their machine code, on a machine that needs none.

    python -m uhd_kernels.resources [--arch 80,90,100] [--head-dims 64,128] [--dtypes bf16] [--latents 64,144] [--json]

Compiles the attention kernels in every default configuration with Triton's own ptxas and reads registers, stack,
spill stores and matrix instructions off the result. They are facts of the code, not of its speed. With --small it does
the same for the kernels around them, which only move and add numbers.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from uhd_kernels.configs import MAX_HEAD_DIM, MAX_LATENTS, Config, backward_config, forward_config, padded_dim

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHARED_LIMIT = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}  # KiB
SMALL = ("combine_kernel", "row_dots_kernel", "sum_parts_kernel", "table_gradient_kernel")
FLOAT32 = ("lse_ptr", "part_ptr", "part_lse_ptr", "dq_ptr", "dot_ptr")
MATRIX_INSTRUCTION = re.compile(r"HMMA|HGMMA|UTC\w*MMA")
SPILL_STORE = "STL"


@dataclasses.dataclass(frozen=True)
class Variant:
    """A kernel as it would be launched: everything that decides its machine code."""

    kernel: str
    direction: str
    arch: int
    head_dim: int
    dtype: str
    latents: int
    positions: bool
    config: Config


def variants(archs, head_dims, dtypes, numbers_of_latents, *, small: bool) -> list[Variant]:
    """Every default configuration, with and without a table of positions."""
    found = []
    for arch, dim, dtype in itertools.product(archs, head_dims, dtypes):
        for latents in numbers_of_latents:
            forward = forward_config(arch, dim, DTYPES[dtype], latents)
            backward = backward_config(arch, dim, DTYPES[dtype], latents)
            name = "backward_kernel" if latents <= backward.tiles[0] else "backward_many_kernel"
            for positions in (True, False):
                case = (arch, dim, dtype, latents, positions)
                found.append(Variant("forward_kernel", "forward", *case, forward))
                found.append(Variant(name, "backward", *case, backward))
        if small:
            case = (arch, dim, dtype, 0, False, Config((0, 0), 0, 4, 3))
            found += [Variant(name, "small", *case) for name in SMALL]
    return found


def compile_variant(variant: Variant):
    """Triton's compiled kernel. Pointers and strides are taken as multiples of 16, as they are in practice."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_triton

    from uhd_kernels import cross_attention

    kernel = getattr(cross_attention, variant.kernel)
    config = variant.config
    fixed = {
        "HEAD_DIM": variant.head_dim,
        "BLOCK_D": padded_dim(variant.head_dim),
        "HAS_TABLE": variant.positions,
        "BLOCK_N": config.block_n,
        "TILE": config.tiles[0],
        "TILE_1": config.tiles[0],
        "TILE_2": config.tiles[1],
        "BLOCK": cross_attention.SUM_BLOCK if variant.kernel == "sum_parts_kernel" else cross_attention.ROWS,
        "BLOCK_L": cross_attention.TABLE_ROWS,
        "BLOCK_W": cross_attention.TABLE_COLUMNS,
    }
    types = {"cu_ptr": "*i32", "offsets_ptr": "*i32", "scale": "fp32", "log2_scale": "fp32"}
    types |= dict.fromkeys(FLOAT32, "*fp32")
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in fixed:
            signature[name], constants[name] = "constexpr", fixed[name]
            continue
        signature[name] = types.get(name, f"*{variant.dtype}" if name.endswith("_ptr") else "i32")
        aligned = name.endswith(("_ptr", "_row", "_head")) or name in ("keys_per_split", "size", "width")
        if aligned and name != "offsets_ptr":
            attributes[position,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return compile_triton(source, target=GPUTarget("cuda", variant.arch, 32), options=config.launch)


def measure(variant: Variant) -> dict[str, object]:
    """One row of the report."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Triton, about its own future
        compiled = compile_variant(variant)
    usage, code = disassemble(compiled.asm["cubin"])
    matrix = collections.Counter(op for op in code if MATRIX_INSTRUCTION.fullmatch(op))
    row = dataclasses.asdict(variant)
    row |= row.pop("config")
    return row | {
        "registers": usage["REG"],
        "spill_stores": code.count(SPILL_STORE),
        "stack": usage["STACK"],
        "shared_bytes": compiled.metadata.shared,
        "mma": sum(matrix.values()),
        "mma_by_name": dict(matrix),
    }


def disassemble(cubin: bytes) -> tuple[dict[str, int], list[str]]:
    """Resource usage by name, and the operation of every machine instruction, without modifiers."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        texts = [
            subprocess.run([tool, option, file], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        ]
    usage = {name: int(number) for name, number in re.findall(r"\b(REG|STACK):(\d+)", texts[0])}
    code = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", texts[1], re.MULTILINE)
    if "REG" not in usage or not code:
        raise RuntimeError(f"cuobjdump printed no resources or no code: {texts[0][:200]!r}")
    return usage, code


def rows(todo: list[Variant]) -> list[dict[str, object]]:
    """The report, compiled in as many processes as the machine has processors."""
    with concurrent.futures.ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(measure, todo))


def numbers(text: str) -> list[int]:
    """Integers between commas; argparse.ArgumentTypeError for anything else."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of integers such as 80,90") from None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m uhd_kernels.resources", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=numbers, default="80,90,100", help=f"of {', '.join(map(str, SHARED_LIMIT))}")
    parser.add_argument("--head-dims", type=numbers, default="64,128")
    parser.add_argument("--dtypes", default="bf16", help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--latents", type=numbers, default="64,144", help="the kernels change at 64")
    parser.add_argument("--small", action="store_true", help="also the kernels around the attention, without products")
    parser.add_argument("--json", action="store_true", help="print a list of rows")
    options = parser.parse_args(arguments)
    archs, dims, latents = options.arch, options.head_dims, options.latents
    dtypes = options.dtypes.split(",")
    if wrong := [x for x in archs if x not in SHARED_LIMIT] + [x for x in dtypes if x not in DTYPES]:
        parser.error(f"unknown {wrong}; architectures are {list(SHARED_LIMIT)}, dtypes {list(DTYPES)}")
    if wrong := [x for x in dims if not 1 <= x <= MAX_HEAD_DIM] + [x for x in latents if not 1 <= x <= MAX_LATENTS]:
        parser.error(f"{wrong}: head dims go from 1 to {MAX_HEAD_DIM}, latents from 1 to {MAX_LATENTS}")
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET is set, and what is interpreted cannot be compiled: unset it")
    found = rows(variants(archs, dims, dtypes, latents, small=options.small))
    print(json.dumps(found, indent=1) if options.json else table(found))
    return 0


def table(found: list[dict[str, object]]) -> str:
    """The rows as text, and whether anything spills or asks for too much."""
    names = ["kernel", "arch", "head_dim", "dtype", "latents", "positions"]
    names += ["registers", "spill_stores", "stack", "shared_bytes"]
    lines = [[*names, "matrix instructions"]]
    for row in found:
        instructions = " ".join(f"{name} {count}" for name, count in row["mma_by_name"].items())
        lines.append([*(str(row[name]) for name in names), instructions])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    spills = sum(row["spill_stores"] > 0 for row in found)
    large = sum(row["shared_bytes"] > SHARED_LIMIT[row["arch"]] * 1024 for row in found)
    text.append(f"{len(found)} configurations; with spill stores: {spills}; over the shared memory limit: {large}")
    return "\n".join(text)


if __name__ == "__main__":
    sys.exit(main())
