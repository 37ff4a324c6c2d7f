"""How fast this CPU multiplies by each product that torch offers, and so which one inference takes.

Which product is fastest depends on the CPU's maker and units, on torch and on its threads, so it is measured: once, in
at most a second, when the first large layers run, and kept in the user's cache directory. ``UHD_PRODUCTS`` overrides
what is measured, ``use_products`` pins it; training and small layers take torch's own products always. Choices change
speed, and results by rounding only.

For weights of one dtype a product is one of

* ``native``: ``torch.nn.functional.linear``;
* ``onednn``: oneDNN's product on the weights as they are, which ``torch.compile`` calls too;
* ``packed``: the same on a copy of the weights in oneDNN's own order. Where nothing is kept, ``onednn``;
* ``float32``: weights in a half type are cast where they are used, and multiplied by float32's product.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from uhd.torch_private import in_dispatch_mode, int8_product, packed_products
from uhd.writing import new_file

WAYS = {
    "float32": ("native", "onednn", "packed"),
    "bfloat16": ("native", "onednn", "packed", "float32"),
    "float16": ("native", "onednn", "packed", "float32"),
    "bfloat16 attention": ("native", "products"),
}
"""The products of each dtype, and those of attention: in one call, or two products around a softmax."""

NATIVE = dict.fromkeys(WAYS, "native")
"""What is never slow, and taken where nothing can be measured."""

GAIN = 1.05
"""Times as fast as torch's own product that another one must be."""

SMALL = 1 << 18
"""Numbers of a weight below which torch's own product is taken and nothing is measured."""

SECONDS = 1.0
"""Most that measuring takes."""

SHAPES = ((512, 768, 768), (128, 768, 3072))
"""(rows, inputs, outputs) of the products that are measured: of a ViT's attention and MLP."""

ATTENTION = (6, 576, 64)
"""(heads, tokens, width of a head) of the attention that is measured."""

_SCORES = 1 << 22  # scores at once, which the caches hold
_AGREE = 1.2  # the two shortest times of a product must be as near as this, or the clock is not trusted
_ROUNDS = 8
T = TypeVar("T")
_pinned: dict[str, str] | None = None


class Product(NamedTuple):
    """What to multiply in, and by which of ``native``, ``onednn`` and ``packed``."""

    dtype: torch.dtype
    way: str


def product_of(dtype: torch.dtype, device: torch.device, numbers: int, *, keeps: bool = False) -> Product:
    """Choose the product for inference with weights of this dtype and device.

    Args:
        dtype: Other than the three of ``WAYS``, elsewhere than on a CPU, and where something counts FLOPs or else sees
            every operation, it is torch's own product.
        device: Where the weights are.
        numbers: How many the largest weight has.
        keeps: Whether the caller keeps weights in another order; else ``packed`` is never chosen.
    """
    own = str(dtype).removeprefix("torch.")
    elsewhere = device.type != "cpu" or own not in WAYS or in_dispatch_mode()
    if elsewhere or (numbers < SMALL and not _overridden()):
        return Product(dtype, "native")
    choices = products()
    way = choices[own]
    if way == "float32":
        way, dtype, keeps = choices["float32"], torch.float32, False
    if packed_products() is None:
        way = "native"
    return Product(dtype, "onednn" if way == "packed" and not keeps else way)


def attention_of(dtype: torch.dtype, device: torch.device, numbers: int) -> str:
    """Whether attention at inference is ``native`` or takes ``products``; arguments as of ``product_of``."""
    own = f"{str(dtype).removeprefix('torch.')} attention"
    if device.type != "cpu" or own not in WAYS or (numbers < SMALL and not _overridden()):
        return "native"
    return products()[own]


def products() -> dict[str, str]:
    """The product of each dtype's name, one of its ``WAYS``: as pinned, asked for or measured, in this order."""
    if _pinned is not None:
        return dict(_pinned)
    if not (text := _overridden()):
        return choose(rates())
    if text == "native":
        return dict(NATIVE)
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    return _checked({name.strip(): way.strip() for name, _, way in pairs}, "UHD_PRODUCTS")


def use_products(choices: Mapping[str, str] | None) -> dict[str, str] | None:
    """Pin the products of this process, as ``products`` gave them somewhere; ``None`` undoes. Give those before.

    Raises:
        ValueError: A dtype or a product is not among ``WAYS``; what is left out is ``native``.
    """
    global _pinned
    before, _pinned = _pinned, None if choices is None else _checked(choices, "use_products")
    return before


def choose(found: Mapping[str, float]) -> dict[str, str]:
    """The products that these rates (see ``rates``) speak for; ``native`` where another gains less than ``GAIN``."""
    choices = dict(NATIVE)
    for dtype, ways in WAYS.items():
        known = {way: found.get(f"{dtype} {way}", 0.0) for way in ways if way != "float32"}
        if "float32" in ways:  # nothing is kept of weights that are cast
            known["float32"] = max(found.get("float32 native", 0.0), found.get("float32 onednn", 0.0))
        best = max(known, key=known.__getitem__)
        if known["native"] and known[best] >= GAIN * known["native"]:
            choices[dtype] = best
    return choices


def rates() -> dict[str, float]:
    """GFLOP/s on this process's threads of each product, by "dtype way", and of int8; {} where no clock is trusted.

    Read from the user's cache directory where this machine was measured before, else measured and written there.
    """
    return dict(_rates(torch.get_num_threads()))


