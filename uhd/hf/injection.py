"""How visual rows reach a language model: through ``inputs_embeds``, or through a hook on its input embedding.

Most models give the same output for ids and for the embeddings of those ids. Some read the ids a second time
(per-layer embeddings, hash routing), and some refuse ``inputs_embeds`` in ``generate``. There the ids keep flowing and
a forward hook replaces rows of what the embedding returns. :func:`choose_injection` finds out.
"""

from __future__ import annotations

import inspect
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

PROBE_LENGTH = 6
_NOISE = 0.1


@dataclass
class InjectionCount:
    """How often the hook replaced rows."""

    calls: int = 0


@contextmanager
def inject(embed: nn.Module, prompt_ids: Tensor, change: Callable[[Tensor], Tensor]) -> Iterator[InjectionCount]:
    """While open, ``embed`` called on the prompt returns ``change`` of its output.

    The prompt is known by its ids: a call is changed where its leading columns are ``prompt_ids``, each row repeated
    for beams or returned sequences. Decoding steps with a cache are shorter and pass unchanged; without a cache the
    prompt comes again in each step and is changed again. Calls from other threads pass unchanged, contexts nest, and
    the hook is removed on any way out.

    Args:
        embed: The language model's input embedding.
        prompt_ids: (B, T) int64, as the language model gets them.
        change: (B, T, D) -> (B, T, D).

    Raises:
        ValueError: The context closes without an error and the hook never fired: the model does not call ``embed``.
    """
    count, owner = InjectionCount(), threading.get_ident()

    def replaced(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
        ids = args[0] if args else next(iter(kwargs.values()), None)
        if threading.get_ident() != owner or not starts_with(ids, prompt_ids):
            return None
        count.calls += 1
        repeats, length = len(ids) // len(prompt_ids), prompt_ids.shape[1]
        # beams of a sample hold the same prompt, so one row in `repeats` is enough
        changed = change(output[::repeats, :length]).repeat_interleave(repeats, 0)
        return torch.cat([changed, output[:, length:]], dim=1)

    handle = embed.register_forward_hook(replaced, with_kwargs=True)
    try:
        yield count
    finally:
        handle.remove()
    if not count.calls:
        raise ValueError(
            f"the language model never called its input embedding ({type(embed).__name__}) on the prompt, so no image "
            "reached it: its get_input_embeddings() is not what it embeds ids with, or the prompt was fed in chunks "
            "(prefill_chunk_size), which injection by hook cannot follow"
        )


def starts_with(ids: Tensor | None, prompt_ids: Tensor) -> bool:
    """Whether the rows of ``ids`` begin with those of ``prompt_ids`` (B, T), each repeated as often as the others."""
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] < prompt_ids.shape[1] or len(ids) == 0:
        return False
    if len(ids) % len(prompt_ids):
        return False
    wanted = prompt_ids.repeat_interleave(len(ids) // len(prompt_ids), 0)
    return torch.equal(ids[:, : prompt_ids.shape[1]], wanted.to(ids.device))


def choose_injection(lm: nn.Module) -> str:
    """``"embeds"`` where it is proven harmless, else ``"hook"``.

    The model runs twice on a few ids whose embeddings are in part replaced by rows of no id: once by the hook, once by
    ``inputs_embeds``. ``"embeds"`` needs the same logits, the same modules called the same number of times, and a
    ``generate`` that takes ``inputs_embeds``. Parameters that hold one value throughout (branches that are initialised
    to zero, and gates and norms with them) get noise for the duration, so that a branch that is silent before
    training cannot hide; they are put back bit by bit.

    Args:
        lm: A causal language model of transformers. Its mode and random state are left as they were.

    Raises:
        ValueError: Neither way works: the model calls another embedding than ``get_input_embeddings()``.
    """
    return explain_injection(lm)[0]


def explain_injection(lm: nn.Module) -> tuple[str, str]:
    """As :func:`choose_injection`, and with the choice a sentence that says why."""
    embed = lm.get_input_embeddings()
    with torch.no_grad(), evaluating(lm), constants_shaken(lm):
        problem = _embeds_problem(lm, embed)
    if problem is None:
        return "embeds", "ids and their embeddings give the same logits through the same modules"
    return "hook", problem


def _embeds_problem(lm: nn.Module, embed: nn.Module) -> str | None:
    """What keeps ``inputs_embeds`` from doing what the hook does; raises where not even the hook works."""
    ids = probe_ids(lm, embed)
    rows = embed(ids)
    generator = torch.Generator().manual_seed(1)
    strange = torch.randn(rows.shape, generator=generator).to(rows) * rows.float().pow(2).mean().sqrt().to(rows)
    rows[:, 1::2] = strange[:, 1::2]
    try:
        with inject(embed, ids, lambda _: rows):
            by_hook, modules = _run(lm, input_ids=ids)
    except ValueError as error:
        raise ValueError(f"{type(lm).__name__} cannot be given images: {error}") from error
    if "inputs_embeds" not in inspect.signature(lm.prepare_inputs_for_generation).parameters:
        return "its generate does not take inputs_embeds"
    try:
        by_embeds, others = _run(lm, inputs_embeds=rows)
    except Exception as error:  # whatever a model raises without ids, it is not usable this way
        return f"with inputs_embeds it raises {type(error).__name__}: {' '.join(str(error).split())[:120]}"
    modules.subtract({embed: 1})
    if +modules != +others:
        names = {module: name for name, module in lm.named_modules()}
        differ = [names[module] for module in modules | others if modules[module] != others[module]]
        return f"ids and inputs_embeds do not call the same modules: {', '.join(differ[:3])}"
    tolerance = 1e-4 if by_hook.dtype == torch.float32 else 1e-2
    if (by_hook - by_embeds).abs().max() <= tolerance * by_hook.abs().max():
        return None
    return "ids and inputs_embeds give other logits: the ids are read a second time"


def probe_ids(lm: nn.Module, embed: nn.Module) -> Tensor:
    """(1, PROBE_LENGTH) ids spread over the vocabulary."""
    spread = torch.linspace(0, lm.config.get_text_config().vocab_size - 1, PROBE_LENGTH + 2)[1:-1].long()
    return spread[None].to(next((p.device for p in embed.parameters()), None))


def _run(lm: nn.Module, **inputs: Tensor) -> tuple[Tensor, Counter]:
    """Logits, and how often each submodule was called."""
    called: Counter = Counter()
    handles = [module.register_forward_pre_hook(lambda module, _: called.update([module])) for module in lm.modules()]
    try:
        mask = torch.ones(1, PROBE_LENGTH, dtype=torch.long, device=next(iter(inputs.values())).device)
        return lm(**inputs, attention_mask=mask, use_cache=False, return_dict=True).logits, called
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model in eval mode; at the end the modules that were training train again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def constants_shaken(lm: nn.Module) -> Iterator[None]:
    """Noise on every parameter that holds one value throughout; the values come back exactly."""
    generator = torch.Generator().manual_seed(0)
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        for parameter in lm.parameters():
            # quantized weights, which are classes of their own, are no constants
            usable = type(parameter) is nn.Parameter and parameter.is_floating_point() and parameter.numel()
            if usable and parameter.device.type != "meta" and parameter.amin() == parameter.amax():
                kept.append((parameter, parameter.detach().clone()))
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.copy_(parameter + _NOISE * noise)
        yield
    finally:
        for parameter, value in kept:
            parameter.copy_(value)
