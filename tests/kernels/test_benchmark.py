"""The benchmark's arithmetic and contenders. Times need a GPU; that each contender is right does not."""

from __future__ import annotations

import json

import pytest
import torch
from uhd_kernels import configs
from uhd_kernels.configs import backward_config, forward_config

from tests.scripts import load_script


@pytest.fixture(scope="module")
def benchmark():
    return load_script("kernels")


def test_model_of_one_shape_by_hand(benchmark):
    shape = benchmark.Shape((576,) * 7, 64, 16, 64)
    row = benchmark.model(shape, chip="H100", dtype=torch.bfloat16)
    keys, latents, out, table = 7 * 576 * 1024 * 2, 64 * 1024 * 2, 7 * 64 * 1024 * 2, 576 * 1024 * 2
    assert row["forward_floor"] == 2 * keys + table + latents + out
    assert row["forward_flops"] == 7 * 16 * (2 * 64 * 576 * 64) * 2
    assert row["backward_flops"] == 2.5 * row["forward_flops"]
    assert row["backward_floor"] == 4 * keys + 2 * table + 2 * latents + 2 * out
    memory_bound = 1e6 * row["forward_floor"] / 3.0e12
    assert benchmark.roofline_us(row["forward_floor"], row["forward_flops"], "H100") == pytest.approx(memory_bound)


def test_every_shape_reads_its_keys_once(benchmark):
    for row in benchmark.model_rows(list(benchmark.SHAPES), torch.bfloat16):
        assert row["forward_over_floor"] <= 1.3
        assert row["forward_key_reads"] == row["backward_key_reads"] == 1


@pytest.mark.parametrize("name", ["grouped SDPA", "per-view SDPA", "padded SDPA", "FlexAttention"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_contenders_are_right(benchmark, name):
    shape = benchmark.Shape((5, 3, 5), 2, 2, 16)
    case = benchmark.Case.make(shape, "cpu", torch.float32)
    compute = case.contenders()[name]
    if name == "FlexAttention":  # its CPU code has no backward
        assert shape.offsets == [0, 5, 0]
        case = benchmark.Case(shape, *(x.detach() for x in case.leaves))
        got = case.flex(compiled=False)
        torch.testing.assert_close(got, case.ours("reference"), atol=1e-5, rtol=0)
        return
    exact, plain = benchmark.exactly(case), benchmark.results(case, case.per_view_sdpa())
    assert benchmark.check(case, compute, exact, plain) is None
    assert "wrong output" in benchmark.check(case, lambda: 1.01 * compute(), exact, plain)


def test_a_contender_that_cannot_run_is_a_finding(benchmark):
    case = benchmark.Case.make(benchmark.Shape((5, 3), 2, 1, 16), "cpu", torch.float32)
    found = benchmark.check(case, lambda: case.ours("triton"), [], [])
    assert found.startswith("ValueError: impl='triton' cannot run")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("latents", [64, 144])
@pytest.mark.parametrize("installed", [(3, 6), (3, 9)])
def test_the_tuner_also_tries_what_is_in_the_table(benchmark, monkeypatch, installed, latents, dtype):
    monkeypatch.setattr(configs, "triton_version", lambda: installed)
    tuner = load_script("tune_kernels")
    for arch in (80, 90, 100, "hip"):
        for dim in (64, 128):
            for direction, choose in (("forward", forward_config), ("backward", backward_config)):
                assert choose(arch, dim, dtype, latents) in tuner.candidates(direction, latents, dtype)


def test_older_tritons_get_entries_of_their_own_until_they_need_none(monkeypatch):
    found = {}
    for installed in ((3, 6), (3, 8), (3, 9), (4, 0)):
        monkeypatch.setattr(configs, "triton_version", lambda installed=installed: installed)
        found[installed] = [
            forward_config(80, 128, torch.float16, 64),
            backward_config(90, 128, torch.bfloat16, 64),
            forward_config(103, 64, torch.float32, 144),
            backward_config(90, 64, torch.float32, 144),
            forward_config(90, 64, torch.bfloat16, 64),
        ]
    assert found[4, 0] == found[3, 9]
    changed = {at: [a != b for a, b in zip(found[at], found[3, 9], strict=True)] for at in ((3, 6), (3, 8))}
    assert changed == {(3, 6): [True, True, True, True, False], (3, 8): [False, True, True, True, False]}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to time")
def test_without_a_gpu_it_prints_the_model_and_says_so(benchmark, capsys, tmp_path):
    assert benchmark.main(["--shapes", "0,6", "--json", str(tmp_path / "out.json")]) == 0
    printed = capsys.readouterr().out
    assert "10x1024 keys, 144 latents, 32x128" in printed
    assert "Nothing was timed: torch sees no GPU here." in printed
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["times"] == {}
    assert len(report["model"]) == 2 * len(benchmark.CHIPS)
    assert set(report["versions"]) == {"python", "torch", "triton", "device"}
