"""The learned comparison: arms and their supervision by hand, runs that resume, statistics that know the truth."""

import importlib
import json
import pathlib
import re
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import uhd
from tests.tiny import refuses
from uhd import UHDForConditionalGeneration, register_strategy
from uhd.evaluation.scores import quantile
from uhd.nano.build import NanoConfig, build_nano
from uhd.nano.task import GLYPHS, Glyph, Scene, TaskSettings, bucket, scene
from uhd.slicing.coordinates import view_box
from uhd.slicing.strategies.base import tiled
from uhd.slicing.strategies.fixed import StretchConfig

ROOT = pathlib.Path(__file__).parent.parent
SMALL = NanoConfig(
    width=32, vision_depth=1, vision_heads=2, vision_mlp=32, latent_heads=2, text_depth=1, text_heads=2, text_mlp=32
)


@pytest.fixture(scope="module")
def parts():
    """The scripts as modules, and the example's ``data``."""
    names = {"data": "data", "main": "learned"}
    names |= {part: f"learned_{part}" for part in ("cuts", "report", "results", "run")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(ROOT / "benchmarks"), str(ROOT / "examples" / "nano"), *sys.path])
        yield SimpleNamespace(**{part: importlib.import_module(name) for part, name in names.items()})
    for name in ("stages", "train", *names.values()):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def tiny(parts):
    return parts.run.Settings(
        vision=2, text=2, joint=2, batch_size=2, test_images=6, validation_images=3, local_steps=1, model=SMALL
    )


# arms


PLANNED = {  # (height, width): slices, tokens and separators
    ("uhd", (20, 40)): (0, 9, 0),
    ("uhd", (26, 157)): (4, 45, 4),
    ("uhd", (61, 46)): (4, 45, 4),
    ("no-separators", (26, 157)): (4, 45, 0),
    ("stretch", (26, 157)): (0, 36, 0),
    ("pad", (157, 26)): (0, 36, 0),
    ("next", (20, 40)): (2, 27, 2),
    ("next", (26, 157)): (3, 36, 3),
    ("next", (157, 26)): (3, 36, 3),
    ("anyres", (26, 157)): (4, 45, 4),
    ("anyres", (31, 32)): (1, 18, 1),
    ("overview", (26, 157)): (0, 9, 0),
    ("overview-wide", (26, 157)): (0, 36, 0),
    ("few-latents", (26, 157)): (4, 20, 4),
}


@pytest.mark.parametrize("name", sorted({name for name, _ in PLANNED}))
def test_arms_have_the_planned_views_and_tokens(parts, name):
    model = parts.run.all_arms(SMALL)[name].build(0)
    for (arm, image_hw), (slices, tokens, separators) in PLANNED.items():
        if arm == name:
            plan = model.visual.plan(image_hw)
            assert sum(view.kind == "slice" for view in plan.views) == slices
            assert (plan.num_visual_tokens, plan.num_separators) == (tokens, separators), image_hw
            encoded = model.visual([Image.new("L", image_hw[::-1], 200)])[0]
            assert len(encoded.tokens) == tokens
            assert encoded.layout.num_tokens == tokens + separators


def test_the_compared_arms_are_near_in_tokens_and_parameters_as_the_page_says(parts):
    asked_for = {"few-latents", "overview-wide"}
    every = {name: parts.run.all_arms()[name].build(0) for name in (*parts.run.ARMS, *asked_for)}
    arms = {name: model for name, model in every.items() if name not in asked_for}
    sizes = [scene(parts.run.TEST_SEED, n).image_hw for n in range(256)]
    plans = {name: [model.visual.plan(hw) for hw in sizes] for name, model in every.items()}
    tokens = {name: np.mean([plan.num_visual_tokens for plan in some]) for name, some in plans.items()}
    count = {name: sum(p.numel() for p in model.parameters()) for name, model in arms.items()}
    assert all(0.98 < tokens[name] / tokens["uhd"] < 1.15 for name in arms)
    assert all(1 <= count[name] / count["uhd"] < 1.01 for name in arms)
    assert arms["stretch"].visual.vision.config.position_grid_hw == (8, 8)
    assert arms["uhd"].visual.vision.config.position_grid_hw == (4, 4)
    page = (ROOT / "docs" / "learned.md").read_text()
    for name, some in plans.items():
        cells = page.split(f"\n| `{name}` |")[1].split("\n")[0].split("|")[1:4]
        most = max(plan.num_visual_tokens for plan in some)
        positions, patches = (np.mean([getattr(p, key) for p in some]) for key in ("num_tokens", "num_patches"))
        wanted = [f"{tokens[name]:.1f} ({most})", f"{positions:.1f}", f"{patches:.1f}"]
        assert [cell.strip() for cell in cells] == wanted, name


def test_seeds_of_scenes_are_apart(parts):
    seeds = {parts.run.TEST_SEED, parts.run.VALIDATION_SEED, 1_000_003}
    assert len(seeds) == 3
    assert min(seeds) > 1_000_000  # training has 10 * seed + stage


# supervision


def told(parts, plan, *glyphs):
    """{(view, (latent row, column), part, kind)} and {(view, (patch row, column), kind)} of glyphs ((y, x), text)."""
    drawn = Scene(
        Image.new("L", plan.image_hw[::-1]),
        (("".join(text for _, text in glyphs),),),
        tuple(Glyph(text, centre, 0, 0) for centre, text in glyphs),
    )
    latents, patches = parts.data.codes(drawn, plan)
    side = round(plan.views[0].num_tokens ** 0.5)
    latents = latents.view(plan.num_views, side, side, *parts.data.PARTS_HW, parts.data.KINDS)
    of_latents = {(v, (r, c), (y, x), k) for v, r, c, y, x, k in latents.nonzero().tolist()}
    of_patches, start = set(), 0
    for view in plan.views:
        grid = patches[start : start + view.num_patches].view(*view.patches_hw, -1)
        of_patches |= {(view.index, (r, c), k) for r, c, k in grid.nonzero().tolist()}
        start += view.num_patches
    return of_latents, of_patches


