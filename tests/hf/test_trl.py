"""TRL's trainers as docs/training.md says to use them: ``pytest -m trl``, in an environment with the extra ``trl``."""

import copy
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTuner
from PIL import Image

from tests.hf.tiny import attach, encoder, language_model
from tests.tiny import noise
from uhd import PackingCollator, UHDForConditionalGeneration

pytestmark = [
    pytest.mark.trl,
    # TRL and PEFT ask transformers for names that it renamed; none of them is ours to change
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    # what TRL's own collators for images and text do, see tests/hf/test_labels.py
    pytest.mark.filterwarnings("ignore:labels were given at positions of images or videos:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),  # PEFT, of a model from no hub
]
ROOT = Path(__file__).parents[2]
LIGHT, DARK = (Image.fromarray(noise(60, 80) // 8 + base) for base in (220, 0))
WIDE = Image.fromarray(noise(30, 110, 5))
SETTINGS = {
    "max_steps": 20,
    "per_device_train_batch_size": 2,
    "learning_rate": 5e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "gradient_checkpointing": False,  # on where a test says so
    "bf16": False,
}


@pytest.fixture(autouse=True)
def silent(monkeypatch):
    """TRL sends word of each trainer to its makers, but not where CI is set."""
    monkeypatch.setenv("CI", "1")


def said(role, text):
    return [{"role": role, "content": text}]


ASKED = said("user", "which?")
MESSAGES = [
    {"images": [image], "messages": ASKED + said("assistant", answer)} for image, answer in ((LIGHT, "a"), (DARK, "b"))
]
COMPLETIONS = [
    {"images": [image], "prompt": ASKED, "completion": said("assistant", answer)}
    for image, answer in ((LIGHT, "a"), (DARK, "b"))
]
PREFERENCES = [
    {"images": [image], "prompt": ASKED, "chosen": said("assistant", good), "rejected": said("assistant", bad)}
    for image, good, bad in ((LIGHT, "a", "b"), (DARK, "b", "a"))
]
JUDGED = [{**sample, "label": bool(place)} for place, sample in enumerate(COMPLETIONS)]


def fresh():
    return attach(encoder(), language_model("llama", max_position_embeddings=512)).train()


def run(kind, model, samples, folder, *, eval_samples=None, **given):
    """A trainer of TRL by its short name, on a model or a folder; settings and what the trainer itself takes."""
    import trl
    from datasets import Dataset

    own = {name: given.pop(name) for name in ("peft_config", "ref_model", "data_collator") if name in given}
    return getattr(trl, f"{kind}Trainer")(
        model,
        args=getattr(trl, f"{kind}Config")(str(folder), **{**SETTINGS, **given}),
        train_dataset=Dataset.from_list(samples),
        eval_dataset=None if eval_samples is None else Dataset.from_list(eval_samples),
        processing_class=getattr(model, "processor", None),
        **own,
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def targets_at_images(trainer):
    """How many of the labels that the trainer's collator makes, or its loss takes, are at image positions."""
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    image = batch["input_ids"] == trainer.model.config.image_token_id
    targets = batch["labels"] != -100 if "labels" in batch else batch["completion_mask"] == 1
    assert image.any()
    assert targets.any()
    return int((targets & image).sum())


def lora():
    where = r"language_model\..*\.(q_proj|v_proj)"
    return LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=where, modules_to_save=["compressor"])


def moved(model, start):
    return {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, start[name])}


def state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


SFT = {
    "messages": (MESSAGES, {}),
    "prompt-completion": (COMPLETIONS, {"completion_only_loss": False}),
    "completion-only": (COMPLETIONS, {"completion_only_loss": True}),
    "checkpointing": (MESSAGES, {"gradient_checkpointing": True}),
    "accumulation": (MESSAGES, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}),
    "text": (
        [{"images": [image], "text": f"<image>\n{answer}"} for image, answer in ((LIGHT, "a"), (DARK, "b"))],
        {"remove_unused_columns": False},
    ),
}


@pytest.mark.parametrize("samples, settings", SFT.values(), ids=SFT)
def test_sft_learns_two_images(samples, settings, tmp_path):
    model = fresh()
    start = state(model)
    trainer = run("SFT", model, samples, tmp_path, packing=False, **settings)
    assert targets_at_images(trainer) == 0
    trainer.train()
    assert losses(trainer)[-1] < 0.5 * losses(trainer)[0]
    assert moved(model, start) == {"language_model", "visual"}


def test_sft_has_the_loss_of_the_plain_model(tmp_path):
    """Of the model with labels that are masked by hand; TRL counts and sums targets by itself."""
    model = fresh()
    trainer = run("SFT", model, MESSAGES, tmp_path, max_steps=1)
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    ids = batch["input_ids"]
    ignored = (batch["attention_mask"] == 0) | (ids == model.config.image_token_id)
    with torch.no_grad():
        want = fresh()(**{**batch, "labels": ids.masked_fill(ignored, -100)}).loss
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(float(want), rel=1e-5)


def test_sft_evaluates_and_resumes(tmp_path):
    def trainer(model, **settings):
        asked = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
        return run("SFT", model, MESSAGES, tmp_path, eval_samples=MESSAGES, **{**asked, **settings})

    model = fresh()
    whole = trainer(model)
    whole.train()
    evaluated = [entry["eval_loss"] for entry in whole.state.log_history if "eval_loss" in entry]
    assert evaluated[1] < evaluated[0] < losses(whole)[0]
    again = fresh()
    resumed = trainer(again)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == pytest.approx(losses(whole))
    for (name, want), got in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(got, want), name
    loaded = UHDForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-4")
    assert trainer(loaded).evaluate()["eval_loss"] == pytest.approx(evaluated[1], rel=1e-5)


@pytest.mark.parametrize(
    "kind, samples, checkpointing", [("SFT", MESSAGES, True), ("DPO", PREFERENCES, False), ("KTO", JUDGED, True)]
)
def test_lora_learns_two_images(kind, samples, checkpointing, tmp_path):
    """Without a model beside it: the adapters turned off are the reference."""
    model = fresh()
    trainer = run(kind, model, samples, tmp_path, peft_config=lora(), gradient_checkpointing=checkpointing)
    assert targets_at_images(trainer) == 0
    start = state(trainer.model)
    trainer.train()
    assert losses(trainer)[-1] < 0.9 * losses(trainer)[0]
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, start[name])}
    assert any("lora" in name for name in changed)
    assert any("compressor" in name for name in changed)
    assert all("lora" in name or "compressor" in name for name in changed)


