"""``uhd evaluate``: answers, scores and costs of any rule on own questions, and lines that are wrong."""

import json
import pathlib
import runpy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from tests.tiny import refuses
from uhd import VisualEncoder, cli
from uhd.commands import Stopped
from uhd.evaluation import anls, encoder_with, evaluate, judging, load_model, read_questions
from uhd.evaluation.judging import swapped
from uhd.evaluation.questions import prompt_of
from uhd.evaluation.scores import characters_wrong, paired
from uhd.nano import load_nano
from uhd.nano.answer import SHIPPED, answer_many, ask
from uhd.nano.build import BEGIN, NanoConfig, build_nano
from uhd.nano.task import scene
from uhd.pixels import PixelSettings
from uhd.resampler import MLPProjector

SMALL = NanoConfig(
    width=32, vision_depth=1, vision_heads=2, vision_mlp=32, latent_heads=2, text_depth=1, text_heads=2, text_mlp=32
)

QUESTIONS = ("all?", "line 1?", "count?")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a model, and one with three images and the model's own answers as the truth."""
    root = tmp_path_factory.mktemp("folder")
    model = build_nano(SMALL, seed=3).eval()
    for layer in model.language_model.model.layers:  # untrained, it would say the same of every image
        for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.self_attn.o_proj):
            torch.nn.init.normal_(part.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(root / "model")
    images = [Image.new("L", (157, 26), 240), scene(1, 2).image, scene(1, 3).image.resize((31, 60))]
    lines = []
    (root / "images").mkdir()
    said = answer_many(model, images, [[question] for question in QUESTIONS])
    for number, (image, question, [(answer, _)]) in enumerate(zip(images, QUESTIONS, said, strict=True)):
        image.save(root / "images" / f"{number}.png")
        lines.append({"image": f"{number}.png", "question": question, "answer": answer.strip() or "-"})
    (root / "images" / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def test_any_strategy_is_judged_on_own_images(saved, tmp_path, capsys):
    strategies = ["own", "llava-next", "square-stretch-384"]
    given = [str(saved / "model"), str(saved / "images" / "questions.jsonl"), "--json", str(tmp_path / "rows.json")]
    assert cli.main(["evaluate", *given, "--strategies", ",".join(strategies)]) == 0
    told = json.loads((tmp_path / "rows.json").read_text())
    assert (told["model"], told["prompt"], told["max_new_tokens"]) == (str(saved / "model"), None, 48)
    rows = {row["strategy"]: row for row in told["strategies"]}
    assert list(rows) == strategies
    assert rows["own"]["to_first"] == [0, None, None]
    for row in rows.values():
        assert row["to_first"][0] == pytest.approx(row["exact"] - 1)
    assert rows["own"]["exact"] == rows["own"]["characters"] == rows["own"]["anls"] == 1
    assert rows["own"]["images"] == 3
    # 26 x 157 px: 4 slices and an overview, 3 tiles and a base view, one view
    model = load_model(str(saved / "model"))
    for name in strategies:
        encoder = encoder_with(model, name)
        sizes = ((26, 157), scene(1, 2).image_hw, (60, 31))
        assert rows[name]["tokens"] == pytest.approx(np.mean([encoder.plan(hw).num_tokens for hw in sizes]), abs=0.01)
        assert rows[name]["encoder_flops"] > 0
        counted = {"own": 49, "llava-next": 39, "square-stretch-384": 9}
        assert encoder.plan((26, 157)).num_tokens == counted[name]
    assert len({row["answers"][0]["answer"] for row in rows.values()}) == 3  # the model sees what each rule cut
    lines = [json.loads(line) for line in (saved / "images" / "questions.jsonl").read_text().splitlines()]
    for line, answer in zip(lines, rows["own"]["answers"], strict=True):
        assert answer == {
            "image": line["image"],
            "question": line["question"],
            "truth": line["answer"],
            "answer": line["answer"],
        }
    out = capsys.readouterr().out
    assert "llava-next" in out
    assert "TFLOPs" in out
    assert "exact and ANLS minus own's" in out


def test_differences_of_a_folder_count_images_not_questions():
    first, other = [1, 1, 1, 1, 0, 1], [1, 0, 1, 1, 0, 0]
    differences = [0, -1, 0, 0, 0, -1]
    alone = paired(other, first, list("abcdef"))
    half = 2.571 * np.std(differences, ddof=1) / 6**0.5
    assert alone == pytest.approx([-1 / 3, -1 / 3 - half, -1 / 3 + half], abs=1e-3)
    doubled = paired(other * 2, first * 2, list("abcdef") * 2)  # the same again is no evidence
    assert doubled == pytest.approx(alone)
    assert paired(other, first, ["a"] * 6)[1:] == [None, None]
    assert paired([0, 1], [1, 1], ["a", "b"]) == [-0.5, -1, 1]


def test_lines_of_questions_may_hold_any_character(tmp_path):
    Image.new("L", (9, 9)).save(tmp_path / "a.png")
    line = {"image": "a.png", "question": "caf\u00e9\u2028?", "answer": "\u85e4"}
    text = json.dumps(line, ensure_ascii=False) + "\r\n"
    (tmp_path / "questions.jsonl").write_bytes(("\ufeff" + text * 2).encode())  # as some editors write it
    found = read_questions(tmp_path / "questions.jsonl")
    assert [(item.question, *item.answers) for item in found] == [("caf\u00e9\u2028?", "\u85e4")] * 2


def test_swapping_leaves_the_model_as_it_was(saved):
    model = load_model(str(saved / "model"))
    own = model.visual
    with swapped(model, encoder_with(model, "llava-next")):
        assert model.visual is not own
    assert model.visual is own
    assert prompt_of(model, "all?") == f"{BEGIN}<image>all?"
    refuses("a prompt holds", prompt_of, model, "all?", "{question}")


def test_a_rule_that_fits_latents_shares_as_many_as_the_models_own_rule_has():
    model = load_nano()
    plans = [encoder_with(model, rule).plan((24, 90)) for rule in ("own", "uhd-plus")]
    assert [plan.num_views for plan in plans] == [5, 1]
    assert [plan.num_visual_tokens for plan in plans] == [45, 45]
    model = load_nano("nano-plus")
    plans = [encoder_with(model, rule).plan((24, 90)) for rule in ("own", "llava-uhd", "llava-next")]
    assert [plan.num_views for plan in plans] == [1, 5, 4]
    assert [plan.num_visual_tokens for plan in plans] == [45, 44, 4 * 64]  # of a rule of another kind all latents


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_sees_what_ask_shows_it(name, tmp_path, capsys):
    lines = []
    for number in range(6):
        drawn = scene(5_000_000, number)
        ImageOps.invert(drawn.image).save(tmp_path / f"{number}.png")
        lines.append({"image": f"{number}.png", "question": "all?", "answer": drawn.text})
    Image.effect_noise((40, 40), 90).save(tmp_path / "noise.png")
    lines.append({"image": "noise.png", "question": "all?", "answer": "A"})
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = str(tmp_path / "questions.jsonl")
    assert cli.main(["evaluate", name, data, "--json", str(tmp_path / "rows.json")]) == 0
    (row,) = json.loads((tmp_path / "rows.json").read_text())["strategies"]
    said = [answer["answer"] for answer in row["answers"][:6]]
    model = load_nano(name)
    assert said == [ask(model, tmp_path / line["image"], ["all?"])[0].text for line in lines[:6]]
    assert row["exact"] > 0.6
    assert row["images_in_doubt"] == 1
    out = capsys.readouterr().out
    assert f"images unlike what {name} learned from: 1 (" in out
    assert ("--model nano-plus" in out) == (name == "nano-plus")


def test_a_line_that_is_wrong_is_reported_and_the_others_go_on(saved, tmp_path, capsys):
    good = {"image": "a.png", "question": "all?", "answer": ["x" * 99, "3"]}  # one answer that it could give is enough
    Image.new("L", (40, 20), 240).save(tmp_path / "a.png")
    Image.new("L", (4000, 1)).save(tmp_path / "strip.png")
    (tmp_path / "damaged.png").write_text("no image")
    wrong = [
        ('{"image": "a.png", "question": "all?"}', "needs image, question and answer, got {'image': 'a.png'"),
        ("[1, 2]", "needs image, question and answer, got [1, 2]"),
        ('{"image": ', "this is no JSON"),
        (json.dumps({**good, "answer": 3}), "image, question and answer are strings"),
        (json.dumps({**good, "answer": []}), "image, question and answer are strings"),
        (json.dumps({**good, "image": "none.png"}), "there is no image"),
        (json.dumps({**good, "image": "n" * 999}), "there is no image"),
        (json.dumps({**good, "image": "damaged.png"}), "damaged.png' is not an image"),
        (json.dumps({**good, "image": "strip.png"}), "'qwen2-vl' cannot cut strip.png"),
        (json.dumps({**good, "question": f"{BEGIN}all?"}), "the question holds <begin>, a token of the model's own"),
        (json.dumps({**good, "question": "<image>all?"}), "the question holds <image>, a token of the model's own"),
        (json.dumps({**good, "question": "gr\u00f6\u00dfe?"}), "reads the question 'gr\u00f6\u00dfe?' as 'gr??e?'"),
        (json.dumps({**good, "answer": "\u00fc"}), "writes the answer '\u00fc' as '?': it could never be right"),
        (json.dumps({**good, "answer": "3" * 49}), "the answer has 49 tokens, the model may write 48"),
        (
            json.dumps({**good, "question": "A" * 600}),
            "the text has 601 and the answer up to 48: the language model has 512",
        ),
    ]
    file = tmp_path / "data.jsonl"
    command = ["evaluate", str(saved / "model"), str(file), "--strategies", "own,qwen2-vl"]
    file.write_text("\n".join([json.dumps(good), *(line for line, _ in wrong)]), encoding="utf-8")
    assert cli.main([*command, "--json", str(tmp_path / "rows.json")]) == 3
    out, err = capsys.readouterr()
    for number, (_, words) in enumerate(wrong, 2):
        (line,) = [said for said in err.splitlines() if f"data.jsonl, line {number}: " in said]
        assert words in line
    assert f"lines that could not be asked: {len(wrong)} of {len(wrong) + 1}" in out
    told = json.loads((tmp_path / "rows.json").read_text())
    assert told["refused"] == list(range(2, len(wrong) + 2))
    assert [row["questions"] for row in told["strategies"]] == [1, 1]
    for line, words in wrong:
        file.write_text(line, encoding="utf-8")
        assert cli.main(command) == 1
        assert words in capsys.readouterr().err
        file.write_text(f"{json.dumps(good)}\n{line}", encoding="utf-8")
        assert cli.main([*command, "--on-error", "stop"]) == 1
        err = capsys.readouterr().err
        assert "data.jsonl, line 2: " in err
        assert words in err


def test_columns_stay_under_their_heads_beside_long_names(saved):
    questions = read_questions(saved / "images" / "questions.jsonl")
    rules = ["own", "llava-uhd-safe+cut_by=shape+max_slices=3"]
    head, *rows = judging.table(evaluate(load_model(str(saved / "model")), questions, rules)).splitlines()[:3]
    place = head.index(" exact") + len(" exact")
    assert all(row[place - 5 : place].replace(".", "").isdigit() for row in rows)


def test_a_rule_without_room_for_an_image_leaves_it_out_of_all_rules(saved, tmp_path):
    lines = []
    for number, size in enumerate([(30, 20), (300, 20)]):
        Image.new("L", size, 240).save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "question": "all?", "answer": "3"}))
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    model = load_model(str(saved / "model"))
    longest = encoder_with(model, "own").plan((20, 300)).num_tokens
    model.config.text_config.max_position_embeddings = 5 + 48 + longest - 1
    said = []
    rows = evaluate(model, read_questions(tmp_path / "data.jsonl"), refuse=lambda *told: said.append(told))
    assert rows[0]["questions"] == rows[0]["images"] == 1
    assert [line for line, _ in said] == [2]
    assert f"'own' makes {longest} positions of 1.png" in said[0][1]
    refuses("line 2: 'own' makes", evaluate, model, read_questions(tmp_path / "data.jsonl"))


