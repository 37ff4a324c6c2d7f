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
from uhd.nano.answer import answer_many, image_doubts, question_doubts
from uhd.nano.evaluate import Item, edit_distance, evaluate, interval, summary, table
from uhd.nano.task import LEARNED, TaskSettings, questions, scene

FRESH = 4_000_000  # a seed that neither training nor the card's numbers use


@pytest.fixture(scope="module")
def nano():
    return uhd.load_nano()


def test_it_reads_fresh_images_at_every_aspect(nano):
    items = evaluate(nano, images=160, seed=FRESH, kinds=("all", "line", "right"))
    found = summary(items)
    # far below the card's numbers, so that rounding on another machine is no failure
    assert found["right"]["exact"] > 0.93
    assert found["line"]["exact"] > 0.85
    assert found["all"]["exact"] > 0.75
    assert found["all"]["characters"] > 0.95
    assert all(share > 0.75 for share in found["right"]["buckets"])


def test_the_weights_are_small_and_half_precision_and_load_in_float32(nano):
    folder = resources.files("uhd") / "assets" / "nano"
    assert len((folder / "model.safetensors").read_bytes()) <= 4_000_000
    assert {p.dtype for p in nano.parameters()} == {torch.float32}
    half = uhd.load_nano(dtype=torch.float16)
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    assert not nano.training
    assert "learned" in (folder / "README.md").read_text()


def test_it_is_a_model_of_transformers(nano, tmp_path):
    drawn = scene(FRESH, 1)
    batch = nano.processor(text="<begin><image>all?", images=drawn.image)
    wanted = nano.generate(**batch, max_new_tokens=30, do_sample=False)
    nano.save_pretrained(tmp_path)
    again = uhd.UHDForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again.generate(**batch, max_new_tokens=30, do_sample=False), wanted)
    chat = [{"role": "user", "content": [{"type": "image", "image": drawn.image}, {"type": "text", "text": "all?"}]}]
    templated = nano.processor.apply_chat_template(
        chat, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    assert torch.equal(templated["input_ids"], batch["input_ids"])


def test_answers_do_not_depend_on_what_is_asked_beside_them(nano):
    scenes = [scene(FRESH, index) for index in range(6)]
    asked = [[some[0].text for some in questions(item).values() if some] for item in scenes]
    together = answer_many(nano, [item.image for item in scenes], asked)
    for item, some, found in zip(scenes, asked, together, strict=True):
        alone = ask(nano, item.image, some)
        assert [answer.text for answer in alone] == [text for text, _ in found]
        for answer, (_, confidence) in zip(alone, found, strict=True):
            assert answer.confidence == pytest.approx(confidence, abs=1e-3)


def test_scenes_of_the_task_raise_no_doubts_of_the_image():
    assert [index for index in range(200) if image_doubts(scene(FRESH, index).image)] == []


def test_other_settings_than_those_of_training_do_not_crash(nano):
    for changes in ({"area": (5000, 9000), "max_words": 20}, {"max_aspect": 14.0}, {"inverted": 1.0}):
        drawn = scene(FRESH, 3, replace(TaskSettings(), **changes))
        (answer,) = ask(nano, drawn.image, ["all?"])
        assert 0 < answer.confidence <= 1


def noise(height, width):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "image",
    [
        Image.new("L", (40, 50), 230),
        noise(45, 60),
        noise(300, 400),
        Image.new("RGB", (1, 900), (240, 240, 240)),
        Image.new("RGB", (900, 1), (0, 0, 0)),
        Image.new("L", (1, 1), 255),
        Image.new("RGB", (10_000, 5_000), (250, 250, 250)),
        Image.new("RGBA", (50, 40), (0, 0, 0, 0)),
        Image.new("L", (50, 40), 20),
    ],
    ids=["empty", "noise", "photo-like", "strip", "black strip", "one pixel", "50 MP", "transparent", "dark"],
)
def test_what_is_no_text_is_marked(nano, image):
    answers = ask(nano, image, ["all?", "count?"])
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


def test_wrong_arguments_are_told(nano):
    with pytest.raises(TypeError, match="questions is a list of strings, got the string 'all\\?'"):
        ask(nano, Image.new("L", (40, 50), 230), "all?")
    with pytest.raises(ValueError, match="a question is empty"):
        ask(nano, Image.new("L", (40, 50), 230), ["all?", " "])


@pytest.mark.parametrize(
    ("one", "other", "distance"), [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("A B\nC", "AB\nD", 2)]
)
def test_edit_distance(one, other, distance):
    assert edit_distance(one, other) == edit_distance(other, one) == distance


def test_the_interval_holds_the_share_and_shrinks():
    low, high = interval(90, 100)
    assert low == pytest.approx(0.8256, abs=1e-3)  # Wilson's, from the textbook formula by hand
    assert high == pytest.approx(0.9448, abs=1e-3)
    assert interval(0, 50)[0] == pytest.approx(0, abs=1e-12)
    assert interval(900, 1000)[0] > low
    assert interval(0, 0) == (0.0, 1.0)


def test_the_summary_counts_by_kind_and_bucket():
    items = [
        Item(0, 0, "all", "all?", "AB", "AB", 1.0),
        Item(1, 3, "all", "all?", "ABCD", "ABC", 1.0),
        Item(1, 3, "right", "right A?", "B", "B", 1.0),
    ]
    found = summary(items)
    assert found["all"]["exact"] == 0.5
    assert found["all"]["characters"] == pytest.approx(1 - 1 / 6)
    assert found["all"]["buckets"] == [1.0, None, None, 0.0]
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


def test_the_cards_example_runs(capsys):
    card = (resources.files("uhd") / "assets" / "nano" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() == "True"


@pytest.mark.parametrize(
    ("change", "doubt"),
    [
        (lambda grey: grey + np.linspace(-60, 60, grey.shape[1])[None, :], "uneven ground"),
        (lambda grey: grey - 80, "a ground of"),
        (lambda grey: np.stack([grey, grey - 30, grey], -1), "colours"),
        (lambda grey: np.full_like(grey, 230), "dark px"),
        (lambda grey: np.tile(grey, (3, 3)), "px are"),
        (lambda grey: np.tile(grey[:14], (1, 3)), "aspect ratio"),
    ],
)
def test_each_doubt_of_an_image_has_its_own_cause(change, doubt):
    drawn = next(item for item in (scene(FRESH, n) for n in range(99)) if item.image_hw[1] > 2 * item.image_hw[0])
    assert image_doubts(drawn.image) == ()
    pixels = np.clip(change(np.asarray(drawn.image, float)), 0, 255).astype(np.uint8)
    assert [doubt in found for found in image_doubts(Image.fromarray(pixels))].count(True) == 1