@cache
def _rates(threads: int) -> Mapping[str, float]:
    parts = (cpu(), *_flags(), platform.machine(), torch.__version__, str(threads), str((SHAPES, ATTENTION)))
    file = cache_folder() / f"products-{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:16]}.json"
    with suppress(OSError, ValueError, AttributeError, TypeError):
        kept = {str(name): float(rate) for name, rate in json.loads(file.read_text(encoding="utf-8")).items()}
        if kept:
            return kept
    with ThreadPoolExecutor(1) as pool:  # whose thread is under no autocast, mode or default device of the caller's
        found = pool.submit(measure).result()
    if found:
        with suppress(OSError, ValueError):  # a cache that cannot be written is measured again
            file.parent.mkdir(parents=True, exist_ok=True)
            with new_file(file) as new:
                new.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def measure(*, clock: Callable[[], float] | None = None, seconds: float = SECONDS) -> dict[str, float]:
    """Time every product in turns, for ``seconds`` at most; see ``rates``.

    ``clock``: of this thread's work where torch has one thread, else of the wall.
    """
    clock = clock or (time.thread_time if torch.get_num_threads() == 1 else time.perf_counter)
    end, times = time.perf_counter() + seconds, {}
    with torch.inference_mode(False), torch.no_grad():
        calls = dict(_calls())
        for _ in range(_ROUNDS):
            for name, call in list(calls.items()):
                if time.perf_counter() > end:
                    break
                before = clock()
                call()
                times.setdefault(name, []).append(clock() - before)
            fastest = min(map(min, times.values()), default=0.0)  # none, where a slow machine had no time for a round
            calls = {name: call for name, call in calls.items() if min(times.get(name, [0.0])) < 4 * fastest}
    heads, tokens, width = ATTENTION
    dense = sum(2 * rows * inputs * outputs for rows, inputs, outputs in SHAPES)
    found = {}
    for name, taken in times.items():
        least = sorted(taken)[:2]
        agree = len(least) == 2 and least[1] <= _AGREE * least[0]
        if min(least) > 0 and (agree or name not in calls):
            flops = 4 * heads * tokens**2 * width if "attention" in name else dense
            found[name] = round(flops / least[0] / 1e9, 1)
        else:
            return {}
    return found


def _calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every product that torch offers here, run once: named calls on all of ``SHAPES``."""
    operators = packed_products()
    inputs = [(torch.ones(rows, k), torch.ones(n, k), torch.ones(n)) for rows, k, n in SHAPES]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        cast = [tuple(each.to(dtype) for each in some) for some in inputs]
        name = str(dtype).removeprefix("torch.")
        calls = {"native": lambda cast=cast: [F.linear(*some) for some in cast]}
        if operators is not None:
            calls["onednn"] = lambda cast=cast: [operators.product(*some, "none", [], "") for some in cast]
            with suppress(RuntimeError):  # a dtype that this CPU's units do not have
                packed = [(x, operators.pack(weight, len(x)), bias) for x, weight, bias in cast]
                calls["packed"] = lambda packed=packed: [operators.product(*some, "none", [], "") for some in packed]
        for way, call in calls.items():
            with suppress(RuntimeError):
                call()
                yield f"{name} {way}", call
    q, k, v = torch.ones(3, 1, *ATTENTION, dtype=torch.bfloat16)
    yield "bfloat16 attention native", lambda: F.scaled_dot_product_attention(q, k, v)
    yield "bfloat16 attention products", lambda: attend_by_products(q, k, v)
    whole = [(x.to(torch.int8), weight.to(torch.int8).t()) for x, weight, _ in inputs]
    yield "int8", lambda: [int8_product(*some) for some in whole]


def attend_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of (B, H, N, D) tensors by two products for each of B, scores rounded to their dtype.

    As ``torch.nn.functional.scaled_dot_product_attention``, whose scores stay in float32.
    """
    heads, tokens, width = q.shape[1:]
    rows = max(1, _SCORES // (heads * tokens))
    out = v.new_empty(len(q), tokens, heads, width).transpose(1, 2)
    for query, key, value, mixed in zip(q * width**-0.5, k.mT, v, out, strict=True):
        for some, place in zip(query.split(rows, 1), mixed.split(rows, 1), strict=True):
            place.copy_((some @ key).softmax(-1) @ value)
    return out


def in_threads(function: Callable[..., T], *lists: Sequence[Any]) -> list[T]:
    """``list(map(function, *lists))`` on as many threads as torch has: for work that lets go of the GIL.

    The first item that fails raises, as it would in turn. Workers of a ``DataLoader`` have one thread, as torch there.
    """
    threads = min(torch.get_num_threads(), len(lists[0]))
    if threads < 2:
        return list(map(function, *lists))
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, *lists))


def cpu() -> str:
    """The CPU's name as the system tells it, with family, model and stepping where it does."""
    told = _cpuinfo()
    if "model name" not in told:
        return platform.processor() or platform.machine()
    numbers = [f"{name} {told[key]}" for name, key in (("family", "cpu family"), ("model", "model")) if key in told]
    return ", ".join([told["model name"], *numbers])


def cache_folder() -> Path:
    """Where uhd keeps what it measured: ``$XDG_CACHE_HOME/uhd``, else ``~/.cache/uhd``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "uhd"


def _flags() -> list[str]:
    return sorted(_cpuinfo().get("flags", "").split())


@cache
def _cpuinfo() -> dict[str, str]:
    """The first processor of Linux's /proc/cpuinfo; {} elsewhere."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _overridden() -> str:
    """What the environment asks for, of small layers too."""
    return os.environ.get("UHD_PRODUCTS", "").strip()


def _checked(choices: Mapping[str, str], place: str) -> dict[str, str]:
    wrong = [f"{name}={way}" for name, way in choices.items() if way not in WAYS.get(name, ())]
    if wrong:
        known = "; ".join(f"{name}={'|'.join(ways)}" for name, ways in WAYS.items())
        raise ValueError(f"{place} has {', '.join(wrong)}; expected native, or some of {known}")
    return NATIVE | dict(choices)
