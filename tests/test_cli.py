"""The command line as a user types it."""

import io
import json
import os
import pathlib
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from uhd import cli
from uhd.demo import page_image
from uhd.pixels import PixelSettings
from uhd.pixels.source import most_bytes
from uhd.slicing import PRESETS

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.png"
    page_image().save(path)
    return path


def run(*args, capsys):
    status = cli.main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return status, out, err


def fails(words, *args, capsys):
    """The command ends with 1, and says so."""
    status, out, err = run(*args, capsys=capsys)
    assert (status, words in err) == (1, True), err
    return out


def test_plan_of_sizes_and_files_as_json_lines(page, capsys):
    status, out, _ = run("plan", "672x1008", page, "640x480", "--json", "--strategy", "llava-uhd", capsys=capsys)
    first, second, third = map(json.loads, out.splitlines())
    assert status == 0
    assert (
        first
        == second
        == {
            "image_hw": [1008, 672],
            "grid": [3, 2],
            "slice_hw": [336, 336],
            "overview_hw": [406, 266],
            "views": 7,
            "num_patches": 4007,
            "num_tokens": 454,
            "strategy": "llava-uhd",
        }
    )
    assert (third["grid"], third["slice_hw"]) == ([2, 2], [280, 378])


def test_plan_of_a_sizes_file_goes_on_past_bad_sizes(tmp_path, capsys):
    sizes = tmp_path / "sizes.json"
    sizes.write_text("[[672, 1008], [0, 5], [10.5, 3], [100, 50]]")
    status, out, _ = run("plan", "--sizes", sizes, "--json", capsys=capsys)
    good, zero, fraction, small = map(json.loads, out.splitlines())
    assert status == 0
    assert good["grid"] == [3, 2]
    assert zero["image_hw"] == [5, 0]
    assert "width 0" in zero["error"]
    assert "whole numbers" in fraction["error"]
    assert (small["grid"], small["slice_hw"], small["views"]) == (None, None, 1)


def test_plan_equals_the_golden_sizes_line_by_line(tmp_path, capsys):
    golden = json.loads((GOLDEN / "slices_llava_uhd.json").read_text())
    rows = [dict(zip(golden["columns"], row, strict=True)) for row in golden["rows"]]
    (tmp_path / "sizes.json").write_text(json.dumps([[row["w"], row["h"]] for row in rows]))
    _, out, _ = run("plan", "--sizes", tmp_path / "sizes.json", "--strategy", "llava_uhd", "--json", capsys=capsys)
    lines = [json.loads(line) for line in out.splitlines()]
    assert len(lines) == 2000
    for row, line in zip(rows, lines, strict=True):
        grid = [row["v1_rows"], row["v1_cols"]]
        assert line["grid"] == (grid if any(grid) else None)
        assert line["slice_hw"] == ([row["v1_slice_h"], row["v1_slice_w"]] if any(grid) else None)
        assert line["overview_hw"] == [row["v1_overview_h"], row["v1_overview_w"]]


def test_plan_in_words(capsys):
    status, out, _ = run("plan", "672x1008", "--candidates", capsys=capsys)
    assert status == 0
    assert "672x1008 px (width x height)" in out
    assert "3 x 2 (rows x columns) slices of 336x336 px, overview 266x406 px" in out
    assert "score -0.810930" in out
    _, out, _ = run("plan", "1008x1008", "--candidates", "--json", capsys=capsys)
    ranked = json.loads(out)["candidates"]
    assert [(c["grid"], c["tied"]) for c in ranked[:3]] == [([2, 3], True), ([3, 2], True), ([6, 1], False)]
    _, out, _ = run("plan", "672x1008", "--max-tokens", "200", "--json", capsys=capsys)
    assert json.loads(out)["num_tokens"] <= 200
    _, out, _ = run("plan", "672x1008", "--max-slices", "2", "--json", capsys=capsys)
    assert json.loads(out)["views"] == 3


