"""``uhd choose``: the answer is the best of all options, found here one plan at a time, and it is told so."""

import json
import math
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import uhd
from tests.scripts import load_script
from tests.test_learned import ROOT
from tests.tiny import refuses
from uhd import cli
from uhd.compare import advice, all_rules, choose, compare, learned
from uhd.compare.choosing import BASE_SIZES, FAMILIES, LATENTS, SLICES
from uhd.compare.summary import ASPECTS
from uhd.nano.task import scene
from uhd.slicing import PRESETS, SlicingConfig, find, plan
from uhd.slicing.metrics import measure
from uhd.slicing.rules import slicing_from_dict


def data_sets():
    """(height, width) of A4 scans at usual resolutions, receipts and banners, and phone photos."""
    rng = random.Random(0)
    scans = [(round(11.69 * dpi), round(8.27 * dpi)) for dpi in (96, 120, 150, 150, 200, 300)]
    scans = [size[:: rng.choice((1, 1, 1, -1))] for size in scans]
    receipts = [(rng.randint(1200, 3000), rng.randint(300, 640)) for _ in range(4)]
    banners = [(rng.randint(90, 400), rng.randint(900, 2400)) for _ in range(4)]
    photos = [(3024, 4032), (4032, 3024), (3000, 4000), (2160, 3840), (1080, 1920), (1200, 1600)]
    return {"scans": scans, "receipts and banners": receipts + banners, "photos": photos}


SETS = data_sets()


def options():
    """Every option by its own definition: all rules, and presets with every setting."""
    found = [(name, find(name)) for name in all_rules()]
    for name in FAMILIES:
        preset = PRESETS[name]
        for base in BASE_SIZES:
            for slices in SLICES:
                for latents in LATENTS if preset.tokens_per_view is not None else (None,):
                    if base % (preset.patch_size * preset.merge) == 0:
                        config = preset.replace(image_size=base, max_slices=slices, tokens_per_view=latents)
                        found.append((name, config))
    return found


@pytest.fixture(scope="module")
def brute():
    """For each data set every option that plans all of it: rule, tokens of each image, TFLOPs, kept, seam, padding."""
    found = {}
    for key, sizes in SETS.items():
        found[key] = []
        for name, rule in options():
            try:
                ms = [measure(plan(size, rule)) for size in sizes]
            except ValueError:
                continue
            row = SimpleNamespace(name=name, rule=rule, tokens=[m.tokens for m in ms])
            row.tflops = np.mean([m.flops.total for m in ms]) / 1e12
            row.kept, row.seam, row.padding = (
                sum(getattr(m, field) for m in ms) / len(ms) for field in ("resolution_kept", "seam", "padding")
            )
            found[key].append(row)
    return found


def first(rows):
    """The best, step by step: of those that keep most those of the shortest seams, and so on."""
    for step in (
        lambda row: -round(row.kept, 3),
        lambda row: round(row.seam, 2),
        lambda row: round(row.padding, 3),
        lambda row: np.mean(row.tokens),
    ):
        least = min(map(step, rows))
        rows = [row for row in rows if math.isclose(step(row), least, abs_tol=1e-6)]
    return rows


@pytest.mark.parametrize("budget", [600, 1500])
@pytest.mark.parametrize("key", SETS)
def test_the_answer_is_the_brute_force_best_and_says_what_others_lose(key, budget, brute):
    choice = choose(SETS[key], max_tokens=budget)
    within = [row for row in brute[key] if np.mean(row.tokens) <= budget]
    best = first(within)
    assert choice.best.rule in [row.rule for row in best]
    assert choice.best.resolution_kept == pytest.approx(best[0].kept)
    assert choice.best.tokens == pytest.approx(np.mean(best[0].tokens))
    assert max(row.kept for row in within) < choice.best.resolution_kept + 0.001  # it is on the front

    same = [row for row in within if row.tokens == best[0].tokens and math.isclose(row.kept, best[0].kept)]
    rest = first([row for row in within if row not in same])
    assert choice.runner_up.resolution_kept == pytest.approx(rest[0].kept)
    less = 100 * (best[0].kept - rest[0].kept)
    line = next(line for line in advice.text(choice).splitlines() if line.startswith(f"  {choice.runner_up.name}  "))
    assert f" {less:.1f}%" in line
    told = advice.to_dict(choice)["alternatives"][0]
    assert told["loses"]["resolution_kept"] == pytest.approx(best[0].kept - rest[0].kept)
    for one in told["on"]:
        size = tuple(one["image_hw"])
        kept = [measure(plan(size, rule)).resolution_kept for rule in (choice.runner_up.rule, choice.best.rule)]
        assert [one["resolution_kept"], one["chosen"]] == pytest.approx(kept)
        assert kept[0] < kept[1]


