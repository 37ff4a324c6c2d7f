"""The resampler's benchmark runs, and says nothing where a contender is wrong."""

import json

import pytest

from tests.scripts import FOLDER, load_script


@pytest.fixture(scope="module")
def benchmark():
    return load_script("resampler")


SMALL = ["--widths", "128", "256", "--repeats", "1"]


def test_small_run(benchmark, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "GRIDS", [(4, 6)] * 2)
    monkeypatch.setattr(benchmark, "gemm_rate", lambda dtype: 1e9)
    monkeypatch.setattr(benchmark, "TARGETS", {(256, "fp32"): 1e9})
    assert benchmark.main([*SMALL, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "resampler.json").read_text())
    assert len(result["rows"]) == 2 * 2 * 7
    assert all(row["cpu_ms"] > 0 for row in result["rows"])
    assert all(row["relative_error"] <= benchmark.ROUNDING for row in result["rows"] if row["dtype"] == "fp32")
    assert not result["targets"][0]["ok"]
    assert "NOT reached" in capsys.readouterr().out
    assert (tmp_path / "resampler.svg").read_text().count("<polyline") == 6


def test_a_wrong_contender_silences_it(benchmark, monkeypatch, silenced):
    monkeypatch.setattr(benchmark, "GRIDS", [(4, 6)] * 2)
    released = benchmark.Released.forward
    monkeypatch.setattr(benchmark.Released, "forward", lambda self, *a, **k: 1.001 * released(self, *a, **k))
    silenced(benchmark, "nothing is reported: errors above", *SMALL, "--dtypes", "fp32")


def test_the_stored_results_have_every_row_and_the_page_shows_them(benchmark):
    stored = json.loads((FOLDER / "results" / "resampler.json").read_text())
    found = {(row["width"], row["dtype"]) for row in stored["rows"]}
    assert found == {(width, dtype) for width in (1024, 2048, 4096) for dtype in benchmark.DTYPES}
    wanted = {(row["width"], row["dtype"]) for row in stored["targets"]}
    assert set(benchmark.TARGETS) < wanted <= {*benchmark.TARGETS, (1024, "bf16"), (4096, "bf16")}
    assert benchmark.table(stored) in (FOLDER.parent / "docs" / "performance.md").read_text()