def test_few_glyphs_share_a_part_as_the_page_says(parts):
    shares = {}
    for name in (*parts.run.ARMS, "overview"):
        model = parts.run.all_arms(SMALL)[name].build(0)
        lost = glyphs = 0
        for index in range(80):
            drawn = scene(6, index)
            plan = model.visual.plan(drawn.image_hw)
            fine = [view for view in plan.views if view.kind != "overview" or plan.num_views == 1]
            latents, _ = parts.data.codes(drawn, plan)
            cells = latents.view(plan.num_views, -1, parts.data.KINDS)[[view.index for view in fine], :, :COARSE]
            kinds = cells.sum(-1)
            lost, glyphs = lost + int(kinds[kinds > 1].sum()), glyphs + len(drawn.glyphs)
        shares[name] = lost / glyphs
    assert all(shares[name] < 0.001 for name in ("uhd", "next", "anyres", "no-separators"))
    assert all(shares[name] < 0.01 for name in ("stretch", "pad"))
    assert 0.05 < shares["overview"] < 0.15


K, SEVEN, COARSE = GLYPHS.index("K"), GLYPHS.index("7"), len(GLYPHS)


@pytest.mark.parametrize(
    "arm, image_hw, centre_hw, latents, patches",
    [
        # shares (0.25, 0.625) of the image: latent cells 1.5 and 3.75, patches 2 and 5
        ("stretch", (40, 80), (10.0, 50.0), {(0, (1, 3), (1, 2), K)}, {(0, (2, 5), K)}),
        # 20 px above and below: shares (0.375, 0.625) of the square
        ("pad", (40, 80), (10.0, 50.0), {(0, (2, 3), (0, 2), K)}, {(0, (3, 5), K)}),
        # three tiles, fitted to 29 x 96 px, 1 px from the top: (15.5, 60) on the canvas, (15.5, 28) in the second tile
        (
            "next",
            (24, 80),
            (12.0, 50.0),
            {(2, (1, 2), (0, 1), K), (0, (1, 1), (1, 2), COARSE)},
            {(2, (1, 3), K), (0, (2, 2), COARSE)},
        ),
    ],
)
def test_codes_name_the_part_under_a_glyph(parts, arm, image_hw, centre_hw, latents, patches):
    plan = parts.run.all_arms(SMALL)[arm].build(0).visual.plan(image_hw)
    assert told(parts, plan, (centre_hw, "K")) == (latents, patches)


def test_codes_where_views_overlap(parts):
    config = StretchConfig("overlapping", 8, 32)

    def overlapping(image_hw):
        return config.finish(image_hw, (tiled((1, 2), (32, 32), 9, stride_hw=(32, 16)),))

    register_strategy("overlapping", overlapping)
    plan = build_nano(SMALL, slicing="overlapping").visual.plan((32, 48))
    found = told(parts, plan, ((10.0, 24.0), "K"), ((20.0, 8.0), "7"))
    assert found[0] == {(0, (0, 2), (1, 0), K), (1, (0, 0), (1, 2), K), (0, (1, 0), (1, 2), SEVEN)}
    assert found[1] == {(0, (1, 3), K), (1, (1, 1), K), (0, (2, 1), SEVEN)}
    near = Scene(
        Image.new("L", (48, 32)), (("K7",),), (Glyph("K", (10.0, 24.0), 0, 0), Glyph("7", (10.0, 32.0), 0, 0))
    )
    assert parts.run.cut_by(near, "right K?", plan) == "0"  # the edge of one tile lies inside the other


@pytest.mark.parametrize(
    "places, mark", [((20.0, 28.0), "0"), ((21.0, 29.0), "1"), ((32.0, 40.0), "1"), ((36, 44), "0")]
)
def test_a_border_cuts_a_glyph_where_it_goes_through_its_ink(parts, places, mark):
    model = build_nano(SMALL)
    plan = model.visual.plan((30, 64))
    assert plan.grid == (1, 2)  # a border at 32 px
    glyphs = tuple(Glyph(text, (3.0, x), 0, 0) for text, x in zip("K7", places, strict=True))  # 3: cut by the image
    drawn = Scene(Image.new("L", (64, 30)), (("K7",),), glyphs)
    assert parts.run.cut_by(drawn, "right K?", plan) == mark
    assert parts.run.cut_by(drawn, "right K?", model.visual.plan((20, 40))) == "u"


# borders through glyphs


def dark_hw(image):
    """Top and left of the ink, and (height, width) of what it covers."""
    rows, columns = np.nonzero(np.asarray(image) < 130)
    return (rows.min(), columns.min()), (np.ptp(rows), np.ptp(columns))


def test_moving_a_text_moves_its_pixels_and_its_glyphs(parts):
    drawn, rng = scene(7, 3), np.random.default_rng(0)
    (height, width), (down, along) = drawn.image_hw, (-2, 3)
    found = parts.cuts.moved(drawn, (down, along), rng)
    before, after = np.asarray(drawn.image), np.asarray(found.image)
    assert np.array_equal(after[: height + down, along:], before[-down:, : width - along])
    filled = np.concatenate([after[height + down :].ravel(), after[: height + down, :along].ravel()]).astype(float)
    assert filled.mean() == pytest.approx(np.median(before), abs=1)
    assert 2 < filled.std() < 4  # the scenes' noise
    for one, other in zip(drawn.glyphs, found.glyphs, strict=True):
        assert other == Glyph(one.text, (one.centre_hw[0] - 2, one.centre_hw[1] + 3), one.line, one.word)