@pytest.mark.parametrize("key", ["receipts and banners"])
def test_a_budget_of_flops_and_one_of_every_image(key, brute):
    choice = choose(SETS[key], max_tflops=15)
    assert choice.best.rule in [row.rule for row in first([row for row in brute[key] if row.tflops <= 15])]

    choice = choose(SETS[key], max_tokens=600, per_image=True)
    assert choice.best.tokens_max <= 600
    within = [
        row for row in brute[key] if max(row.tokens) <= 600
    ]  # and options bounded in max_tokens, which may be better
    assert choice.best.worth <= min(
        (-round(row.kept, 3), round(row.seam, 2), round(row.padding, 3)) for row in within
    ) + (math.inf,)
    bounded = [plan(size, PRESETS["minicpm-v"].replace(max_slices=40, max_tokens=600)) for size in SETS[key]]
    kept = sum(measure(one).resolution_kept for one in bounded) / len(bounded)
    assert choice.best.resolution_kept > kept - 0.001


def test_settings_and_rules_can_be_narrowed():
    sizes = SETS["scans"]
    choice = choose(
        sizes, max_tokens=900, rules=["llava-uhd-safe", "clip"], slices=(3, 5), latents=(144,), base_sizes=(336,)
    )
    assert choice.best.rule == PRESETS["llava-uhd-safe"].replace(max_slices=5, tokens_per_view=144)
    assert choice.considered == 2 + 1
    strong, weak = (choose(sizes, max_tokens=600, patches_per_token=most) for most in (None, 8))
    assert strong.best.patches_per_token > 8 >= weak.best.patches_per_token
    assert weak.other > 0


def test_a_rule_that_is_named_with_its_settings_is_an_option_as_it_is():
    rules = ["llava-uhd+max_slices=14", SlicingConfig(name="own", max_slices=15), 'internvl+resample="bilinear"']
    choice = choose([(672, 1008)], max_tokens=6000, rules=rules, slices=[2])
    assert choice.considered == 3
    assert choice.best.name == "llava-uhd+max_slices=14"
    assert choice.best.rule.max_slices == 14
    (tiled,) = (option for option in choice.alternatives if option.name.startswith("internvl"))
    assert eval(advice.pasted(tiled), {"uhd": uhd}) == tiled.rule


@pytest.mark.parametrize("resampler", [None, "perceiver-64"])
def test_presets_that_are_named_are_varied_whatever_they_are(resampler):
    sizes = SETS["photos"] + SETS["receipts and banners"]
    given = {
        "max_tokens": 300,
        "slices": (2, 5),
        "latents": (49, 64),
        "base_sizes": (224, 336),
        "resampler": resampler,
    }
    choice = choose(sizes, rules=["uhd-plus", "llava-uhd"], **given)
    rules = [
        PRESETS[name].replace(max_slices=slices, tokens_per_view=latents, image_size=base)
        for name in ("uhd-plus", "llava-uhd")
        for slices in (2, 5)
        for latents in (49, 64)
        for base in (224, 336)
    ]
    assert choice.considered == len(rules)
    rows = [(rule, [measure(plan(size, rule), resampler=resampler) for size in sizes]) for rule in rules]
    within = [(rule, ms) for rule, ms in rows if np.mean([m.tokens for m in ms]) <= 300]
    best, ms = max(within, key=lambda row: round(float(np.mean([m.resolution_kept for m in row[1]])), 3))
    assert (choice.best.rule, choice.over_budget) == (best, len(rules) - len(within))
    assert choice.best.tokens == pytest.approx(np.mean([m.tokens for m in ms]))
    assert choice.best.tflops == pytest.approx(np.mean([m.flops.total for m in ms]) / 1e12)
    assert "trained with 49 tokens a view on average, fitted to views" in advice.needed(rules[0])


