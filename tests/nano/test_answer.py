"""The shipped model, as users meet it: it reads, says when it should not be trusted, and no image makes it crash."""

import json
from dataclasses import replace
from importlib import resources

import numpy as np
import pytest
import torch
from PIL import Image

import uhd
from uhd.nano import ask
from uhd.nano.__main__ import main
from uhd.nano.answer import SHIPPED, answer_many, question_doubts, reading_doubts
from uhd.nano.evaluate import Item, edit_distance, evaluate, summary, table, wilson
from uhd.nano.images import as_learned, image_doubts
from uhd.nano.task import LEARNED, TaskSettings, questions, scene

FRESH = 4_000_000  # a seed that neither training nor the card's numbers use


@pytest.fixture(scope="module")
def nano():
    return uhd.load_nano()


@pytest.fixture(scope="module", params=SHIPPED)
def shipped(request):
    return request.param, uhd.load_nano(request.param)


def test_it_reads_fresh_images_at_every_aspect(shipped):
    items = evaluate(shipped[1], images=160, seed=FRESH, kinds=("all", "line", "right"))
    found = summary(items)
    # far below the card's numbers, so that rounding on another machine is no failure
    assert found["right"]["exact"] > 0.93
    assert found["line"]["exact"] > 0.85
    assert found["all"]["exact"] > 0.75
    assert found["all"]["characters"] > 0.95
    assert all(share > 0.75 for share in found["right"]["buckets"])


def test_the_weights_are_small_and_half_precision_and_load_in_float32(shipped):
    name, nano = shipped
    folder = resources.files("uhd") / "assets" / name
    assert len((folder / "model.safetensors").read_bytes()) <= 4_000_000
    assert {p.dtype for p in nano.parameters()} == {torch.float32}
    half = uhd.load_nano(name, dtype=torch.float16)
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    drawn = scene(FRESH, 1)
    assert [ask(model, drawn.image, ["all?"])[0].text for model in (nano, half)] == [drawn.text] * 2
    assert not nano.training
    with pytest.raises(ValueError, match="no model 'nono' comes with this package: there are nano, nano-plus"):
        uhd.load_nano("nono")
    assert "learned" in (folder / "README.md").read_text()


