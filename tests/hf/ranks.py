"""Two ranks whose batches hold other kinds of media, under every backend: the table of docs/training.md.

``python -m tests.hf.ranks`` runs all (some minutes on two cores) and writes the table into the page. A cell is what
:func:`check` finds: a training step whose gradients are those of one process on both batches, evaluation with its
logits, ``generate`` with its tokens, and a checkpoint that one rank resumes as it would have gone on itself.
"""

import argparse
import contextlib
import functools
import importlib.util
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
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
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
SCHEMAS = ("llava-onevision", "llava-uhd-better")
"""A strategy with learned newlines, and a schema with learned separators beside those of the vocabulary."""
TIED = ", tied"
WORLDS = (2, 1, 2)
"""Ranks that train, then resume, then resume that. DeepSpeed takes new processes for each, all others do it in one."""
SAVED = ("model_state_dict", "optim_state_dict")


def fresh(strategy):
    """A model with learned newlines (``llava-onevision``), or with the separators of a schema; ", tied" embeddings."""
    torch.manual_seed(0)  # of the compressor and of learned separators
    name = strategy.removesuffix(TIED)
    eyes = name if name in COMPRESSORS else encoder(schema=name)
    return attached(eyes, tie_word_embeddings=name != strategy).train()


def batch_of(model, kind):
    """One or two rows; ranks have other lengths, other numbers of images, and images of other sizes."""
    if kind == "text":
        batch = model.processor(text=["hello there", "you"])
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


def _optimizer(model):
    """Adam, since DeepSpeed's converter knows no other; a large ``eps``, as its division makes much of rounding."""
    return torch.optim.AdamW(model.parameters(), lr=0.05, eps=1.0, weight_decay=0.0)


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
        "gradient_clipping": 0.0,
        "gradient_accumulation_steps": 2 // dist.get_world_size(),
        "checkpoint": {"load_universal": True},
    }
    return deepspeed.initialize(model=model, config=settings, optimizer=_optimizer(model))[0]


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


def _whole(wrapped, model, what):
    """By name, every parameter (``data``) or its gradient (``grad``), whole and copied, wherever its parts are."""
    if isinstance(wrapped, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=what == "grad"):
            found = {name: getattr(p, what) for name, p in model.named_parameters()}
            return {name.replace("_fsdp_wrapped_module.", ""): value.clone() for name, value in found.items()}
    if hasattr(wrapped, "zero_optimization_stage"):
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

        get = {"data": safe_get_full_fp32_param, "grad": safe_get_full_grad}[what]
        return {name: get(p).clone() for name, p in model.named_parameters()}
    found = {name: getattr(p, what) if what == "grad" else p.detach() for name, p in model.named_parameters()}
    return {name: getattr(value, "full_tensor", value.clone)() for name, value in found.items()}


def _close(got, want, what):
    for name, value in want.items():
        # a part that no batch needs has no gradient in one process and 0 beside others
        value = torch.zeros_like(got[name]) if value is None else value
        rounding = 1e-5 * float(value.abs().max()) + 1e-6  # sums round by their largest terms, not by what is left
        torch.testing.assert_close(
            got[name], value, rtol=1e-4, atol=rounding, msg=lambda m, n=name: f"{what}, {n}: {m}"
        )


class _Alone:
    """What one process does with all ranks' batches: two steps, evaluation behind them, and two steps more."""

    def __init__(self, strategy, kinds):
        model = fresh(strategy)
        self.batches = [batch_of(model, kind) for kind in kinds]
        optimizer = _optimizer(model)
        self.gradients = [self.step(model, optimizer) for _ in range(2)]
        self.weights = {2: _copied(model)}
        with torch.no_grad():
            self.logits = [model.eval()(**batch).logits for batch in self.batches]
        self.answers = [_answer(model, batch, rank) for rank, batch in enumerate(self.batches)]
        model.train()
        for steps in (3, 4):
            self.step(model, optimizer)
            self.weights[steps] = _copied(model)

    def step(self, model, optimizer):
        optimizer.zero_grad()
        model.encode_without_images = False
        (sum(model(**batch).loss for batch in self.batches) / len(self.batches)).backward()
        optimizer.step()
        return {name: p.grad for name, p in model.named_parameters()}