def test_a_command_that_is_wrong_is_refused_before_any_work(saved, tmp_path, capsys):
    def failing(*arguments):
        assert cli.main(["evaluate", *map(str, arguments)]) == 1
        return capsys.readouterr().err

    data, model = saved / "images" / "questions.jsonl", saved / "model"
    assert "there is no" in failing("nano", tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "has no questions" in failing("nano", tmp_path / "empty.jsonl")
    (tmp_path / "bytes.jsonl").write_bytes(b'{"image": "\xff"}')
    assert "bytes.jsonl is not UTF-8: invalid start byte at byte 11" in failing("nano", tmp_path / "bytes.jsonl")
    assert "is no folder with a saved model" in failing(tmp_path, data)
    assert "no strategy named 'llava-nxt'" in failing(model, data, "--strategies", "own,llava-nxt")
    assert "--strategies names none" in failing(model, data, "--strategies", ",")
    assert "must be at least 1, got 0 and 48" in failing(model, data, "--batch-size", 0)
    assert "once each, maybe {bos}, and no other field" in failing(model, data, "--prompt", "{image}{question}{oops}")
    for wrong in ([data], ["--nano", model, data]):
        with pytest.raises(SystemExit, match="^2$"):
            failing(*wrong)
        assert "give a model's folder, or nano" in capsys.readouterr().err
    assert failing(model, data, "--json", tmp_path / "no" / "rows.json")
    asked = data.read_bytes()
    assert "holds the questions" in failing(model, data, "--json", data)
    assert data.read_bytes() == asked
    Image.new("L", (40, 20), 240).save(tmp_path / "a.png")
    (tmp_path / "q.jsonl").write_text(json.dumps({"image": "a.png", "question": "all?", "answer": "3"}))
    assert cli.main(["evaluate", str(model), str(tmp_path / "q.jsonl"), "--max-new-tokens", "1"]) == 0
    assert "own: answers that had not ended: 1 (give --max-new-tokens)" in capsys.readouterr().out


def test_an_interrupt_keeps_what_all_rules_have_answered(saved, tmp_path, capsys, monkeypatch):
    whole, calls = judging.answers, []

    def answers(*args, **how):
        calls.append(1)
        if len(calls) == 4:  # the second rule, of the second image
            raise Stopped
        return whole(*args, **how)

    monkeypatch.setattr(judging, "answers", answers)
    command = ["evaluate", str(saved / "model"), str(saved / "images" / "questions.jsonl"), "--batch-size", "1"]
    told = tmp_path / "rows.json"
    assert cli.main([*command, "--strategies", "own,llava-next", "--json", str(told)]) == 130
    assert "uhd evaluate: interrupted, 1 of 3 questions were asked" in capsys.readouterr().err
    assert [row["questions"] for row in json.loads(told.read_text())["strategies"]] == [1, 1]


def test_parts_of_a_data_set_give_what_the_whole_gives(saved):
    model, asked = load_model(str(saved / "model")), read_questions(saved / "images" / "questions.jsonl")
    whole, parts = (evaluate(model, asked, ["own", "llava-next"], batch_size=size) for size in (16, 1))
    for one, other in zip(whole, parts, strict=True):
        timed = ("seconds", "encoder_flops")
        assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}
        assert one["encoder_flops"] == pytest.approx(other["encoder_flops"], rel=0.02)  # tables of grids


