"""The training example: supervision by hand, questions that do not see each other, resuming, data in any process."""

import json
import pathlib
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from uhd import UHDForConditionalGeneration, load_nano
from uhd.nano.answer import SHIPPED
from uhd.nano.build import NanoConfig, build_nano
from uhd.nano.evaluate import EVALUATION_SEED
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
        for name in ("data", "stages", "train", "ship", "beyond"):
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
    how = {"attention_mask": hidden, "position_ids": batch.position_ids, "image_tokens": encoded}
    with torch.no_grad():
        together = model(input_ids=batch.input_ids, **how).logits
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


def steps_of(log):
    return [json.loads(line)["step"] for line in log.read_text().splitlines()]


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
    begun = build_nano(SMALL, seed=1).state_dict()
    changed = [name for name, tensor in begun.items() if not torch.equal(tensor, ends[0][name])]
    assert all(n.startswith(stage.modules) for n in changed)
    assert len(changed) > 5
    for weight, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][weight], msg=weight)
    assert steps_of(tmp_path / "twice" / f"{name}.jsonl") == [2, 4]


def checkpoint(stages, path, seed):
    """A stage's checkpoint of a model and heads of their own; returns both."""
    torch.manual_seed(seed)
    model, heads = build_nano(SMALL, seed=seed), stages.Supervision(32, 9)
    torch.nn.init.normal_(heads.latent_head.weight)
    stages.save(path, 1, model, heads, [])
    return model.state_dict(), heads.state_dict()


def test_the_joint_stage_has_the_eyes_of_one_stage_and_the_language_of_the_other(parts, tmp_path):
    _, stages = parts
    eyes, heads = checkpoint(stages, tmp_path / "vision.pt", 5)
    language, _ = checkpoint(stages, tmp_path / "text.pt", 6)
    model, supervision = build_nano(SMALL, seed=7), stages.Supervision(32, 9)
    stages.start_joint(tmp_path, model, supervision)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, (eyes if name.startswith("visual.") else language)[name]), name
    assert not torch.equal(eyes["visual.compressor.query"], language["visual.compressor.query"])
    assert all(torch.equal(tensor, heads[name]) for name, tensor in supervision.state_dict().items())


def test_polish_begins_with_all_that_the_joint_stage_learned(parts, train, tmp_path):
    _, stages = parts
    wanted, heads = checkpoint(stages, tmp_path / "joint.pt", 8)
    model, supervision = train.begin(tmp_path, "polish", seed=9)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, heads[name]) for name, tensor in supervision.state_dict().items())


def test_the_text_stage_reads_codes_with_noise(parts, model):
    data, stages = parts
    batch = next(iter(make_data(data, model)))
    supervision = stages.Supervision(32, 9)

    def loss(noise, seed):
        stage = stages.Stage(name="text", steps=1, noise=noise)
        with torch.no_grad():
            return stages.losses(model, supervision, stage, batch, torch.Generator().manual_seed(seed))[0].item()

    assert loss(0.0, 1) == loss(0.0, 2)
    assert len({loss(0.0, 1), loss(0.7, 1), loss(0.7, 2)}) == 3


def test_every_seed_and_stage_has_scenes_of_its_own(parts, tmp_path, monkeypatch):
    _, stages = parts
    seeds, data = [], stages.NanoData

    def make(model, *, seed, **kwargs):
        seeds.append(seed)
        return data(model, seed=seed, **kwargs)

    monkeypatch.setattr(stages, "NanoData", make)
    for seed in (0, 3):
        for name in stages.STAGES:
            (tmp_path / str(seed)).mkdir(exist_ok=True)
            stage = stages.Stage(name=name, steps=1, batch_size=1)
            stages.train(build_nano(SMALL), stages.Supervision(32, 9), stage, tmp_path / str(seed), seed=seed)
    assert seeds == [0, 1, 2, 3, 30, 31, 32, 33]


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


@pytest.fixture
def train(parts, monkeypatch):
    """The script, with a small model and steps of two images."""
    import train as script

    small = {name: replace(stage, batch_size=2) for name, stage in script.RECIPE.items()}
    monkeypatch.setattr(script, "RECIPE", small)
    monkeypatch.setattr(script, "NanoConfig", lambda: SMALL)
    monkeypatch.setattr(script, "fit_attention", lambda model: 0.0)
    return script


SHORT = ["--scale", "0.0008", "--images", "2"]  # two steps of vision and text, four of joint, one of polish


