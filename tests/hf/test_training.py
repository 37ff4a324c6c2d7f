"""Gradients, labels, checkpointing, and data-parallel ranks without images."""

import os
import subprocess
import sys
from pathlib import Path

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

ROOT = Path(__file__).parents[2]


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


WORKER = """
import gc
import sys
import warnings
from datetime import timedelta
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from tests.hf.test_training import IMAGES, batch_of, fresh

WAYS = {
    "plain": DistributedDataParallel,
    "unused": lambda model: DistributedDataParallel(model, find_unused_parameters=True),
    "static": lambda model: DistributedDataParallel(model, static_graph=True),
    "sharded": lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True),
}


def step_twice(rank, folder, way):
    texts, images = (["a<image>b"], IMAGES[:1]) if rank == 0 else (["hello there"], None)
    found = fresh()
    batch = batch_of(found, texts, images)
    if rank == 1:  # any input shape
        batch = {name: value.repeat(2, 1) for name, value in batch.items()}
    wrapped = WAYS[way](found)
    for _ in range(2):
        wrapped(**batch).loss.backward()
    torch.save({name: p.grad for name, p in found.named_parameters()}, f"{folder}/{way}-{rank}.pt")


rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2,
                        timeout=timedelta(seconds=60))
warnings.filterwarnings("ignore", category=FutureWarning)  # of FSDP1 about itself
for way in WAYS:
    step_twice(rank, folder, way)
dist.destroy_process_group()
gc.collect()  # torch may abort where process groups that wrapped models still hold die with the interpreter
"""


def test_a_rank_without_images_does_not_hang(tmp_path):
    """Two steps on two ranks under DDP's three settings and under FSDP1, which take outputs apart."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, [ROOT, ROOT / "kernels"]))}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), tmp_path], env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=240)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], errors
    want = torch.load(tmp_path / "plain-0.pt")
    assert want["visual.vision.stem.weight"].any()
    for way in ("plain", "unused", "static"):
        for rank in range(2):
            got = torch.load(tmp_path / f"{way}-{rank}.pt")
            for name in want:
                torch.testing.assert_close(got[name], want[name], msg=f"{way}, rank {rank}: {name}")
    halves = [torch.load(tmp_path / f"sharded-{rank}.pt") for rank in range(2)]  # a parameter is on either or both
    whole = torch.cat([grad.flatten() for half in halves for grad in half.values() if grad is not None])
    assert len(whole) == sum(grad.numel() for grad in want.values())
    torch.testing.assert_close(whole, torch.cat([grad.flatten() for grad in want.values()]))


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