def test_no_move_takes_ink_out_of_the_image(parts):
    for index in range(12):
        drawn = scene(8, index)
        found = parts.cuts.moves(drawn)
        assert (0, 0) in found
        assert all(max(map(abs, move)) <= parts.cuts.FARTHEST for move in found)
        (_, extent) = dark_hw(drawn.image)
        corners = {(f(m[0] for m in found), g(m[1] for m in found)) for f in (min, max) for g in (min, max)}
        for move in corners:
            rng = np.random.default_rng(0)
            assert dark_hw(parts.cuts.moved(drawn, move, rng).image)[1] == extent, (index, move)


@pytest.mark.parametrize("name", ["uhd", "next"])
def test_a_pair_is_one_text_with_and_without_a_border_through_a_glyph(parts, name):
    encoder = parts.run.all_arms(SMALL)[name].build(0).visual
    pairs = [found for index in range(40) if (found := parts.cuts.pair(index, encoder))]
    assert len(pairs) > 8
    for found in pairs:
        drawn = scene(parts.run.TEST_SEED, found.index)
        assert found.whole.size == found.cut.size == drawn.image.size
        plan = encoder.plan(drawn.image_hw)
        place = next(n for n, glyph in enumerate(drawn.glyphs) if glyph.text == found.question[6])
        assert drawn.glyphs[place + 1].text == found.truth
        boxes = [[*map(float, view_box(plan, view.index))] for view in plan.views if view.kind == "slice"]
        (top, left), _ = dark_hw(drawn.image)
        for image, cut in ((found.whole, False), (found.cut, True)):
            y, x = np.subtract(dark_hw(image)[0], (top, left))
            far = [
                abs(edge - glyph.centre_hw[axis] - (y, x)[axis]) / (((1.5, 1.5) if cut else (4.5, 3.5))[axis])
                for glyph in drawn.glyphs[place : place + 2]
                for axis in (0, 1)
                for edge in {box[axis + end] for box in boxes for end in (0, 2)}
                if 0 < edge < drawn.image_hw[axis]
            ]
            assert (min(far) < 1) == cut, (found.index, cut, far)


def test_borders_through_glyphs_are_judged_once_and_reported(parts, tiny, tmp_path, monkeypatch, capsys):
    settings = replace(tiny, factors=(1.0,))
    folders = {"out": tmp_path / "out" / "long", "checkpoints": tmp_path / "kept" / "long"}
    parts.run.work(settings, arms=("stretch", "next"), seeds=(0,), **folders)
    monkeypatch.setattr(parts.cuts, "load_nano", lambda: build_nano(SMALL).eval())
    command = ["cuts", "--out", str(tmp_path / "out"), "--checkpoints", str(tmp_path / "kept"), "--images", "12"]
    assert parts.main.main(command) == 0
    told = json.loads((tmp_path / "out" / "cuts.json").read_text())
    assert {name: run["by"] for name, run in told["runs"].items()} == {
        "nano": "uhd",
        "next-seed0-lr1": "next",
        "stretch-seed0-lr1": "uhd",
    }
    for run in told["runs"].values():
        assert len(run["whole"]) == len(run["cut"]) == len(told["pairs"][run["by"]]["scenes"]) > 2
    (folders["checkpoints"] / "next-seed0-lr1" / "model").rename(tmp_path / "away")
    judge = parts.cuts.judge
    monkeypatch.setattr(parts.cuts, "judge", None)
    capsys.readouterr()
    assert parts.main.main(command) == 0  # nothing is done twice
    out = capsys.readouterr().out
    assert "judged before: nano, stretch-seed0-lr1" in out
    assert f"without a model in {folders['checkpoints']}: next-seed0-lr1" in out
    (tmp_path / "away").rename(folders["checkpoints"] / "next-seed0-lr1" / "model")
    monkeypatch.setattr(parts.cuts, "judge", judge)
    monkeypatch.setattr(parts.cuts, "load_nano", lambda: build_nano(SMALL, seed=1).eval())  # other weights ship
    assert parts.main.main(command) == 0
    assert "judged before: next-seed0-lr1, stretch-seed0-lr1" in capsys.readouterr().out
    assert parts.main.main([*command[:-1], "13"]) == 1
    assert "was made with 12 images, not 13" in capsys.readouterr().err
    assert parts.main.main([*command[:-1], "0"]) == 1
    for change in ({"scenes": [0]}, {"fingerprint": "0"}):
        other = {**told, "pairs": {**told["pairs"], "uhd": {**told["pairs"]["uhd"], **change}}}
        (tmp_path / "out" / "cuts.json").write_text(json.dumps(other))
        assert parts.main.main(command) == 1
        assert "has other pairs of uhd than this code makes" in capsys.readouterr().err
    (tmp_path / "out" / "cuts.json").write_text("[1]")
    assert parts.main.main(["report", "--out", str(tmp_path / "out")]) == 1
    assert "cuts.json is not what `learned.py cuts` writes: it has no images" in capsys.readouterr().err
    (tmp_path / "out" / "cuts.json").write_text(json.dumps(told))
    told["runs"]["nano"] |= {"whole": "1" * 4 + "0" * 4, "cut": "1" * 2 + "0" * 6}
    found = parts.results.Comparison(parts.run.read_runs(folders["out"]))
    rows = parts.results.cut_pairs(told, found)
    assert [(row["arm"], row["pairs_of"], row["seeds"]) for row in rows] == [
        ("stretch", "uhd", 1),
        ("next", "next", 1),
        ("nano", "uhd", 1),
    ]
    assert (rows[2]["whole"][0], rows[2]["cut"][0], rows[2]["difference"][0]) == (0.5, 0.25, -0.25)
    assert [row["to_uncut"] for row in rows] == [None, None, None]  # no other arm has the pairs of stretch
    capsys.readouterr()
    parts.report.report(tmp_path / "out")
    assert "| nano | 1 | " in capsys.readouterr().out


