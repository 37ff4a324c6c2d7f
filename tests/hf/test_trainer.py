"""transformers' Trainer and PEFT, as docs/training.md says to use them."""

import gc
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from tests.hf.test_training import fresh
from tests.hf.tiny import IMAGES, attach, encoder
from uhd.hf import UHDForConditionalGeneration, training

# Trainer and PEFT ask transformers for a name that it renamed; neither is ours to change
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

SAMPLES = [
    {"text": "<image>", "images": IMAGES[:1], "answer": "ab"},
    {"text": "none", "images": [], "answer": "c"},
    {"text": "<image>or<image>", "images": IMAGES[1:], "answer": "defg"},
    {"text": "<image>?", "images": IMAGES[2:], "answer": "h"},
]


@pytest.fixture(autouse=True)
def collected():
    """accelerate collects garbage while it trains: what other tests left is no fault of these."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def collate(samples, processor):
    """Left-padded rows end with their answers, and only those are targets."""
    images = [sample["images"] for sample in samples]
    texts = [sample["text"] + sample["answer"] for sample in samples]
    batch = processor(text=texts, images=images if any(images) else None)
    labels = torch.full_like(batch["input_ids"], -100)
    for row, sample in enumerate(samples):
        count = len(processor.tokenizer.encode(sample["answer"], add_special_tokens=False))
        labels[row, -count:] = batch["input_ids"][row, -count:]
    return {**batch, "labels": labels}


def trainer(found, folder, processor=None, optimizers=(None, None), **changes):
    processor = processor or found.processor
    settings = {
        "output_dir": folder,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 2,
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return Trainer(
        model=found,
        args=TrainingArguments(**{**settings, **changes}),
        train_dataset=SAMPLES,
        data_collator=lambda samples: collate(samples, processor),
        processing_class=processor,
        optimizers=optimizers,
    )


def losses(run):
    return [float(entry["loss"]) for entry in run.state.log_history if "loss" in entry]


def goes_on_exactly(make, folder):
    """Check that the trainers that ``make`` gives end alike, one resumed half-way; that one, and its end as loaded."""
    whole, resumed = make(folder), make(folder)
    whole.train()
    resumed.train(resume_from_checkpoint=folder / "checkpoint-2")
    assert losses(resumed) == losses(whole)
    for (name, want), got in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(got, want), name
    loaded = UHDForConditionalGeneration.from_pretrained(folder / "checkpoint-4").eval()
    batch = collate(SAMPLES, loaded.processor)  # the processor is in every checkpoint
    with torch.no_grad():
        assert torch.equal(loaded(**batch).loss, whole.model.eval()(**batch).loss)
    return resumed, loaded


def test_a_stage_in_trainer_falls_and_resumes(tmp_path):
    def make(folder):
        found = fresh()
        groups = training.tune_all(found, lr=1e-2, vision_lr=1e-3)
        return trainer(found, folder, optimizers=(torch.optim.AdamW(groups, weight_decay=0.0), None))

    resumed, loaded = goes_on_exactly(make, tmp_path)
    assert losses(resumed)[-1] < losses(resumed)[0]
    rates = [group["lr"] for group in resumed.optimizer.param_groups]
    assert rates[0] == rates[1] == 10 * rates[2]  # the schedule keeps the ratio
    assert loaded.processor.image_token == "<image>"


def test_accumulated_steps_equal_one_large_batch(tmp_path):
    """The loss is averaged over targets of all the step's samples, not over batches."""
    weights = []
    for size, accumulate in ((4, 1), (1, 4)):
        found = fresh()
        settings = {"max_steps": 1, "optim": "sgd", "save_strategy": "no"}
        trainer(
            found, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulate, **settings
        ).train()
        weights.append(torch.cat([p.detach().flatten() for p in found.parameters()]))
    start = torch.cat([p.detach().flatten() for p in fresh().parameters()])
    assert (weights[0] - start).abs().max() > 1e-3
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=1e-4, atol=1e-6)