def test_plan_says_what_is_wrong(page, tmp_path, capsys):
    status, out, _ = run("plan", "nowhere.jpg", "672x1008", capsys=capsys)
    assert status == 3
    assert "'nowhere.jpg' is neither an image file nor a size" in out
    assert "454 tokens" in out
    fails("nothing to plan", "plan", capsys=capsys)
    fails("did you mean", "plan", "10x10", "--strategy", "llava-hd", capsys=capsys)
    (tmp_path / "bad.json").write_text('{"w": 3}')
    fails("JSON list of [width, height]", "plan", "--sizes", tmp_path / "bad.json", capsys=capsys)
    fails("JSON list of [width, height]", "plan", "--sizes", page, capsys=capsys)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no")
    fails("broken.png", "show", tmp_path / "broken.png", "-o", tmp_path / "out.png", capsys=capsys)


def test_layout(page, capsys):
    _, out, _ = run("layout", "672x1008", "--json", capsys=capsys)
    want = ["s0", ",", "s1", "\n", "s2", ",", "s3", "\n", "s4", ",", "s5", "\n", "overview"]
    assert json.loads(out) == want
    _, out, _ = run("layout", page, "--schema", "llava-uhd-paper", "--json", capsys=capsys)
    assert json.loads(out) == want[:-2] + ["overview"]
    _, out, _ = run("layout", "672x1008", "--schema", "minicpm-v-2.6", capsys=capsys)
    assert "334 positions: 320 visual tokens + 14 separators" in out
    assert "</slice>\n<slice>" in out


@pytest.mark.parametrize("strategy", sorted(PRESETS))
@pytest.mark.parametrize("option", ["--strategy", "--schema"])
def test_layout_and_plan_agree(strategy, option, capsys):
    _, out, _ = run("plan", "700x300", option, strategy, "--json", capsys=capsys)
    tokens = json.loads(out)["num_tokens"]
    _, out, _ = run("layout", "700x300", option, strategy, capsys=capsys)
    assert f"{tokens} positions" in out


def test_show_writes_a_picture(page, tmp_path, capsys):
    status, out, _ = run("show", page, "-o", tmp_path / "out.png", "--strategy", "minicpm-v", capsys=capsys)
    assert status == 0
    assert "2 x 2 (rows x columns) slices of 364x546 px" in out
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.width > 900


def test_a_folder_is_no_picture(tmp_path, capsys):
    for command in ("show", "demo", "encode"):
        out = tmp_path / ("t.safetensors" if command == "encode" else "out.png")
        status, _, err = run(command, tmp_path, "-o", out, capsys=capsys)
        assert status == 1
        assert f"{str(tmp_path)!r} is a folder: give an image file\n" in err
        assert not out.exists()


def test_encode_says_loudly_that_it_is_untrained(page, tmp_path, capsys):
    status, out, err = run("encode", page, page, "-o", tmp_path / "t.safetensors", capsys=capsys)
    assert status == 0
    assert "tokens (448, 256)" in out
    assert "UNTRAINED" in err
    with safe_open(tmp_path / "t.safetensors", framework="np") as file:
        assert "UNTRAINED" in file.metadata()["note"]
        assert file.get_tensor("tokens").shape == (896, 256)
        names = [image["name"] for image in json.loads(bytes(file.get_tensor("images")))]
    assert names == [str(page), str(page)]


def test_encode_with_a_saved_encoder(page, tmp_path, capsys):
    from uhd.demo import untrained_encoder

    encoder = untrained_encoder(out_dim=64)
    args = ("encode", page, "-o", tmp_path / "t.safetensors", "--encoder", tmp_path / "encoder")
    encoder.save_pretrained(tmp_path / "encoder")
    status, out, err = run(*args, capsys=capsys)
    assert (status, "UNTRAINED" in err) == (0, True)
    assert "tokens (448, 64)" in out
    encoder.note = ""
    encoder.save_pretrained(tmp_path / "encoder")
    assert run(*args, capsys=capsys)[::2] == (0, "")
    with safe_open(tmp_path / "t.safetensors", framework="np") as file:
        assert "note" not in file.metadata()


