"""Rules over a data set: every number against the metrics of single plans, inputs of every kind, and the page."""

import base64
import csv
import hashlib
import html
import json
import random
import re
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

import uhd
from tests.files import encoded, exif, picture
from tests.test_compare import BROWSERS, FLAGS, read
from tests.tiny import refuses
from uhd import cli
from uhd.compare import all_rules, compare, measure_sizes, overview, overview_page, summarize, table
from uhd.compare.inputs import SETS, Input, holds_many, named_rules
from uhd.compare.scripted import cut_code
from uhd.compare.summary import AREAS, ASPECTS, latex, text, to_dict
from uhd.slicing import PRESETS, find, plan
from uhd.slicing.metrics import measure

FEW = ("llava-uhd-safe", "llava-1.5", "qwen2-vl", "molmo2", "minicpm-v-4.6", "clip")
SYSTEMS = ({}, {"vit": "siglip-b", "resampler": "perceiver-64", "lm": "llama-7b"}, {"resampler": "spatial-144"})


def sizes_of(count, seed=0):
    rng = random.Random(seed)
    return [(round(2 ** rng.uniform(6, 11.5)), round(2 ** rng.uniform(6, 11.5))) for _ in range(count)]


def planned_or_why(size, rule):
    try:
        return plan(size, rule)
    except ValueError as problem:
        return str(problem)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Five pictures in two folders, one of them turned, and the same in a list, an archive and as sizes."""
    root = tmp_path_factory.mktemp("pictures")
    (root / "all" / "deep").mkdir(parents=True)
    sizes = {
        "a.png": (60, 200),
        "b.jpg": (300, 420),
        "deep/c.png": (512, 90),
        "deep/d.jpg": (700, 700),
        "e.png": (300, 420),
    }
    for number, (name, size) in enumerate(sizes.items()):
        picture(*size, seed=number).save(root / "all" / name)
    picture(80, 240).save(root / "all" / "turned.jpg", exif=exif(6))
    names = [*sizes, "turned.jpg"]
    (root / "list.txt").write_text("".join(f"all/{name}\n" for name in names))
    with tarfile.open(root / "all.tar", "w") as tar:
        for name in names:
            tar.add(root / "all" / name, name)
    wide = [(*size[::-1],) for size in sizes.values()] + [(80, 240)]
    (root / "sizes.json").write_text(json.dumps(wide))
    return root


def run(*args, capsys, command="compare"):
    status = cli.main([command, *map(str, args)])
    out, err = capsys.readouterr()
    return status, out, err


# --- numbers


@pytest.mark.parametrize("system", SYSTEMS, ids=["default", "resampler", "windows"])
def test_every_number_is_that_of_single_plans(system):
    sizes = [*sizes_of(12), (1, 900), (336, 336), (64, 64)]
    found = measure_sizes(sizes, None, **system)
    assert [name for name, _ in found.rules] == all_rules()
    for place, (name, rule) in enumerate(found.rules):
        for column, size in enumerate(sizes):
            got = {key: values[place, column] for key, values in found.values.items()}
            planned = planned_or_why(size, rule)
            if isinstance(planned, str):
                assert np.isnan(list(got.values())).all()
                assert found.refusals[place, column] == planned
                continue
            one = measure(planned, **system)
            grid = plan(size, rule).grid or (0, 0)
            wanted = {"tflops": one.flops.total / 1e12, "rows": grid[0], "columns": grid[1]}
            wanted |= {key: getattr(one, key) for key in got if hasattr(one, key)}
            assert got == pytest.approx(wanted, rel=1e-9, abs=1e-9), (name, size)


@pytest.mark.parametrize(
    "config", [PRESETS["minicpm-v-4.6"].replace(max_tokens=300), PRESETS["llava-uhd"].replace(max_tokens=70)]
)
def test_a_bounded_planner_is_measured_and_refusals_are_kept(config):
    sizes = [*sizes_of(20, seed=2), (1, 4000)]
    found = measure_sizes(sizes, [config])
    for column, size in enumerate(sizes):
        planned = planned_or_why(size, config)
        if isinstance(planned, str):
            assert found.refusals[0, column] == planned
        else:
            assert found.values["tokens"][0, column] == planned.num_tokens


def test_equal_sizes_count_as_often_as_they_come():
    sizes = [(300, 400)] * 7 + [(1200, 900)] * 2 + [(90, 800)]
    found = summarize(sizes, FEW)
    every = {name: np.array([plan(size, name).num_tokens for size in sizes]) for name in FEW}
    assert found.measured.mean("tokens").tolist() == pytest.approx([every[name].mean() for name in FEW])
    for one in to_dict(found)["strategies"]:
        tokens = np.sort(every[one["strategy"]])
        assert one["tokens"]["mean"] == pytest.approx(tokens.mean())
        for share in (5, 50, 95):
            assert one["tokens"][f"p{share}"] == np.quantile(tokens, share / 100, method="inverted_cdf")
        assert one["tokens"]["max"] == tokens[-1]


def test_the_front_is_what_no_rule_beats_among_those_that_plan_all():
    found = summarize([*sizes_of(40), (1, 900)])  # the last one is refused by some
    whole = [one for one in to_dict(found)["strategies"] if not one["refused"]]
    points = {one["strategy"]: (one["tokens"]["mean"], one["resolution_kept"]["mean"]) for one in whole}
    assert 40 < len(points) < len(all_rules())
    for one in to_dict(found)["strategies"]:
        tokens, kept = points.get(one["strategy"], (0, 0))
        beaten = any((t <= tokens and k > kept + 1e-8) or (t < tokens and k > kept - 1e-8) for t, k in points.values())
        assert not (one["front"] and (beaten or one["refused"]))
        assert beaten or one["refused"] or (tokens, kept) in {points[found.names[rule]] for rule in found.front}


@pytest.mark.parametrize("buckets, key", [(ASPECTS, "by_aspect"), (AREAS, "by_area")])
def test_buckets_make_up_the_whole(buckets, key):
    found = to_dict(summarize(sizes_of(30) + sizes_of(10) * 3, FEW[:4]))
    numbers = found[key]
    assert sum(numbers.values()) == found["images"] == 60
    assert found["sizes"] == 30
    for one in found["strategies"]:
        for column in ("tokens", "resolution_kept"):
            parts = sum(numbers[name] * part[column] for name, part in one[key].items())
            assert parts / 60 == pytest.approx(one[column]["mean"])


def test_the_worst_images_are_those_that_keep_least():
    sizes = sizes_of(50)
    found = summarize(sizes, ["llava-1.5"])
    (one,) = to_dict(found)["strategies"]
    kept = sorted(measure(plan(size, "llava-1.5")).resolution_kept for size in sizes)
    assert [worst["resolution_kept"] for worst in one["worst"]] == pytest.approx(kept[:3])
    assert found.worst(0, 50) == found.worst(0, 500)
    assert "100%  of every image" in text(summarize([(30, 40)], ["llava-uhd"]))


def test_records_are_a_data_frame_as_they_are():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(table([(672, 1008), (1, 900), (300, 400)], ["llava-uhd", "qwen2-vl"]))
    assert frame.shape == (6, 15)
    whole = frame[frame.error.isna()]
    assert len(whole) == 5
    assert whole.groupby("strategy").tokens.mean()["llava-uhd"] == pytest.approx((454 + 194 + 64) / 3)
    assert "refuses a 1x900 px image" in frame[frame.error.notna()].error.iloc[0]


def test_table_takes_paths_sizes_and_pictures(pictures):
    image = Image.new("RGB", (200, 60))
    given = [
        str(pictures / "all" / "a.png"),
        pictures / "list.txt",
        (60, 200),
        image,
        Input("mine", (60, 200)),
        "200x60",
    ]
    rows = table(given, ["llava-uhd"])
    assert [row["tokens"] for row in rows if row["height"] == 60] == [64] * 6
    assert len(rows) == 5 + 6
    assert uhd.compare.table(pictures / "all", ["clip"]) == uhd.compare.table([pictures / "all"], ["clip"])
    assert isinstance(table(compare((60, 200), ["clip"])), str)
    refuses("none.png", table, ["none.png"], ["clip"])
    refuses("'' names no image", table, [""], ["clip"])
    refuses("two whole numbers", table, [(1.5, 2)], ["clip"])
    for wrong in ((60, 200), [None], 3, b"a.png"):
        refuses(r"a list of \(height, width\)", table, wrong, ["clip"], error=TypeError)
    for alike in (image, [image], summarize([image], ["clip"]).inputs, summarize(image, ["clip"]).inputs):
        assert [(row["height"], row["width"]) for row in table(alike, ["clip"])] == [(60, 200)]
    assert [one.image_hw for one in summarize([pictures / "all"], ["clip"]).inputs] == [
        (row["height"], row["width"]) for row in table(pictures / "all", ["clip"])
    ]


def test_no_output_replaces_an_input_or_another_output(pictures, tmp_path, capsys):
    folder, sizes = pictures / "all", tmp_path / "sizes.json"
    sizes.write_text("[[40, 30]]")
    kept = (folder / "a.png").read_bytes()
    for words, why in (
        ((folder, "--csv", folder / "a.png"), "images end so"),
        ((folder, "--latex", tmp_path / "new.parquet"), "images end so"),
        (("--sizes", sizes, "--csv", sizes), "choose another output"),
        (
            (folder, "--csv", tmp_path / "out", "--latex", folder.parent / ".." / tmp_path.name / "out"),
            "name different",
        ),
    ):
        status, out, said = run(*words, "--strategies", "clip", capsys=capsys)
        assert (status, out) == (1, "")
        assert why in said
    assert (folder / "a.png").read_bytes() == kept
    assert sizes.read_text() == "[[40, 30]]"


def test_latex_has_a_row_for_every_rule():
    lines = latex(summarize(sizes_of(5), FEW)).splitlines()
    assert len(lines) == len(FEW) + 6
    assert len({line.count("&") for line in lines[2:-2] if "rule" not in line}) == 1
    assert all("%" not in re.sub(r"\\%", "", line) for line in lines)


# --- inputs


def test_folders_lists_archives_and_sizes_give_the_same(pictures, capsys):
    seen = []
    for given in (["all"], ["list.txt"], ["all.tar"], ["--sizes", "sizes.json"]):
        words = [word if word.startswith("-") else pictures / word for word in given]
        status, out, err = run(*words, "--json", "--set", "common", capsys=capsys)
        assert (status, err) == (0, "")
        found = json.loads(out)
        for one in found["strategies"]:
            del one["worst"]  # it names the images
        seen.append(found)
    assert seen[0]["images"] == 6
    assert seen[0]["sizes"] == 5
    assert all(found == seen[0] for found in seen)


def test_parquet_is_read(pictures, tmp_path, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    images = [{"bytes": encoded(picture(60, 200)), "path": None}, {"bytes": b"no picture", "path": None}]
    parquet.write_table(pyarrow.table({"image": images}), tmp_path / "some.parquet")
    status, out, err = run(tmp_path / "some.parquet", "--json", "--strategies", "clip", capsys=capsys)
    assert (status, json.loads(out)["images"], json.loads(out)["failed"]) == (3, 1, 1)
    assert "some.parquet#1" in err


def test_a_bad_image_is_named_and_the_others_are_summed_up(pictures, tmp_path, capsys):
    shutil.copytree(pictures / "all", tmp_path / "all")
    (tmp_path / "all" / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    status, out, err = run(tmp_path / "all", "--strategies", "clip,siglip", capsys=capsys)
    assert status == 3
    assert "torn.png" in err
    assert out.startswith("6 images of 5 sizes, 2 rules\n")
    status, out, err = run(tmp_path / "all", "--strategies", "clip", "--on-error", "stop", capsys=capsys)
    assert (status, out) == (1, "")
    for name in ("n" * 999, "n" * 999 + ".png"):
        status, out, err = run("200x60", name, "--strategies", "clip", "--html", tmp_path / "x.html", capsys=capsys)
        assert (status, name in err) == (3, True)
    (tmp_path / "empty").mkdir()
    assert "there are no images" in run(tmp_path / "empty", capsys=capsys)[2]


def test_few_images_are_shown_each_and_many_in_one(pictures, capsys):
    image = pictures / "all" / "a.png"
    assert "a.png: 200x60 px" in run(image, "30x40", "--strategies", "clip", capsys=capsys)[1]
    assert run(*[image] * 5, "--strategies", "clip", capsys=capsys)[1].startswith("5 images of 1 size")
    assert run(image, "--summary", "--strategies", "clip", capsys=capsys)[1].startswith("1 image of 1 size")
    each = run(pictures / "all", "--each", "--strategies", "clip", "--json", capsys=capsys)[1]
    assert [json.loads(line)["input"] for line in each.splitlines()] == [
        "a.png",
        "b.jpg",
        "c.png",
        "d.jpg",
        "e.png",
        "turned.jpg",
    ]
    assert "add --each" in run(pictures / "all", "--budget", "9", capsys=capsys)[2]


def test_a_list_is_told_from_a_picture(tmp_path, capsys):
    kinds = {
        "list": "a.png\nb.png\n",
        "umlaut": "ä" * 4095 + "\n",
        "page": "<svg></svg>",
        "data": "[[3, 4]]",
        "nothing": "",
    }
    for name, words in kinds.items():
        (tmp_path / name).write_text(words, encoding="utf-8")
    (tmp_path / "picture").write_bytes(encoded(picture(3, 5)))
    (tmp_path / "text.png").write_text("a.png\n")
    found = {path.name: holds_many(str(path)) for path in tmp_path.iterdir()}
    assert {name for name, many in found.items() if many} == {"list", "umlaut", "nothing"}
    assert holds_many(str(tmp_path))
    assert not holds_many(str(tmp_path / "gone"))
    assert cli.main(["compare", str(tmp_path / "nothing")]) == 1
    assert "there are no images" in capsys.readouterr().err


def test_rules_by_pattern_set_and_function(tmp_path, monkeypatch):
    assert named_rules(["internvl-*-max1?", "minicpm-v-4*"]) == [
        "internvl-dynamic-448-max12",
        "minicpm-v-4.6",
        "minicpm-v-4.6-4x",
    ]
    assert named_rules(["gemma3"], ["adaptive"]) == [*PRESETS, "gemma3"]
    assert named_rules(["internvl", "internvl-dynamic-448-max12"]) == ["internvl"]  # one rule by two names
    assert len(named_rules(["*"])) == len(all_rules())
    assert named_rules([]) is None
    assert named_rules([], ["all"]) is None
    assert {find(name) for name in SETS["common"]} <= {find(name) for name in all_rules()}
    (tmp_path / "own_rules_of_mine.py").write_text(
        "from uhd.slicing import plan_from_grid\nnumber = 3\n"
        "def rows(size):\n    return plan_from_grid(size, (2, 1))\n"
    )
    (tmp_path / "broken_rules_of_mine.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    (rule,) = named_rules(["own_rules_of_mine:rows"])
    assert (rule.name, rule((30, 40)).grid) == ("rows", (2, 1))
    for word, why in {
        "own_rules_of_mine:cols": "no attribute 'cols'",
        "own_rules_of_mine:number": "is no rule",
        "no_such_module:rows": "No module named",
        "broken_rules_of_mine:rows": "cannot be imported: ZeroDivisionError",
        "none*": "no strategy is named like 'none\\*'",
        "lava": "no strategy named 'lava'",
    }.items():
        refuses(why, named_rules, [word])
    refuses("no set of strategies named 'usual'", named_rules, [], ["usual"])
    assert str(tmp_path) not in sys.path


def test_csv_has_a_line_for_each_image_and_rule(pictures, tmp_path, capsys):
    file = tmp_path / "out.csv"
    assert (
        run(
            pictures / "all",
            "--strategies",
            "clip,llava-uhd",
            "--csv",
            file,
            "--latex",
            tmp_path / "t.tex",
            capsys=capsys,
        )[0]
        == 0
    )
    with open(file, newline="", encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    images = [
        (name, plan(size, "llava-uhd").num_tokens) for name, size in (("a.png", (60, 200)), ("turned.jpg", (240, 80)))
    ]
    assert len(rows) == 12
    for name, tokens in images:
        assert [row["tokens"] for row in rows if row["input"] == name and row["strategy"] == "llava-uhd"] == [
            str(tokens)
        ]
    assert (tmp_path / "t.tex").read_text().startswith(r"\begin{tabular}")


# --- the page


def page_of(images, rules=FEW, **more):
    return overview_page(summarize(images, rules, **more))


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def test_the_page_is_whole_asks_nothing_and_runs_its_own_script_only(pictures):
    names = ["</script><b>x", 'a"b', "<img src=x>"]
    files = [pictures / "all" / name for name in ("a.png", "b.jpg", "e.png")]
    images = [Input(name, (300, 420), str(file)) for name, file in zip(names, files, strict=True)]
    page = page_of([*images, Input("only a size", (1, 900))])
    tags = read(page)
    assert [a.get("type") for tag, a in tags if tag == "script"] == ["application/json", None]
    assert not [tag for tag, _ in tags if tag in ("link", "iframe", "object", "embed", "base", "img")]
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)|url\(|@import|\son[a-z]+=", page)
    policy = next(a["content"] for tag, a in tags if a.get("http-equiv") == "Content-Security-Policy")
    script = re.findall(r"<script>(.*?)</script>", page, re.S)[0]
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert [name for name, _ in data_of(page)["images"]] == [*names, "only a size"]
    assert "refuses a 1x900 px image" in page


def test_the_page_has_the_plans_numbers_and_cuts(pictures):
    sizes = {"a": (60, 200), "b": (300, 420), "c": (1500, 700)}
    data = data_of(page_of([Input(name, size) for name, size in sizes.items()]))
    for place, rule in enumerate(data["rules"]):
        for image, (name, size) in enumerate(data["images"]):
            found = plan(sizes[name], rule["name"])
            assert data["sizes"][size] == list(sizes[name][::-1])
            assert data["tokens"][place][size] == found.num_tokens
            assert data["kept"][place][size] == round(1000 * measure(found).resolution_kept)
            picture = next(each for each in data["pictures"] if each["i"] == image)
            if rule["name"] in ("llava-uhd-safe", "minicpm-v-4.6"):
                assert picture["cuts"][place] == list(found.grid or (1, 1))
            if rule["name"] == "clip":  # the middle square
                top, left, bottom, right = picture["cuts"][place]
                height, width = sizes[name]
                assert (bottom - top) / 1000 * height == pytest.approx((right - left) / 1000 * width, rel=0.02)


def test_the_page_cuts_a_picture_where_its_borders_moved_to():
    from uhd.demo import page_image

    image, moves = page_image(600, 900), PRESETS["llava-uhd-safe"].replace(border_moves=2)
    data = data_of(page_of([image, (900, 600)], [moves, "llava-1.5"]))
    shown = {
        one["i"]: one["cuts"][[rule["name"] for rule in data["rules"]].index(moves.name)] for one in data["pictures"]
    }
    assert shown[0] == cut_code(uhd.plan(image, moves)) != cut_code(plan((900, 600), moves)) == shown[1]


def test_a_page_is_bounded_and_says_so(monkeypatch):
    monkeypatch.setattr(overview, "MOST_LISTED", 30)
    sizes = sizes_of(80)
    page = page_of(sizes)
    data = data_of(page)
    assert (len(data["images"]), len(data["sizes"]), len(data["pictures"])) == (30, 30, 18)
    assert "The 30 images of which the" in page
    found = summarize(sizes, FEW)
    kept = found.measured.values["resolution_kept"][sorted(found.front)].mean(axis=0)
    assert {name for name, _ in data["images"]} == {"{1}x{0}".format(*sizes[place]) for place in np.argsort(kept)[:30]}
    ends = [data["sizes"][data["images"][one["i"]][1]] for one in data["pictures"]]
    ratios = [width / height for width, height in ends]
    assert ratios == sorted(ratios, reverse=True)


def test_a_thousand_images_by_a_few_rules_stay_small():
    names = [
        Input(f"folder/of/some/length/image-{number:06}.jpeg", size) for number, size in enumerate(sizes_of(1000))
    ]
    assert len(page_of(names)) < 300_000  # every rule: benchmarks say


@pytest.mark.slow
def test_a_thousand_images_by_every_rule_stay_below_three_megabytes():
    names = [
        Input(f"folder/of/some/length/image-{number:06}.jpeg", size) for number, size in enumerate(sizes_of(1000))
    ]
    assert len(page_of(names, None)) < 3_000_000


ACTIONS = """
const say = (name, value) => document.body.setAttribute("data-" + name, value);
const press = (node, name) => node.dispatchEvent(new KeyboardEvent("keydown", {key: name, bubbles: true}));
const svg = () => document.querySelector("#chart svg");
const told = () => document.getElementById("told").textContent;
const put = (id, value) => { const node = document.getElementById(id); node.value = value;
  node.dispatchEvent(new Event("input", {bubbles: true})); };
