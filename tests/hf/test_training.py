"""Gradients, labels and checkpointing."""

import pytest
import torch

from tests.hf.tiny import (
    IMAGES,
    TEXTS,
    attach,
    checkpoint_activations,
    encoder,
    targets,
)
from tests.tiny import noise, silent


def fresh(kind="llama"):
    found = attach(encoder(), kind)
    return found.train()


def batch_of(found, texts=TEXTS, images=IMAGES):
    batch = found.processor(text=texts, images=images, padding_side="right")
    return {**batch, "labels": targets(found, batch)}


@pytest.mark.parametrize("kind", ["llama", "gemma4_text"])
def test_gradients_reach_every_part_and_the_separators(kind):
    found = fresh(kind)
    found(**batch_of(found)).loss.backward()
    assert silent(found.visual) == []
    found.zero_grad()
    images = found(**{**batch_of(found), "labels": None}).image_hidden_states
    sum(image.sum() for image in images).backward()
    comma, newline = found.config.separator_ids[","][0], found.config.separator_ids["\n"][0]
    gradient = found.get_input_embeddings().weight.grad
    assert gradient[comma].any()
    assert gradient[newline].any()


def test_gradient_checkpointing_gives_the_same_gradients():
    found = fresh()
    batch = batch_of(found)
    found(**batch).loss.backward()
    want = {name: p.grad.clone() for name, p in found.named_parameters() if p.grad is not None}
    found.zero_grad()
    checkpoint_activations(found)
    assert found.visual.vision.gradient_checkpointing
    found(**batch).loss.backward()
    for name, p in found.named_parameters():
        if name in want:
            torch.testing.assert_close(p.grad, want[name], rtol=1e-4, atol=1e-6)


def test_autocast_to_bfloat16():
    found = fresh()
    batch = batch_of(found)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = found(**batch).loss
    loss.backward()
    with torch.no_grad():
        torch.testing.assert_close(loss.detach().float(), found(**batch).loss, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("mode", ["embeds", "hook"])
def test_a_batch_without_images_may_still_give_every_visual_parameter_a_gradient(mode):
    found = attach(encoder(schema="llava-uhd-better"), mode=mode).train()
    batch = batch_of(found, ["hello"], None)
    want = found(**batch)
    want.loss.backward()
    assert all(p.grad is None for p in found.visual.parameters())  # off outside of distributed training
    found.encode_without_images = True
    got = found(**batch)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-6, atol=1e-6)
    got.loss.backward()
    for name, p in [*found.visual.named_parameters(), ("learned", found.learned_separators)]:
        assert p.grad is not None, name
        assert not p.grad.any(), name
    with torch.no_grad():
        assert torch.equal(found(**batch).logits, want.logits)


def test_the_blank_is_not_encoded_for_a_frozen_encoder(monkeypatch):
    found = fresh()
    found.encode_without_images = True
    found.visual.requires_grad_(False)
    monkeypatch.setattr(found.visual, "encode_packed", None)  # calling it would fail
    found(**batch_of(found, ["hello"], None)).loss.backward()
    assert any(parameter.grad is not None for parameter in found.language_model.parameters())
    assert all(parameter.grad is None for parameter in found.visual.parameters())


def test_learning_to_tell_two_images_apart():
    """Without the image no loss below log 2 is possible."""
    found = fresh()
    light, dark = noise(60, 80) // 8 + 220, noise(60, 80) // 8
    batch = found.processor(text=["<image>a", "<image>b"], images=[light, dark], padding_side="right")
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -1] = batch["input_ids"][:, -1]
    optimizer = torch.optim.AdamW(found.parameters(), lr=5e-3)
    losses = []
    for _ in range(40):
        loss = found(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.3 < losses[0]