def test_commands_take_a_name_with_settings(page, tmp_path, capsys):
    for text, symbols in (("llava-uhd+max-slices=2", "[s0:64]\n[s1:64]\n"), ("minicpm-v+max-slices=1", "<image>")):
        assert symbols in run("layout", page, "--strategy", text, capsys=capsys)[1]
    other = run(
        "layout", "1200x900", "--strategy", "minicpm-v+max-slices=2", "--schema", "minicpm-v-2.5", capsys=capsys
    )
    assert other[0] == 0
    assert other[1].count("<image>[s") == 2
    rules = "llava-uhd-safe+one_view_below=2.5,internvl+max_tiles=3"
    _, out, _ = run("compare", page, "--strategies", "clip,llava-next+grids=[[1,2],[2,1]]", capsys=capsys)
    assert "llava-next+grids=[[1,2],[2,1]]" in out
    rows = run("compare", page, "--strategies", rules, capsys=capsys)[1].splitlines()
    assert [name for name in rules.split(",") if any(name in row for row in rows)] == rules.split(",")
    assert (
        run("show", page, "-o", tmp_path / "cut.png", "--strategy", "llava-uhd+border_moves=2", capsys=capsys)[0] == 0
    )
    fails("not a setting of 'llava-uhd'", "plan", "9x9", "--strategy", "llava-uhd+slices=2", capsys=capsys)


def test_another_strategy_is_fitted_to_a_saved_encoder(page, tmp_path, capsys):
    from uhd.demo import untrained_encoder
    from uhd.slicing import find
    from uhd.token_files import load_tokens

    encoder = untrained_encoder(out_dim=64)
    encoder.check_image_size = False
    encoder.slicing = encoder.slicing.replace(image_size=224)
    encoder.save_pretrained(tmp_path / "encoder")
    out_file = tmp_path / "t.safetensors"
    args = ("encode", page, "-o", out_file, "--encoder", tmp_path / "encoder", "--strategy")
    for name in ("minicpm-v", "llava-next", "siglip"):
        assert run(*args, name, capsys=capsys)[0] == 0
        (found,) = load_tokens(out_file)
        own = find(name).for_vision(image_size=224, patch_size=14).plan(found.plan.image_hw)
        assert {canvas.view_hw for canvas in found.plan.canvases} == {canvas.view_hw for canvas in own.canvases}
    fails("no strategy named", *args, "minicpm-x", capsys=capsys)
    assert run(*args, "llava-uhd+max_slices=2", capsys=capsys)[0] == 0
    fails(
        "image_size is 224 of this encoder, 'llava-uhd+image_size=448' gives 448",
        *args,
        "llava-uhd+image_size=448",
        capsys=capsys,
    )
    encoder.slicing = lambda image_hw: find("clip").plan(image_hw)  # no file holds it, and another takes its place
    encoder.save_pretrained(tmp_path / "encoder")
    assert run(*args, "llava-uhd", capsys=capsys)[0] == 0


def test_encode_goes_on_past_a_bad_image(page, tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"no image")
    out_file = tmp_path / "t.safetensors"
    status, out, err = run("encode", tmp_path / "bad.png", page, "-o", out_file, capsys=capsys)
    assert status == 3
    assert "bad.png" in err
    assert "tokens (448, 256)" in out
    assert out_file.exists()


def test_outputs_are_checked_before_any_work(page, tmp_path, capsys):
    before = page.read_bytes()
    for args, message in (
        (("encode", page, "-o", page), "to a .safetensors file"),
        (("encode", page, "-o", tmp_path / "no" / "t.safetensors"), "there is no folder"),
        (("show", page, "-o", page), "is the image itself"),
        (("show", "672x1008", "-o", tmp_path / "out.png"), "uhd compare takes sizes"),
        (("show", page, "-o", tmp_path / "out.foo"), "names no picture format"),
        (("demo", "-o", tmp_path / "no" / "d.png"), "there is no folder"),
        (("encode", page, "-o", tmp_path / "t.safetensors", "--encoder", tmp_path), "holds no uhd_encoder.json"),
        (("export", tmp_path, "-o", tmp_path / "a.onnx"), "holds no uhd_encoder.json: give a folder"),
    ):
        status, out, err = run(*args, capsys=capsys)
        assert (status, out) == (1, "")
        assert message in err
    assert page.read_bytes() == before


