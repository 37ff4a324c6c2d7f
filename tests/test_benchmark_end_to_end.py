"""The end-to-end benchmark runs small, says nothing where tokens differ, and judges by the slowest input."""

import json
from functools import partial

import numpy as np
import pytest
from PIL import Image

from tests.pretrained import released
from tests.scripts import FOLDER, load_script

SMALL = ["--all", "--width", "64", "--depth", "1", "--repeats", "1"]
INPUTS = ("made 672x1008", "made 1080x1920", "rocket 427x640", "4 images")


@pytest.fixture(scope="module")
def benchmark():
    return load_script("end_to_end")


@pytest.fixture
def small(benchmark, monkeypatch):
    """Two small pictures at once, a narrow language model, and no compiler."""
    rng = np.random.default_rng(0)
    colours = [rng.integers(0, 256, (h // 30, w // 30, 3), np.uint8) for h, w in ((180, 120), (120, 270))]
    files = [
        benchmark.jpeg(np.asarray(Image.fromarray(each).resize((each.shape[1] * 30, each.shape[0] * 30))))
        for each in colours
    ]
    for function in (benchmark.own_encoder, benchmark.make_peer):  # each in its own file
        monkeypatch.setitem(function.__globals__, "LM_WIDTH", 128)
    monkeypatch.setattr(benchmark, "inputs", lambda: {"two": files})
    monkeypatch.setattr(benchmark, "gemm_rate", lambda dtype: 1e9)
    monkeypatch.setattr(benchmark, "OURS", {k: v for k, v in benchmark.OURS.items() if "compiled" not in k})
    return benchmark


def test_small_run(small, tmp_path, capsys):
    released.skip_unless_packed(released.make("minicpmv4_6")[0])  # one of the peers
    assert small.main([*SMALL, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "end_to_end.json").read_text())
    rows = result["rows"]
    assert len(rows) == 2 * (3 + 3 * 2 + 1)
    assert all(row["cpu_ms"] > 0 for row in rows)
    for row in rows:
        theirs = next(
            other
            for other in rows
            if other["contender"].startswith("transformers")
            and (other["input"], other["dtype"], other["rule"]) == (row["input"], row["dtype"], row["compared_with"])
        )
        assert theirs["ratio"] == 1
        if row["rule"] in small.MAKERS:
            assert (row["patches"], row["tokens"]) == (theirs["patches"], theirs["tokens"])
            assert row["ratio_per_patch"] == row["ratio"]
    by_rule = {row["rule"]: row["patches"] for row in rows}
    assert by_rule == {"LLaVA-NeXT": 6 * 576, "LLaVA-OneVision": 4 * 729, "MiniCPM-V 4.6": 2080, "llava-uhd": 1127}
    exact = [row for row in rows if row["contender"] == "uhd" and row["dtype"] == "fp32"]
    assert max(row["relative_error"] for row in exact) < small.ROUNDING
    said = capsys.readouterr().out
    assert small.summary(result) in said
    assert small.table(result) in said
    assert (tmp_path / "end_to_end.svg").read_text().count("<polyline") == 6


@pytest.fixture
def one_peer(small, monkeypatch):
    monkeypatch.setattr(small, "MAKERS", ["LLaVA-NeXT"])
    return small


def test_wrong_tokens_silence_it(one_peer, monkeypatch, silenced):
    monkeypatch.setattr(one_peer, "OURS", {"darker": partial(one_peer.with_pixels, mean=(0.55, 0.5, 0.5))})
    silenced(one_peer, "nothing is reported: darker, LLaVA-NeXT, fp32: tokens are off by", *SMALL, "--dtypes", "fp32")


def test_another_number_of_tokens_silences_it(one_peer, monkeypatch, silenced):
    made = one_peer.our_contenders

    def one_less(*args):
        return [each._replace(call=partial(shorter, each.call)) for each in made(*args)]

    def shorter(call, images):
        return [part[1:] for part in call(images)]

    monkeypatch.setattr(one_peer, "our_contenders", one_less)
    silenced(one_peer, "tokens an image instead of", *SMALL, "--dtypes", "fp32")


def test_targets_are_judged_by_the_slowest_input(benchmark):
    rows = [{"rule": "x", "dtype": "bf16", "contender": "a", "ratio": ratio} for ratio in (0.99, 1.7, 2.0)]
    found = benchmark.reached(rows, "x", "bf16", "a")
    assert (found["least"], found["median"], found["aim"]) == (0.99, 1.7, 1.2)
    assert not found["never_slower"]
    assert not found["aim_reached"]
    found = benchmark.reached(rows[1:], "x", "bf16", "a")
    assert found["never_slower"]
    assert found["aim_reached"]


def test_the_plot_draws_the_fastest_of_ours(benchmark):
    row = {"rule": "LLaVA-NeXT", "dtype": "fp32", "megapixels": 1.0}
    rows = [{**row, "contender": name, "ratio": ratio} for name, ratio in (("uhd", 0.5), ("uhd, b", 2.0))]
    rows += [{**each, "megapixels": 2.0} for each in rows]
    flat, lower = benchmark.plot({"rows": rows}), benchmark.plot({"rows": rows[:1] + rows[2:]})
    (line,) = [part.split('"')[0] for part in flat.split('points="')[1:]]
    assert len({point.split(",")[1] for point in line.split()}) == 1
    assert flat != lower


def test_the_stored_results_have_every_row_and_the_page_shows_them(benchmark):
    stored = json.loads((FOLDER / "results" / "end_to_end.json").read_text())
    found = {(row["input"], row["dtype"], row["rule"], row["contender"].split(",")[0]) for row in stored["rows"]}
    kinds = {(rule, kind) for rule in benchmark.MAKERS for kind in ("transformers", "uhd")} | {("llava-uhd", "uhd")}
    assert found == {(name, dtype, *kind) for name in INPUTS for dtype in benchmark.DTYPES for kind in kinds}
    assert len(stored["rows"]) == len(INPUTS) * 2 * (4 * len(benchmark.OURS) + 2)
    assert len(stored["targets"]) == 2 * 3 * len(benchmark.OURS)
    page = (FOLDER.parent / "docs" / "performance.md").read_text()
    assert benchmark.summary(stored) in page
    assert all(line in page for line in benchmark.table(stored).splitlines() if "| llava-uhd |" in line)