def test_refusals_and_budgets_that_nothing_keeps():
    choice = choose([(1, 900), (300, 400)], max_tokens=600)
    assert choice.refusing > 0
    plan((1, 900), choice.best.rule)
    refuses("a choice needs a budget", choose, [(3, 4)])
    refuses(
        "keeps the budget of 5 tokens an image on average: the nearest is minicpm-v-4.6, 1 slice, 224 px with 20",
        choose,
        [(300, 400)],
        max_tokens=5,
    )
    refuses("max_tokens is a number above 0, got -1", choose, [(3, 4)], max_tokens=-1)
    refuses("nothing to compare", choose, [], max_tokens=600)
    refuses(
        "options refuses one of these images: .* qwen2-vl: .*1x900",
        choose,
        [(1, 900)],
        max_tokens=600,
        rules=["qwen2-vl"],
    )
    refuses(
        "leave learned out", choose, [(100, 90)], max_tokens=600, rules=["pixtral"], learned=True, patches_per_token=9
    )
    refuses(
        "none of them what else",
        choose,
        [(1000, 900)],
        max_tokens=600,
        rules=["pixtral", "gemma3"],
        learned=True,
        patches_per_token=4,
    )


def test_wrong_arguments_are_refused_by_name(tmp_path, capsys):
    ask = {"inputs": [(30, 40)], "max_tokens": 600, "rules": ["minicpm-v-4.6"]}
    for wrong, words in (
        ({"max_tokens": True}, "max_tokens is a number above 0, got True"),
        ({"slices": 4}, "slices are a list"),
        ({"latents": []}, "latents are a list"),
        ({"slices": [2.5]}, "each of slices must be a positive int"),
        ({"base_sizes": [336, 378]}, "base size 378 px fits no preset .* multiples of 56"),
    ):
        refuses(words, choose, **{**ask, **wrong})
    refuses("write", choose, **{**ask, "rules": "minicpm-v"}, error=TypeError)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    for wrong in (
        ["--max-tokens", "0"],
        ["--max-tokens", "9", "--latents", "0"],
        ["--max-tokens", "9", "--lm", "none"],
    ):  # before any image is read
        assert cli.main(["choose", str(tmp_path), *wrong]) == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "bad.png" not in said


@pytest.mark.parametrize(
    "ask", [lambda rule: choose([(30, 40)], max_tokens=9, rules=[rule]), lambda rule: compare((30, 40), [rule])]
)
def test_a_rule_that_fails_is_named(ask):
    def broken(size):
        return {}[size]

    with pytest.raises(RuntimeError, match="the rule 'broken' fails on 30x40 px .*: KeyError: "):
        ask(broken)


