"""Benchmarks run, agree with the results that are checked in, and refuse to speak when their own checks fail."""

import json
import math

import pytest

import uhd
from tests.scripts import FOLDER, load_script

strategies, claims = load_script("strategies"), load_script("paper_claims")


def test_sizes_are_seeded_and_in_their_shares():
    first, again, other = (strategies.draw_sizes(100, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert {kind: len(sizes) for kind, sizes in first.items()} == {
        k: round(100 * s) for k, s in strategies.SHARES.items()
    }
    assert set(strategies.DISTRIBUTION) == set(strategies.SHARES)
    assert math.isclose(sum(strategies.SHARES.values()), 1)
    assert all(min(size) >= 640 / (16 / 9) - 1 and max(size) <= 4032 for size in first["photos"])
    assert all(3.9 <= max(size) / min(size) <= 10.1 for size in first["strips"])
    assert all(1.2 < max(size) / min(size) < 1.6 for size in first["pages"])


def test_strategies_small_run(tmp_path, capsys, monkeypatch):
    few = ["llava-uhd", "llava15-pad-336", "fuyu-1080x1920", "gemma4-280", "idefics2-split"]
    monkeypatch.setattr(strategies, "all_rules", lambda: few)
    assert strategies.main(["--out", str(tmp_path), "--count", "20", "--stability-count", "5"]) == 0
    result = json.loads((tmp_path / "strategies.json").read_text())
    by_name = {row["strategy"]: row for row in result["strategies"]}
    assert by_name["llava15-pad-336"]["tokens_max"] == 576
    assert by_name["llava-uhd"]["padding_mean"] == 0
    assert by_name["gemma4-280"]["budget_error_max"] <= 1 < 2 * by_name["gemma4-280"]["budget_error_max"]
    assert any(row["pareto"] for row in result["strategies"])
    assert "* " in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.glob("*.svg")) == [
        "strategies_aspect.svg",
        "strategies_pareto.svg",
        "strategies_size.svg",
    ]


def test_strategies_refuse_to_speak_on_a_wrong_metric(monkeypatch, tmp_path):
    monkeypatch.setattr(strategies, "measure", lambda plan: uhd.slicing.metrics.measure(uhd.plan((30, 40))))
    with pytest.raises(RuntimeError, match="expected"):
        strategies.main(["--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_stored_results_are_these():
    stored = json.loads((FOLDER / "results" / "strategies.json").read_text())
    assert stored["distribution"] == strategies.DISTRIBUTION
    sizes = strategies.draw_sizes(sum(stored["sizes"].values()), stored["seed"])
    flat = [size for some in sizes.values() for size in some]
    by_name = {row["strategy"]: row for row in stored["strategies"]}
    assert sorted(by_name) == sorted(strategies.all_rules()), "run `python benchmarks/strategies.py` again"
    for name in ("llava-uhd", "internvl-dynamic-448-max12", "gemma4-280"):
        found = strategies._rounded(strategies.summarize(name, flat))
        assert found == pytest.approx({key: by_name[name][key] for key in found}, rel=1e-3)


@pytest.fixture(scope="module")
def claimed():
    return claims.run()


def test_claims_validate_and_equal_the_stored_ones(claimed):
    assert all(formula == count for key, (formula, count) in list(claimed["validation"].items())[1:])
    stored = json.loads((FOLDER / "results" / "paper_claims.json").read_text())
    assert stored["rows"] == claimed["rows"]
    assert stored["duplication"] == claimed["duplication"]
    assert claims.verdicts(claimed) in (FOLDER / "README.md").read_text()


def test_the_headline_claims(claimed):
    rows = {row["claim"]: row for row in claimed["rows"]}
    assert {row["holds"] for row in rows.values()} == {"yes", "partly", "no"}
    assert rows["a 672 x 1008 image costs 64 * (6 + 1) tokens"]["ours"] == "448"
    assert rows["uncompressed, the same image would cost LLaVA-1.5 3456 tokens"]["ours"] == "3456"
    assert abs(float(rows["TFLOPs of LLaVA-UHD 13B at 672 x 1008"]["ours"]) / 14.63 - 1) < 0.01
    assert abs(float(rows["TFLOPs of LLaVA-1.5 13B"]["ours"]) / 15.50 - 1) < 0.01
    assert rows["the same for N = 1"]["holds"] == "no"


def test_slice_bounds_are_exact_for_the_planner():
    """The closed form against the planner itself."""
    from uhd.slicing import SlicingConfig, grid_score

    config = SlicingConfig(max_slices=20)
    worst = 0.0
    for n in (2, 5, 18):
        for step in range(200):
            aspect = 6 ** (step / 100 - 1)
            side = 336 * math.sqrt((n - 0.5) / aspect)
            size = (round(side * 10) // 10, round(side * aspect * 10) // 10)
            grid = uhd.plan(size, config).grid
            misfit = math.exp(-grid_score(size, grid))
            worst = max(worst, misfit)
            assert misfit <= claims.worst_misfit(n, tuple(k for k in (n - 1, n, n + 1) if k > 1)) + 0.02
    assert worst > 1.9


def test_duplication_map(claimed):
    overlap = {side: (count, o) for side, count, o in claimed["duplication"]["overlap"]}
    assert overlap[512] == (9, 1.0)
    assert overlap[513][0] == 36
    assert overlap[768] == (16, round((1024 / 768) ** 2, 3))
    assert overlap[2048] == overlap[768]
    assert all(count == 9 for _, count, _ in claimed["duplication"]["pad"])


def test_claims_exit_with_1_where_a_formula_is_wrong(monkeypatch, silenced):
    monkeypatch.setattr(claims, "mlp_flops", lambda *args, **kwargs: 1)
    silenced(claims, "MLP projector")
