"""The planner in JavaScript against the goldens and the one in Python, in Node or else a headless Chromium."""

import html
import json
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import uhd
from tests.slicing.test_plan import SIGLIP, expected, golden
from uhd.slicing import PRESETS

SOURCE = Path(uhd.__file__).parent / "slicing" / "planner.js"
CALL = "tasks.map(({call, sizes, config}) => sizes.map((size) => uhdPlanner[call](size, config)))"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def run(tasks, folder):
    """What the planner gives for ``{call, sizes, config}`` each."""
    data = json.dumps(tasks)
    if node := shutil.which("node"):
        code = f"const uhdPlanner = require({json.dumps(str(SOURCE))}); const tasks = JSON.parse(require('fs')"
        code += f".readFileSync(0)); console.log(JSON.stringify({CALL}));"
        done = subprocess.run([node, "-e", code], input=data, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("neither Node nor Chromium is installed")
    page = folder / "planner.html"
    script = f"{SOURCE.read_text()}\nconst tasks = {data}; document.body.textContent = JSON.stringify({CALL});"
    page.write_text(f"<body></body><script>{script}</script>")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return json.loads(html.unescape(re.search("<body>(.*)</body>", done.stdout, re.DOTALL)[1]))


def task(call, sizes, config):
    return {"call": call, "sizes": [list(size) for size in sizes], "config": config.to_dict()}


def pair(value):
    return None if value is None else tuple(value)


GOLDENS = [
    ("slices_llava_uhd.json", "v1", "llava-uhd"),
    ("slices_llava_uhd.json", "v2_siglip384", SIGLIP),
    ("slices_llava_uhd.json", "march2024", "llava-uhd-paper"),
    ("slices_minicpm_v.json", "remote_2_6", "minicpm-v"),
    ("slices_minicpm_v.json", "hf_4_6_16x", "minicpm-v-4.6"),
    ("slices_minicpm_v.json", "hf_4_6_4x", "minicpm-v-4.6-4x"),
]


def test_equals_the_reference_on_every_size(tmp_path):
    rows = [golden(file) for file, _, _ in GOLDENS]
    tasks = [
        task("plan", [(row["h"], row["w"]) for row in some], uhd.slicing.find(config))
        for some, (_, _, config) in zip(rows, GOLDENS, strict=True)
    ]
    compared = 0
    for some, (_, tag, _), found in zip(rows, GOLDENS, run(tasks, tmp_path), strict=True):
        for row, plan in zip(some, found, strict=True):
            got = pair(plan["grid"]), pair(plan["slice_hw"]), pair(plan["overview_hw"])
            assert got == expected(row, tag), (tag, row["h"], row["w"])
            compared += 1
    assert compared == 12_000


def test_equals_the_planner_in_python_with_any_settings(tmp_path):
    drawn = random.Random(0)
    sizes = [tuple(int(2 ** drawn.uniform(0, 13)) for _ in range(2)) for _ in range(300)]
    sizes += [(side, side) for side in range(300, 5000, 97)]
    configs = [*PRESETS.values()]
    configs += [config.replace(max_slices=drawn.randint(1, 40), clamp=True) for config in PRESETS.values()]
    configs += [config.replace(max_tokens=5000, max_slices=20) for config in PRESETS.values()]
    configs.append(PRESETS["llava-uhd"].replace(max_tokens=300))
    configs += [config.replace(cut_by="shape") for config in configs if config.rule == "released"]
    fixed = [config for config in configs if config.tokens_per_view]
    configs += [config.replace(latents="fitted") for config in fixed]
    configs += [config.replace(one_view_below=drawn.uniform(1, 9)) for config in [*configs]]
    tasks = [task(call, sizes, config) for config in configs for call in ("plan", "candidates")]
    results = iter(run(tasks, tmp_path))
    for config in configs:
        for size, plan, candidates in zip(sizes, next(results), next(results), strict=True):
            ours = uhd.plan(size, config)
            got = [pair(plan[name]) for name in ("grid", "slice_hw", "overview_hw")]
            assert got == [ours.grid, ours.slice_hw, ours.overview_hw], (config, size)
            counts = ("num_patches", "num_visual_tokens", "num_separators", "num_tokens")
            assert [plan[name] for name in counts] == [getattr(ours, name) for name in counts], (config, size)
            views = [(v.kind, v.size_hw, v.patches_hw, v.num_tokens, v.latents_hw) for v in ours.views]
            js = [
                (v["kind"], pair(v["size_hw"]), pair(v["patches_hw"]), v["num_tokens"], pair(v.get("latents_hw")))
                for v in plan["views"]
            ]
            assert js == views, (config, size)
            places = [(view.row, view.col) for view in ours.views if view.kind == "slice"]
            assert [pair(v["place"]) for v in plan["views"] if v["kind"] == "slice"] == places
            theirs = uhd.candidates(size, config)
            assert [pair(one["grid"]) for one in candidates] == [one.grid for one in theirs], (config, size)
            assert [one["score"] for one in candidates] == [one.score for one in theirs]


def test_a_size_or_budget_that_cannot_be_is_refused(tmp_path):
    if not (node := shutil.which("node")):
        pytest.skip("Node is not installed")
    code = f"""
const {{ plan }} = require({json.dumps(str(SOURCE))});
const config = {json.dumps(PRESETS["llava-uhd"].replace(max_tokens=10).to_dict())};
for (const size of [[0, 3], [2.5, 3], [3], [1000001, 3], [300, 300]]) {{
  try {{ plan(size, config); console.log("planned"); }} catch (problem) {{ console.log(problem.message); }}
}}
const others = [{json.dumps(uhd.strategy("llava-next").to_dict())}, {{ slicing: config }}, undefined];
for (const other of [...others, {{ ...config, max_slices: 0 }}]) {{
  try {{ plan([30, 50], other); console.log("planned"); }} catch (problem) {{ console.log(problem.message); }}
}}
"""
    done = subprocess.run([node, "-e", code], capture_output=True, text=True, timeout=60)
    lines = done.stdout.splitlines()
    assert all("two whole numbers of px above 0, at most 1000000; got" in line for line in lines[:4]), done
    assert lines[4] == "the overview alone takes 64 tokens, max_tokens is 10: raise it"
    assert [line.partition("this one's rule is ")[2] for line in lines[5:8]] == ['"AnyResConfig"', *["undefined"] * 2]
    assert lines[8] == "max_slices must be a whole number above 0, got 0"
    assert len(lines) == 9