def test_paths_and_pictures_are_chosen_for(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    ask = {"max_tokens": np.int64(600), "rules": ["llava-1.5"]}
    for given in (tmp_path, [str(tmp_path / "a.png")], Image.new("RGB", (40, 30)), ["40x30"]):
        assert [one.image_hw for one in choose(given, **ask).images] == [(30, 40)]


def test_caps_that_no_image_reaches_are_no_runner_up():
    choice = choose([(300, 400)], max_tokens=600, rules=["llava-uhd-safe"])
    assert choice.runner_up is None or not choice.runner_up.same_as(choice.best)
    assert "To paste" in advice.text(choice)


@pytest.mark.parametrize("key", SETS)
def test_what_is_pasted_is_what_was_chosen(key):
    import uhd

    choice = choose(SETS[key], max_tokens=600, per_image=True, slices=(3, 40), base_sizes=(336, 448))
    for option in (choice.best, *choice.alternatives):
        rule = eval(advice.pasted(option), {"uhd": uhd})
        assert rule == option.rule == slicing_from_dict(json.loads(json.dumps(option.rule.to_dict())))


@pytest.mark.parametrize("name", ["llava-uhd-safe", "my-own", "internvl"])
def test_settings_of_ones_own_are_pasted_whole(name):
    import uhd

    separators = uhd.slicing.SeparatorCount(per_slice=2)
    own = SlicingConfig(name=name, rounding="round", merge=2, separators=separators, border_moves=2, cut_by="shape")
    choice = choose([(300, 1500)], max_tokens=900, rules=[own], slices=[7], latents=[64], base_sizes=[336])
    assert eval(advice.pasted(choice.best), {"uhd": uhd}) == own
    uhd.register_strategy("pasted-by-name", own.replace(name="pasted-by-name"))
    choice = choose([(300, 1500)], max_tokens=900, rules=["pasted-by-name"])
    assert advice.pasted(choice.best) == 'uhd.strategy("pasted-by-name")'


def test_the_command_gives_one_object(tmp_path, capsys):
    (tmp_path / "sizes.json").write_text(json.dumps([size[::-1] for size in SETS["scans"]]))
    words = ["choose", "--sizes", str(tmp_path / "sizes.json"), "--max-tokens", "600", "--patches-per-token", "16"]
    words += ["--strategies", "llava-uhd*,minicpm*,idefics2*"]
    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rules = [name for name in all_rules() if name.startswith(("llava-uhd", "minicpm", "idefics2"))]
    choice = choose(SETS["scans"], max_tokens=600, patches_per_token=16, rules=rules)
    assert found["strategy"] == choice.best.strategy
    assert slicing_from_dict(found["config"]) == choice.best.rule
    assert (found["tokens"], found["tflops"]) == (choice.best.tokens, choice.best.tflops)
    assert found["tokens"] <= found["tokens_p95"] <= found["tokens_max"]
    assert (found["base_size"], found["latents"]) == (448, 64)
    assert "more resolution kept" in found["better"]
    assert {"strategy", "config", "tokens", "tflops", "resolution_kept", "loses", "on"} <= set(
        found["alternatives"][0]
    )
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert f"slicing = {advice.pasted(choice.best)}" in out
    assert "a vision encoder of 448 px and patches of 14 px, a compressor of 64 latents" in out
    with pytest.raises(SystemExit, match="^2$"):
        cli.main(["choose", "30x40"])
    assert "a choice needs a budget: --max-tokens N" in capsys.readouterr().err


# --- the learned comparison


def rows_of_the_page(title="Difference to `uhd`, paired by seed and image"):
    page = (ROOT / "docs" / "learned_results.md").read_text()
    text = page[page.index(title) :]
    found = {}
    for arm, question, *cells in re.findall(
        r"^\| (\S+) \| (\w+) \| (.*?) \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", text, re.M
    ):
        if question == "all":
            found.setdefault(arm, [tuple(map(float, re.findall(r"[+-]\d\.\d{3}", cell))) for cell in cells])
    return found


def measured_rows():
    """Differences of every kind as the page has them: those of the last comparison are to slices of equal tokens."""
    rows = rows_of_the_page()
    return {**rows, "native-direct": rows_of_the_page("### The direct run")["native-direct"]}


def test_measured_differences_are_those_of_the_page():
    rows = measured_rows()
    for kind, differences in learned.DIFFERENCES.items():
        assert list(differences) == rows[kind][1:]
    assert rows["overview-wide"][0] == learned.RESOLUTION


@pytest.mark.slow
def test_what_arms_keep_more_is_measured_on_their_images():
    first, direct = load_script("learned_run"), load_script("learned_plus").DIRECT
    aspects, kept = kept_by(first.all_arms(), first.TEST_SEED)
    shares = learned.shapes(np.array([[aspect, 1] for aspect in aspects]), np.ones(1000))
    assert shares == pytest.approx([0.24, 0.28, 0.24, 0.24], abs=0.06)
    assert kept["uhd"].mean() - kept["overview-wide"].mean() == pytest.approx(learned.LESS_KEPT, abs=0.002)
    own, native = kept_by({name: direct.arms()[name] for name in ("native-direct", "uhd-more")}, direct.test_seed)
    for name, values in learned.MORE_KEPT.items():
        shape, arms, slices = (own, native, "uhd-more") if name in native else (aspects, kept, "uhd")
        for bucket, value in zip(ASPECTS, values, strict=True):
            inside = (shape >= bucket.low) & (shape < bucket.high)
            more = (arms[name] - arms[slices])[inside].mean()
            assert more == pytest.approx(value, abs=0.001), (name, bucket)


def kept_by(arms, seed):
    """Aspects of the 1,000 scenes that judge, and the resolution that each arm keeps of them."""
    sizes = [scene(seed, number).image_hw for number in range(1000)]
    rules = {name: arm.slicing or arm.config.slicing for name, arm in arms.items()}
    kept = {name: np.array([measure(rule(size)).resolution_kept for size in sizes]) for name, rule in rules.items()}
    return np.array([max(size) / min(size) for size in sizes]), kept


def test_a_measured_arm_on_the_measured_shapes_loses_what_was_measured():
    rows = measured_rows()
    for kind, name in {
        "stretch": "siglip",
        "pad": "llava-1.5",
        "next": "llava-next",
        "anyres": "llava-onevision",
        "native-direct": "uhd-plus",
    }.items():
        for place in range(4):
            shares = [float(place == each) for each in range(4)]
            own = learned.lost(find(name), 0.8 + learned.MORE_KEPT[kind][place], shares)
            native = learned.lost(find("llava-uhd"), 0.8, shares)
            assert native.mean - own.mean == pytest.approx(rows[kind][place + 1][0], abs=1e-9)
            assert own.low < own.mean < own.high


def test_a_native_view_has_its_number_where_it_is_one_view():
    settings = {"base_sizes": (336,), "slices": (7,), "latents": (64,), "max_tokens": 900, "learned": True}
    cases = (((1000, 1000), 0.164), ((2000, 250), 0.117), ((2001, 250), 0.0), ((60, 900), 0.0), ((90, 120), 0.0))
    for size, gain in cases:  # one beyond 8:1 is cut, and a small one is one view with every rule
        lost = choose([size], rules=["uhd-plus"], **settings).best
        place = min(int(np.searchsorted((1.5, 2.5, 4), max(size) / min(size), side="right")), 3)
        explained = learned.RATE[0] * learned.MORE_KEPT["native-direct"][place] if gain else 0
        expected = learned.RATE[0] * (1 - lost.resolution_kept) - (gain - explained)
        assert lost.lost.mean == pytest.approx(expected), size


def test_options_of_the_planner_that_were_not_measured_so_have_no_number():
    plus = PRESETS["uhd-plus"]
    assert learned.kind_of(plus.replace(image_size=448, max_slices=9)) == "native-direct"
    for other in (plus.replace(one_view_below=2.5), plus.replace(border_moves=1), plus.replace(latents="fixed")):
        assert learned.kind_of(other) is None


def test_learned_choices_weigh_shape_and_resolution():
    square, long = [(380, 400)] * 3, [(200, 1400)] * 3
    rules = ["llava-uhd-safe", "siglip", "qwen2-vl"]
    settings = {"base_sizes": (336,), "slices": (7,), "latents": (64,), "max_tokens": 800, "rules": rules}
    chosen = {name: choose(sizes, learned=True, **settings) for name, sizes in (("square", square), ("long", long))}
    assert chosen["square"].best.strategy == "siglip"  # one stretched view read squares better, where as much is kept
    assert chosen["long"].best.strategy == "llava-uhd-safe"
    assert chosen["square"].other >= 1  # a single native view was not measured
    assert choose(square, **settings).best.strategy == "llava-uhd-safe"  # it keeps every px
    assert "of exact answers lost (one square view, stretched; 95% interval)" in advice.text(chosen["square"])
    found = advice.to_dict(chosen["long"])
    assert found["learned"]["low"] <= found["learned"]["mean"] <= found["learned"]["high"]
    assert isinstance(chosen["long"].best.rule, SlicingConfig)