def test_cuts_are_held_against_an_arm_that_does_not_cut(parts, tmp_path):
    write_runs(parts, tmp_path / "long", {"uhd": 0.6, "stretch": 0.6, "next": 0.6})
    rng, told = np.random.default_rng(0), {"pairs": {"uhd": {"scenes": [1]}, "next": {"scenes": [2]}}, "runs": {}}
    for arm, by, share in (("uhd", "uhd", 0.6), ("stretch", "uhd", 0.9), ("next", "next", 0.6)):
        for seed in (0, 1, 2):
            cut = "".join(map(str, (rng.random(200) < share).astype(int)))
            told["runs"][f"{arm}-seed{seed}-lr1"] = {"by": by, "whole": "1" * 200, "cut": cut}

    def by_arm():
        compared = parts.results.Comparison(parts.run.read_runs(tmp_path / "long"))
        return {row["arm"]: row for row in parts.results.cut_pairs(told, compared)}

    rows = by_arm()
    assert rows["stretch"]["to_uncut"] is rows["next"]["to_uncut"] is None
    apart = rows["uhd"]["to_uncut"]
    assert apart["difference"][0] == pytest.approx(
        rows["uhd"]["difference"][0] - rows["stretch"]["difference"][0], abs=2e-4
    )
    assert apart["verdict"] == "worse"
    for seed in (0, 1, 2):  # an arm may have chosen another rate
        run = fake_run(parts, "stretch", seed, np.ones(400), factor=0.5, validation=0.9)
        (tmp_path / "long" / f"half-{seed}.json").write_text(json.dumps(run))
        told["runs"][f"stretch-seed{seed}-lr0.5"] = told["runs"].pop(f"stretch-seed{seed}-lr1")
    assert by_arm()["uhd"]["to_uncut"] == apart
    del told["runs"]["stretch-seed2-lr0.5"]
    assert by_arm()["uhd"]["to_uncut"]["verdict"] == "2 seeds: not judged"


# runs


def test_a_run_goes_on_where_it_was_left(parts, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parts.run, "PIECE", 1)
    given = {"arms": ("next",), "seeds": (0,)}
    assert parts.run.work(tiny, **given, out=tmp_path / "a", checkpoints=tmp_path / "at once") == []
    rooms = 0

    class Impatient(parts.run.Clock):
        left = 0

        @property
        def room(self):
            Impatient.left -= 1
            return Impatient.left >= 0

    monkeypatch.setattr(parts.run, "Clock", Impatient)
    folders = {"out": tmp_path / "b", "checkpoints": tmp_path / "in pieces"}
    left = ["some"]
    while left:
        Impatient.left = 3
        left = parts.run.work(tiny, **given, **folders)
        rooms += 1
    assert rooms > 4
    names = [task.name for task in parts.run.read_runs(tmp_path / "a", tiny)]
    assert names == ["next-seed0-lr0.5", "next-seed0-lr1"]
    for name in names:
        once, pieces = (json.loads((tmp_path / f / f"{name}.json").read_text()) for f in "ab")
        for key in ("arm", "seed", "factor", "settings", "test", "cost", "validation"):
            assert once[key] == pieces[key]
        weights = [load_file(tmp_path / f / name / "model" / "model.safetensors") for f in ("at once", "in pieces")]
        for key, tensor in weights[0].items():
            torch.testing.assert_close(tensor, weights[1][key], msg=key)
    assert not list(tmp_path.rglob("*.pt"))
    assert "joint 2 of 2 steps" in capsys.readouterr().out


def test_what_is_judged_is_what_was_trained(parts, tiny, tmp_path, monkeypatch):
    settings = replace(tiny, factors=(1.0,))
    stages, saved, seeds, fitted, judged = parts.run.stages, {}, [], [], []
    save, data, evaluate = stages.save, stages.NanoData, parts.run.evaluate

    def keep(path, step, model, *rest):
        saved[path.stem] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        save(path, step, model, *rest)

    def make(model, *, seed, **kwargs):
        seeds.append(seed)
        return data(model, seed=seed, **kwargs)

    def judge(model, **kwargs):
        judged.append(kwargs)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, saved["joint"][name]), name
        assert not model.training
        return evaluate(model, **kwargs)

    monkeypatch.setattr(stages, "save", keep)
    monkeypatch.setattr(stages, "NanoData", make)
    monkeypatch.setattr(stages, "fit_attention", lambda model, *, steps: fitted.append(steps))
    monkeypatch.setattr(parts.run, "evaluate", judge)
    assert (
        parts.run.work(settings, arms=("stretch",), seeds=(4,), out=tmp_path / "a", checkpoints=tmp_path / "b") == []
    )
    assert (seeds, fitted) == ([40, 41, 42], [1])
    assert judged == [
        {"images": 6, "seed": parts.run.TEST_SEED, "settings": TaskSettings()},
        {"images": 3, "seed": parts.run.VALIDATION_SEED, "settings": TaskSettings(), "kinds": parts.run.CHOSEN_BY},
    ]
    changed = [name for name, tensor in saved["joint"].items() if not torch.equal(tensor, saved["vision"][name])]
    assert any(name.startswith("visual.") for name in changed)


def test_a_run_is_one_process_at_a_time(parts, tmp_path):
    with parts.run.claimed(tmp_path / "a.lock") as one, parts.run.claimed(tmp_path / "a.lock") as other:
        assert (one, other) == (True, False)
    with parts.run.claimed(tmp_path / "a.lock") as again:
        assert again


