"""The Triton kernels without a GPU: interpreted on the CPU, and compiled ahead of time for three architectures."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from uhd_kernels.resources import main

from tests.scripts import interpreted

ROOT = Path(__file__).parents[2]
PATHS = os.pathsep.join([str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
ENVIRONMENT = {**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}
HERE = Path(__file__).parent
CHECKS = HERE / "interpreted_checks.py"
SHARED_CHECKS = (HERE / "test_op.py", HERE / "test_cross_attention.py")  # of all implementations
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}

pytest.importorskip("triton")


def test_interpreted():
    chosen = ("-m", "not slow", "-k", "interpreted_checks or [triton or -triton")
    assert interpreted(CHECKS, *map(str, SHARED_CHECKS), *chosen) >= 46


@pytest.mark.slow
def test_interpreted_every_configuration():
    assert interpreted(CHECKS, "-m", "slow") >= 108


def resources(*options):
    command = [sys.executable, "-m", "uhd_kernels.resources", "--json", *options]
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-4000:]
    return json.loads(found.stdout)


FIELDS = {"kernel", "direction", "arch", "head_dim", "dtype", "registers", "spill_stores"}
FIELDS |= {"stack", "shared_bytes", "mma"}


def check_rows(rows):
    for row in rows:
        assert set(row) >= FIELDS
        assert type(row["arch"]) is int
        assert 0 < row["registers"] <= 255
        assert row["shared_bytes"] <= SHARED_LIMIT[row["arch"]], row
        assert row["mma"] == sum(row["mma_by_name"].values())
        if row["direction"] == "small":
            assert row["mma"] == 0
            continue
        assert row["spill_stores"] == 0, row
        if row["dtype"] == "fp32":
            assert row["mma"] == 0, "float32 is to stay IEEE, and the matrix units are not"
        else:
            assert {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[row["arch"]] in row["mma_by_name"], row
            assert row["shared_bytes"] > 0
    return {(row["arch"], row["head_dim"], row["dtype"], row["direction"], row["latents"]) for row in rows}


def test_no_spills_and_wgmma_on_hopper():
    seen = check_rows(resources("--arch", "90", "--head-dims", "128", "--latents", "64", "--small"))
    assert seen == {(90, 128, "bf16", way, n) for way, n in (("forward", 64), ("backward", 64), ("small", 0))}


@pytest.mark.slow
def test_no_spills_and_matrix_instructions_anywhere():
    dtypes = ("bf16", "fp16", "fp32")
    seen = check_rows(resources("--dtypes", ",".join(dtypes), "--small"))
    ways = [(way, n) for way in ("forward", "backward") for n in (64, 144)] + [("small", 0)]
    assert seen == {(a, d, t, *way) for a in (80, 90, 100) for d in (64, 128) for t in dtypes for way in ways}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arch", "70"], r"unknown \[70\]; architectures are \[80,"),
        (["--dtypes", "bf16,int8"], r"unknown \['int8'\]"),
        (["--arch", "90,"], r"'90,' is no list of integers such as 80,90"),
        (["--head-dims", "64,256"], r"\[256\]: head dims go from 1 to 128"),
    ],
)
def test_resources_refuses_what_it_does_not_know(capsys, options, message):
    with pytest.raises(SystemExit, match="2"):
        main(options)
    assert re.search(message, capsys.readouterr().err)