def test_checkpointing_and_autocast_in_trainer(tmp_path):
    found = fresh()
    renamed = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if renamed else "gradient_checkpointing"
    run = trainer(found, tmp_path, bf16=True, max_steps=6, save_strategy="no", **{name: True})
    run.train()
    assert found.visual.vision.gradient_checkpointing
    assert losses(run)[-1] < losses(run)[0]
    assert {p.dtype for p in found.parameters()} == {torch.float32}


def lora(found, **changes):
    config = {
        "r": 4,
        "target_modules": r"language_model\..*\.(q_proj|v_proj)",
        "modules_to_save": ["compressor"],
        "task_type": "CAUSAL_LM",
    }
    return get_peft_model(found, LoraConfig(**{**config, **changes}))


# before 0.21 PEFT says this of a base model that was never saved
@pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning")
def test_lora_on_the_language_model_and_a_whole_resampler(tmp_path):
    found = fresh()
    before = {name: p.detach().clone() for name, p in found.named_parameters()}
    wrapped = lora(found)
    groups = training.parameter_groups(wrapped.get_base_model(), {"connector": 1e-2, "language": 2e-2})
    assert [group["name"] for group in groups] == ["connector", "language"]
    assert len(groups[0]["params"]) == sum(1 for name in before if name.startswith("visual.compressor."))
    assert len(groups[1]["params"]) == 2 * 2 * 2  # layers, projections, A and B
    run = trainer(wrapped, tmp_path, processor=found.processor, optimizers=(torch.optim.AdamW(groups), None))
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    frozen = [p for name, p in found.named_parameters() if not p.requires_grad]
    assert len(frozen) == len(before)  # the resampler's copy trains
    batch = collate(SAMPLES, found.processor)
    wrapped.eval()
    with torch.no_grad():
        want = wrapped(**batch).logits
    asked = found.processor(text="<image>", images=IMAGES[:1])
    said = wrapped.generate(**asked, max_new_tokens=3, do_sample=False)

    files = {path.name for path in (tmp_path / "checkpoint-4").iterdir()}
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files
    again = PeftModel.from_pretrained(fresh(), tmp_path / "checkpoint-4").eval()
    merged = again.merge_and_unload()
    assert type(merged) is UHDForConditionalGeneration
    merged.save_pretrained(tmp_path / "merged")
    loaded = UHDForConditionalGeneration.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, want, rtol=1e-4, atol=1e-4)
    assert torch.equal(loaded.generate(**asked, max_new_tokens=3, do_sample=False), said)


def test_lora_where_ids_flow_and_a_hook_injects():
    found = fresh("gemma4_text")
    assert found.config.injection_mode == "hook"
    wrapped = lora(found)
    batch = collate(SAMPLES, found.processor)
    loss = wrapped(**batch).loss
    loss.backward()
    silent = [name for name, p in wrapped.named_parameters() if p.requires_grad and p.grad is None]
    assert silent == []
    groups = training.parameter_groups(wrapped.get_base_model(), {"connector": 1e-2, "language": 1e-2})
    optimizer = torch.optim.AdamW(groups)
    optimizer.step()
    with torch.no_grad():
        assert wrapped(**batch).loss < loss


def test_learned_separators_beside_lora(tmp_path):
    """They are a parameter, not a module, so PEFT freezes them: thaw them, merge, and save the whole model."""
    eyes = encoder(schema="llava-uhd-better")
    found = attach(eyes).train()
    before = found.learned_separators.detach().clone()
    wrapped = lora(found)
    assert not found.learned_separators.requires_grad
    found.learned_separators.requires_grad_(True)
    groups = training.parameter_groups(found, {"connector": 1e-2, "language": 1e-2})
    optimizer = torch.optim.AdamW(groups)
    wrapped(**collate(SAMPLES, found.processor)).loss.backward()
    optimizer.step()
    assert not torch.equal(found.learned_separators, before)
    merged = wrapped.merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = UHDForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again.learned_separators, found.learned_separators)