def test_no_time_begins_nothing_and_other_settings_are_refused(parts, tiny, tmp_path):
    folders = {"out": tmp_path / "out", "checkpoints": tmp_path / "checkpoints"}
    left = parts.run.work(tiny, arms=("uhd", "pad"), seeds=(0, 1), minutes=0, **folders)
    assert left == ["uhd-seed0-lr1", "pad-seed0-lr1", "uhd-seed0-lr0.5", "pad-seed0-lr0.5", "uhd-seed1", "pad-seed1"]
    assert not list(tmp_path.rglob("*.json"))
    made = fake_run(parts, "uhd", 0, np.ones(6))
    made["settings"] = {**tiny.to_dict(), "joint": 3}
    (tmp_path / "out" / "x.json").write_text(json.dumps(made))
    refuses(r"x\.json was made with other settings \(joint\)", parts.run.work, tiny, **folders)
    (tmp_path / "out" / "x.json").write_text("{}")
    refuses("no run of this benchmark: it has no arm, cost", parts.run.work, tiny, **folders)
    (tmp_path / "out" / "x.json").unlink()
    settings = replace(tiny, factors=(1.0,))
    given = {"arms": ("uhd",), "seeds": (0,), **folders}
    (tmp_path / "checkpoints" / "uhd-seed0-lr1").mkdir()
    parts.run.settle(tmp_path / "checkpoints" / "uhd-seed0-lr1", {**settings.to_dict(), "joint": 3, "arm": "uhd"})
    with pytest.raises(ValueError, match=r"another run \(joint 3, asked is 2, seed None, asked is 0, factor None,"):
        parts.run.work(settings, **given)