def _copied(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _answer(model, batch, rank):
    """Ids of another length on every rank."""
    prompt = {name: value for name, value in batch.items() if name != "labels"}
    return model.generate(**prompt, max_new_tokens=2 + 2 * rank, do_sample=False, eos_token_id=None)


class _Ranks:
    """A fresh model under a backend, and this rank's share of the batches."""

    def __init__(self, backend, strategy, batches):
        self.batches = batches[dist.get_rank() :: dist.get_world_size()]
        self.model = fresh(strategy)
        self.wrapped = BACKENDS[backend](self.model)
        self.by_deepspeed = by_deepspeed(backend)
        self.optimizer = self.wrapped.optimizer if self.by_deepspeed else _optimizer(self.wrapped)

    def step(self, gradients=None):
        """One step on all batches; where given, the gradients must be these."""
        self.optimizer.zero_grad()
        for batch in self.batches:
            loss = self.wrapped(**batch).loss
            (self.wrapped.backward if self.by_deepspeed else torch.Tensor.backward)(loss)
            if gradients is not None:
                _close(_whole(self.wrapped, self.model, "grad"), gradients, "gradients")
            (self.wrapped if self.by_deepspeed else self.optimizer).step()

    def check_weights(self, want, what):
        _close(_whole(self.wrapped, self.model, "data"), want, what)


def by_deepspeed(backend):
    return backend.startswith("DeepSpeed")


def check(folder, phase, backend, kinds, strategy):
    """Raise where two ranks with batches of these kinds do anything else than one process, also after a resume."""
    alone = _Alone(strategy, kinds)
    ranks = _Ranks(backend, strategy, alone.batches)
    if phase:
        _resumed_by_deepspeed(ranks, folder, alone, steps=1 + phase)
        return
    for gradients in alone.gradients:  # static_graph and ZeRO-3 learn in the first step what to expect in the second
        ranks.step(gradients)
    ranks.wrapped.eval()
    rank, [batch] = dist.get_rank(), ranks.batches
    with torch.no_grad():
        _close({"logits": ranks.wrapped(**batch).logits}, {"logits": alone.logits[rank]}, "evaluation")
    if not isinstance(ranks.wrapped, FullyShardedDataParallel):  # whose root gathers for forward only
        assert torch.equal(_answer(ranks.model, batch, rank), alone.answers[rank]), "generate: other ids"
    if ranks.by_deepspeed:
        _save_for_any_ranks(ranks.wrapped, folder)
    else:
        _resumed_by_one(ranks, folder, alone, strategy)
        _resumed_by_two(_Ranks(backend, strategy, alone.batches), folder, alone)


def _resumed_by_one(ranks, folder, alone, strategy):
    """What two ranks have saved is loaded by one process, which takes the next step and saves in turn."""
    dcp.save(dict(zip(SAVED, get_state_dict(ranks.wrapped, ranks.optimizer), strict=True)), checkpoint_id=folder)
    model = fresh(strategy)
    optimizer = _optimizer(model)
    state = dict(zip(SAVED, get_state_dict(model, optimizer), strict=True))
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    set_state_dict(model, optimizer, **state)
    _close(dict(model.named_parameters()), alone.weights[2], "loaded by one")
    alone.step(model, optimizer)
    _close(_copied(model), alone.weights[3], "resumed by one")
    state = dict(zip(SAVED, get_state_dict(model, optimizer), strict=True))
    if dist.get_rank() == 0:
        dcp.save(state, checkpoint_id=f"{folder}-by-one", no_dist=True)
    dist.barrier()


def _resumed_by_two(ranks, folder, alone):
    """What one process has saved is loaded by two ranks, which take the next step."""
    state = dict(zip(SAVED, get_state_dict(ranks.wrapped, ranks.optimizer), strict=True))
    dcp.load(state, checkpoint_id=f"{folder}-by-one")
    set_state_dict(ranks.wrapped, ranks.optimizer, **state)
    ranks.check_weights(alone.weights[3], "loaded by two")
    ranks.step()
    ranks.check_weights(alone.weights[4], "resumed by two")


def _save_for_any_ranks(engine, folder):
    """DeepSpeed's checkpoint, and its universal form beside it, which loads on any number of ranks."""
    from deepspeed.checkpoint.ds_to_universal import main

    tag = f"saved-{dist.get_world_size()}"
    engine.save_checkpoint(folder, tag=tag)
    dist.barrier()
    if dist.get_rank() == 0:
        folders = {"input_folder": f"{folder}/{tag}", "output_folder": f"{folder}/universal-{tag}"}
        workers = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False}
        # a state that names no layers of Megatron's is the missing one
        main(argparse.Namespace(**folders, **workers, strict=True, inject_missing_state=True))
    dist.barrier()


