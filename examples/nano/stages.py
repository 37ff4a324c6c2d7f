"""The three stages that train a nano model: eyes, reading order, both together.

1. *vision*: images full of words -> latents. A throw-away linear head must tell from every latent what has its middle
   in the latent's cell, another from every patch what has its middle in the patch; and each latent must come near the
   sum of fixed random codes of what it should tell.
2. *text*: the language model answers questions from those sums, with noise in place of images, and so learns the order
   of reading. It needs no images, so stages 1 and 2 can run side by side.
3. *joint*: images in, answers out; everything trains. The heads stay with a small weight. *polish* is more of it at
   smaller rates, with every kind of question about every image.

All but the text stage are told where the glyphs are; the text stage gets codes that say it. Learning from answers
alone was not tried with this code.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from data import DENSE, IGNORE, KINDS, NUM_CODES, TASK, NanoBatch, NanoData, loader
from torch import Tensor, nn

from uhd import EncodedImage, UHDForConditionalGeneration
from uhd.nano.task import TaskSettings
from uhd.positions import interpolate_pos_embed
from uhd.schema.counted import layout_of
from uhd.slicing import View

STAGES = ("vision", "text", "joint", "polish")
LOCAL_WIDTH = 0.6  # of the attention that latents start with, in cells


@dataclass(frozen=True, kw_only=True)
class Stage:
    """How one stage trains.

    Attributes:
        name: "vision", "text", "joint" or "polish".
        steps, batch_size: Steps, and images in each.
        matrix_lr, other_lr: Peak learning rates of Muon, for the matrices inside blocks, and of AdamW, for the rest.
        latent_weight, patch_weight: Of the heads' losses.
        match_weight: Of the distance between latents and codes.
        noise: Text stage: largest standard deviation of the noise on a view's codes, which have an RMS of 1.
        every: Ask every kind of question about every image; see ``choose_questions``.
        warmup: Steps of linear warm-up; then a cosine to 0.
    """

    name: str
    steps: int
    batch_size: int = 32
    matrix_lr: float = 0.015
    other_lr: float = 0.003
    latent_weight: float = 1.0
    patch_weight: float = 1.0
    match_weight: float = 1.0
    noise: float = 0.7
    every: bool = False
    warmup: int = 50

    @property
    def modules(self) -> tuple[str, ...]:
        """Which part of the model trains, by the beginning of its parameters' names."""
        return {"vision": ("visual.",), "text": ("language_model.",)}.get(self.name, ("visual.", "language_model."))

    def settings(self, step: int) -> TaskSettings:
        """Of the scenes: full ones for vision, small ones first for text."""
        if self.name == "vision":
            return DENSE
        grown = min(step / (0.4 * self.steps), 1.0) if self.name == "text" else 1.0
        least, most = TASK.area
        return replace(TASK, area=(least, round(1400 + grown * (most - 1400))), max_words=round(3 + grown * 5))


class Supervision(nn.Module):
    """What a latent or a patch should tell; thrown away after training.

    Args:
        width: D of latents and patch features.
        latents: Q of a view.
        seed: Of the codes.
    """

    def __init__(self, width: int, latents: int, *, seed: int = 1) -> None:
        super().__init__()
        drawn = torch.Generator().manual_seed(seed)
        self.register_buffer("codes", torch.randn(NUM_CODES + 1, width, generator=drawn))  # the last: nothing there
        self.register_buffer("slots", torch.randn(latents, width, generator=drawn))  # which latent it is
        self.latent_head, self.patch_head = nn.Linear(width, NUM_CODES), nn.Linear(width, KINDS)
        for head, share in ((self.latent_head, 0.01), (self.patch_head, 0.03)):  # what is there is rare
            nn.init.normal_(head.weight, std=width**-0.5, generator=drawn)
            nn.init.constant_(head.bias, math.log(share))

    def ideal(self, latent_codes: Tensor, views: Sequence[View]) -> Tensor:
        """(M, NUM_CODES) bool -> (M, D): the sum of codes that each latent should be, at an RMS of 1."""
        told = torch.cat([latent_codes, ~latent_codes.any(1, keepdim=True)], dim=1).float()
        total = told @ self.codes + torch.cat([self._slots(view.latents_hw) for view in views])
        return F.rms_norm(total, total.shape[-1:])

    def _slots(self, latents_hw: tuple[int, int] | None) -> Tensor:
        """Codes of the latents' places, between the square's where latents are fitted to a view."""
        if latents_hw is None:
            return self.slots
        side = math.isqrt(len(self.slots))
        return interpolate_pos_embed(self.slots, (side, side), latents_hw, mode="bilinear")


