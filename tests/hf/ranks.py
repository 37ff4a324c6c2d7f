"""Two ranks whose batches hold other kinds of media, under every backend: the table of docs/training.md.

``python -m tests.hf.ranks`` runs all (some minutes on two cores) and writes the table into the page. A cell is what
:func:`check` finds: a training step whose gradients are those of one process on both batches, evaluation with its
logits, ``generate`` with its tokens, and a checkpoint that one rank resumes as it would have gone on itself.
"""

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
SAVED = ("model_state_dict", "optim_state_dict")


def fresh(strategy):
    """A model with learned newlines (``llava-onevision``), or with the separators of a schema."""
    torch.manual_seed(0)  # of the compressor and of learned separators
    eyes = strategy if strategy in COMPRESSORS else encoder(schema=strategy)
    return attached(eyes, tie_word_embeddings=False).train()


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
    """With a state, and without Adam's division, which makes much of rounding."""
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


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
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
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


class _Alone:
    """What one process does with all ranks' batches in two steps, evaluation behind them, and a third step."""

    def __init__(self, strategy, kinds):
        model = fresh(strategy)
        self.batches = [batch_of(model, kind) for kind in kinds]
        optimizer = _optimizer(model)
        self.gradients = [self.step(model, optimizer) for _ in range(2)]
        self.weights = [_copied(model)]
        with torch.no_grad():
            self.logits = [model.eval()(**batch).logits for batch in self.batches]
        self.answers = [_answer(model, batch, rank) for rank, batch in enumerate(self.batches)]
        self.step(model.train(), optimizer)
        self.weights.append(_copied(model))

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


def check(folder, backend, kinds, strategy):
    """Raise where two ranks with batches of these kinds do anything else than one process."""
    alone = _Alone(strategy, kinds)
    rank = dist.get_rank()
    batch = alone.batches[rank]
    model = fresh(strategy)
    wrapped = BACKENDS[backend](model)
    by_deepspeed = hasattr(wrapped, "zero_optimization_stage")
    optimizer = wrapped.optimizer if by_deepspeed else _optimizer(wrapped)
    backward = wrapped.backward if by_deepspeed else torch.Tensor.backward
    # static_graph and ZeRO-3 learn in the first step what to expect in the second
    for step, gradients in enumerate(alone.gradients):
        backward(wrapped(**batch).loss)
        _close(_gradients(wrapped, model), gradients, f"gradients of step {step}")
        (wrapped if by_deepspeed else optimizer).step()
        optimizer.zero_grad()
    wrapped.eval()
    with torch.no_grad():
        _close({"logits": wrapped(**batch).logits}, {"logits": alone.logits[rank]}, "evaluation")
    if not isinstance(wrapped, FullyShardedDataParallel):  # whose root gathers for forward only
        assert torch.equal(_answer(model, batch, rank), alone.answers[rank]), "generate: other ids"
    if by_deepspeed:
        _weights_of_deepspeed(wrapped, folder, alone)
    else:
        _resumed_by_one(wrapped, optimizer, folder, alone, strategy)


def _resumed_by_one(wrapped, optimizer, folder, alone, strategy):
    """What two ranks have saved is loaded by one process, which takes the next step."""
    dcp.save(dict(zip(SAVED, get_state_dict(wrapped, optimizer), strict=True)), checkpoint_id=folder)
    model = fresh(strategy)
    optimizer = _optimizer(model)
    state = dict(zip(SAVED, get_state_dict(model, optimizer), strict=True))
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    set_state_dict(model, optimizer, **state)
    _close(dict(model.named_parameters()), alone.weights[0], "loaded")
    alone.step(model, optimizer)
    _close(_copied(model), alone.weights[1], "resumed")


def _weights_of_deepspeed(wrapped, folder, alone):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    wrapped.save_checkpoint(folder)
    dist.barrier()
    _close(get_fp32_state_dict_from_zero_checkpoint(folder), alone.weights[0], "saved weights")


def work(rank, world, folder, jobs):
    """Run the jobs one after another, and write what came of each."""
    warnings.filterwarnings("error")
    warnings.filterwarnings("ignore", category=FutureWarning)  # of FSDP1 about itself
    warnings.filterwarnings(
        "ignore", "torch.distributed is disabled|`_get_pg_default|Multiple backends"
    )  # of checkpoints
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=20))
    for number, job in enumerate(jobs):
        try:
            check(f"{folder}/saved-{number}", *job)
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
            env |= {"DS_ACCELERATOR": "cpu", "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
            command = [sys.executable, "-m", "tests.hf.ranks", "work", str(world), folder, json.dumps(rest)]
            ranks = [
                subprocess.Popen(
                    [*command, str(rank)], env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd=ROOT
                )
                for rank in range(world)
            ]
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
        work(int(sys.argv[5]), int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]))
    else:
        main()