def _resumed_by_deepspeed(ranks, folder, alone, steps):
    ranks.wrapped.load_checkpoint(folder, tag=f"universal-saved-{3 - dist.get_world_size()}")
    ranks.check_weights(alone.weights[steps], f"loaded by {dist.get_world_size()}")
    ranks.step()
    ranks.check_weights(alone.weights[steps + 1], f"resumed by {dist.get_world_size()}")
    if dist.get_world_size() == 1:
        _save_for_any_ranks(ranks.wrapped, folder)


def work(folder, phase, jobs):
    """Run the jobs one after another, and write what came of each."""
    warnings.filterwarnings("error")
    warnings.filterwarnings("ignore", category=FutureWarning)  # of FSDP1 about itself
    warnings.filterwarnings(
        "ignore", "torch.distributed is disabled|`_get_pg_default|Multiple backends"
    )  # of checkpoints
    store, rank, world = f"file://{folder}/store-{phase}-{len(jobs)}", int(os.environ["RANK"]), WORLDS[phase]
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    for number, job in jobs:
        try:
            check(f"{folder}/saved-{number}", phase, *job)
            said = "ok"
        except Exception as problem:
            said = f"{type(problem).__name__}: {' '.join(str(problem).split())[:600]}"
            if os.environ.get("RANKS_TRACE"):
                import traceback

                traceback.print_exc()
        Path(folder, f"{number}-{phase}-{rank}").write_text(said)
        if said != "ok":
            os._exit(1)  # the other rank may wait for this one
    dist.barrier()
    os._exit(0)


def run(jobs):
    """What came of each job: ``"ok"``, or what the rank that knows most says."""
    found = ["ok"] * len(jobs)
    with tempfile.TemporaryDirectory() as folder:
        for phase, world in enumerate(WORLDS):
            left = [number for number, (backend, *_) in enumerate(jobs) if phase == 0 or by_deepspeed(backend)]
            left = [number for number in left if found[number] == "ok"]
            while left:
                said = _run_phase(folder, phase, world, [[number, jobs[number]] for number in left])
                found[left[len(said) - 1]] = said[-1]
                left = left[len(said) :]  # on new ranks behind a job that failed
    return found


def _run_phase(folder, phase, world, jobs):
    """What came of the jobs up to the first that failed."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    env |= {"DS_ACCELERATOR": "cpu", "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    command = [sys.executable, "-m", "tests.hf.ranks", "work", folder, str(phase), json.dumps(jobs)]
    ranks = [
        subprocess.Popen(command, env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd=ROOT)
        for rank in range(world)
    ]
    for process in ranks:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(300 + 60 * len(jobs))
        process.kill()
    found = []
    for number, _ in jobs:
        files = [Path(folder, f"{number}-{phase}-{rank}") for rank in range(world)]
        said = [file.read_text() if file.exists() else "did not end" for file in files]
        # a rank that waited for the other says least
        found.append(min(said, key=lambda word: (word == "ok", "gloo" in word, word == "did not end")))
        if set(said) != {"ok"}:
            break
    return found


def table(backends):
    """Rows of the page's table, with what does not work below it; the schema with both kinds of separators."""
    rows = ["| backend | " + " | ".join(" / ".join(mix) for mix in MIXES) + " |", "|---" * (len(MIXES) + 1) + "|"]
    notes = []
    for backend in backends:
        found = run([[backend, mix, SCHEMAS[1]] for mix in MIXES])
        rows.append(f"| {backend} | " + " | ".join("works" if said == "ok" else "fails" for said in found) + " |")
        failed = zip(MIXES, found, strict=True)
        notes += [f"* {backend}, {' / '.join(mix)}: {said[:200]}" for mix, said in failed if said != "ok"]
        print(rows[-1], *notes, sep="\n", flush=True)
    return "\n".join([*rows, "", *notes]).strip()


def main():
    have = importlib.util.find_spec("deepspeed") is not None
    backends = [name for name in BACKENDS if have or not name.startswith("DeepSpeed")]
    page = ROOT / "docs" / "training.md"
    begin, end = "<!-- ranks: python -m tests.hf.ranks -->\n", "\n<!-- end of ranks -->"
    before, rest = page.read_text().split(begin)
    page.write_text(before + begin + table(backends) + end + rest.split(end)[1])


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        work(sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]))
    else:
        main()
