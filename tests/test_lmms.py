"""lmms-eval's own runner, registry and metrics on tasks made here; the model is the shipped one."""

import importlib.metadata
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny import refuses
from uhd.nano import load_nano
from uhd.nano.answer import answer_many
from uhd.nano.build import BEGIN
from uhd.nano.evaluate import EVALUATION_SEED, choose, evaluate, summary
from uhd.nano.task import questions, scene

pytest.importorskip("lmms_eval")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
IMAGES, KINDS = 24, ("all", "line", "right", "count")

READ = """
task: uhd_read
dataset_path: {data}
dataset_kwargs:
  load_from_disk: true
test_split: test
output_type: generate_until
doc_to_visual: !function here.visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  max_new_tokens: 48
  temperature: 0
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
CHOOSE = """
task: uhd_choose
dataset_path: {data}
dataset_kwargs:
  load_from_disk: true
test_split: test
output_type: multiple_choice
doc_to_visual: !function here.visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{target}}}}"
doc_to_choice: "{{{{choices}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def registry():
    """Theirs, with what our entry point gives."""

    from lmms_eval.models import MODEL_REGISTRY_V2

    told, group = (Path(__file__).parent.parent / "pyproject.toml").read_text(), "lmms_eval.models"
    name, value = re.search(rf'entry-points."{group}"\]\n(\w+) = "(.+)"', told).groups()
    MODEL_REGISTRY_V2.register_manifest(importlib.metadata.EntryPoint(name, value, group).load()(), overwrite=True)
    return MODEL_REGISTRY_V2


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Their task manager over a folder with two tasks on the scenes of the model's own evaluation."""
    import datasets
    from lmms_eval.tasks import TaskManager

    root, rows = tmp_path_factory.mktemp("tasks"), []
    for index in range(IMAGES):
        drawn = scene(EVALUATION_SEED, index)
        for question in choose(questions(drawn), KINDS, (EVALUATION_SEED, index)):
            wrong = "0" if question.answer != "0" else "X"
            choices = [question.answer, wrong] if index % 2 else [wrong, question.answer]
            told = {"question": question.text, "answer": question.answer, "kind": question.kind}
            rows.append({"image": drawn.image, **told, "choices": choices, "target": choices.index(question.answer)})
    datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)}).save_to_disk(str(root / "data"))
    (root / "here.py").write_text("def visual(doc):\n    return [doc['image']]\n")
    (root / "read.yaml").write_text(READ.format(data=root / "data"))
    (root / "choose.yaml").write_text(CHOOSE.format(data=root / "data"))
    return TaskManager("ERROR", include_path=str(root), include_defaults=False)


def run(tasks, name, **how):
    from lmms_eval.evaluator import simple_evaluate

    told = {"model": "uhd", "model_args": "pretrained=nano", "batch_size": 8, "bootstrap_iters": 0, **how}
    return simple_evaluate(tasks=[name], task_manager=tasks, **told)


def test_their_runner_gives_the_number_that_the_models_own_evaluation_gives(registry, tasks):
    found = run(tasks, "uhd_read")
    items = evaluate(load_nano(), images=IMAGES, kinds=KINDS)  # what `python -m uhd.nano` runs
    ours = sum(item.exact for item in items) / len(items)
    assert 0.5 < ours < 1
    assert found["results"]["uhd_read"]["exact_match,none"] == pytest.approx(ours, abs=1e-9)
    samples = sorted(found["samples"]["uhd_read"], key=lambda sample: sample["doc_id"])
    said = [sample["filtered_resps"][0] for sample in samples]
    assert said == [item.answer for item in items]
    assert summary(items)["right"]["exact"] == np.mean([item.exact for item in items if item.kind == "right"])


def test_continuations_are_chosen_by_likelihood(registry, tasks):
    found = run(tasks, "uhd_choose", force_simple=True)
    assert found["results"]["uhd_choose"]["acc,none"] > 0.9
    again = run(tasks, "uhd_read", force_simple=True, limit=8)
    chat = run(tasks, "uhd_read", limit=8)
    name = "exact_match,none"
    assert again["results"]["uhd_read"][name] == chat["results"]["uhd_read"][name]


