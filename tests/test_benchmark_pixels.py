"""Benchmarks of planner and pixels run small, are silent when a check fails, and their stored results are whole."""

import json

import pytest

from tests.scripts import FOLDER, load_script


@pytest.fixture(scope="module")
def planner():
    return load_script("planner")


@pytest.fixture(scope="module")
def preprocess():
    return load_script("preprocess")


def test_planner_small_run(planner, tmp_path, capsys):
    assert planner.main(["--count", "1000", "--rounds", "1", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "planner.json").read_text())
    assert [row["planner"] for row in result["rows"]][:2] == ["transformers", "integer core"]
    assert result["rows"][0]["ratio"] == 1
    assert "all numbers equal" in capsys.readouterr().out


def test_planner_refuses_to_speak_where_a_number_differs(planner, monkeypatch, silenced):
    monkeypatch.setattr(planner, "PRESET", "minicpm-v")
    silenced(planner, "planned otherwise", "--count", "50", "--rounds", "1")


@pytest.mark.parametrize("flags", [[], ["--uint8"]])
def test_preprocess_small_run(preprocess, monkeypatch, tmp_path, capsys, flags):
    sizes = ((300, 420), (420, 300), (470, 610))
    monkeypatch.setattr(preprocess, "MADE", sizes)
    monkeypatch.setattr(preprocess, "PHOTOS", ("chelsea",))
    monkeypatch.setattr(preprocess, "BATCH", 3)
    assert preprocess.main(["--rounds", "1", "--out", str(tmp_path), *flags]) == 0
    stem = "preprocess_uint8" if flags else "preprocess"
    result = json.loads((tmp_path / f"{stem}.json").read_text())
    made = [f"made {h}x{w}" for h, w in sizes]
    others = [f"{name}, {kind}" for kind in ("PNG", "WebP") for name in [*made, "page 420x300"]]
    assert [row["picture"] for row in result["rows"]] == [*made, "chelsea 300x451", *others]
    assert ("torchvision decodes" in result["rows"][-1]["cpu_ms"]) == (not flags)
    assert all(max(v for k, v in row["ratio"].items() if k.startswith("transformers")) == 1 for row in result["rows"])
    assert (tmp_path / f"{stem}.svg").read_text().startswith("<svg")
    assert "torchvision " in capsys.readouterr().out


def test_preprocess_refuses_to_speak_where_pixels_are_off(preprocess, monkeypatch, silenced):
    monkeypatch.setattr(preprocess, "MADE", ((300, 420),) * 3)
    monkeypatch.setattr(preprocess, "PHOTOS", ())
    wrong = preprocess.OURS["uhd, fast"].__class__(**preprocess.NORMAL, backend="fast", resample="bilinear")
    monkeypatch.setitem(preprocess.OURS, "uhd, fast", wrong)
    silenced(preprocess, "fast and exact differ", "--rounds", "1")


@pytest.mark.parametrize(
    "name, rows",
    [
        ("planner", 5),
        ("preprocess", 7),
        ("preprocess_uint8", 7),
        ("amd_epyc/preprocess", 15),
        ("amd_epyc/preprocess_uint8", 15),
    ],
)
def test_stored_results_are_whole_and_on_the_page(name, rows, request):
    stored = json.loads((FOLDER / "results" / f"{name}.json").read_text())
    assert len(stored["rows"]) == rows
    assert {"python", "transformers"} <= set(stored["versions"])
    for row in stored["rows"]:
        times = row["cpu_ms"] if "cpu_ms" in row else {"": row["us_per_image"]}
        assert all(value > 0 for value in times.values())
    script = request.getfixturevalue(name.removeprefix("amd_epyc/").removesuffix("_uint8"))
    assert script.table(stored["rows"]) in (FOLDER.parent / "docs" / "performance.md").read_text()