def fit_attention(model: UHDForConditionalGeneration, *, steps: int = 300, seed: int = 0) -> float:
    """Before training: fit the query and key projections so that each latent looks at its own part of a view.

    The target is a Gaussian around the middle of the latent's cell; keys are noise with the view's positions. What
    this saves the vision stage was not measured alone.

    Returns:
        Mean divergence from the target at the end, nats.
    """
    resampler = model.visual.compressor
    attn, width = resampler.attn, resampler.config.width
    side, heads = math.isqrt(resampler.config.num_latents), resampler.config.num_heads
    some = ((32, 32), (40, 90), (90, 40), (60, 60), (20, 100), (100, 20))
    views = {(view.patches_hw, view.latents_hw or (side, side)) for hw in some for view in model.visual.plan(hw).views}
    drawn = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([attn.in_proj_weight], lr=2e-3)
    queries = {hw: resampler.queries(resampler.query_table(hw), hw).detach() for _, hw in views}
    for _ in range(steps):
        loss = torch.zeros(())
        for (rows, columns), latents_hw in sorted(views):
            kv = F.layer_norm(torch.randn(rows * columns, width, generator=drawn), (width,))
            keys = kv + resampler.key_table((rows, columns), latents_hw)
            parts = (
                (queries[latents_hw], attn.in_proj_weight[:width]),
                (keys, attn.in_proj_weight[width : 2 * width]),
            )
            q, k = (F.linear(x, weight).unflatten(-1, (heads, -1)).transpose(0, 1) for x, weight in parts)
            logits = q @ k.mT / math.sqrt(width // heads)  # (heads, Q, keys)
            cells = torch.tensor(latents_hw) / max(latents_hw)
            middles = (_middles(*grid) * cells for grid in (latents_hw, (rows, columns)))
            far = torch.cdist(*middles) * max(latents_hw) / LOCAL_WIDTH
            wanted = (-far.square() / 2).log_softmax(-1)
            loss = (
                loss
                + F.kl_div(logits.log_softmax(-1), wanted.expand_as(logits), reduction="none", log_target=True)
                .sum(-1)
                .mean()
            )
        optimizer.zero_grad()
        (loss / len(views)).backward()
        optimizer.step()
    return loss.item() / len(views)


def _middles(rows: int, columns: int) -> Tensor:
    """(rows * columns, 2) middles of a grid's cells, as shares of the view."""
    return torch.cartesian_prod((torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns)


def losses(
    model: UHDForConditionalGeneration,
    supervision: Supervision,
    stage: Stage,
    batch: NanoBatch,
    drawn: torch.Generator,
) -> tuple[Tensor, dict[str, float]]:
    """A step's loss, and what the log tells of it."""
    loss, log, views = torch.zeros(()), {}, [view for plan in batch.images.plans for view in plan.views]
    if stage.name == "text":
        tokens = supervision.ideal(batch.latent_codes, views)
        spread = torch.rand(len(views), 1, generator=drawn) * stage.noise
        spread = spread.repeat_interleave(torch.tensor([view.num_tokens for view in views]), 0)
        tokens = tokens + spread * torch.randn(tokens.shape, generator=drawn)
    else:
        tokens, features = _encode(model, batch)
        for name, logits, told, weight in (
            ("latent", supervision.latent_head(tokens), batch.latent_codes, stage.latent_weight),
            ("patch", supervision.patch_head(features), batch.patch_codes, stage.patch_weight),
        ):
            wrong = F.binary_cross_entropy_with_logits(logits, told.float(), reduction="sum") / len(told)
            loss, log[name] = loss + weight * wrong, wrong.item()
            log[f"{name} found"] = ((logits > 0) & told).sum().item() / max(told.sum().item(), 1)
        if stage.match_weight:
            loss = loss + stage.match_weight * F.mse_loss(tokens, supervision.ideal(batch.latent_codes, views))
    if stage.name != "vision":
        wrong, log["characters"] = _answer(model, batch, tokens)
        loss, log["answer"] = loss + wrong, wrong.item()
    return loss, log


def _encode(model: UHDForConditionalGeneration, batch: NanoBatch) -> tuple[Tensor, Tensor]:
    """Latents (M, D) and patch features (N, D)."""
    kept = []
    hook = model.visual.vision.register_forward_hook(lambda module, inputs, output: kept.append(output))
    try:
        tokens = model.visual.encode(batch.images)
    finally:
        hook.remove()
    return tokens, kept[0]


def _answer(model: UHDForConditionalGeneration, batch: NanoBatch, tokens: Tensor) -> tuple[Tensor, float]:
    """Cross-entropy of the answers given visual tokens (M, D), and the share of right characters."""
    plans, schema = batch.images.plans, model.visual.schema
    parts = tokens.split([cut.num_visual_tokens for cut in plans])
    encoded = [EncodedImage(part, cut, layout_of(cut, schema)) for part, cut in zip(parts, plans, strict=True)]
    hidden = torch.zeros(batch.seen.shape).masked_fill_(~batch.seen, torch.finfo(torch.float32).min)
    out = model(
        input_ids=batch.input_ids,
        attention_mask=hidden,
        position_ids=batch.position_ids,
        image_tokens=encoded,
        use_cache=False,
    )
    told = batch.labels[:, 1:]
    logits, told = out.logits[:, :-1][told != IGNORE], told[told != IGNORE]
    return F.cross_entropy(logits, told), (logits.argmax(-1) == told).float().mean().item()


def make_optimizers(named: list[tuple[str, nn.Parameter]], stage: Stage) -> list[torch.optim.Optimizer]:
    """Muon (torch 2.9) for the matrices that map features to features, AdamW for everything else."""
    apart = ("embed_tokens", "lm_head", "positions", "query", "_head")
    matrices, others = [], []
    for name, parameter in named:
        inner = parameter.dim() == 2 and not any(part in name for part in apart)
        (matrices if inner else others).append(parameter)
    return [
        torch.optim.AdamW(others, lr=stage.other_lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
        torch.optim.Muon(matrices, lr=stage.matrix_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
    ]


def schedule(stage: Stage, step: int) -> float:
    """Share of the peak learning rate at a step."""
    warm = min(1.0, (step + 1) / stage.warmup)
    return warm * max(0.5 * (1 + math.cos(math.pi * step / stage.steps)), 0.01)


def train(
    model: UHDForConditionalGeneration,
    supervision: Supervision,
    stage: Stage,
    folder: Path,
    *,
    seed: int,
    stop: int | None = None,
    workers: int = 0,
    every: int = 100,
    keep: int = 500,
) -> None:
    """Run one stage, or go on with it: its newest checkpoint is in ``folder`` as ``STAGE.pt``, its log as STAGE.jsonl.

    Args:
        model, supervision: Changed in place.
        seed: Of scenes and noise.
        stop: Leave off after this step, with a checkpoint; the next call goes on. ``None``: the stage's last.
        workers: Processes that make data.
        every: Steps between lines of the log.
        keep: Steps between checkpoints.
    """
    named = [(name, p) for name, p in model.named_parameters() if name.startswith(stage.modules)]
    named += list(supervision.named_parameters()) if stage.name != "text" else []
    optimizers = make_optimizers(named, stage)
    start, stop = resume(folder / f"{stage.name}.pt", model, supervision, optimizers), stop or stage.steps
    number = STAGES.index(stage.name)
    data = NanoData(
        model,
        seed=10 * seed + number,
        batch_size=stage.batch_size,
        start=start,
        stop=stop,
        settings=stage.settings,
        ask=stage.name != "vision",
        every=stage.every,
    )
    model.train()
    batches, logs, clock = iter(loader(data, workers=workers)), [], _Clock()
    for step in range(start, stop):
        batch = clock.wait(batches)
        for optimizer in optimizers:
            peak = stage.matrix_lr if isinstance(optimizer, torch.optim.Muon) else stage.other_lr
            for group in optimizer.param_groups:
                group["lr"] = peak * schedule(stage, step)
        loss, log = losses(model, supervision, stage, batch, torch.Generator().manual_seed(seed * 1_000_000 + step))
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        for optimizer in optimizers:
            optimizer.step()
        logs.append(log)
        if (step + 1) % every == 0 or step + 1 == stop:
            _report(folder / f"{stage.name}.jsonl", stage.name, step + 1, logs, clock)
            logs = []
        if (step + 1) % keep == 0 or step + 1 == stop:
            save(folder / f"{stage.name}.pt", step + 1, model, supervision, optimizers)
    model.eval()


class _Clock:
    """Seconds since the start, CPU seconds of this process, and seconds spent waiting for data."""

    def __init__(self) -> None:
        self.start, self.cpu, self.waited = time.perf_counter(), time.process_time(), 0.0

    def wait(self, batches: Iterator[NanoBatch]) -> NanoBatch:
        before = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - before
        return batch

    def read(self) -> dict[str, float]:
        now = {"seconds": time.perf_counter() - self.start, "cpu": time.process_time() - self.cpu}
        return {name: round(value, 1) for name, value in {**now, "waited": self.waited}.items()}


def _report(path: Path, name: str, step: int, logs: list[dict[str, float]], clock: _Clock) -> None:
    means = {key: round(sum(log[key] for log in logs) / len(logs), 4) for key in logs[0]}
    line = {"step": step, **clock.read(), **means}
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(name, " ".join(f"{key} {value:g}" for key, value in line.items()), flush=True)


def save(path: Path, step: int, model: nn.Module, supervision: nn.Module, optimizers: list) -> None:
    """Write a checkpoint; an interrupted write leaves the one before."""
    state = {
        "step": step,
        "model": model.state_dict(),
        "supervision": supervision.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def resume(path: Path, model: nn.Module, supervision: nn.Module, optimizers: list) -> int:
    """Load a checkpoint, where there is one; the number of steps it has behind it."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    supervision.load_state_dict(state["supervision"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"]


def start_joint(folder: Path, model: nn.Module, supervision: nn.Module) -> None:
    """Eyes from the vision stage, the language model from the text stage.

    Raises:
        FileNotFoundError: One of them has not run.
    """
    vision = torch.load(folder / "vision.pt", weights_only=True)
    text = torch.load(folder / "text.pt", weights_only=True)
    parts = {name: tensor for name, tensor in vision["model"].items() if name.startswith("visual.")}
    parts |= {name: tensor for name, tensor in text["model"].items() if not name.startswith("visual.")}
    model.load_state_dict(parts)
    supervision.load_state_dict(vision["supervision"])


def start_from(path: Path, model: nn.Module, supervision: nn.Module) -> None:
    """Everything from the end of another stage.

    Raises:
        FileNotFoundError: It has not run.
    """
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    supervision.load_state_dict(state["supervision"])
