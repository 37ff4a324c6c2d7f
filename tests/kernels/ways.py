"""Which implementations run here: Triton's only in a process where it interprets, as is chosen when it is imported."""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PORTABLE = ("sdpa", "reference")
IMPLS = (*PORTABLE, "triton") if INTERPRETED else PORTABLE
DTYPES = {"triton": torch.float32}  # the widest that it takes
# Triton 3.6's interpreter takes int() of arrays with one number, of which numpy before 2.4 only warns.
NUMPY = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")

if INTERPRETED:
    from uhd_kernels.cross_attention import interpreter_problem

    if problem := interpreter_problem():
        pytest.skip(problem, allow_module_level=True)