def test_it_is_a_model_of_transformers(shipped, tmp_path):
    nano = shipped[1]
    drawn, greedy = scene(FRESH, 1), {"max_new_tokens": 30, "do_sample": False}
    batch = nano.processor(text="<begin><image>all?", images=drawn.image)
    nano.save_pretrained(tmp_path)
    again = uhd.UHDForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again.generate(**batch, **greedy), nano.generate(**batch, **greedy))
    chat = [{"role": "user", "content": [{"type": "image", "image": drawn.image}, {"type": "text", "text": "all?"}]}]
    templated = nano.processor.apply_chat_template(
        chat, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    assert torch.equal(templated["input_ids"], batch["input_ids"])


def test_answers_do_not_depend_on_what_is_asked_beside_them(shipped):
    nano = shipped[1]
    scenes = [scene(FRESH, index) for index in range(6)]
    asked = [[some[0].text for some in questions(item).values() if some] for item in scenes]
    together = answer_many(nano, [item.image for item in scenes], asked)
    for item, some, found in zip(scenes, asked, together, strict=True):
        alone = ask(nano, item.image, some)
        assert [answer.text for answer in alone] == [text for text, _ in found]
        for answer, (_, confidence) in zip(alone, found, strict=True):
            assert answer.confidence == pytest.approx(confidence, abs=1e-3)


def test_scenes_of_the_task_raise_no_doubts_and_are_shown_as_they_are():
    images = [scene(FRESH, index).image for index in range(200)]
    assert [index for index, image in enumerate(images) if image_doubts(image)] == []
    assert all(as_learned(image) is image for image in images)


GROUNDS = {  # colours of ground and text
    "light on dark": ((20, 20, 20), (235, 235, 235)),
    "yellow on blue": ((20, 40, 140), (250, 220, 60)),
    "red on green": ((40, 150, 60), (220, 30, 40)),
    "pale": ((230, 230, 230), (175, 175, 175)),
    "grey on black": ((0, 0, 0), (110, 110, 110)),
}


def in_colours(image, ground, text):
    grey = np.asarray(image, np.float32)[..., None]
    ink = (np.median(grey) - grey) / (np.median(grey) - grey.min())
    pixels = np.asarray(ground) + (np.asarray(text, np.float32) - ground) * ink
    return Image.fromarray(np.rint(pixels.clip(0, 255)).astype(np.uint8))


@pytest.mark.parametrize("name", GROUNDS)
def test_text_of_another_colour_is_read_like_dark_text(nano, name):
    drawn = [scene(FRESH, index) for index in range(12)]
    painted = [in_colours(item.image, *GROUNDS[name]) for item in drawn]
    for image in painted:
        assert image_doubts(image)
        shown = as_learned(image)
        assert (shown.mode, shown.size, image_doubts(shown)) == ("L", image.size, ())
    right, as_drawn = (
        sum(ask(nano, image, ["all?"])[0].text == item.text for image, item in zip(images, drawn, strict=True))
        for images in (painted, [item.image for item in drawn])
    )
    assert right >= as_drawn - 2


def test_what_has_not_two_colours_is_not_repainted():
    dark = np.asarray(in_colours(scene(FRESH, 0).image, *GROUNDS["yellow on blue"]))
    three = dark.copy()
    three[:, : three.shape[1] // 2] = three[:, : three.shape[1] // 2, ::-1]  # the ground too
    texts = dark.copy()
    half = texts[:, : texts.shape[1] // 2]
    half[half[..., 0] > 100] = (250, 30, 250)
    large = np.tile(dark, (20, 20, 1))
    for pixels in (three, texts, large, np.full_like(dark, 20), np.asarray(noise(45, 60))):
        image = Image.fromarray(pixels)
        assert as_learned(image) is image
        assert image_doubts(image)


def test_other_settings_than_those_of_training_do_not_crash(nano):
    for changes in ({"area": (5000, 9000), "max_words": 20}, {"max_aspect": 14.0}, {"inverted": 1.0}):
        drawn = scene(FRESH, 3, replace(TaskSettings(), **changes))
        (answer,) = ask(nano, drawn.image, ["all?"])
        assert 0 < answer.confidence <= 1


def noise(height, width):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


EMPTY = Image.new("L", (40, 50), 230)
NO_TEXT = {
    "empty": EMPTY,
    "noise": noise(45, 60),
    "photo-like": noise(300, 400),
    "strip": Image.new("RGB", (1, 900), (240, 240, 240)),
    "black strip": Image.new("RGB", (900, 1), (0, 0, 0)),
    "one pixel": Image.new("L", (1, 1), 255),
    "32 MP": Image.new("RGB", (8_000, 4_000), (250, 250, 250)),
    "transparent": Image.new("RGBA", (50, 40), (0, 0, 0, 0)),
    "dark": Image.new("L", (50, 40), 20),
}


@pytest.mark.parametrize("name", NO_TEXT)
def test_what_is_no_text_is_marked(nano, name):
    answers = ask(nano, NO_TEXT[name], ["all?", "count?"])
    assert all(answer.doubts for answer in answers)
    assert all(isinstance(answer.text, str) for answer in answers)


def test_a_real_photo_is_marked(nano):
    data = pytest.importorskip("skimage.data")
    photo = Image.fromarray(data.astronaut())
    assert any("colours" in doubt for doubt in ask(nano, photo, ["all?"])[0].doubts)
    small = photo.resize((60, 48)).convert("L")
    assert any("uneven ground" in doubt or "ground of" in doubt for doubt in image_doubts(small))


def test_questions_of_another_form_are_marked():
    assert question_doubts("all?") == question_doubts("line 3?") == question_doubts("right K?") == ()
    for question in ("what is it?", "where K?", "right B?", "line 0?", "line 12?", "All?", "all"):
        (doubt,) = question_doubts(question)
        assert repr(question) in doubt
        assert "line 2?" in doubt


def test_questions_that_the_image_cannot_answer_are_marked(nano):
    drawn = scene(FRESH, 2)
    assert drawn.text == "1 H3\nFTC\nT3 6"
    asked = ["line 3?", "right H?", "line 4?", "right K?", "right T?", "right C?"]
    fine, near, *odd = ask(nano, drawn.image, asked)
    assert (fine.text, fine.doubts, near.text, near.doubts) == ("T3 6", (), "3", ())
    wanted = ("reads 3 lines in all", "reads no K in all", "reads 2 T in all", "nothing to the right of C")
    for answer, question, doubt in zip(odd, asked[2:], wanted, strict=True):
        assert [doubt in found and repr(question) in found for found in answer.doubts].count(True) == 1


@pytest.mark.parametrize(
    ("question", "answer", "reading", "doubt"),
    [
        ("line 2?", "A", "A", "it reads 1 line in all"),
        ("line 2?", "", "", "it reads no lines in all"),
        ("line 2?", "7 H", "K3\n7 H", None),
        ("line 2?", "7H", "K3\n7 H", "asked for everything it reads '7 H' there"),
        ("right A?", "7", "1\nFA 7H", None),
        ("right A?", "H", "1\nFA 7H", "asked for everything it reads '7' there"),
        ("right A?", "H", "H\nFA\nH", "it reads nothing to the right of A"),
        ("right A?", "H", "AH A", "it reads 2 A in all"),
        ("right A?", "H", "", "it reads no A in all"),
        ("count?", "3", "K3\n7 H", None),
        ("count?", "4", "K3\n7 H", "asked for everything it reads '3' there"),
        ("all?", "anything", "K3", None),
        ("who?", "me", "K3", None),
    ],
)
def test_answers_are_held_against_the_whole_reading(question, answer, reading, doubt):
    found = reading_doubts(question, answer, reading)
    assert len(found) == (doubt is not None)
    assert all(repr(question) in told and doubt in told for told in found)


def test_glyphs_that_it_never_learned_are_mostly_marked_and_its_own_are_not(nano):
    settings = [TaskSettings(), replace(TaskSettings(), glyphs="BDGIJMNOQRSUVWYZ")]
    own, other = ([ask(nano, scene(FRESH, n, one).image, ["count?"])[0] for n in range(12)] for one in settings)
    assert sum(bool(answer.doubts) for answer in own) <= 3
    assert sum(any("asked for everything" in doubt for doubt in answer.doubts) for answer in other) >= 7


def test_an_answer_that_was_cut_off_is_marked(nano, monkeypatch):
    drawn = scene(FRESH, 2)
    monkeypatch.setattr("uhd.nano.answer.MAX_ANSWER", 6)
    everything, line = ask(nano, drawn.image, ["all?", "line 1?"])
    assert (everything.text, line.text) == (drawn.text[:6], "1 H3")
    assert "cut off after 6 characters" in everything.doubts
    assert not any("cut off" in doubt for doubt in line.doubts)


def test_low_confidence_is_told_once(nano):
    everything, other = ask(nano, noise(40, 50), ["all?", "line 1?"])
    assert min(everything.confidence, other.confidence) < 0.8
    assert ["unsure" in doubt for doubt in everything.doubts].count(True) == 1
    assert any(doubt.startswith("unsure: ") for doubt in other.doubts) == (other.confidence < 0.8)


def test_the_same_question_twice_has_two_answers_and_none_has_none(nano):
    drawn = scene(FRESH, 2)
    one, two, three = ask(nano, drawn.image, ("line 3?", "all?", "line 3?"))
    assert one == three
    assert (one.text, two.text) == ("T3 6", drawn.text)
    assert ask(nano, drawn.image, []) == []


@pytest.mark.parametrize(
    ("image", "questions", "error", "problem"),
    [
        *(
            (EMPTY, bad, TypeError, "is a list of strings, got")
            for bad in ("all?", None, [3], b"all?", iter(["all?"]))
        ),
        (EMPTY, ["all?", " "], ValueError, "a question is empty"),
        (EMPTY, ["all?", "all?<image>"], ValueError, "holds <image>"),
        (EMPTY, ["all?", "<end>"], ValueError, "holds <end>"),
        (Image.new("L", (0, 5)), ["all?"], ValueError, "5x0 px"),
    ],
)
def test_what_cannot_be_asked_is_told(nano, image, questions, error, problem):
    with pytest.raises(error, match=problem):
        ask(nano, image, questions)


@pytest.mark.parametrize(
    ("one", "other", "distance"), [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("A B\nC", "AB\nD", 2)]
)
def test_edit_distance(one, other, distance):
    assert edit_distance(one, other) == edit_distance(other, one) == distance


def test_the_interval_holds_the_share_and_shrinks():
    low, high = wilson(90, 100)
    assert low == pytest.approx(0.8256, abs=1e-3)  # Wilson's, from the textbook formula by hand
    assert high == pytest.approx(0.9448, abs=1e-3)
    assert wilson(0, 50)[0] == pytest.approx(0, abs=1e-12)
    assert wilson(900, 1000)[0] > low
    assert wilson(0, 0) == (0.0, 1.0)


def test_the_summary_counts_by_kind_and_bucket():
    items = [
        Item(0, 0, "all", "all?", "AB", "AB", 1.0),
        Item(1, 3, "all", "all?", "ABCD", "ABC", 1.0),
        Item(1, 3, "right", "right A?", "B", "B", 1.0),
    ]
    found = summary(items)
    every = found["all"]
    assert (every["exact"], every["buckets"]) == (0.5, [1.0, None, None, 0.0])
    assert every["characters"] == pytest.approx(1 - 1 / 6)
    assert found["right"]["items"] == 1
    assert "0.500" in table(found)


def test_it_is_measured_by_one_command(tmp_path, capsys):
    main(["--images", "12", "--seed", str(FRESH), "--json", str(tmp_path / "out.json")])
    printed = capsys.readouterr().out
    assert all(kind in printed for kind in LEARNED)
    assert "where" not in printed
    saved = json.loads((tmp_path / "out.json").read_text())
    assert len(saved["items"]) >= 42
    assert saved["summary"]["all"]["items"] == 12


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (("--images", "0"), "--images must be at least 1"),
        (("--seed", "-1"), "--seed must be at least 0"),
        (("--model", "nowhere"), "nowhere is no folder with a saved model"),
        (("--kinds", "zoom"), "invalid choice: 'zoom'"),
    ],
)
def test_the_command_says_what_is_wrong_before_any_work(args, problem, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*args])
    assert stopped.value.code == 2
    assert problem in capsys.readouterr().err


