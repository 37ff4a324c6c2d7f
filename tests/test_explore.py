"""The page with sliders: what it shows is what the library plans, in Node and in a browser, and it asks nothing."""

import base64
import html
import json
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import uhd
from tests.files import encoded, exif, picture
from tests.slicing.test_planner_js import SOURCE
from tests.test_compare import BROWSERS, FLAGS, read
from tests.tiny import refuses
from uhd import cli
from uhd.compare import explore, explore_page
from uhd.slicing import PRESETS, SlicingConfig, find, plan
from uhd.slicing.flops import plan_flops

SCRIPT = Path(explore.__file__).with_suffix(".js")
RULES = ("llava-next", "qwen2.5-vl", "molmo2", "llava-uhd-safe", "pixtral")


def rows_first(image_hw):
    if image_hw[0] > 4000:
        raise ValueError(f"too tall: {image_hw[0]} px")
    return uhd.slicing.plan_from_grid(image_hw, (2, 1))


@pytest.fixture(scope="module")
def page():
    return explore_page([*RULES, rows_first])


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def shown(found):
    """A plan as the page has it."""
    return {
        "grid": found.grid and list(found.grid),
        "slice_hw": found.slice_hw and list(found.slice_hw),
        "overview_hw": found.overview_hw and list(found.overview_hw),
        "views": found.num_views,
        "patches": found.num_patches,
        "visual": found.num_visual_tokens,
        "separators": found.num_separators,
    }


def near(side):
    return min(explore.LATTICE, key=lambda one: max(one / side, side / one))


