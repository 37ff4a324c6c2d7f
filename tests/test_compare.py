"""Rules side by side: the table, the JSON and the page, which a real browser opens where there is one."""

import functools
import html.parser
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from tests.tiny import refuses
from uhd import charts, cli
from uhd.compare import all_rules, compare, curves_over_aspect, curves_over_size, html_page, pareto, table
from uhd.demo import page_image
from uhd.slicing import plan, strategy
from uhd.slicing.strategies import ALIASES
from uhd.slicing.strategies.closest import InternVLConfig

FEW = ("llava-uhd", "llava-1.5", "molmo2", "clip", "idefics3", "gemma3-896-pas")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def everything():
    """Every rule on a page."""
    image = page_image(672, 1008)
    return compare((image.height, image.width), name="page <1>.png", image=image)


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    page_image(300, 420).save(path)
    return path


class Reader(html.parser.HTMLParser):
    """Collects tags, and checks that they are closed in order."""

    VOID = ("meta", "img", "br", "input", "link")

    def __init__(self):
        super().__init__()
        self.open, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def read(page):
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert not reader.open
    return reader.tags


def run(*args, capsys):
    status = cli.main(["compare", *map(str, args)])
    out, err = capsys.readouterr()
    return status, out, err


def test_every_rule_is_compared_once_and_sorted(everything):
    names = [entry.name for entry in everything.entries]
    assert sorted(names) == sorted(all_rules())
    assert not set(names) & set(ALIASES)
    tokens = [entry.plan.num_tokens for entry in everything.planned]
    assert tokens == sorted(tokens)


def test_rules_by_value_keep_their_order_and_names():
    def mine(size):
        return plan(size, "llava-1.5")

    given = [mine, InternVLConfig("tuned", max_tiles=3), "clip", strategy("siglip"), functools.partial(mine)]
    found = compare((300, 200), given)
    names = ["mine", "tuned", "clip", "square-stretch-384", "mine (2)"]
    assert [entry.name for entry in found.entries] == names
    assert found.name == "200x300"


def test_rules_of_one_name_stay_apart():
    """Each has its own curve and its own anchor, and the front names only the one that is on it."""
    tuned = [InternVLConfig("tuned", max_tiles=3), InternVLConfig("tuned", max_tiles=24), InternVLConfig("tuned (2)")]
    found = compare((1000, 700), tuned)
    assert [entry.name for entry in found.entries] == ["tuned", "tuned (2)", "tuned (2) (2)"]
    assert [entry.rule for entry in found.entries] == tuned
    anchors = [attrs["id"] for tag, attrs in read(html_page([found])) if tag == "article"]
    assert len(set(anchors)) == 3
    lines = curves_over_size([(e.name, e.rule) for e in found.entries], (1000, 700))
    assert len({tuple(line) for line in lines.values()}) == 3
    assert "tuned" in pareto(found.planned)
    assert not {"tuned", "tuned (2)"} <= pareto(compare((448, 448), tuned[:2]).planned)


def test_one_name_is_no_list_of_rules():
    refuses(r"write \['internvl'\]", compare, (30, 50), "internvl", error=TypeError)


def test_a_refusal_is_an_entry_an_unknown_name_an_error():
    found = compare((1, 500), ["llava-1.5", "qwen2-vl"])
    assert [entry.plan is None for entry in found.entries] == [False, True]
    assert "refuses a 1x500 px image" in table(found)
    assert found.to_dict()["strategies"][1]["error"]
    refuses("no strategy named 'lava'", compare, (30, 50), ["lava"])
    refuses("no rules to compare", compare, (30, 50), [])
    refuses("two whole numbers", compare, (30, 5.5))


def test_the_front_is_what_no_other_rule_beats(everything):
    front = pareto(everything.planned)
    points = {e.name: (e.metrics.tokens, e.metrics.resolution_kept) for e in everything.planned}
    for name, (tokens, kept) in points.items():
        beaten = any((t <= tokens and k > kept + 1e-8) or (t < tokens and k > kept - 1e-8) for t, k in points.values())
        assert not (name in front and beaten)
        assert beaten or (tokens, kept) in {points[best] for best in front}  # of equals the first is named
    assert len({points[best] for best in front}) == len(front)


def test_the_table_aligns_and_says_what_is_what(everything):
    lines = table(everything).splitlines()
    assert lines[0] == "page <1>.png: 672x1008 px (width x height)"
    rows = lines[1 : 2 + len(everything.planned)]
    assert len({len(row) for row in rows}) == 1
    assert any(re.search(r"llava-uhd +3x2 +7 +454 +100% +1\.00 +0% +1\.00", row) for row in rows)
    assert "budget" in table(compare((30, 40), ["clip"], budget=100))
    assert "5.76" in table(compare((30, 40), ["clip"], budget=100))