def test_the_command_refuses_a_place_that_cannot_be_written_before_any_work(tmp_path, capsys):
    for place, problem in (("nowhere/out.json", "there is no folder nowhere"), (str(tmp_path), "it is a folder")):
        assert main(["--json", place]) == 1
        assert f"cannot write {place}: {problem}" in capsys.readouterr().err


def test_the_command_says_when_images_may_have_been_trained_on_and_counts_none_twice(tmp_path, capsys):
    assert main(["--images", "2", "--seed", "5", "--kinds", "all", "all", "--json", str(tmp_path / "out.json")]) == 0
    assert "seeds below 1000003 are for training" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out.json").read_text())["items"]) == 2
    (tmp_path / "config.json").write_text("{}")
    assert main(["--images", "2", "--model", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("python -m uhd.nano: ")


def test_kinds_that_there_are_not_are_refused(nano):
    for kinds in (("all", "all"), ("zoom",)):
        with pytest.raises(ValueError, match="kinds must be different ones of all, line"):
            evaluate(nano, images=1, kinds=kinds)


def card(name):
    return (resources.files("uhd") / "assets" / name / "README.md").read_text()


def test_the_cards_sizes_are_those_of_the_model(shipped):
    name, nano = shipped
    told = [row.split("|")[-2].strip() for row in card(name).splitlines() if row.startswith("|")]
    parts = (nano.visual.vision, nano.visual.compressor, nano.language_model)
    sizes = [sum(p.numel() for p in part.parameters()) for part in parts]
    assert [told[2 + n] for n in (1, 2, 4)] == [f"{size / 1000:.0f} k" for size in sizes]
    assert f"of {sum(sizes) / 1e6:.2f} million parameters" in card(name)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_cards_example_runs(name, capsys):
    code = card(name).split("```python\n")[1].split("```")[0]
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() == "True"


@pytest.mark.parametrize(
    ("change", "doubt"),
    [
        (lambda grey: grey + np.linspace(-60, 60, grey.shape[1])[None, :], "uneven ground"),
        (lambda grey: grey - 80, "a ground of"),
        (lambda grey: np.stack([grey, grey - 30, grey], -1), "colours"),
        (lambda grey: np.full_like(grey, 230), "dark px"),
        (lambda grey: np.where(np.indices(grey.shape).max(0) < 10, 20, grey), "thicker than"),
        (lambda grey: np.tile(grey, (3, 3)), "px are"),
        (lambda grey: np.tile(grey[:14], (1, 3)), "aspect ratio"),
    ],
)
def test_each_doubt_of_an_image_has_its_own_cause(change, doubt):
    drawn = next(item for item in (scene(FRESH, n) for n in range(99)) if item.image_hw[1] > 2 * item.image_hw[0])
    assert image_doubts(drawn.image) == ()
    pixels = np.clip(change(np.asarray(drawn.image, float)), 0, 255).astype(np.uint8)
    assert [doubt in found for found in image_doubts(Image.fromarray(pixels))].count(True) == 1
