"""Two ranks whose batches hold other kinds of media, under every backend: the table of docs/training.md.

``python -m tests.hf.ranks`` runs all (some minutes on two cores) and writes the table into the page. A cell is what
:func:`check` finds: a training step whose gradients are those of one process on both batches, evaluation with its
logits, ``generate`` with its tokens, and a checkpoint that one rank resumes as it would have gone on itself.
"""

import contextlib
import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from tests.hf.tiny import COMPRESSORS, IMAGES, attached, encoder, targets
from uhd.resampler import PerceiverResampler
from uhd.vision import ViT

ROOT = Path(__file__).parents[2]
KINDS = ("text", "image", "image+video", "encoded")
MIXES = tuple(itertools.combinations(KINDS, 2))
ERROR = "error: "


def fresh(strategy):
    """A model with learned newlines (``llava-onevision``), or with the separators of a schema."""
    torch.manual_seed(0)  # of the compressor and of learned separators
    eyes = strategy if strategy in COMPRESSORS else encoder(schema=strategy)
    return attached(eyes, tie_word_embeddings=False).train()


def batch_of(model, kind):
    """One or two rows; ranks have other lengths, other numbers of images, and images of other sizes."""
    if kind == "text":
        batch = model.processor(text=["hello there", "you"], padding_side="right")
    elif kind == "image":
        batch = model.processor(text=["a<image>b"], images=IMAGES[:1])
    elif kind == "image+video":
        video = [IMAGES[1], IMAGES[1][::-1].copy()]
        batch = model.processor(text=["a<image>b<video>c"], images=IMAGES[2:3], videos=[video])
    else:
        with torch.no_grad():
            images = model.visual(IMAGES[:2])
        batch = model.processor(text=["<image>x<image>yz"], images=images)
    return {**batch, "labels": targets(model, batch)}


def _layers(model):
    return next(part for part in model.language_model.modules() if isinstance(part, torch.nn.ModuleList))


def _units(model, which):
    """Modules that FSDP gathers by, inner ones first."""
    visual, lm = model.visual, model.language_model
    if which == "layers":
        return [*_layers(model), visual.vision, visual.compressor]
    if which == "parts":
        return [visual, lm]
    packer = [] if visual.packer is None else [visual.packer]
    inner = [*visual.vision.blocks, visual.vision, visual.compressor, *packer, visual]
    return [*inner, lm.get_input_embeddings(), *_layers(model), lm.get_output_embeddings(), lm]


def fsdp2(model, which):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (*_units(model, which), model):
        fully_shard(part, mesh=mesh)
    return model


def fsdp1(model, which):
    layer = type(_layers(model)[0])
    kinds = {"layers": {layer, ViT, PerceiverResampler, type(model.visual.compressor)}}
    kinds["parts"] = {type(model.visual), type(model.language_model)}
    kinds["all"] = kinds["layers"] | kinds["parts"] | {type(model.get_input_embeddings())}
    policy = ModuleWrapPolicy(kinds[which])
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True
    )


def zero(model, stage):
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 10000},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.0, "torch_adam": True}},
    }
    return deepspeed.initialize(model=model, config=settings, model_parameters=list(model.parameters()))[0]


BACKENDS = {
    "DDP": DistributedDataParallel,
    "DDP, find_unused_parameters": functools.partial(DistributedDataParallel, find_unused_parameters=True),
    "DDP, static_graph": functools.partial(DistributedDataParallel, static_graph=True),
    "FSDP1, layers": functools.partial(fsdp1, which="layers"),
    "FSDP1, visual and language_model": functools.partial(fsdp1, which="parts"),
    "FSDP1, every part": functools.partial(fsdp1, which="all"),
    "FSDP2, layers": functools.partial(fsdp2, which="layers"),
    "FSDP2, visual and language_model": functools.partial(fsdp2, which="parts"),
    "FSDP2, every part": functools.partial(fsdp2, which="all"),
    "DeepSpeed ZeRO-2": functools.partial(zero, stage=2),
    "DeepSpeed ZeRO-3": functools.partial(zero, stage=3),
}