class Request:
    """Of lmms-eval's, with arguments only."""

    def __init__(self, *args):
        self.args = args


@pytest.fixture(scope="module")
def model(registry):
    found = registry.get_model_class("uhd")(pretrained="nano", batch_size=2, videos="images")
    images = [scene(EVALUATION_SEED, index).image for index in range(3)]
    found.task_dict = {"t": {"s": images}}
    return found


def asks(question, *, until=(), shown=lambda image: [image]):
    """A request's arguments but for the document's number."""

    def messages(image):
        parts = [{"type": "image", "url": each} for each in shown(image)]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]

    return "", messages, {"max_new_tokens": 48, "until": list(until)}


def test_batches_of_other_settings_keep_their_order_and_end_where_a_task_says(model):
    images = model.task_dict["t"]["s"]
    ((read, _),) = answer_many(model.model, images[2:], [["all?"]])[0]
    told = [(asks("all?"), 0), (asks("count?"), 1), (asks("all?", until=["nothing", read[1]]), 2), (asks("all?"), 2)]
    found = model.generate_until([Request(*args, doc, "t", "s") for args, doc in told])
    (a,), (b,), (c,) = answer_many(model.model, images, [["all?"], ["count?"], ["all?"]])
    assert found == [a[0], b[0], read.split(read[1])[0], c[0]]


def test_several_images_text_alone_and_frames_reach_the_model(model):
    images = model.task_dict["t"]["s"]
    two = model.generate_until([Request(*asks("all?", shown=lambda image: [image, images[1]]), 0, "t", "s")])
    alone = model.generate_until([Request(*asks("all?", shown=lambda image: []), 0, "t", "s")])
    frames = [np.asarray(each.convert("RGB")) for each in (images[0], images[1])]
    content = [{"type": "video", "url": frames}, {"type": "text", "text": "all?"}]
    args = ("", lambda doc: [{"role": "user", "content": content}], {"max_new_tokens": 48})
    assert model.generate_until([Request(*args, 0, "t", "s")]) == two
    assert alone != two
    model.videos = "video"
    try:
        refuses("2 frames of the sizes", model.generate_until, [Request(*args, 0, "t", "s")])
        same = frames[0], frames[0]
        content[0]["url"] = list(same)
        (read,) = model.generate_until([Request(*args, 0, "t", "s")])
        inputs = model.processor(text=[f"{BEGIN}{model.processor.video_token}\nall?"], videos=[[list(same)]])
        out = model.model.generate(**inputs, do_sample=False, max_new_tokens=48)
        new = out[0, inputs["input_ids"].shape[1] :]
        assert read == model.processor.tokenizer.decode(new, skip_special_tokens=True)
    finally:
        model.videos = "images"


def test_a_likelihood_is_that_of_the_tokens_in_turn(model):
    image = model.task_dict["t"]["s"][0]
    found = model.loglikelihood([Request("all?", "4T\nX", lambda doc: [doc], 0, "t", "s")])
    inputs = model.processor(text=["<begin><image>all?4T\nX"], images=[[image]])
    with torch.inference_mode():
        logits = model.model(**inputs).logits[0].log_softmax(-1)
    ids = inputs["input_ids"][0]
    expected = -sum(float(logits[place - 1, ids[place]]) for place in range(len(ids) - 4, len(ids)))
    assert found[0].text[0] == pytest.approx(expected, abs=1e-4)
    (said,) = model.generate_until([Request(*asks("all?"), 0, "t", "s")])
    greedy = model.loglikelihood([Request("all?", said, lambda doc: [doc], 0, "t", "s")])
    assert greedy[0].text[1]
    assert greedy[0].text[0] < found[0].text[0]
    assert model.loglikelihood([Request("", "A")])[0].text[0] > 0


def test_what_cannot_be_done_is_said(model, registry):
    refuses("videos is 'video' or 'images'", registry.get_model_class("uhd"), pretrained="nano", videos="x")
    refuses("is no folder with a saved model", registry.get_model_class("uhd"), pretrained="/none")
    audio = ("", lambda doc: [{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}], {})
    refuses("audio", model.generate_until, [Request(*audio, 0, "t", "s")])
    refuses("several rounds", model.generate_until_multi_round, [], error=NotImplementedError)