def test_a_damaged_encoder_is_named(page, tmp_path, capsys):
    from uhd.demo import untrained_encoder

    args = ("encode", page, "-o", tmp_path / "t.safetensors", "--encoder", tmp_path / "encoder")
    untrained_encoder().save_pretrained(tmp_path / "encoder")
    weights, config = tmp_path / "encoder" / "model.safetensors", tmp_path / "encoder" / "uhd_encoder.json"
    good = config.read_text()
    for text in ("{", "[]", '{"format": 1}', good.replace('"width": 192', '"breadth": 192')):
        config.write_text(text)
        fails("uhd_encoder.json does not fit or is damaged", *args, capsys=capsys)
    config.write_text(good)
    weights.write_bytes(weights.read_bytes()[:1000])
    fails("model.safetensors does not fit or is damaged", *args, capsys=capsys)


def test_demo_shows_the_whole_way_on_a_photo(tmp_path, capsys):
    Image.fromarray(np.zeros((200, 700, 3), np.uint8)).save(tmp_path / "in.jpg")
    status, out, _ = run("demo", tmp_path / "in.jpg", "-o", tmp_path / "demo.png", capsys=capsys)
    assert status == 0
    for part in ("1 slice", "2 encode", "3 compress", "4 lay out", "UNTRAINED", "[overview:64]", "(4, 64, 256)"):
        assert part in out
    assert "5 read" not in out
    with Image.open(tmp_path / "demo.png") as picture:
        assert "UNTRAINED" in picture.info["note"]


def test_demo_reads_an_image_drawn_on_the_spot(tmp_path, capsys):
    outs = []
    for seed in (3, 3, 4):
        status, out, _ = run("demo", "--seed", seed, "-o", tmp_path / f"{seed}.png", capsys=capsys)
        assert status == 0
        outs.append([line for line in out.splitlines() if " ms" not in line and "wrote" not in line])
    assert outs[0] == outs[1] != outs[2]
    text = "\n".join(outs[0])
    assert "UNTRAINED" not in text
    assert text.count("% sure a character)   right") + text.count("WRONG, it is") == 3
    assert "all?" in text
    with Image.open(tmp_path / "3.png") as picture:
        assert picture.width > 500


def test_demo_shows_the_same_image_to_the_other_shipped_model(tmp_path, capsys):
    for name, views in (("nano", "5 views"), ("nano-plus", "1 view")):
        status, out, _ = run("demo", "--seed", 3, "--model", name, "-o", tmp_path / "out.png", capsys=capsys)
        assert status == 0
        assert "23x105 px" in out
        assert f"encoder: the shipped {name} model\n" in out
        assert f", {views}\n" in out
        assert out.count("% sure a character)   right") >= 2
    fails("there are nano, nano-plus", "demo", "--model", "nan", "-o", tmp_path / "no.png", capsys=capsys)
    Image.new("L", (40, 30), 240).save(tmp_path / "own.png")
    args = ("demo", tmp_path / "own.png", "--model", "nano-plus", "-o", tmp_path / "out.png")
    status, out, _ = run(*args, capsys=capsys)
    assert (status, out.count("all? "), "1 answer, one character" in out) == (0, 1, True)
    fails("leave --encoder out, or --ask and --model", *args, "--encoder", tmp_path, capsys=capsys)