def _gradients(wrapped, model):
    if isinstance(wrapped, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
            found = {name: p.grad for name, p in model.named_parameters()}
            return {name.replace("_fsdp_wrapped_module.", ""): grad.clone() for name, grad in found.items()}
    if hasattr(wrapped, "zero_optimization_stage"):
        from deepspeed.utils import safe_get_full_grad

        return {name: safe_get_full_grad(p).clone() for name, p in model.named_parameters()}
    return {name: getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for name, p in model.named_parameters()}


def _close(got, want, what):
    for name, value in want.items():
        # a part that no batch needs has no gradient in one process and 0 beside others
        value = torch.zeros_like(got[name]) if value is None else value
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{what}, {n}: {m}")


def _alone(strategy, kinds):
    """Gradients and logits of one process on all ranks' batches."""
    model = fresh(strategy)
    batches = [batch_of(model, kind) for kind in kinds]
    model.encode_without_images = False
    (sum(model(**batch).loss for batch in batches) / len(batches)).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    with torch.no_grad():
        logits = [model.eval()(**batch).logits for batch in batches]
    return batches, gradients, logits


def check(backend, kinds, strategy):
    """Raise where two ranks with batches of these kinds do anything else than one process."""
    batches, gradients, logits = _alone(strategy, kinds)
    rank = dist.get_rank()
    model = fresh(strategy)
    wrapped = BACKENDS[backend](model)
    backward = getattr(wrapped, "backward", torch.Tensor.backward)
    for step in range(2):  # static_graph and ZeRO-3 learn in the first step what they expect in the second
        backward(wrapped(**batches[rank]).loss)
        _close(_gradients(wrapped, model), gradients, f"gradients of step {step}")
        if hasattr(wrapped, "zero_optimization_stage"):
            wrapped.optimizer.zero_grad()
        else:
            model.zero_grad()
    wrapped.eval()
    with torch.no_grad():
        _close({"logits": wrapped(**batches[rank]).logits}, {"logits": logits[rank]}, "evaluation")


def work(rank, world, folder, jobs):
    """Run the jobs one after another, and write what came of each."""
    warnings.filterwarnings("error")
    warnings.filterwarnings("ignore", category=FutureWarning)  # of FSDP1 about itself
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=20))
    for number, job in enumerate(jobs):
        try:
            check(*job)
            said = "ok"
        except Exception as problem:
            said = f"{type(problem).__name__}: {' '.join(str(problem).split())[:600]}"
            if os.environ.get("RANKS_TRACE"):
                import traceback

                traceback.print_exc()
        Path(folder, f"{number}-{rank}").write_text(said)
        if said != "ok":
            os._exit(1)  # the other rank may wait for this one
    dist.barrier()
    os._exit(0)


def run(jobs, world=2):
    """What came of each job, on new ranks behind one that failed."""
    found = []
    while len(found) < len(jobs):
        rest = jobs[len(found) :]
        with tempfile.TemporaryDirectory() as folder:
            env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
            command = [sys.executable, "-m", "tests.hf.ranks", "work", str(world), folder, json.dumps(rest)]
            ranks = [subprocess.Popen([*command, str(rank)], env=env, cwd=ROOT) for rank in range(world)]
            for process in ranks:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(60 + 30 * len(rest))
                process.kill()
            for number in range(len(rest)):
                said = [Path(folder, f"{number}-{rank}") for rank in range(world)]
                said = [file.read_text() if file.exists() else "did not end" for file in said]
                # a rank that waited for the other says least
                found.append(min(said, key=lambda word: (word == "ok", "gloo" in word, word == "did not end")))
                if set(said) != {"ok"}:
                    break
    return found


if __name__ == "__main__" and sys.argv[1:2] == ["work"]:
    work(int(sys.argv[5]), int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]))