const shown = () => [...document.querySelectorAll("#rule-table tbody tr")].filter((row) => !row.hidden);
const listed = () => [...document.querySelectorAll("#image-rows tr th")].map((cell) => cell.textContent);
say("wide", document.documentElement.scrollWidth);
press(svg(), "Home"); say("first", told()); press(svg(), "ArrowRight"); say("second", told());
press(svg(), "Enter"); say("picked", document.querySelector("tr.picked th").textContent.trim());
const circle = svg().querySelectorAll("circle")[0].getBoundingClientRect();
const at = {clientX: circle.x + circle.width / 2 + 1, clientY: circle.y + circle.height / 2 + 1, bubbles: true};
svg().dispatchEvent(new PointerEvent("pointermove", {...at, pointerType: "mouse"})); say("hovered", told());
svg().dispatchEvent(new PointerEvent("pointerdown", {...at, pointerType: "touch"}));
say("tapped", document.querySelector(".rule-name").textContent);
put("find-rule", "llava"); say("found", shown().length); put("find-rule", "");
const only = document.getElementById("only-front"); only.click(); say("front", shown().length); only.click();
document.querySelector("[data-key=kept]").click(); const up = shown()[0].innerText;
document.querySelector("[data-key=kept]").click(); say("sorted", up !== shown()[0].innerText);
say("all", listed().length); put("find-image", "photo-1"); say("some", listed().join());
put("find-image", ""); put("by-aspect", "0"); say("square", listed().join()); put("by-aspect", "");
document.querySelector("#image-rows button").click(); say("one", document.querySelectorAll("#one tbody tr").length);
document.getElementById("one").close();
document.getElementById("more").click(); say("more", listed().length);
"""


FRAME = """<script>
const frame = document.querySelector("iframe");
frame.onload = () => document.body.setAttribute("data-found", JSON.stringify(frame.contentDocument.body.dataset));
</script>"""


@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason=f"no browser: none of {', '.join(BROWSERS)}")
def test_a_browser_sorts_finds_and_chooses_on_a_phone(pictures, tmp_path):
    sizes = [(300, 400), (400, 300), *((200 + number, 900) for number in range(70))]
    images = [Input(f"photo-{number}", size) for number, size in enumerate(sizes)]
    images[0] = images[0]._replace(picture=str(pictures / "all" / "b.jpg"))
    page = page_of(images)
    plain = re.sub(r'<meta http-equiv="Content-Security-Policy".*?>', "", page, flags=re.S)
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    acted = html.escape(plain.replace("</body>", f"<script>{ACTIONS}</script></body>"))
    (tmp_path / "acted.html").write_text(f'<iframe width="390" height="844" srcdoc="{acted}"></iframe>{FRAME}')
    browser = next(filter(None, map(shutil.which, BROWSERS)))
    command = [browser, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]

    def dom(name):
        found = subprocess.run([*command, (tmp_path / name).as_uri()], check=True, capture_output=True, timeout=120)
        return found.stdout.decode()

    assert 'data-ready="1"' in dom("page.html")  # its own policy lets its own script run
    found = json.loads(html.unescape(re.search(r'data-found="([^"]*)"', dom("acted.html"))[1]))
    ranked = sorted(FEW, key=lambda name: np.mean([plan(size, name).num_tokens for size in sizes]))
    assert int(found["wide"]) <= 390  # nothing but tables is moved sideways
    assert found["first"].startswith(ranked[0])
    assert found["second"].startswith(ranked[1])
    assert found["picked"] == ranked[1]
    assert ": " in found["hovered"]
    assert found["hovered"].startswith(found["tapped"])
    assert found["found"] == str(sum("llava" in name for name in FEW))
    assert found["front"] == str(len(summarize(images, FEW).front))
    assert found["sorted"] == "true"
    assert found["all"] == "50"
    assert sorted(found["some"].split(",")) == sorted(["photo-1", *(f"photo-{number}" for number in range(10, 20))])
    assert sorted(found["square"].split(",")) == ["photo-0", "photo-1"]
    assert found["one"] == str(len(FEW))
    assert found["more"] == str(len(sizes))