def test_a_run_has_its_model_before_it_counts_as_done(parts, tiny, tmp_path, monkeypatch):
    settings = replace(tiny, factors=(1.0,))
    given = {"arms": ("uhd",), "seeds": (0,), "out": tmp_path / "out", "checkpoints": tmp_path / "kept"}
    with monkeypatch.context() as broken:
        broken.setattr(UHDForConditionalGeneration, "save_pretrained", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            parts.run.work(settings, **given)
    assert parts.run.read_runs(tmp_path / "out") == {}
    assert parts.run.work(settings, **given) == []
    folder = tmp_path / "kept" / "uhd-seed0-lr1"
    assert UHDForConditionalGeneration.from_pretrained(folder / "model").num_parameters() > 0
    assert not list(folder.glob("*.pt"))
    (tmp_path / "out" / "uhd-seed0-lr1.json").unlink()  # begins anew
    assert parts.run.work(settings, **given) == []


def test_the_time_that_pieces_took_is_known_to_the_next_process(parts, tiny, tmp_path):
    assert parts.run.longest_piece([]) == 0
    slow = {
        "vision": {"steps": 1000, "cpu": 200.0},
        "joint": {"steps": 1200, "cpu": 660.0},
        "evaluation": {"cpu": 40.0},
    }
    assert parts.run.longest_piece([{"vision": {"steps": 100, "cpu": 90.0}}, {"text": {"steps": 0}}]) == 90
    assert parts.run.longest_piece([{"vision": {"cpu": 1.0}}, slow]) == 110
    run = {**fake_run(parts, "pad", 0, np.ones(6)), "settings": tiny.to_dict(), "time": slow}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.json").write_text(json.dumps(run))
    given = {"arms": ("uhd",), "seeds": (0,), "out": tmp_path / "out", "checkpoints": tmp_path / "kept"}
    assert parts.run.work(tiny, **given, minutes=1.5) == ["uhd-seed0-lr1", "uhd-seed0-lr0.5"]
    assert not list((tmp_path / "kept").glob("*/*.pt"))
    (tmp_path / "out" / "b.json").write_text(json.dumps(run))
    refuses(r"a\.json and .*b\.json are the same run", parts.run.read_runs, tmp_path / "out")


def test_every_arm_takes_the_learning_rate_that_its_validation_chose(parts):
    Task = parts.run.Task
    found = {Task("uhd", 0, 1.0): {"validation": 0.5}, Task("pad", 0, 1.0): {"validation": 0.5}}
    assert parts.run.chosen_factor("uhd", found, (1.0, 0.5)) is None
    found |= {Task("uhd", 0, 0.5): {"validation": 0.6}, Task("pad", 0, 0.5): {"validation": 0.5}}
    planned, blocked = parts.run.tasks((1.0, 0.5), ("uhd", "pad", "next"), (0, 2), found)
    assert planned[:3] == [Task("uhd", 0, 1.0), Task("pad", 0, 1.0), Task("next", 0, 1.0)]
    assert planned[6:] == [Task("uhd", 2, 0.5), Task("pad", 2, 1.0)]
    assert blocked == ["next-seed2"]
    planned, blocked = parts.run.tasks((1.0, 0.5), ("few-latents", "uhd"), (0, 1), found)
    assert planned[:2] == [Task("uhd", 0, 1.0), Task("uhd", 0, 0.5)]
    assert planned[2:] == [Task("few-latents", 0, 0.5), Task("few-latents", 1, 0.5), Task("uhd", 1, 0.5)]
    assert blocked == []
    assert parts.run.tasks((1.0, 0.5), ["overview"], [0], {}) == ([], ["overview-seed0"])
    assert {*parts.run.VARIANTS, *parts.run.ARMS} == set(parts.run.all_arms())


def test_a_third_learning_rate_is_tried_where_the_second_read_better(parts):
    Task, factors = parts.run.Task, (0.5, 0.25, 0.125)
    found = {Task(arm, 0, 0.5): {"validation": 0.5} for arm in ("uhd", "pad", "next")}
    planned = parts.run.tasks(factors, ("uhd", "pad"), (0, 1), found)
    assert planned == ([Task(arm, 0, f) for f in factors[:2] for arm in ("uhd", "pad")], ["uhd-seed1", "pad-seed1"])
    found |= {Task("uhd", 0, 0.25): {"validation": 0.4}, Task("pad", 0, 0.25): {"validation": 0.6}}
    planned, blocked = parts.run.tasks(factors, ("uhd", "pad"), (0, 1), found)
    assert planned[4:] == [Task("pad", 0, 0.125), Task("uhd", 1, 0.5)]
    assert blocked == ["pad-seed1"]
    found[Task("pad", 0, 0.125)] = {"validation": 0.55}
    assert parts.run.tasks(factors, ("pad",), (1,), found) == ([Task("pad", 1, 0.25)], [])


def test_steps_images_and_rates_are_equal_for_all_arms(parts):
    long = parts.run.LONG
    stage = long.stage("joint", 0.5)
    assert stage.matrix_lr == long.stage("joint").matrix_lr / 2
    assert stage.other_lr == long.stage("joint").other_lr / 2
    assert (stage.steps, stage.batch_size) == (1200, 32)
    assert parts.run.QUICK.model == long.model


def test_command_line_refuses_unknown_arms(parts, tmp_path, capsys):
    assert parts.main.main(["run", "--arms", "uhd", "zoom", "--out", str(tmp_path)]) == 1
    assert "no arm zoom: there are uhd, stretch" in capsys.readouterr().err
    for seed in ("-1", "100010"):  # scenes of ten times the seed: the second is where arms are judged
        assert parts.main.main(["run", "--seeds", "0", seed, "--out", str(tmp_path / "out")]) == 1
        assert (
            f"--seeds must be 0 to 99999 (scenes of larger ones are for judging), got {seed}"
            in capsys.readouterr().err
        )
    for minutes in ("0", "-5", "nan"):
        assert parts.main.main(["run", "--minutes", minutes, "--out", str(tmp_path / "out")]) == 1
        assert "--minutes must be above 0, got" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    write_runs(parts, tmp_path / "long", {"uhd": 0.5}, seeds=(0,), images=8)
    assert parts.main.main(["report", "--out", str(tmp_path), "--page", str(tmp_path / "no.md")]) == 1
    assert "No such file" in capsys.readouterr().err


# statistics


def fake_run(parts, arm, seed, right, *, factor=1.0, factors=(1.0, 0.5), validation=0.5):
    """A result whose "right" is given, (images,) 0 or 1, and whose other questions are all wrong by one character."""
    images = len(right)
    rows = {k: {"distance": "1" * images, "length": "3" * images} for k in ("all", "line", "where", "count")}
    rows["right"] = {"distance": "".join("10"[int(x)] for x in right), "length": "1" * images}
    return {
        "arm": arm,
        "seed": seed,
        "factor": factor,
        "settings": {"factors": list(factors)},
        "parameters": 1000,
        "time": {"vision": {"cpu": 1.0}},
        "validation": validation,
        "cost": {
            "visual_tokens": 36.0,
            "tokens": 38.0,
            "views": 4.0,
            "patches": 60.0,
            "most_visual_tokens": 45,
            "encoder_flops": 2_000_000,
        },
        "test": {
            "seed": 1,
            "buckets": "".join(str(n % 4) for n in range(images)),
            "items": rows,
            "cut": "".join("10u"[n % 3] for n in range(images)),
        },
    }


def write_runs(parts, folder, shares, *, seeds=(0, 1, 2), images=400, **kwargs):
    """Runs whose images are of equal difficulty for all arms: an arm reads those below its share."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(5)
    hard = rng.random(images)
    for arm, share in shares.items():
        for seed in seeds:
            right = hard + rng.normal(0, 0.1, images) < share
            run = fake_run(parts, arm, seed, right, **kwargs)
            (folder / f"{arm}-{seed}.json").write_text(json.dumps(run))
    return folder


def test_the_interval_knows_images_and_seeds(parts):
    rng = np.random.default_rng(0)
    one = (rng.random((1, 500)) < 0.3).astype(float)
    mean, low, high = parts.results.interval(one)
    assert mean == one.mean()
    assert (high - low) == pytest.approx(2 * 1.965 * np.sqrt(mean * (1 - mean) / 499), rel=1e-3)
    apart = np.repeat([[0.0], [0.1], [0.2]], 500, axis=1)  # seeds differ, images do not: t of two degrees of freedom
    mean, low, high = parts.results.interval(apart)
    assert (mean, low, high) == pytest.approx((0.1, 0.1 - 4.303 * 0.1 / 3**0.5, 0.1 + 4.303 * 0.1 / 3**0.5), abs=1e-4)
    assert parts.results.interval(apart, within=(0.0, 1.0))[1] == 0
    holes = np.where(np.arange(500) < 100, np.nan, apart)
    assert parts.results.interval(holes)[0] == pytest.approx(0.1)
    assert parts.results.interval(np.zeros((3, 50))) == (0, 0, 0)
    for few in (np.full((3, 4), np.nan), np.ones((3, 1))):
        assert np.isnan(parts.results.interval(few)).all()


def test_students_t_is_that_of_the_tables(parts):
    table = {1: 12.706, 2: 4.303, 3: 3.182, 5: 2.571, 10: 2.228, 30: 2.042, 120: 1.980, 100_000: 1.960}
    for freedom, wanted in table.items():
        assert quantile(freedom) == pytest.approx(wanted, abs=6e-4)


@pytest.mark.parametrize("spread", [0.0, 0.2, 0.6])
def test_true_zeros_are_rarely_called_differences(parts, spread):
    """Arms without a true difference; images are hard for one arm or the other, seeds are lucky or not."""
    rng = np.random.default_rng(8)

    def arm(hard):
        logit = 1.2 + hard + rng.normal(0, 0.5, 400) + rng.normal(0, spread, (3, 1)) + rng.normal(0, 1, (3, 400))
        return (rng.random((3, 400)) < 1 / (1 + np.exp(-logit))).astype(float)

    called = 0
    for _ in range(400):
        hard = rng.normal(0, 1.5, 400)
        difference = arm(hard) - arm(hard)
        called += parts.results.verdict(difference, *parts.results.interval(difference)[1:]) in ("better", "worse")
    assert called / 400 < 0.08


def test_pairing_by_image_sharpens_differences(parts):
    rng = np.random.default_rng(1)
    hard = rng.random(400)
    base, arm = ((hard + rng.normal(0, 0.02, (3, 400)) < share).astype(float) for share in (0.6, 0.5))
    paired = parts.results.interval(arm - base)
    shuffled = parts.results.interval(arm[:, rng.permutation(400)] - base)
    assert paired[2] - paired[1] < 0.7 * (shuffled[2] - shuffled[1])
    assert paired[2] < 0


def test_report_finds_a_difference_and_calls_none_none(parts, tmp_path, capsys):
    write_runs(parts, tmp_path / "long", {"uhd": 0.6, "stretch": 0.45, "next": 0.6, "anyres": 0.72})
    page = tmp_path / "page.md"
    page.write_text(f"before\n{parts.report.MARKS[0]}\nold\n{parts.report.MARKS[1]}\nafter\n")
    assert parts.main.main(["report", "--out", str(tmp_path), "--page", str(page)]) == 0
    told = json.loads((tmp_path / "report.json").read_text())["long"]
    verdicts = {arm: found["questions"]["right"][0]["verdict"] for arm, found in told["differences"].items()}
    assert verdicts == {"stretch": "worse", "next": "no difference", "anyres": "better"}
    mean, low, high = told["differences"]["stretch"]["questions"]["right"][0]["difference"]
    assert low < mean < high < 0
    assert mean == pytest.approx(-0.15, abs=0.05)
    assert {part["verdict"] for part in told["differences"]["stretch"]["questions"]["all"]} == {"no difference"}
    assert told["arms"]["uhd"]["questions"]["all"]["characters"] == pytest.approx(2 / 3, abs=1e-4)
    assert len(told["arms"]["uhd"]["questions"]["right"]["by_seed"]) == 3
    assert "uhd-seed0-lr0.5" in told["missing"]  # so its factor is open
    assert told["arms"]["uhd"]["factor"] is None
    assert set(told["cut"]["uhd"]) == {"a border cuts a glyph", "no border does", "image not cut"}
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "**Not complete.**" in text
    assert "| anyres | right | +0." in text
    told = [
        part["verdict"] for arm in told["differences"].values() for row in arm["questions"].values() for part in row
    ]
    differ = sum(verdict in ("better", "worse") for verdict in told)
    assert f"75 comparisons are judged, {differ} differ; 4 would by chance" in text
    assert "![long differences](long_differences.svg)" in text
    assert "Not complete" in capsys.readouterr().out
    for path in tmp_path.glob("*.svg"):
        ElementTree.parse(path)
    assert len(list(tmp_path.glob("long_*.svg"))) == 5


def test_pixels_and_tokens_are_held_against_each_other(parts, tmp_path):
    folder = write_runs(parts, tmp_path / "long", {"uhd": 0.6, "few-latents": 0.7, "overview-wide": 0.5})
    told = parts.report.report(tmp_path, say=str)["long"]
    rows = {name: found["questions"]["right"][0] for name, found in told["contrasts"].items()}
    assert list(rows) == ["few-latents - overview-wide"]
    one, other = (told["differences"][arm]["questions"]["right"][0] for arm in ("few-latents", "overview-wide"))
    assert rows["few-latents - overview-wide"]["difference"][0] == pytest.approx(
        one["difference"][0] - other["difference"][0], abs=2e-4
    )
    assert rows["few-latents - overview-wide"]["verdict"] == "better"
    text = parts.report.markdown(told, "long")
    assert "Differences between two other arms. 25 comparisons are judged" in text
    assert "| few-latents - overview-wide | right | +0." in text
    for path in folder.glob("overview*"):
        path.unlink()
    told = parts.report.report(tmp_path, say=str)["long"]
    assert told["contrasts"] == {}
    assert "two other arms" not in parts.report.markdown(told, "long")


def test_two_seeds_or_few_images_are_not_judged(parts, tmp_path):
    write_runs(parts, tmp_path / "a" / "long", {"uhd": 0.8, "pad": 0.2}, seeds=(0, 1))
    write_runs(parts, tmp_path / "b" / "long", {"uhd": 0.9, "pad": 0.1}, images=100)
    found = [parts.report.report(tmp_path / name, say=str)["long"] for name in "ab"]
    rows = [one["differences"]["pad"]["questions"]["right"] for one in found]
    assert rows[0][0]["verdict"] == "2 seeds: not judged"
    assert rows[1][0]["verdict"] == "worse"
    assert rows[1][1]["verdict"] == "25 images: not judged"
    equal = found[0]["differences"]["pad"]["questions"]["all"][0]  # nothing is told apart, nor called equal
    assert (equal["difference"][0], equal["verdict"]) == (0, "2 seeds: not judged")
    text = parts.report.markdown(found[0], "long")
    assert "None of 25 comparisons can be judged yet." in text
    assert "one seed are of the images alone" not in text


def test_seeds_that_only_one_of_two_arms_has_are_left_out(parts, tmp_path):
    folder = write_runs(parts, tmp_path / "long", {"uhd": 0.6, "pad": 0.6}, seeds=(0, 2))
    for seed in (0, 2):
        (folder / f"pad-{seed}.json").write_text((folder / f"uhd-{seed}.json").read_text().replace('"uhd"', '"pad"'))
    (folder / "uhd-1.json").write_text(json.dumps(fake_run(parts, "uhd", 1, np.zeros(400))))
    told = parts.report.report(tmp_path, say=str)["long"]
    assert told["arms"]["uhd"]["seeds"] == [0, 1, 2]
    assert told["differences"]["pad"]["seeds"] == [0, 2]
    assert told["differences"]["pad"]["questions"]["right"][0] == {
        "difference": [0, 0, 0],
        "verdict": "2 seeds: not judged",
    }


def test_the_chosen_rate_is_the_one_that_is_reported(parts, tmp_path):
    folder = write_runs(parts, tmp_path / "long", {"uhd": 0.2}, seeds=(0,), validation=0.2)
    run = fake_run(parts, "uhd", 0, np.ones(400), factor=0.5, validation=0.9)
    (folder / "half.json").write_text(json.dumps(run))
    told = parts.report.report(tmp_path, say=str)["long"]["arms"]["uhd"]
    assert told["factor"] == 0.5
    assert told["questions"]["right"]["by_seed"] == [1.0]
    assert told["validation"] == {"1": 0.2, "0.5": 0.9}


def test_images_are_told_apart_by_how_they_are_cut(parts, tmp_path):
    images, sizes = 60, parts.run.LONG.to_dict()["model"]
    plans = [uhd.plan(scene(parts.run.TEST_SEED, n).image_hw, NanoConfig().slicing) for n in range(images)]
    slices = np.array([sum(view.kind == "slice" for view in one.views) for one in plans])
    (tmp_path / "long").mkdir()
    for arm, right in (("uhd", slices < 2), ("stretch", slices != 3)):
        for seed in (0, 1, 2):
            run = fake_run(parts, arm, seed, right)
            run["settings"] = {"factors": [1.0], "model": sizes}
            run["test"]["seed"] = parts.run.TEST_SEED
            run["test"]["buckets"] = "".join(str(bucket(scene(parts.run.TEST_SEED, n).aspect)) for n in range(images))
            (tmp_path / "long" / f"{arm}-{seed}.json").write_text(json.dumps(run))
    told = parts.report.report(tmp_path, say=str)["long"]
    found = told["by_cut"]
    assert list(found["cuts"]) == ["not cut, < 2.5", "not cut, >= 2.5", "1 x 2", "1 x 3", "1 x 4", "2 x 2"]
    assert [one["visual_tokens"] for one in found["cuts"].values()] == [9, 9, 27, 36, 45, 45]
    long, *counts = [one["images"] for one in found["cuts"].values()]
    aspects = [scene(parts.run.TEST_SEED, n).aspect for n in range(images)]
    assert long == sum(aspect < 2.5 and count < 2 for aspect, count in zip(aspects, slices, strict=True))
    counts[0] += long
    assert (counts[:3], sum(counts[3:])) == ([int((slices == n).sum()) for n in (0, 2, 3)], int((slices == 4).sum()))
    assert [row[0] for row in found["baseline"]["right"]] == [1, 1, 0, 0, 0, 0]
    rows = found["differences"]["stretch"]["questions"]["right"]
    assert [row["difference"][0] for row in rows] == [0, 0, 1, 0, 1, 1]
    text = parts.report.markdown(told, "long")
    assert f"| arm | question | not cut, < 2.5 ({long} images, 9 tokens) | not cut, >= 2.5 (" in text
    assert "| uhd | right | 1.000 [" in text


def test_the_page_has_the_tables_of_the_stored_runs(parts, tmp_path):
    tables = []
    shutil.copytree(ROOT / "benchmarks" / "results" / "learned", tmp_path / "learned")
    parts.report.report(tmp_path / "learned", say=tables.append)
    page = ROOT / "docs" / "learned_results.md"
    assert tables[0] in page.read_text(), "run `learned.py report --page docs/learned_results.md`"


def test_every_interval_in_the_conclusions_stands_in_the_tables(parts):
    conclusions = (ROOT / "docs" / "learned.md").read_text().split("## What came out")[1].split("\n## ")[0]
    tables = (ROOT / "docs" / "learned_results.md").read_text()
    said, found = (
        {(float(low), float(high)) for low, high in re.findall(r"\[([+-]?\d\.\d+),\s+([+-]?\d\.\d+)\]", text)}
        for text in (conclusions, tables)
    )
    assert len(said) > 30
    assert not [ends for ends in said if ends not in found and (-ends[1], -ends[0]) not in found]  # a loss has no sign


def test_an_arm_with_one_of_two_rates_is_shown_and_its_factor_open(parts, tmp_path):
    folder = write_runs(parts, tmp_path / "long", {"uhd": 0.6})
    run = fake_run(parts, "pad", 0, np.ones(400), factor=0.5)
    (folder / "pad.json").write_text(json.dumps(run))
    arms = parts.report.report(tmp_path, say=str)["long"]["arms"]
    assert (arms["pad"]["factor"], arms["pad"]["seeds"]) == (None, [0])


def test_shares_without_variation_have_an_interval(parts):
    mean, low, high = parts.results.share(np.ones((3, 20)))
    assert (mean, low, high) == (1, pytest.approx(0.839, abs=1e-3), pytest.approx(1))  # Wilson's, of 20 images
    some = (np.arange(60) % 4 > 0).astype(float).reshape(3, 20)
    assert parts.results.share(some) == parts.results.interval(some, within=(0, 1))


def test_quick_trends_are_held_against_the_long_run(parts, tmp_path):
    write_runs(parts, tmp_path / "long", {"uhd": 0.6, "stretch": 0.4, "next": 0.75, "pad": 0.6})
    quick = {"uhd": 0.6, "stretch": 0.5, "next": 0.4, "pad": 0.3}
    write_runs(parts, tmp_path / "quick", quick, seeds=(0,), images=200, factors=(1.0,), validation=None)
    rows = parts.report.report(tmp_path, say=str)["trends"]
    assert {(arm, kind): agree for arm, kind, *_, agree in rows} == {
        ("stretch", "right"): "yes",
        ("next", "right"): "no",
    }


def test_report_refuses_what_does_not_belong_together(parts, tmp_path, capsys):
    assert parts.main.main(["report", "--out", str(tmp_path)]) == 1
    assert "no runs in" in capsys.readouterr().err
    folder = write_runs(parts, tmp_path / "long", {"uhd": 0.5, "pad": 0.5})
    (tmp_path / "page.md").write_text("nothing")
    refuses("needs the lines", parts.report.report, tmp_path, page=tmp_path / "page.md", say=str)
    run = json.loads((folder / "pad-1.json").read_text())
    run["test"]["items"]["right"]["length"] = "2" * 400
    (folder / "pad-1.json").write_text(json.dumps(run))
    refuses("different scenes", parts.report.report, tmp_path, say=str)