def test_demo_answers_about_your_own_image_and_says_when_it_is_far_from_it(tmp_path, capsys):
    from uhd.nano.task import scene

    drawn = scene(4_000_000, 2)
    drawn.image.save(tmp_path / "text.png")
    args = ("--ask", "all?", "--ask", "line 1?", "-o", tmp_path / "out.png")
    status, out, _ = run("demo", tmp_path / "text.png", *args, capsys=capsys)
    assert (status, "far from" in out, "repainted" in out) == (0, False, False)
    assert f"{drawn.text.splitlines()[0]!r}" in out
    Image.merge(
        "RGB", [drawn.image.point(level) for level in (lambda v: 255 - v, lambda v: 250 - v, lambda v: 90)]
    ).save(tmp_path / "light.png")
    status, out, _ = run("demo", tmp_path / "light.png", *args, capsys=capsys)
    assert (status, "far from" in out, "two colours are repainted" in out) == (0, False, True)
    assert f"{drawn.text.splitlines()[0]!r}" in out
    Image.fromarray(np.zeros((200, 700, 3), np.uint8)).save(tmp_path / "dark.jpg")
    args = ("--ask", "what is it?", "-o", tmp_path / "out.png")
    status, out, _ = run("demo", tmp_path / "dark.jpg", *args, capsys=capsys)
    assert status == 0
    assert "far from what it knows: 700x200 px" in out
    assert "the question 'what is it?' has none of the forms" in out


def test_demo_refuses_what_does_not_go_together(tmp_path, capsys):
    args = (tmp_path / "x.png", "--seed", 3, "-o", tmp_path / "out.png")
    fails("--seed is of the image drawn on the spot", "demo", *args, capsys=capsys)
    args = ("--ask", "all?", "--encoder", tmp_path, "-o", tmp_path / "out.png")
    fails("leave --encoder out", "demo", *args, capsys=capsys)
    fails("seed must be at least 0, got -1", "demo", "--seed", -1, "-o", tmp_path / "out.png", capsys=capsys)
    status, out, err = run("demo", "--ask", "all?", "--ask", "", "-o", tmp_path / "out.png", capsys=capsys)
    assert (status, out, "a question is empty" in err) == (1, "", True)
    assert not list(tmp_path.iterdir())  # nothing was begun


def test_demo_says_which_answer_is_doubtful(tmp_path, capsys):
    from uhd.nano.task import scene

    scene(4_000_000, 2).image.save(tmp_path / "text.png")
    args = ("--ask", "line 1?", "--ask", "line 4?", "-o", tmp_path / "out.png")
    status, out, _ = run("demo", tmp_path / "text.png", *args, capsys=capsys)
    lines = out.splitlines()
    place = next(number for number, line in enumerate(lines) if "line 4?" in line)
    assert (status, "line 1?" in lines[place - 1]) == (0, True)
    assert "doubtful: 'line 4?': it reads 3 lines in all" in lines[place + 1]
    assert out.count("doubtful") == 1
    assert "far from" not in out


def piped(path, content):
    """A picture that comes through a pipe: it can be read once."""
    os.mkfifo(path)
    threading.Thread(target=path.write_bytes, args=(content,)).start()
    return path


def test_every_command_reads_pipes(page, tmp_path, capsys):
    content = page.read_bytes()
    for number, (command, *rest) in enumerate(
        (
            ("plan", "--json"),
            ("layout", "--json"),
            ("show", "-o", tmp_path / "out.png"),
            ("compare", "--strategies", "clip"),
            ("compare", "--strategies", "clip", "--html", tmp_path / "out.html"),
            ("encode", "-o", tmp_path / "t.safetensors"),
            ("encode", "--video", "-o", tmp_path / "t.safetensors"),
            ("demo", "-o", tmp_path / "demo.png"),
        )
    ):
        outs = []
        for image in (page, piped(tmp_path / f"pipe{number}", content)):
            status, out, err = run(command, image, *rest, capsys=capsys)
            assert status == 0, err
            lines = out.replace(str(image), "IMAGE").replace(image.name, "NAME").splitlines()
            outs.append([line for line in lines if " ms" not in line and line.strip("- ")])
        assert [" ".join(line.split()) for line in outs[0]] == [" ".join(line.split()) for line in outs[1]]


