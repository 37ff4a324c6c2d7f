"""The scaling benchmark runs small, finds lines where there are lines, and says nothing where tokens differ."""

import copy
import json
import mmap
import pathlib

import pytest

from tests.scripts import FOLDER, load_script

SMALL = ["--width", "64", "--depth", "1", "--points", "3", "--repeats", "1"]
needs_linux = pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")


@pytest.fixture(scope="module")
def benchmark():
    return load_script("scaling")


@needs_linux
def test_small_run(benchmark, tmp_path, capsys):
    assert benchmark.main([*SMALL, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "scaling.json").read_text())
    rows = {}
    for row in result["rows"]:
        rows.setdefault(row["series"], []).append(row)
    assert list(rows) == ["megapixels", "slices", "batch", "slices, at once", "batch, at once"]
    assert [row["views"] for row in rows["slices"]] == [1, 3, 5]
    assert [row["patches"] for row in rows["slices"]][::2] == [576, 5 * 576]
    assert [row["images"] for row in rows["batch"]] == [1, 2, 4]
    assert all(row[key] > 0 for row in result["rows"] for key in ("prepare_ms", "encode_ms", "prepare_mb"))
    assert rows["batch, at once"][-1]["encode_mb"] > 0.8 * rows["batch"][-1]["encode_mb"]  # one step does for so few
    assert len(result["fits"]) == 3 * 4 + 2 * 2
    at_once = next(x for x in result["fits"] if (x["series"], x["what"]) == ("batch, at once", "encode_mb"))
    assert at_once["r2"] > 0.99
    said = capsys.readouterr().out
    assert benchmark.table(result) in said
    assert benchmark.fit_table(result) in said
    assert {path.name for path in tmp_path.glob("*.svg")} == {
        f"scaling_{kind}_{unit}.svg" for kind in ("prepare", "encode") for unit in ("ms", "mb")
    }


@needs_linux
def test_peaks_are_those_of_the_call(benchmark):
    """40 MiB that are gone again; a peak from before does not count."""

    def touch(mebibytes):
        with mmap.mmap(-1, mebibytes << 20) as pages:  # fresh ones, which an allocator need not take
            pages[::4096] = b"x" * (mebibytes << 8)

    touch(90)
    assert 39 < benchmark.peak_mb(lambda: touch(40)) < 42
    assert benchmark.peak_mb(lambda: None) < 1


def test_wrong_tokens_silence_it(benchmark, monkeypatch, silenced):
    def off(encoder):
        other = copy.deepcopy(encoder)
        other.compressor.proj.mul_(1.01)
        return other

    monkeypatch.setitem(benchmark.VARIANTS, ", off", off)
    silenced(benchmark, "nothing is reported: tokens of 3 images together, off: off by", *SMALL)


def test_failing_elsewhere_silences_it(benchmark, tmp_path, monkeypatch, silenced):
    monkeypatch.setattr(benchmark, "__file__", str(tmp_path / "gone.py"))
    silenced(benchmark, "memory could not be measured", *SMALL)


def test_lines_are_found(benchmark):
    rows = [{"a": a, "b": b, "y": 3 + 2 * a + 0.5 * b} for a, b in ((1, 1), (2, 9), (4, 4), (1, 50))]
    found = benchmark.fit(rows, "y", ("a", "b"))
    assert found["intercept"] == pytest.approx(3)
    assert found["slopes"] == pytest.approx({"a": 2, "b": 0.5})
    assert (found["r2"], found["largest_relative_residual"]) == (1, 0)
    bent = [{"a": a, "y": a**2} for a in (1, 2, 4, 8)]
    found = benchmark.fit(bent, "y", ("a",))
    assert found["largest_relative_residual"] > 0.3
    assert found["r2"] < 0.99


def test_the_stored_results_are_lines(benchmark):
    stored = json.loads((FOLDER / "results" / "scaling.json").read_text())
    counts = {"megapixels": 7, "slices": 7, "batch": 6, "slices, at once": 7, "batch, at once": 6}
    assert [row["series"] for row in stored["rows"]] == [name for name, count in counts.items() for _ in range(count)]
    fits = {(row["series"], row["what"]): row for row in stored["fits"]}
    assert set(fits) == {
        (name, f"{kind}_{unit}") for name in counts for kind in benchmark.kinds(name) for unit in ("ms", "mb")
    }
    timed = [(name, row) for (name, what), row in fits.items() if what.endswith("_ms")]
    assert all(row["r2"] > (0.9 if "at once" in name else 0.97) for name, row in timed)
    assert all(fits[name, "encode_mb"]["r2"] > 0.99 for name in counts if name.endswith("at once"))
    at_once, bounded = (
        max(row["encode_mb"] for row in stored["rows"] if row["series"] == name)
        for name in ("slices, at once", "slices")
    )
    assert at_once > 5 * bounded
    page = (FOLDER.parent / "docs" / "performance.md").read_text()
    assert benchmark.fit_table(stored) in page
