"""Which tiles, warps and stages each kernel gets: a fixed table, so that nothing is timed at the first call.

Made by compiling ahead of time (`python -m uhd_kernels.resources`) with Triton 3.6 to 3.9: the largest blocks without
register spills under each. No entry has been chosen by its speed; `benchmarks/tune_kernels.py` times the alternatives
where there is a GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata

import torch

MAX_HEAD_DIM = 128
MAX_LATENTS = 256
FEW_LATENTS = 64  # as many as the backward keeps in registers


@dataclasses.dataclass(frozen=True)
class Config:
    """One kernel's shape. The backward has one tile; it takes as many rounds as the latents need."""

    tiles: tuple[int, int]  # latents that a program holds at once, in one or two powers of two
    block_n: int  # keys in a step
    num_warps: int
    num_stages: int  # steps in flight

    @property
    def launch(self) -> dict[str, object]:
        # Fused multiply-add is asked for aloud: what Triton does unasked is about to change.
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


# (family, head dim above 64, latents above 64) for 16 bits; tiles, keys, warps, stages
FORWARD_16 = {
    ("80", False, False): Config((64, 0), 64, 4, 3),
    ("80", False, True): Config((128, 16), 32, 8, 3),
    ("80", True, False): Config((64, 0), 32, 4, 3),
    ("80", True, True): Config((128, 16), 16, 8, 3),
    ("90", False, False): Config((64, 0), 64, 4, 3),
    ("90", False, True): Config((128, 16), 64, 8, 3),
    ("90", True, False): Config((64, 0), 64, 4, 2),
    ("90", True, True): Config((128, 16), 32, 8, 2),
    ("100", False, False): Config((64, 0), 64, 4, 2),
    ("100", False, True): Config((128, 16), 64, 8, 2),
    ("100", True, False): Config((64, 0), 64, 4, 2),
    ("100", True, True): Config((128, 16), 32, 8, 2),
    ("hip", False, False): Config((64, 0), 64, 4, 1),
    ("hip", False, True): Config((128, 16), 32, 8, 1),
    ("hip", True, False): Config((64, 0), 32, 4, 1),
    ("hip", True, True): Config((128, 16), 16, 8, 1),
}
BACKWARD_16 = {
    ("80", False, False): Config((64, 0), 32, 4, 2),
    ("80", False, True): Config((16, 0), 64, 8, 2),
    ("80", True, False): Config((64, 0), 32, 8, 1),
    ("80", True, True): Config((16, 0), 32, 8, 1),
    ("90", False, False): Config((64, 0), 64, 8, 2),
    ("90", False, True): Config((32, 0), 64, 8, 2),
    ("90", True, False): Config((64, 0), 64, 8, 2),
    ("90", True, True): Config((32, 0), 64, 8, 2),
    ("100", False, False): Config((64, 0), 64, 4, 2),
    ("100", False, True): Config((32, 0), 64, 8, 1),
    ("100", True, False): Config((64, 0), 64, 8, 2),
    ("100", True, True): Config((32, 0), 64, 8, 1),
    ("hip", False, False): Config((64, 0), 32, 4, 1),
    ("hip", False, True): Config((32, 0), 32, 8, 1),
    ("hip", True, False): Config((16, 0), 32, 8, 1),
    ("hip", True, True): Config((16, 0), 32, 8, 1),
}
# IEEE products in float32 run on the plain units, which hold their operands in registers: small tiles everywhere.
FORWARD_32 = {"80": Config((64, 0), 32, 8, 1), "90": Config((64, 0), 32, 8, 1)}
FORWARD_32_ELSEWHERE = Config((32, 32), 16, 8, 1)
BACKWARD_32 = Config((16, 0), 32, 8, 1)

# Where an older Triton spills with the entries above: the first that does not, and what takes less room until then.
# Smaller blocks cost the matrix units part of their work, fewer stages hide less of the memory's delay.
OLDER = {
    ("forward", 16, "80", True, False): ((3, 7), Config((64, 0), 32, 4, 2)),
    ("backward", 16, "80", True, False): ((3, 9), Config((64, 0), 16, 8, 2)),
    ("backward", 16, "90", True, False): ((3, 9), Config((64, 0), 32, 8, 2)),
    ("forward", 32, "90", True): ((3, 8), Config((32, 32), 16, 8, 1)),
    ("forward", 32, "100", False): ((3, 9), Config((64, 0), 32, 8, 1)),
    ("backward", 32, "80", True): ((3, 7), Config((16, 0), 16, 8, 1)),
    ("backward", 32, "90", False): ((3, 9), Config((16, 0), 16, 8, 1)),
}


def family(arch: int | str) -> str:
    """The row of the tables for a compute capability times ten (86 is 8.6), or for "hip".

    8.6, 8.9 and 12.0 have less shared memory than 8.0, and 12.0 has no tcgen05: the row of 8.0 fits them all.
    """
    if arch == "hip":
        return "hip"
    return {9: "90", 10: "100", 11: "100"}.get(int(arch) // 10, "80")


def forward_config(arch: int | str, head_dim: int, dtype: torch.dtype, latents: int) -> Config:
    """Latents past the tiles take another launch, which reads the keys again."""
    row = family(arch), head_dim > 64
    if dtype.itemsize == 4:
        return _older("forward", 32, *row) or FORWARD_32.get(row[0], FORWARD_32_ELSEWHERE)
    row = *row, latents > FEW_LATENTS
    return _older("forward", 16, *row) or FORWARD_16[row]


def backward_config(arch: int | str, head_dim: int, dtype: torch.dtype, latents: int) -> Config:
    """Latents past the first tile go round in `backward_many_kernel`, which still reads the keys once."""
    row = family(arch), head_dim > 64
    if dtype.itemsize == 4:
        return _older("backward", 32, *row) or BACKWARD_32
    row = *row, latents > FEW_LATENTS
    return _older("backward", 16, *row) or BACKWARD_16[row]


def _older(*key: str | int | bool) -> Config | None:
    """The entry for an older Triton, where the installed one needs it."""
    first_without, config = OLDER.get(key, ((0, 0), None))
    return config if triton_version() < first_without else None


@functools.cache
def triton_version() -> tuple[int, int]:
    """(major, minor) of the installed Triton, which is not imported; (0, 0) where there is none."""
    try:
        major, minor = importlib.metadata.version("triton").split(".")[:2]
    except importlib.metadata.PackageNotFoundError:
        return 0, 0
    return int(major), int(minor)


def padded_dim(head_dim: int) -> int:
    """The power of two that a head dim takes in the kernels; lanes past it are masked."""
    return max(16, 1 << (head_dim - 1).bit_length())


def split_keys(programs: int, longest: int, block_n: int, processors: int) -> tuple[int, int]:
    """(splits of each view's keys, keys in a split): more than one only where programs are too few for the chip."""
    blocks = max(1, -(-longest // block_n))
    wanted = -(-processors // max(1, programs))
    each = -(-blocks // min(blocks, wanted))
    return -(-blocks // each), each * block_n