@pytest.mark.parametrize(
    "answer, truths, score",
    [
        ("abcd", ["abcd"], 1),
        (" ABcd", ["abcd "], 1),
        ("abcx", ["abcd", "ab"], 0.75),
        ("axyz", ["abcd"], 0),
        ("", ["a"], 0),
    ],
)
def test_anls_is_the_nearest_truth_and_none_below_a_half(answer, truths, score):
    assert anls(answer, truths) == score


def test_characters_are_those_of_the_nearest_truth():
    assert characters_wrong("abcx", ["xy", "abcd"]) == (1, 4)


def test_a_strategy_that_needs_newlines_the_model_never_learned_is_refused():
    vision = build_nano(SMALL).visual.vision
    pixels = PixelSettings(mean=(0.5,) * 3, std=(0.5,) * 3)
    slicing = SMALL.slicing.replace(tokens_per_view=None)
    encoder = VisualEncoder(vision, MLPProjector(32, 32), slicing=slicing, pixels=pixels)
    with pytest.raises(ValueError, match="cannot take 'llava-next': it needs newlines"):
        encoder_with(SimpleNamespace(visual=encoder), "llava-next")


def test_the_wrapper_for_vlmevalkit_answers_with_a_stand_in_for_its_base(tmp_path, monkeypatch):
    base = SimpleNamespace(BaseModel=type("BaseModel", (), {}))
    for name, module in {"vlmeval": None, "vlmeval.vlm": None, "vlmeval.vlm.base": base}.items():
        monkeypatch.setitem(sys.modules, name, module or SimpleNamespace())
    names = runpy.run_path(str(pathlib.Path(__file__).parent.parent / "examples/vlmevalkit/model.py"))
    drawn = scene(4_000_000, 1)
    drawn.image.save(tmp_path / "drawn.png")
    message = [{"type": "image", "value": str(tmp_path / "drawn.png")}, {"type": "text", "value": "all?"}]
    model = names["UHD"]("nano")
    assert model.generate_inner(message) == drawn.text
    assert isinstance(model.generate_inner(message[1:]), str)
    assert names["UHD"]("nano", "llava-1.5").model.visual.slicing.name != model.model.visual.slicing.name
