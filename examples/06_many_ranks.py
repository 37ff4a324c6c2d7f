"""Train the small model that comes with the package on several processes, its weights sharded over them by FSDP2.

torchrun --nproc-per-node 2 examples/06_many_ranks.py [--steps N]

Every rank has batches of its own: one with images, another of text alone in the same step. A sharded model makes the
same calls on every rank whatever its batch holds, so none waits for another. The first rank writes the whole model.
"""

import argparse
import gc
import os

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import uhd
from uhd import PackingCollator
from uhd.nano.task import scene

SEED, PER_RANK = 77, 8


def samples(processor, step, rank):
    """Prepared: an image with the question for its last word, or, on every second rank and step, text alone."""
    found = []
    for place in range(PER_RANK):
        drawn = scene(SEED, (step * dist.get_world_size() + rank) * PER_RANK + place)
        text_alone = (step + rank) % 2
        question = f"repeat: {drawn.text}" if text_alone else "<image>last?"
        answer = (drawn.text if text_alone else drawn.lines[-1][-1]) + processor.tokenizer.eos_token
        sample = processor(text=question + answer, images=None if text_alone else drawn.image)
        mask = torch.zeros_like(sample["input_ids"])
        mask[:, -len(processor.tokenizer.encode(answer, add_special_tokens=False)) :] = 1
        found.append({**sample, "completion_mask": mask})
    return found


def sharded(model):
    """By the layers of both sides; what is left is one unit."""
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (dist.get_world_size(),))
    for unit in (*model.language_model.model.layers, *model.visual.vision.blocks, model.visual.compressor, model):
        fully_shard(unit, mesh=mesh)
    return model


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    steps = parser.parse_args().steps
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, device = dist.get_rank(), torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    model = uhd.load_nano().to(device).train()
    processor = model.processor
    collate = PackingCollator(processor, max_length=512)
    sharded(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    for step in range(steps):
        batch = {name: value.to(device) for name, value in collate(samples(processor, step, rank)).items()}
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss.detach())
        if rank == 0 and (step + 1) % max(steps // 4, 1) == 0:
            print(f"after {step + 1} steps: {loss.item() / dist.get_world_size():.3f}", flush=True)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        trained = uhd.load_nano()
        trained.load_state_dict(whole)
        trained.save_pretrained("ranks/model")
        print("the first rank wrote ranks/model")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    gc.collect()  # torch may abort where process groups that wrapped models still hold die with the interpreter
