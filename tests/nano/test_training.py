"""The training example: supervision by hand, questions that do not see each other, resuming, data in any process."""

import json
import pathlib
import sys

import numpy as np
import pytest
import torch

from uhd.nano.build import NanoConfig, build_nano
from uhd.nano.task import GLYPHS, questions, scene

FOLDER = pathlib.Path(__file__).parents[2] / "examples" / "nano"
SMALL = NanoConfig(width=32, vision_depth=1, vision_heads=2, vision_mlp=32, latent_heads=2, text_depth=1, text_mlp=32)


@pytest.fixture(scope="module")
def parts():
    """The modules ``data`` and ``stages`` of the example."""
    sys.path.insert(0, str(FOLDER))
    try:
        import data
        import stages

        yield data, stages
    finally:
        sys.path.remove(str(FOLDER))
        for name in ("data", "stages", "train"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def model():
    return build_nano(SMALL)


def make_data(data, model, **changes):
    fields = {"seed": 3, "batch_size": 4, "start": 0, "stop": 2, "settings": lambda step: data.TASK}
    return data.NanoData(model, **{**fields, **changes})


def test_codes_name_the_glyph_under_each_latent_and_patch(parts, model):
    data, _ = parts
    drawn = next(item for item in (scene(5, n) for n in range(50)) if model.visual.plan(item.image_hw).grid == (1, 2))
    cut = model.visual.plan(drawn.image_hw)
    latents, patches = data.codes(drawn, cut)
    assert latents.shape == (3 * 9, data.NUM_CODES)
    assert patches.shape == (cut.num_patches, data.KINDS)
    height, width = drawn.image_hw
    latents = latents.view(3, 3, 3, *data.PARTS_HW, data.KINDS)
    for glyph in drawn.glyphs:
        y, x = glyph.centre_hw[0] / height, glyph.centre_hw[1] / width * 2  # of the slices, side by side
        view = int(x)
        cell_y, cell_x = y * 3, (x - view) * 3
        part = int(cell_y % 1 * 2), int(cell_x % 1 * 3)
        assert latents[(view, int(cell_y), int(cell_x), *part, GLYPHS.index(glyph.text))]
    assert latents[:2].sum() == len({(g.centre_hw, g.text) for g in drawn.glyphs})
    assert not latents[:2, ..., -1].any()  # slices are read, the overview only shows that something is there
    assert not latents[2, ..., :-1].any()
    assert latents[2, ..., -1].any()


def test_a_question_among_others_is_answered_as_if_alone(parts, model):
    data, _ = parts
    batch = next(iter(make_data(data, model, batch_size=2)))
    hidden = torch.zeros(batch.seen.shape).masked_fill(~batch.seen, torch.finfo(torch.float32).min)
    encoded = model.visual(batch.images)
    model.eval()
    with torch.no_grad():
        together = model(
            input_ids=batch.input_ids, attention_mask=hidden, position_ids=batch.position_ids, image_tokens=encoded
        ).logits
    ids = model.processor.tokenizer.get_vocab()
    checked = 0
    for row, image in enumerate(encoded):
        start = 1 + image.layout.num_tokens
        places = (batch.position_ids[row] == start).nonzero().flatten().tolist()
        ends = [*places[1:], int((batch.input_ids[row] != ids["<pad>"]).sum())]
        assert len(places) >= 2
        for begin, end in zip(places, ends, strict=True):
            alone = torch.cat([batch.input_ids[row, :start], batch.input_ids[row, begin:end]])[None]
            with torch.no_grad():
                logits = model(input_ids=alone, image_tokens=[image]).logits[0, start:]
            torch.testing.assert_close(together[row, begin:end], logits, atol=2e-5, rtol=1e-4)
            checked += 1
    assert checked >= 4


def test_every_kind_is_asked_where_that_is_wanted(parts):
    data, _ = parts
    drawn = [scene(6, index) for index in range(40)]
    rng = np.random.default_rng(0)
    few = [[question.kind for question in data.choose_questions(item, rng, every=False)] for item in drawn]
    some = [[question.kind for question in data.choose_questions(item, rng, every=True)] for item in drawn]
    assert {len(kinds) for kinds in few} <= {2, 3, 4}
    assert {kind for kinds in few for kind in kinds} == {"all", "line", "right", "where", "count"}
    for item, kinds in zip(drawn, some, strict=True):
        assert kinds == [kind for kind, found in questions(item).items() if found]


def test_labels_are_the_answers(parts, model):
    data, _ = parts
    tokenizer = model.processor.tokenizer
    batch = next(iter(make_data(data, model)))
    for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
        text = tokenizer.decode([i for i in ids.tolist() if i != model.processor.image_token_id])
        told = tokenizer.decode(labels[labels >= 0])
        asked = [part for part in text.replace("<pad>", "").removeprefix("<begin>").split("<end>") if part]
        answers = [part.split("?", 1)[1] for part in asked]
        assert told == "".join(answer + "<end>" for answer in answers)
        assert asked[0].startswith("all?")


@pytest.mark.parametrize("workers", [1, 2])
def test_data_is_the_same_from_any_number_of_processes_and_any_start(parts, model, workers):
    data, _ = parts
    wanted = list(make_data(data, model, stop=11))
    found = list(data.loader(make_data(data, model, start=3, stop=11), workers=workers))
    assert len(found) == 8
    for one, other in zip(wanted[3:], found, strict=True):
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.images.patches, other.images.patches)
        assert torch.equal(one.latent_codes, other.latent_codes)


@pytest.mark.parametrize("name", ["vision", "text", "joint", "polish"])
def test_a_stage_that_was_interrupted_goes_on_as_if_it_was_not(parts, name, tmp_path):
    _, stages = parts
    stage = stages.Stage(name=name, steps=4, batch_size=2, matrix_lr=0.01, other_lr=0.003, warmup=2)
    ends = []
    for folder, stops in ((tmp_path / "once", (None,)), (tmp_path / "twice", (2, None))):
        folder.mkdir()
        for stop in stops:
            model, supervision = build_nano(SMALL, seed=1), stages.Supervision(32, 9)
            stages.train(model, supervision, stage, folder, seed=0, stop=stop, every=2, keep=2)
        ends.append(model.state_dict())
    changed = [
        n for n, tensor in build_nano(SMALL, seed=1).state_dict().items() if not torch.equal(tensor, ends[0][n])
    ]
    assert all(n.startswith(stage.modules) for n in changed)
    assert len(changed) > 5
    for weight, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][weight], msg=weight)
    lines = [json.loads(line) for line in (tmp_path / "twice" / f"{name}.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]


def test_latents_start_by_looking_at_their_own_cells(parts):
    _, stages = parts
    model = build_nano(NanoConfig(width=64))
    begin, end = stages.fit_attention(model, steps=1), stages.fit_attention(model, steps=120)
    assert end < 0.7 * begin


def test_every_question_can_be_written_in_the_models_characters(model):
    ids = model.processor.tokenizer.get_vocab()
    for index in range(30):
        for some in questions(scene(2, index)).values():
            assert all(character in ids for question in some for character in question.text + question.answer)
