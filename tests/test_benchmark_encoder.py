"""The encoder's benchmark runs, and says nothing where a contender is wrong."""

import json

import pytest
import torch

from tests.scripts import FOLDER, load_script
from uhd.encoder import VisualEncoder
from uhd.flop_counter import count_flops


@pytest.fixture(scope="module")
def benchmark():
    return load_script("encoder")


@pytest.fixture
def small(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark, "IMAGES", ((60, 100), (90, 40), (30, 32)))
    monkeypatch.setattr(benchmark, "SIDE", 64)
    monkeypatch.setattr(benchmark, "gemm_rate", lambda dtype: 1e9)
    return benchmark


SMALL = ["--depth", "2", "--width", "64", "--repeats", "1", "--eager"]


def test_small_run(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(small.TARGETS, "fp32", (("uhd", small.PEER, 1e9),))
    assert small.main([*SMALL, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "encoder.json").read_text())
    assert len(result["rows"]) == 2 * 5
    assert result["work"]["patches"] < result["work"]["patches, padded"]
    errors = {(row["dtype"], row["contender"]): row["relative_error"] for row in result["rows"]}
    assert errors["fp32", "uhd"] < small.ROUNDING < errors["fp32", "uhd, int8"] < 0.05
    assert not result["targets"][0]["ok"]
    assert "NOT reached" in capsys.readouterr().out
    assert (tmp_path / "encoder.svg").read_text().count("<rect") == 10


def test_a_wrong_contender_silences_it(small, monkeypatch, silenced):
    right = VisualEncoder.encode_packed
    monkeypatch.setattr(VisualEncoder, "encode_packed", lambda *args: (1.01 * right(*args)[0], right(*args)[1]))
    silenced(small, "nothing is reported: errors above", *SMALL, "--dtypes", "fp32")


def test_flops_are_those_that_are_multiplied(small):
    with torch.no_grad():
        calls, _ = small.contenders(2, torch.float32, 64, compiled=False)
        grids = [view.patches_hw for hw in small.IMAGES for view in small.plans(hw).views]
    assert count_flops(calls["uhd, all at once"]) == small.vit_flops(2, 64, grids)


def test_the_stored_results_have_every_row_and_the_page_shows_them(benchmark):
    stored = json.loads((FOLDER / "results" / "encoder.json").read_text())
    names = {(row["dtype"], row["contender"]) for row in stored["rows"]}
    assert len(names) == 2 * 8
    assert {target["dtype"] for target in stored["targets"]} == set(benchmark.TARGETS)
    assert benchmark.table(stored) in (FOLDER.parent / "docs" / "performance.md").read_text()