def test_the_page_is_whole_and_asks_nothing_of_the_network(everything):
    page = html_page([everything, compare((200, 900), FEW)])
    tags = read(page)
    assert not [tag for tag, _ in tags if tag in ("script", "link", "iframe", "object", "embed", "base", "form")]
    sources = [a[k] for _, a in tags for k in ("src", "href", "srcset", "data") if a.get(k)]
    assert len(sources) > 200
    assert all(source.startswith(("data:image/jpeg;base64,", "#")) for source in sources)
    assert not re.findall(r"url\(|@import|\son[a-z]+=", re.sub(r'src="[^"]*"', "", page))
    policy = next(a["content"] for tag, a in tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    anchors = [a["id"] for _, a in tags if "id" in a]
    assert len(anchors) == len(set(anchors))
    assert {source[1:] for source in sources if source.startswith("#")} <= set(anchors)
    assert "page &lt;1&gt;.png" in page
    assert "page <1>" not in page
    assert sum(tag == "article" for tag, _ in tags) == len(everything.planned) + len(FEW)
    assert len(page) < 6_000_000


def test_one_rule_and_refusals_make_a_page():
    page = html_page([compare((1, 500), ["qwen2-vl"]), compare((1, 500), ["llava-1.5"])])
    read(page)
    assert "Refused this size" in page
    refuses("nothing to compare", html_page, [])


@pytest.mark.parametrize(
    "size, rules", [((1, 4096), None), ((4096, 1), FEW), ((1, 1), FEW), ((3, 10**6), FEW), ((10**6, 10**6), FEW)]
)
def test_extreme_sizes_are_drawn(size, rules):
    read(html_page([compare(size, rules)]))


def test_a_drawn_cut_shows_cuts_overlaps_and_what_is_lost():
    from uhd.compare.pictures import cut_picture, views_picture

    white = Image.new("RGB", (640, 480), (255, 255, 255))

    def colors(rule, size=(480, 640)):
        pixels = np.asarray(cut_picture(white, plan(size, rule))).reshape(-1, 3).astype(int)
        return {tuple(c) for c in pixels.tolist()}

    plain, crossed, cropped = colors("llava-uhd"), colors("molmo2"), colors("clip")
    assert (214, 64, 40) in plain & crossed & cropped
    assert len(plain) == 2
    assert any(r > 240 and b < 200 and g > 200 for r, g, b in crossed)  # tinted amber
    assert any(max(c) < 130 for c in cropped)  # darkened
    padded = np.asarray(views_picture(white, plan((480, 640), "llava-1.5"), "overview", 100))
    assert padded.shape == (100, 100, 3)
    assert (padded[20:80, :] == 255).all()  # 3/4 of the view is the image
    assert not (padded[:10] == 255).any()


def test_curves_are_the_plans_token_counts():
    lines = curves_over_size([("a", "internvl"), ("b", "qwen2-vl")], (300, 3), points=9)
    assert [x for x, _ in lines["a"]] == [round(64 * 64 ** (i / 8)) for i in range(9)]
    assert lines["a"][-1] == (4096, plan((4096, 41), "internvl").num_tokens)
    assert math.isfinite(lines["b"][-1][1])
    aspects = curves_over_aspect([("a", "clip"), ("b", "fuyu")], (1000, 1000), points=5)
    assert [y for _, y in aspects["a"]] == [576] * 5
    assert aspects["b"][0][1] == plan((2828, 354), "fuyu").num_tokens
    refused = curves_over_size([("b", "qwen2-vl")], (1, 3000), points=3)["b"]
    assert all(math.isnan(y) for _, y in refused[1:])


def test_bars_are_as_long_as_their_values():
    svg = charts.bars({"a & b": {"one": 1.0, "two": 2.0}, "c": {"two": 4.0}}, "times faster", reference=1)
    lengths = [float(length) for length in re.findall(r'<rect[^>]* width="([\d.]+)"', svg)]
    assert lengths == pytest.approx([lengths[2] / 4, lengths[2] / 2, 470])
    assert "a &amp; b" in svg
    line = float(re.search(r'<line x1="([\d.]+)"', svg)[1])
    assert line == pytest.approx(230 + lengths[0], abs=0.1)
    assert len(set(re.findall(r'<rect[^>]* fill="(#\w+)"', svg))) == 2


def test_charts_place_points_and_break_lines_at_gaps():
    x = charts.log_axis([10, 1000], "x")
    assert x.place(100, 200) == pytest.approx(100)
    assert x.place(1, 200) == 0
    assert [text for _, text in charts.log_axis([900, 30000]).ticks] == ["1k", "2k", "5k", "10k", "20k"]
    assert [text for _, text in charts.log_axis([36, 42.5034]).ticks] == ["36", "42.5"]  # no step lies between
    assert charts.log_axis([5, 5]).low < 5 < charts.log_axis([5, 5]).high
    svg = charts.curves({"a & b": [(10, 0.1), (50, math.nan), (100, 0.2), (1000, 0.9)]}, x, charts.percent_axis("y"))
    read(svg)
    assert svg.count("<polyline") == 2
    assert "a &amp; b" in svg
    points = [charts.Point(10.0 * i, 0.5, f"rule-{i}", i == 3) for i in range(1, 20)]
    drawn = charts.scatter(points, x, charts.percent_axis("y"))
    read(drawn)
    assert drawn.count("<circle") == 19
    assert drawn.count(">rule-") == 1 + 19  # one label, and every point's own title


def test_command_compares_files_and_sizes(photo, tmp_path, capsys):
    page = tmp_path / "out.html"
    status, out, err = run(photo, "672x1008", "--strategies", "llava-uhd, clip", "--html", page, capsys=capsys)
    assert (status, err) == (0, "")
    assert "photo.png: 300x420 px" in out
    assert "672x1008: 672x1008 px" in out
    assert "<h1>How 2 slicing rules see photo.png" in page.read_text()


def test_command_as_json(photo, capsys):
    status, out, _ = run(photo, "--json", "--strategies", "llava-uhd,qwen2-vl", "--budget", "100", capsys=capsys)
    (record,) = map(json.loads, out.splitlines())
    assert status == 0
    assert record["image_hw"] == [420, 300]
    first = record["strategies"][0]
    assert (first["strategy"], first["num_tokens"]) == ("llava-uhd", plan((420, 300), "llava-uhd").num_tokens)
    assert first["metrics"]["budget_error"] == first["num_tokens"] / 100
    assert first["metrics"]["flops"]["total"] > 0


def test_command_names_other_models(capsys):
    flops = []
    for more in ((), ("--vit", "siglip-b", "--lm", "llama-7b", "--resampler", "perceiver-64")):
        _, out, _ = run("300x400", "--json", "--strategies", "llava-uhd", *more, capsys=capsys)
        flops.append(json.loads(out)["strategies"][0]["metrics"]["flops"])
    assert all(flops[0][part] > flops[1][part] for part in ("encoder", "lm"))


@pytest.mark.parametrize(
    "args, message",
    [
        (("30x40", "--strategies", "lava-next"), "did you mean"),
        (("30x40", "--html", "out.png"), "a page ends in .html"),
        (("30x40", "--html", "nowhere/out.html"), "there is no folder nowhere"),
        (("30x40", "--lm", "llama-14b"), "no model named 'llama-14b'"),
        (("30x40", "--budget", "0"), "budget must be a positive int"),
        (("30x40", "--strategies", ","), "no rules to compare"),
    ],
)
def test_command_says_what_is_wrong(args, message, capsys):
    status, out, err = run(*args, capsys=capsys)
    assert (status, out) == (1, "")
    assert message in err


def test_command_goes_on_past_a_bad_file(tmp_path, capsys):
    status, out, err = run(tmp_path / "none.png", "30x40", "--strategies", "clip", capsys=capsys)
    assert status == 3
    assert "none.png" in err
    assert "30x40: 30x40 px" in out


@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason=f"no browser: none of {', '.join(BROWSERS)}")
def test_a_real_browser_shows_the_page(tmp_path):
    """Headings, cards and every picture are there, at their size, in a screenshot."""
    image = page_image(672, 1008)
    page = tmp_path / "page.html"
    page.write_text(html_page([compare((1008, 672), FEW, name="a page", image=image)]))
    shot = tmp_path / "shot.png"
    browser = next(filter(None, map(shutil.which, BROWSERS)))
    command = [browser, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1250,2400"]
    subprocess.run([*command, f"--screenshot={shot}", page.as_uri()], check=True, capture_output=True, timeout=120)
    with Image.open(shot) as opened:
        pixels = np.asarray(opened.convert("RGB")).astype(int)
    assert pixels.shape == (2400, 1250, 3)
    red = (abs(pixels - (214, 64, 40)).sum(axis=2) < 40).sum(axis=1)  # cuts and curves
    bars = (abs(pixels - (39, 111, 103)).sum(axis=2) < 30).sum(axis=1)  # the bars that the page's picture has
    assert red[:900].any()  # the chart and the table's marks
    assert bars[1100:].any()
    assert red[1100:].any()
    dom = subprocess.run([*command, "--dump-dom", page.as_uri()], check=True, capture_output=True, timeout=120)
    assert dom.stdout.decode().count("<article") == len(FEW)
