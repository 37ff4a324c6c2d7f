"""Labels at positions of images and videos: set to ignore wherever they come in, with one warning."""

import copy
import pickle

import pytest
import torch
from transformers import Trainer, TrainingArguments

from tests.hf.test_training import fresh
from tests.hf.tiny import IMAGES, TEXTS, attached, model, targets
from uhd.hf import labels_of

NAIVE = "labels were given at positions of images or videos"
SAMPLES = [("<image>ab", IMAGES[:1]), ("hello", []), ("<image>or<image>?", IMAGES[1:])]


def with_video():
    found = attached("llava-onevision").train()
    return found, found.processor(text=["<video>ab", "<image>c"], images=IMAGES[:1], videos=[[IMAGES[1]]])


def with_images():
    found = fresh()
    return found, found.processor(text=TEXTS, images=IMAGES)


@pytest.mark.parametrize("make", [with_images, with_video])
@pytest.mark.parametrize("into_the_batch", [True, False])
def test_the_usual_script_trains_with_the_right_loss_and_warns_once(make, into_the_batch):
    def losses(labels_of):
        found, batch = make()
        optimizer = torch.optim.SGD(found.parameters(), lr=0.01)
        for _ in range(3):
            if into_the_batch:
                batch["labels"] = labels_of(found, batch)
                loss = found(**batch).loss
            else:
                loss = found(**batch, labels=labels_of(found, batch)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield loss.item()

    def padding_alone(found, batch):
        return batch["input_ids"].clone().masked_fill_(batch["attention_mask"] == 0, -100)

    want = list(losses(targets))
    with pytest.warns(UserWarning, match=NAIVE) as said:
        got = list(losses(padding_alone))
    assert got == pytest.approx(want, abs=1e-6)
    assert want[0] != pytest.approx(want[-1], abs=1e-3)
    assert len(said) == 1


def test_a_batch_sets_labels_to_ignore_in_place_and_keeps_its_ids():
    found, batch = with_images()
    ids, labels = batch["input_ids"].clone(), batch["input_ids"].clone()
    wanted = ids.masked_fill(found.visual_positions(ids), -100)
    with pytest.warns(UserWarning, match=NAIVE):
        batch["labels"] = labels
    assert batch["labels"] is labels
    assert torch.equal(labels, wanted)
    for same in (batch["input_ids"], batch["input_ids"][:]):
        batch["labels"] = same
        assert torch.equal(batch["labels"], wanted)
        assert torch.equal(batch["input_ids"], ids)
    other = copy.copy(batch)
    other.update(labels=ids.clone(), more=1)
    assert torch.equal(other["labels"], wanted)
    batch["labels"] = ids[:1]  # of another shape: whoever gave them knows
    assert torch.equal(batch["labels"], ids[:1])
    sent = pickle.loads(pickle.dumps(other)).to("cpu")
    assert torch.equal(sent["labels"], wanted)
    assert set(sent) == set(other)


def into_the_batch(processor, samples):
    batch = dict_of(processor, samples)
    filled = processor(text=[text for text, _ in samples], images=[images for _, images in samples])
    filled["labels"] = batch.pop("labels")
    return filled


def dict_of(processor, samples):
    texts, images = zip(*samples, strict=True)
    batch = processor(text=list(texts), images=list(images) if any(images) else None)
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def right(processor, samples):
    batch = dict_of(processor, samples)
    return {**batch, "labels": batch["labels"].masked_fill(batch["labels"] == processor.image_token_id, -100)}


def trained(collate, folder, **settings):
    """Losses and weights after two steps."""
    found = fresh()
    arguments = TrainingArguments(
        folder, max_steps=2, remove_unused_columns=False, report_to="none", use_cpu=True, save_strategy="no",
        dataloader_pin_memory=False, disable_tqdm=True, logging_steps=1, learning_rate=0.01, **settings,
    )  # fmt: skip
    run = Trainer(
        found, arguments, train_dataset=SAMPLES, data_collator=lambda samples: collate(found.processor, samples)
    )
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    return torch.tensor(losses), torch.cat([p.detach().flatten() for p in found.parameters()])


ONE, SEVERAL = {"per_device_train_batch_size": 3}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}


@pytest.mark.parametrize(
    "collate, settings",
    [(dict_of, ONE), (into_the_batch, ONE), (into_the_batch, SEVERAL)],
    ids=["dict", "one", "many"],
)
def test_a_trainers_count_of_targets_is_made_right(collate, settings, tmp_path):
    want = trained(right, tmp_path, **settings)
    with pytest.warns(UserWarning, match=NAIVE):
        got = trained(collate, tmp_path, **settings)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_a_count_over_several_batches_is_refused(tmp_path):
    with (
        pytest.warns(UserWarning, match=NAIVE),
        pytest.raises(ValueError, match=r"num_items_in_batch is \d+, and counts .* of several batches: labels must"),
    ):
        trained(dict_of, tmp_path, **SEVERAL)


def test_a_count_that_is_right_already_stays():
    found, batch = with_images()
    naive, masked = batch["input_ids"].clone(), targets(found, batch)
    count = (masked[:, 1:] != -100).sum()
    want = found(**batch, labels=masked, num_items_in_batch=count).loss
    naive[batch["attention_mask"] == 0] = -100
    with pytest.warns(UserWarning, match=NAIVE):
        got = [found(**batch, labels=naive, num_items_in_batch=given).loss for given in (count, int(count))]
    got.append(found(**batch, labels=naive, num_items_in_batch=(naive[:, 1:] != -100).sum()).loss)
    torch.testing.assert_close(got, [want] * 3)
    assert (naive[found.visual_positions(batch["input_ids"])] != -100).all()  # the caller's are left alone


def test_labels_that_are_counted_around_the_forward_are_refused():
    """TRL's trainers replace the forward, take the labels away and ask the trunk for hidden states."""
    found, batch = with_images()
    found.forward = lambda **kwargs: kwargs
    with pytest.raises(ValueError, match="TRL has counted them"):
        found(**batch, labels=batch["input_ids"], fused_lm_head=True)
    assert found(**batch, labels=targets(found, batch), fused_lm_head=True)["fused_lm_head"]
    assert found(**batch, labels=batch["input_ids"])["labels"] is batch["input_ids"]


KNOWS_IMAGES = (
    "{% for m in messages %}{% for part in m.content %}{% if part.type == 'image' %}<image>"
    "{% elif m.role == 'assistant' %}{% generation %}{{ part.text }}{% endgeneration %}"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
)
TEXT_ONLY = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [KNOWS_IMAGES, TEXT_ONLY])
def test_the_assistants_words_are_marked_wherever_images_stand(template):
    """Some releases of transformers count an image as one place when they mark words."""
    found = model("llama")

    def turn(role, text, *images):
        parts = [{"type": "image", "image": image} for image in images]
        return {"role": role, "content": [*parts, {"type": "text", "text": text}]}

    asked = turn("user", "ab", IMAGES[0]), turn("user", "ef", *IMAGES[1:3])
    chats = [
        [asked[0], turn("assistant", "cd"), asked[1], turn("assistant", "g")],
        [turn("user", "hi"), turn("assistant", "jk")],
    ]
    batch = found.processor.apply_chat_template(
        chats, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    labels = labels_of(batch, found.processor)
    assert [found.processor.tokenizer.decode(row[row != -100]) for row in labels] == ["cdg", "jk"]