@pytest.mark.parametrize("kind, samples", [("DPO", PREFERENCES), ("KTO", JUDGED)])
@pytest.mark.parametrize("given, checkpointing", [("model", True), ("folder", False)])
def test_preferences_between_two_images(kind, samples, given, checkpointing, tmp_path):
    """A folder is loaded twice, once as the reference; a model that was never saved needs one beside it."""
    model, settings = fresh(), {"gradient_checkpointing": checkpointing}
    start = state(model)
    if given == "folder":
        model.save_pretrained(tmp_path / "model")
        trainer = run(kind, str(tmp_path / "model"), samples, tmp_path, **settings)
    else:
        trainer = run(kind, model, samples, tmp_path, ref_model=copy.deepcopy(model), **settings)
    assert isinstance(trainer.model, UHDForConditionalGeneration)
    assert targets_at_images(trainer) == 0
    trainer.train()
    assert losses(trainer)[0] == pytest.approx({"DPO": 0.6931, "KTO": 0.5}[kind], abs=1e-3)  # as its reference
    assert losses(trainer)[-1] < 0.6 * losses(trainer)[0]
    assert moved(trainer.model, start) == {"language_model", "visual"}
    assert all(torch.equal(p, start[name]) for name, p in trainer.ref_model.named_parameters())


def reinforced(kind, model, samples, folder, *, rewarded=None, peft_config=None, **settings):
    """A trainer that generates two completions of each sample, and then trains on two batches; rewards are kept."""
    import trl
    from datasets import Dataset

    rewarded = [] if rewarded is None else rewarded

    def reward(completion_ids, **columns):
        rewarded.append([index + len(set(ids)) for index, ids in enumerate(completion_ids)])
        return rewarded[-1]

    own = {"max_steps": 1, "gradient_accumulation_steps": 2, "num_generations": 2, "max_completion_length": 5}
    return getattr(trl, f"{kind}Trainer")(
        model,
        reward_funcs=reward,
        args=getattr(trl, f"{kind}Config")(str(folder), **{**SETTINGS, **own, "beta": 0.05, **settings}),
        train_dataset=Dataset.from_list(samples),
        processing_class=model.processor,
        peft_config=peft_config,
    )


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_a_step_of_reinforcement(kind, tmp_path):
    """Prompts of two lengths and images of two sizes, one of them cut; TRL cuts what it generated into two batches."""
    model = fresh()
    model.processor.image_processor.pad_patches = True
    model.save_pretrained(tmp_path / "model")
    model = UHDForConditionalGeneration.from_pretrained(tmp_path / "model").train()
    samples = [
        {"image": WIDE, "prompt": said("user", "wide?")},
        {"image": DARK, "prompt": said("user", "is it dark?")},
    ]
    rewarded, asked = [], []
    trainer = reinforced(kind, model, samples, tmp_path, rewarded=rewarded)
    handle = trainer.ref_model.register_forward_hook(lambda *call: asked.append(call[2:]), with_kwargs=True)
    start = state(model)
    trainer.train()
    handle.remove()
    assert [len(rewards) for rewards in rewarded] == [4]
    assert moved(model, start) == {"language_model", "visual"}
    seen = set()
    for given, output in asked:
        for row, size_hw in enumerate(given["image_sizes"].tolist()):
            image = WIDE if size_hw == [WIDE.height, WIDE.width] else DARK
            ids = given["input_ids"][row][given["attention_mask"][row] == 1]
            assert ("wide?" in model.processor.tokenizer.decode(ids)) == (image is WIDE)
            targets = given["labels"][row, 1:]
            count = int((targets != -100).sum())
            assert model.processor.tokenizer.pad_token_id not in ids[:-count]
            want = alone(trainer.ref_model, model.processor, ids, image, count)
            torch.testing.assert_close(output.log_probs[row][targets != -100], want, rtol=1e-4, atol=1e-4)
            seen.add(len(ids))
    assert len(seen) > 1