def refused(call, arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        call([*map(str, arguments)])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_a_folder_is_trained_to_its_end_and_is_of_one_run(train, tmp_path, capsys):
    folder = tmp_path / "runs" / "a"
    train.main([str(folder), "text", "vision", *SHORT])  # in any order, and in pieces
    train.main([str(folder), *SHORT])
    steps = {name: steps_of(folder / f"{name}.jsonl") for name in train.RECIPE}
    assert steps == {"vision": [2], "text": [2], "joint": [4], "polish": [1]}
    assert set(json.loads((folder / "evaluation.json").read_text())) >= {"all", "line", "count"}
    assert "<svg" in (folder / "curves.svg").read_text()
    assert (folder / "model" / "model.safetensors").exists()
    other = refused(train.main, [folder, *SHORT, "--seed", 1], capsys)
    assert "belongs to another run (seed 0, asked is 1): give another folder" in other
    assert "belongs to another run (steps.vision " in refused(train.main, [folder, "--scale", 0.1], capsys)
    (folder / "run.json").unlink()
    assert "of an unknown run" in refused(train.main, [folder, *SHORT], capsys)


def test_a_rule_is_trained_and_shipped_beside_the_other(parts, train, tmp_path, capsys, monkeypatch):
    import ship

    folder = tmp_path / "plus"
    train.main([str(folder), *SHORT, "--rule", "uhd-plus"])
    assert "belongs to another run (rule uhd-plus, asked is llava-uhd)" in refused(
        train.main, [folder, *SHORT], capsys
    )
    made = UHDForConditionalGeneration.from_pretrained(ship.halved(folder))
    assert made.visual.plan((24, 96)).num_views == 1
    assert made.visual.compressor.config.fitted_position == "direct"
    monkeypatch.setattr(ship, "ASSETS", tmp_path)
    for name in SHIPPED:
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(f"{ship.BEGIN}\n{ship.END}\n")
    ship.main([str(folder), "--images", "2", "--anyway"])
    assert UHDForConditionalGeneration.from_pretrained(tmp_path / "nano-plus").visual.slicing.name == "nano-plus"
    assert [path.name for path in (tmp_path / "nano").iterdir()] == ["README.md"]
    assert not list((tmp_path / "nano-plus").glob("*.py"))
    assert not [path for path in (tmp_path / "nano-plus").glob("*.json") if "auto_map" in path.read_text()]


def test_a_stage_begins_after_those_that_it_needs(train, tmp_path, capsys):
    train.main([str(tmp_path), "vision", *SHORT])
    told = refused(train.main, [tmp_path, "joint", *SHORT], capsys)
    assert "stage text is needed first: it has 0 of 2 steps" in told
    state = torch.load(tmp_path / "vision.pt", weights_only=True)
    torch.save({**state, "step": 1}, tmp_path / "vision.pt")
    assert "stage vision is needed first: it has 1 of 2" in refused(train.main, [tmp_path, "joint", *SHORT], capsys)
    assert "stage joint is needed first" in refused(train.main, [tmp_path, "polish", *SHORT], capsys)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("zoom",), "no stage zoom"),
        (("--seed", -1), "--seed must be 0 to 99999"),
        (("--seed", 100_000), "--seed must be 0 to 99999"),  # 10 * seed + stage: scenes of the evaluation
        (("--scale", 0), "--scale must be above 0"),
        (("--scale", "nan"), "--scale must be above 0"),
        (("--workers", -1), "--workers of at least 0"),
        (("--images", 0), "--images of at least 1"),
    ],
)
def test_training_refuses_what_it_cannot_do_and_leaves_no_folder(train, tmp_path, capsys, arguments, problem):
    assert problem in refused(train.main, [tmp_path / "a", *arguments], capsys)
    assert not (tmp_path / "a").exists()


def test_no_seed_of_training_is_one_of_evaluation(train):
    last = 10 * (train.SEEDS - 1) + len(train.RECIPE) - 1
    assert last < EVALUATION_SEED <= 10 * train.SEEDS + len(train.RECIPE) - 1


def test_a_file_in_place_of_the_folder_is_told(train, tmp_path, capsys):
    (tmp_path / "a").write_text("")
    assert "File exists" in refused(train.main, [tmp_path / "a", "vision"], capsys)


def test_what_reads_badly_is_not_shipped(parts, tmp_path, capsys):
    import ship

    package = tmp_path / "package"
    package.mkdir()
    card = f"before\n{ship.BEGIN}\nold\n{ship.END}\nafter\n"
    (package / "README.md").write_text(card)
    run = ["--images", "2", "--into", str(package)]
    assert "has no trained model" in refused(ship.main, [tmp_path, *run], capsys)
    build_nano(NanoConfig(), seed=1).save_pretrained(tmp_path / "run" / "model")
    with pytest.raises(SystemExit, match="not shipped: right, line, all below"):
        ship.main([str(tmp_path / "run"), *run])
    assert [path.name for path in package.iterdir()] == ["README.md"]
    assert (package / "README.md").read_text() == card
    ship.main([str(tmp_path / "run"), *run, "--anyway"])
    written = (package / "README.md").read_text()
    assert written.startswith(f"before\n{ship.BEGIN}\n\n```\nquestion")
    assert written.endswith(f"2 images of seed 1000003.\n\n{ship.END}\nafter\n")
    weights = load_file(package / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    (package / "README.md").write_text("no marks")
    assert "needs the lines" in refused(ship.main, [tmp_path / "run", *run], capsys)


def test_what_lies_beyond_the_task_is_counted(parts):
    import beyond

    model = load_nano()
    own = beyond.row("own", model, beyond.TASK, lambda image, rng: image, images=8).split()
    small = beyond.row("small", model, beyond.SCENES["small letters"], lambda image, rng: image, images=6).split()
    tinted = beyond.row("tinted", model, beyond.TASK, beyond.two_colours, images=8).split()
    assert own[0] == "own"
    right, marked, missed, _ = map(float, own[1:])
    assert right >= 0.5
    assert right + missed <= 1 <= right + missed + marked + 1e-9
    assert float(small[1]) == 0
    assert float(tinted[1]) >= 0.5
