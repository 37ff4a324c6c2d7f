"""The family's FLOPs: formulas held against what is multiplied, and the stored results are these."""

import json
import math

import pytest

import uhd
from tests.scripts import FOLDER, load_script

flops = load_script("flops")
FEW = ("LLaVA-1.5", "LLaVA-UHD, ECCV", "MiniCPM-V 2.6", "MiniCPM-V 4.6")


@pytest.fixture
def small(monkeypatch):
    """Some members, and shapes of fewer blocks."""
    few = {name: flops.MEMBERS[name] for name in FEW}
    for name, member in few.items():
        after = tuple(1 for _ in member.vit.compress_after)
        few[name] = flops.replace(member, vit=flops.replace(member.vit, depth=2, compress_after=after))
    monkeypatch.setattr(flops, "MEMBERS", few)
    monkeypatch.setitem(flops.LMS, flops.LM, flops.replace(flops.LMS[flops.LM], depth=1))


def test_small_run(small, tmp_path, capsys):
    assert flops.main(["--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "flops.json").read_text())
    assert {row["member"] for row in result["rows"]} == set(FEW)
    assert len(result["rows"]) == len(FEW) * len(flops.IMAGES)
    checked = {name: parts for name, parts in result["validation"].items() if name != "about"}
    assert set(checked) == set(FEW)
    assert all(formula == counted > 0 for parts in checked.values() for formula, counted in parts.values())
    shown = capsys.readouterr().out
    assert "torch " in shown
    assert "| LLaVA-UHD, ECCV | 7 | 1014 |" in shown


def test_nothing_is_reported_where_a_formula_is_off(small, monkeypatch, silenced):
    monkeypatch.setattr(flops, "mlp_flops", lambda *args, **kwargs: 1)
    silenced(flops, "'LLaVA-1.5, compressor': [1, ")


def test_stored_results_are_these():
    stored = json.loads((FOLDER / "results" / "flops.json").read_text())
    assert set(stored["validation"]) == {"about", *flops.MEMBERS}
    rows = {(row["member"], tuple(row["image_hw"])): row for row in stored["rows"]}
    assert set(rows) == {(name, image_hw) for name in flops.MEMBERS for image_hw in flops.IMAGES}
    for (name, image_hw), row in rows.items():
        plan = uhd.plan(image_hw, flops.MEMBERS[name].rule)
        parts = flops.cost(plan, flops.MEMBERS[name])
        assert (row["views"], row["tokens"]) == (plan.num_views, plan.num_tokens)
        assert {part: row[f"{part}_gflops"] for part in parts} == {k: round(v / 1e9, 1) for k, v in parts.items()}
        assert math.isclose(row["total_gflops"], sum(parts.values()) / 1e9, abs_tol=0.06)
    shown = flops.table(stored)
    assert shown in (FOLDER / "README.md").read_text()
    assert shown in (FOLDER.parent / "docs" / "family.md").read_text()


def test_what_compression_inside_the_vit_saves():
    """The same tokens, joined inside the ViT or behind it: about half of the encoder, as the v4 paper has it."""
    v4, end = (flops.MEMBERS[name] for name in ("LLaVA-UHD v4", "v4's tokens, merged at the end"))
    for image_hw in flops.IMAGES:
        plan = uhd.plan(image_hw, v4.rule)
        assert plan == uhd.plan(image_hw, end.rule)
        assert 0.4 < flops.cost(plan, v4)["encoder"] / flops.cost(plan, end)["encoder"] < 0.5