def alone(model, processor, ids, image, count):
    """Log-probabilities of the last of the ids (T,), by packed patches and without any padding."""
    batch = processor.image_processor(image, pad_patches=False)
    batch.pop("num_image_tokens")
    with torch.no_grad():
        logits = model(input_ids=ids[None], **batch).logits[0, -count - 1 : -1]
    return logits.log_softmax(-1).gather(1, ids[-count:, None])[:, 0]


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_reinforcement_of_adapters_by_samples_with_any_number_of_images(kind, tmp_path):
    """A batch that TRL cuts may have none."""
    samples = [
        {"images": [WIDE, DARK], "prompt": said("user", "wide?")},
        {"images": [], "prompt": said("user", "is it dark?")},
    ]
    model = fresh()
    model.processor.image_processor.pad_patches = True
    trainer = reinforced(kind, model, samples, tmp_path, peft_config=lora(), gradient_checkpointing=True)
    start = state(trainer.model)
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, start[name])}
    assert any("lora" in name for name in changed)
    assert any("compressor" in name for name in changed)


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")  # TRL, of padded prompts
def test_reinforcement_needs_the_setting(tmp_path):
    """Without it a batch lacks what the model needs, and says so."""
    trainer = reinforced("GRPO", fresh(), [{"image": WIDE, "prompt": ASKED}] * 2, tmp_path, beta=0.0)
    with pytest.raises(ValueError, match="processor with image_processor.pad_patches = True"):
        trainer.train()


@pytest.mark.parametrize("peft_config", [None, lora])
def test_a_collator_of_ones_own_is_refused_where_its_labels_were_counted(peft_config, tmp_path):
    if peft_config and "self.model.forward" in inspect.getsource(BaseTuner.forward):
        pytest.skip("this PEFT calls a model's forward past its hooks")
    model = fresh()
    processor = model.processor

    def collate(samples):
        batch = processor(text=["<image>a"] * len(samples), images=[sample["images"] for sample in samples])
        return {**batch, "labels": batch["input_ids"].clone()}

    trainer = run("SFT", model, MESSAGES, tmp_path, peft_config=peft_config and peft_config(), data_collator=collate)
    with pytest.raises(ValueError, match=r"TRL has counted them already: put them into the processor's batch"):
        trainer.train()


def test_packed_samples_that_datasets_has_prepared(tmp_path):
    """The first has no image, so its columns are not all there are."""
    from datasets import Dataset

    model = fresh()

    def prepare(sample):
        return model.processor(text=sample["text"], images=sample["image"])

    raw = [{"image": None, "text": "hello"}, {"image": LIGHT, "text": "<image>a"}, {"image": DARK, "text": "b<image>"}]
    pack = PackingCollator(model.processor, max_length=256, prepare=prepare)
    want = pack(raw)
    samples = Dataset.from_list(raw).map(pack.columns, remove_columns=["image", "text"])
    collate = PackingCollator(model.processor, max_length=256)
    got = collate(list(samples))
    assert all(torch.equal(got[name], want[name]) for name in want if name != "visual")
    assert torch.equal(got["visual"].pixel_values, want["visual"].pixel_values)
    settings = {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False, "max_steps": 2}
    trainer = run("SFT", model, list(samples), tmp_path, data_collator=collate, **settings)
    start = state(model)
    trainer.train()
    assert moved(model, start) == {"visual", "language_model"}
    lost = Dataset.from_list(raw).map(prepare, remove_columns=["image", "text"])
    with pytest.raises(ValueError, match=r"neither images nor videos.*map PackingCollator\.columns"):
        collate(list(lost))


def test_the_training_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, page = fresh(), (ROOT / "docs" / "training.md").read_text()
    start = state(model)
    samples = [
        {"image": image, "question": question, "answer": answer}
        for image, question, answer in ((LIGHT, "which?", "a"), (DARK, "which?", "b"), (WIDE, "which one?", "c"))
    ]
    sft, grpo = re.findall(r"```python trl\n(.*?)```", page, re.DOTALL)
    names = {"model": model, "samples": samples}
    for block, kind in ((sft, "SFTTrainer"), (grpo, "GRPOTrainer")):
        exec(compile(block, "docs/training.md", "exec"), names)
        assert type(names["trainer"]).__name__ == kind
        assert moved(model, start) == {"language_model", "visual"}
        start = state(model)


def test_the_example_learns(tmp_path):
    """With warnings as errors, but for those of TRL, and so without the one about labels."""
    flags = ["-W", "error", "-W", "ignore::FutureWarning"]
    found = subprocess.run(
        [sys.executable, *flags, ROOT / "examples" / "07_trl_sft.py", "--steps", "8"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    before, after = map(int, re.findall(r"(\d+) of 64 right", found.stdout))
    assert before + 6 <= after
    assert (tmp_path / "sft" / "model" / "processor_config.json").exists()