def looked_up(page, sizes):
    """What the page's script finds for every rule and size, in Node."""
    if not (node := shutil.which("node")):
        pytest.skip("Node is not installed")
    code = f"globalThis.uhdPlanner = require({json.dumps(str(SOURCE))}); const {{ look }} = require("
    code += f"{json.dumps(str(SCRIPT))}); const [data, sizes] = JSON.parse(require('fs').readFileSync(0));"
    code += "console.log(JSON.stringify(data.rules.map((rule) => sizes.map((size) => look(data, rule, size)))));"
    given = json.dumps([data_of(page), sizes])
    done = subprocess.run([node, "-e", code], input=given, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_number_is_that_of_the_plan(page):
    drawn = random.Random(0)
    sizes = [[round(2 ** drawn.uniform(6.1, 12.9)) for _ in range(2)] for _ in range(200)]
    rules = [rule["name"] for rule in data_of(page)["rules"]]
    assert rules[:6] == [*RULES, "rows_first"]
    assert set(PRESETS) <= set(rules)
    refused = 0
    for name, looks in zip(rules, looked_up(page, sizes), strict=True):
        rule = find(rows_first if name == "rows_first" else name)
        for size, found in zip(sizes, looks, strict=True):
            of = size if name in PRESETS else [near(side) for side in size]
            assert found["drawn_hw"] == of
            try:
                planned = rule.plan(tuple(of))
            except ValueError as problem:
                planned, why = None, str(problem)
            if planned is None:
                refused += found["error"] == why
                continue
            wanted = shown(planned)
            assert {key: found[key] for key in wanted} == wanted, (name, size)
            assert found["flops"] == pytest.approx(plan_flops(planned).total / 1e10, abs=0.5001)
            if name in PRESETS:
                assert found["cut"] == list(planned.grid or (1, 1))
                scores = [[list(one.grid), one.score] for one in uhd.candidates(tuple(of), name)]
                assert [[one["grid"], one["score"]] for one in found["candidates"]] == scores
            else:
                assert found["cut"] == explore.cut_code(planned)
    assert refused == sum(near(height) > 4000 for height, _ in sizes) > 0


def test_sizes_that_a_page_does_not_know_are_refused(page):
    names = [rule["name"] for rule in data_of(page)["rules"]]
    for name, looks in zip(names, looked_up(page, [[63, 500], [500, 8193], [0, 500]]), strict=True):
        if name in PRESETS:
            assert [one.get("error", "")[:11] for one in looks] == ["", "", "an image is"]
            assert looks[1]["patches"] == plan((500, 8193), name).num_patches
        else:
            assert all("knows the rule for sides of 64 to 8192 px" in one["error"] for one in looks)


def test_the_page_is_whole_small_and_asks_nothing(page):
    tags = read(page)
    assert not [tag for tag, _ in tags if tag in ("link", "iframe", "object", "embed", "base", "img", "form")]
    assert not [a for _, a in tags for key in ("src", "href", "srcset", "action") if key in a]
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)|url\(|@import|\son[a-z]+=|fetch\(|XMLHttp", page)
    policy = next(a["content"] for tag, a in tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data: blob:;")
    assert len(page.encode()) < 1_000_000


def test_settings_of_ones_own_are_planned_for_every_size():
    rules = [SlicingConfig(patch_size=16, image_size=256), SlicingConfig(one_view_below=2.5, latents="fitted")]
    rules.append(PRESETS["minicpm-v-4.6"].replace(one_view_below=2.5))
    for rule, (found,) in zip(rules, looked_up(explore_page(rules), [[501, 703]])[:3], strict=True):
        planned = rule.plan((501, 703))
        assert {key: found.get(key) for key in shown(planned)} == shown(planned)
        assert found["flops"] == pytest.approx(plan_flops(planned).total / 1e10, abs=0.5001)


@pytest.mark.slow
def test_the_usual_rules_fit_on_a_page():
    page = explore_page()
    data = data_of(page)
    names = [rule["name"] for rule in data["rules"]]
    assert len(page.encode()) < 1_000_000
    assert names[: data["shown"]] == list(explore.SHOWN)
    assert {find(name) for name in names} == {find(name) for name in (*uhd.compare.inputs.SETS["common"], *PRESETS)}


def test_a_call_that_cannot_be_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["explore", "--strategies", "clip,minicpm-v"]) == 0
    assert "wrote uhd_explore.html: open it in a browser" in capsys.readouterr().out
    data = data_of(Path("uhd_explore.html").read_text(encoding="utf-8"))
    assert [data["shown"], *(rule["name"] for rule in data["rules"][:2])] == [2, "clip", "minicpm-v"]
    for words in (["photo.jpg"], ["--rules", "clip"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(["explore", *words])
        assert ended.value.code == 2
    for words, why in (
        (["-o", "page.txt"], "a page ends in .html"),
        (["-o", "none/page.html"], "none"),
        (["--strategies", "lava"], "no strategy named 'lava'"),
        (["--strategies", ","], "no rules to explore"),
    ):
        assert cli.main(["explore", *words]) == 1
        assert why in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"uhd_explore.html"}
    refuses("write \\['clip'\\]", explore_page, "clip", error=TypeError)
    monkeypatch.setattr(explore, "MOST_BYTES", 30_000)
    refuses("name fewer strategies", explore_page, ["clip"])


ACTIONS = """
const $ = (id) => document.getElementById(id);
const say = (name, value) => document.body.setAttribute("data-" + name, value);
const fire = (id, value, name) => { $(id).value = value; $(id).dispatchEvent(new Event(name || "input")); };
const cards = () => [...document.querySelectorAll("#cards article")].map((card) => ({
  rule: card.querySelector("select").selectedOptions[0].textContent,
  rects: card.querySelectorAll("svg rect").length - 1, dashed: card.querySelectorAll("svg [stroke-dasharray]").length,
  near: card.querySelector(".near")?.textContent,
  scores: [...card.querySelectorAll("tbody tr")].map((row) => row.lastChild.textContent),
  ...Object.fromEntries([...card.querySelectorAll("[data-key]")].map((one) => [one.dataset.key, one.textContent]))}));
const select = (place, name) => { const one = document.querySelectorAll("#cards select")[place];
  one.value = [...one.options].find((option) => option.textContent === name).value;
  one.dispatchEvent(new Event("change")); };
say("wide", document.documentElement.scrollWidth);
say("first", JSON.stringify(cards()));
const put = ([h, w, name]) => { select(3, name); fire("width", w); fire("height", h); return cards()[3]; };
const sized = SIZES.map(put);
say("sized", JSON.stringify(sized));
fire("width-slider", 800); say("slid", $("width").value);
const before = [$("width").value, $("height").value]; $("turn").click();
say("turned", JSON.stringify([...before, $("width").value, $("height").value])); select(2, "none");
const bytes = Uint8Array.from(atob("PHOTO"), (c) => c.charCodeAt(0)); const moved = new DataTransfer();
moved.items.add(new File([bytes], "turned.jpg", { type: "image/jpeg" }));
document.dispatchEvent(new DragEvent("drop", { dataTransfer: moved, cancelable: true }));
new MutationObserver(() => {
  say("photo", $("width").value + "x" + $("height").value);
  say("pictures", document.querySelectorAll("#cards image[href^='data:image/jpeg']").length);
}).observe($("photo-said"), { childList: true });
"""

FRAME = """<script>
const frame = document.querySelector("iframe");
frame.onload = () => setTimeout(() =>
  document.body.setAttribute("data-found", JSON.stringify(frame.contentDocument.body.dataset)), 1500);
</script>"""


@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason=f"no browser: none of {', '.join(BROWSERS)}")
def test_a_browser_draws_a_size_and_a_dropped_photo_on_a_phone(page, tmp_path):
    drawn = random.Random(1)
    sizes = [(round(2 ** drawn.uniform(6.1, 12)), round(2 ** drawn.uniform(6.1, 12))) for _ in range(40)]
    tasks = [(*size, drawn.choice([*RULES, *PRESETS])) for size in sizes]
    photo = base64.b64encode(encoded(picture(300, 420), "JPEG", exif=exif(6))).decode()
    acts = ACTIONS.replace("SIZES", json.dumps(tasks)).replace("PHOTO", photo)
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    plain = re.sub(r'<meta http-equiv="Content-Security-Policy".*?>', "", page, flags=re.S)
    acted = html.escape(plain.replace("</body>", f"<script>{acts}</script></body>"))
    (tmp_path / "acted.html").write_text(f'<iframe width="390" height="844" srcdoc="{acted}"></iframe>{FRAME}')
    browser = next(filter(None, map(shutil.which, BROWSERS)))
    command = [browser, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=6000", "--dump-dom"]

    def dom(name):
        found = subprocess.run([*command, (tmp_path / name).as_uri()], check=True, capture_output=True, timeout=120)
        return found.stdout.decode()

    assert 'data-ready="1"' in dom("page.html")  # its own policy lets its own script run
    found = json.loads(html.unescape(re.search(r'data-found="([^"]*)"', dom("acted.html"))[1]))
    assert int(found["wide"]) <= 390
    assert [card["rule"] for card in json.loads(found["first"])] == list(RULES[:4])
    for (height, width, name), card in zip(tasks, json.loads(found["sized"]), strict=True):
        size = (height, width) if name in PRESETS else (near(height), near(width))
        planned = plan(size, name)
        assert card["rule"] == name
        assert ("near" in card) == (size != (height, width))
        if "near" in card:
            assert f"{size[1]} x {size[0]} px" in card["near"]
        assert card["dashed"] == (card["rects"] == 1)  # one view without a cut
        assert card["tokens"] == f"{planned.num_tokens:,}"
        assert card["patches"] == f"{planned.num_patches:,}"
        assert float(card["TFLOPs"]) == pytest.approx(plan_flops(planned).total / 1e12, abs=0.00501)
        scores = uhd.candidates(size, name)
        assert list(map(float, card["scores"])) == [float(f"{one.score:.4f}") for one in scores]
        if name in PRESETS:
            assert card["rects"] == (planned.num_views - 1 or 1)
    assert found["slid"] == "8192"
    width, height, *turned = json.loads(found["turned"])
    assert turned == [height, width]
    assert found["photo"] == "300x420"  # upright
    assert found["pictures"] == "3"  # one card is empty