def test_devices_and_pipes_without_end_are_refused(page, tmp_path, capsys):
    status, out, _ = run("plan", "/dev/zero", page, capsys=capsys)
    assert (status, "is a device" in out) == (3, True), out
    fails("is a device", "show", "/dev/zero", "-o", page.with_name("o.png"), capsys=capsys)
    pipe = piped(tmp_path / "pipe", bytes(most_bytes(PixelSettings(max_pixels=1000)) + 1))
    status, out, _ = run("--max-pixels", "1000", "plan", pipe, capsys=capsys)
    assert (status, "bytes" in out) == (1, True), out


def many(tmp_path):
    """Commands of many images."""
    return ("plan",), ("compare", "--strategies", "clip"), ("encode", "-o", tmp_path / "t.safetensors")


def test_status_says_whether_some_failed_or_all(page, tmp_path, capsys):
    for command, *rest in many(tmp_path):
        for inputs, wanted in ((["no.png", page], 3), (["no.png"], 1), (["no.png", "nor.png"], 1), ([page, page], 0)):
            assert run(command, *inputs, *rest, capsys=capsys)[0] == wanted, (command, inputs)


def test_the_first_bad_image_stops_where_asked(page, tmp_path, capsys):
    for command, *rest in many(tmp_path):
        words = f"uhd {command}: no.png: "
        out = fails(words, command, page, "no.png", page, *rest, "--on-error", "stop", capsys=capsys)
        assert out.count("\n") < 40
        assert not (tmp_path / "t.safetensors").exists()


def test_pictures_are_written_in_formats_that_pillow_writes(page, tmp_path, capsys):
    for ending, words in ((".psd", "no picture format that is written"), (".xbm", "RGB"), (".h5", "not installed")):
        fails(f"cannot write {tmp_path / 'o'}{ending}: ", "show", page, "-o", tmp_path / f"o{ending}", capsys=capsys)
        fails(words, "show", page, "-o", tmp_path / f"o{ending}", capsys=capsys)
    for ending in (".JPG", ".webp", ".gif", ".tiff", ".pdf"):
        assert run("show", page, "-o", tmp_path / f"o{ending}", capsys=capsys)[0] == 0
    assert sorted(path.suffix for path in tmp_path.glob("o.*")) == [".JPG", ".gif", ".pdf", ".tiff", ".webp"]


def test_sizes_that_json_cannot_say_again(tmp_path, capsys):
    file = tmp_path / "sizes.json"
    file.write_text("[[NaN, 5], [1e999, -Infinity], [[1], 2], [3, 4]]")
    status, out, _ = run("plan", "--sizes", file, "--json", capsys=capsys)
    lines = [json.loads(line, parse_constant=lambda word: pytest.fail(word)) for line in out.splitlines()]
    assert (status, ["error" in line for line in lines]) == (0, [True, True, True, False])
    file.write_text("[" * 100_000)
    fails("must hold a JSON list of [width, height]", "plan", "--sizes", file, capsys=capsys)


@pytest.mark.parametrize("debug", [False, True])
def test_a_traceback_is_shown_only_where_asked(debug, monkeypatch, capsys):
    def broken(*_):
        raise KeyError("a mistake\n  of ours")

    monkeypatch.setenv("UHD_DEBUG", str(int(debug)))
    monkeypatch.setattr(cli, "_plan", broken)
    status, out, err = run("plan", "10x20", capsys=capsys)
    assert (status, out, "Traceback" in err) == (1, "", debug)
    assert err.endswith(r"uhd plan: KeyError: 'a mistake\n  of ours' (UHD_DEBUG=1 shows where)" + "\n")


def test_a_closed_pipe_is_no_error(monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    assert cli.main(["plan", "10x20"]) == 0


def test_plan_starts_without_torch():
    code = "import sys; from uhd.cli import main; main(['plan', '672x1008']); print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert found.stdout.splitlines()[-1] == "False", found.stderr
