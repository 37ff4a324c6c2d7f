"""The steps of `gpu.py`: each gives rows, plain JSON types, with a `problem` that is None where all is well."""

from __future__ import annotations

import copy
import random
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from uhd_kernels import calls, varlen_cross_attention
from uhd_kernels.op import attention_backward_op, attention_op

import kernels as bench  # kernels.py beside this file
from kernels import DTYPES, Case, Shape

Row = dict[str, Any]
SLACK = 3  # ours may be so many times as far from the truth as what it is compared with


class Work(NamedTuple):
    """Where the steps run, by which kernels, and on how large an encoder and images."""

    device: str
    impl: str
    width: int
    depth: int
    images_hw: tuple[tuple[int, int], ...]


def guarded(about: Row, measure: Callable[..., Row], *given: Any) -> Row:
    """A row of what is measured with what is given; where that fails, of why."""
    try:
        return {**about, "problem": None, **measure(*given)}
    except Exception as error:  # of many kinds: the row is the report
        told = str(error).strip().splitlines() or [""]
        return {**about, "problem": f"{type(error).__name__}: {told[0][:300]}"}


def off(found: Tensor, wanted: Tensor) -> float:
    """Relative error, in double precision."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    return ((found - wanted).norm() / wanted.norm()).item()


def beyond(error: float, allowed: float) -> str | None:
    return None if error <= allowed else f"off by {error:.1e}, {allowed:.1e} is allowed"


def ragged(number: int, most: int = 1200) -> list[Shape]:
    """Shapes with views of unequal lengths up to `most`, some of them empty, some alike.

    Head dims and numbers of latents are few, since the kernels are compiled for each: whole and padded dims, latents
    that fit a tile, fill two, and take more launches than one.
    """
    drawn, shapes = random.Random(0), []
    for place in range(number):
        lengths = [drawn.randint(1, most) for _ in range(drawn.randint(1, 9))]
        lengths += [drawn.choice(lengths)] * (place % 3) + [0] * (place % 5 == 4)
        drawn.shuffle(lengths)
        heads, dim, latents = drawn.choice([1, 3, 8, 16]), (64, 128, 72)[place % 3], (64, 144, 9, 256)[place % 4]
        shapes.append(Shape(tuple(lengths), latents, heads, dim))
    return shapes


def kernel_rows(work: Work, dtype: str, shapes: Sequence[Shape] | None = None) -> Iterator[Row]:
    """Output and gradients of the kernels against float64, at most three times as far from it as SDPA."""

    def measure(shape: Shape) -> Row:
        case = Case.make(shape, work.device, DTYPES[dtype])
        exact, plain = bench.exactly(case), bench.results(case, case.ours("sdpa"))
        calls.clear()
        problem = bench.check(case, lambda: case.ours(work.impl), exact, plain)
        if work.impl == "triton" and not problem and not (calls["triton"] and calls["triton backward"]):
            problem = "another implementation ran"
        return {"problem": problem}

    for shape in ragged(30) if shapes is None else shapes:
        yield guarded({"dtype": dtype, "shape": shape.name}, measure, shape)


def counted(rows: list[Row]) -> list[Row]:
    """How many shapes are right, and the first problem."""
    wrong = [row for row in rows if row["problem"] is not None]
    first = f"{wrong[0]['shape']}: {wrong[0]['problem']}" if wrong else None
    found = {"dtype": rows[0]["dtype"], "shapes": len(rows), "right": len(rows) - len(wrong)} if rows else {}
    return [{**found, "problem": first}] if rows else []


def operator_rows(work: Work) -> Iterator[Row]:
    """torch's own checks of the operators, and the operator in one compiled graph."""
    case = Case.make(Shape((40, 7, 40, 0), 20, 2, 32), work.device, torch.float32)
    index = [torch.tensor(each, dtype=torch.int32) for each in (case.bounds, case.shape.offsets)]

    def check(impl: str) -> Row:
        arguments = (*case.leaves[:3], index[0], 40, case.table, index[1], 0.2, impl)
        found = torch.library.opcheck(attention_op, arguments)
        with torch.no_grad():
            out, lse, kept = attention_op(*arguments)
        plain = [x.detach() for x in (torch.randn_like(out), *case.leaves[:3], out, lse, kept)]
        torch.library.opcheck(attention_backward_op, (*plain, 40, case.table.detach(), 0.2, impl, True))
        return {"checks": len(found)}

    def compiled(impl: str) -> Row:
        def attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
            views = {"key_positions": table, "position_offsets": index[1], "impl": impl}
            return varlen_cross_attention(q, k, v, index[0], 40, **views)

        wanted = bench.results(case, attend(*case.leaves))
        found = bench.results(case, torch.compile(attend, fullgraph=True)(*case.leaves))
        error = max(off(a, b) for a, b in zip(found, wanted, strict=True))
        return {"error": error, "problem": beyond(error, 1e-5)}

    for impl in dict.fromkeys((work.impl, "sdpa")):
        yield guarded({"what": "opcheck", "impl": impl}, check, impl)
        yield guarded({"what": "compiled, forward and backward", "impl": impl}, compiled, impl)


def time_rows(work: Work, shapes: Sequence[Shape] | None = None) -> Iterator[Row]:
    """The kernels and their contenders, with the ratio to the least time that the chip allows."""
    name = torch.cuda.get_device_name() if work.device == "cuda" else ""
    chip = next((each for each in bench.CHIPS if each in name), None)
    for shape in [bench.SHAPES[n] for n in (1, 5, 3, 6)] if shapes is None else shapes:
        found = guarded({}, lambda shape=shape: bench.timings(Case.make(shape, work.device, torch.bfloat16)))
        if problem := found.pop("problem"):
            yield {"shape": shape.name, "contender": "all", "problem": problem}
        for contender, result in found.items():
            row = {"shape": shape.name, "contender": contender, "problem": None, **result}
            row["problem"] = row["problem"] and row["problem"][:300]
            if chip is not None and row["problem"] is None:
                model = bench.model(shape, chip=chip, dtype=torch.bfloat16)
                for way in ("forward", "backward"):
                    least = bench.roofline_us(model[f"{way}_floor"], model[f"{way}_flops"], chip)
                    row[f"{way}_over_roofline"] = row[f"{way}_us"] / least
            yield row


def pictures(work: Work) -> list[bytes]:
    from preprocess import jpeg, made_picture

    return [jpeg(made_picture(*hw)) for hw in work.images_hw]


def part_rows(work: Work) -> Iterator[Row]:
    """The packed ViT and whole encoders against the CPU in double precision."""
    from uhd.demo import untrained_encoder

    def measure(encoder: Any, batch: Any, exact: tuple[Tensor, ...], dtype: torch.dtype, compiled: bool) -> Row:
        def results(device: str) -> tuple[Tensor, ...]:
            own = copy.deepcopy(encoder).to(device, dtype)
            if compiled and device == work.device:
                own.compile()
            return seen(own, batch.to(device))

        errors, allowed = ([off(a, b) for a, b in zip(results(at), exact, strict=True)] for at in (work.device, "cpu"))
        wrong = [beyond(a, SLACK * b + 1e-6) for a, b in zip(errors, allowed, strict=True)]
        return {"vit_error": errors[0], "tokens_error": errors[1], "problem": wrong[0] or wrong[1]}

    def seen(encoder: Any, batch: Any) -> tuple[Tensor, ...]:
        with torch.no_grad():
            pixels = batch.normalized(encoder.pixels).patches.to(next(encoder.vision.parameters()).dtype)
            return encoder.vision(pixels, batch.grids), encoder.encode(batch)

    for strategy in ("llava-uhd", "llava-next", "llava-onevision"):
        encoder = untrained_encoder(strategy=strategy, depth=min(work.depth, 3))
        batch = encoder.prepare(pictures(work)[:1]).ordered("chw")
        exact = seen(copy.deepcopy(encoder).double(), batch)
        for name, dtype in DTYPES.items():
            for compiled in (False, True) if name == "bf16" else (False,):
                about = {"encoder": strategy, "dtype": name, "compiled": "yes" if compiled else ""}
                yield guarded(about, measure, encoder, batch, exact, dtype, compiled)


class FrontEnd:
    """A front end of transformers and ours with its weights, on the same images, from pixels on the device on."""

    def __init__(self, name: str, work: Work, folder: Path) -> None:
        from end_to_end_peers import EXACT_WAY, make_peer

        import uhd

        images = pictures(work)
        peer = make_peer(name, work.width, work.depth, folder)
        ours = uhd.pretrained.load(peer.folder).eval()
        self.pixels, self.batch = peer.ways[EXACT_WAY](images), ours.prepare(images).to(work.device)
        self.patches = peer.patches(images), len(self.batch.patches)
        self.peer, self.ours = peer, ours.to(work.device)
        peer.model.to(work.device)
        self.truth = torch.cat(peer.see(self.pixels))
        self.exact = off(self.tokens(ours), self.truth)
        for model in (peer.model, ours):
            model.to(torch.bfloat16)
        self.pixels = self.pixels.to(work.device, torch.bfloat16)
        compiled = copy.deepcopy(ours).compile()
        self.ways: dict[str, Callable[[], Tensor]] = {
            "transformers": lambda: torch.cat(peer.see(self.pixels)),
            "uhd": lambda: self.tokens(ours),
            "uhd, compiled": lambda: self.tokens(compiled),
        }
        self.seen: dict[str, tuple[float, float]] = {}  # milliseconds and error

    def tokens(self, encoder: Any) -> Tensor:
        return torch.cat([item.tokens for item in encoder(self.batch)])

    def row(self, contender: str) -> Row:
        """Errors are from transformers in float32; ours there by no more than rounding."""
        call = self.ways[contender]
        error = off(call(), self.truth)
        taken = bench.time_us(call) / 1e3
        self.seen[contender] = taken, error
        their_time, their_error = self.seen["transformers"]
        problem = beyond(self.exact, 1.5e-4) or beyond(error, SLACK * their_error)
        if len(set(self.patches)) > 1:
            problem = "{} patches there, {} here".format(*self.patches)
        return {"ms": taken, "ratio": their_time / taken, "error": error, "problem": problem}


@torch.no_grad()
def front_end_rows(work: Work) -> Iterator[Row]:
    """Pixels on the GPU to tokens, beside transformers, with its weights and as many patches; in bfloat16."""
    from end_to_end_peers import MAKERS

    for name in MAKERS:
        with tempfile.TemporaryDirectory() as folder:
            ready: list[FrontEnd] = []
            made = guarded({"front_end": name}, _made, ready, name, work, Path(folder))
            if not ready:
                yield made
            for end in ready:
                about = {"front_end": name, "images": len(work.images_hw), "patches": end.patches[1]}
                for contender in end.ways:
                    yield guarded({**about, "contender": contender}, end.row, contender)


def _made(ready: list[FrontEnd], *given: Any) -> Row:
    ready.append(FrontEnd(*given))
    return {}


def peak_mib(step: Callable[[], object]) -> float:
    """The most that a call holds beside what was held before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def training_rows(work: Work) -> Iterator[Row]:
    """Forward, backward and AdamW's step of a ViT over the views of all images: packed, and padded by transformers."""
    from encoder import build_peer, peer_call, plans

    from uhd.vision import vit_from

    grids = [view.patches_hw for hw in work.images_hw for view in plans(hw).views]
    drawn = torch.Generator().manual_seed(1)
    patches = torch.randn(sum(h * w for h, w in grids), 3 * 16**2, generator=drawn)
    theirs = patches.unflatten(1, (3, -1)).transpose(1, 2).flatten(1).to(work.device)
    patches = patches.to(work.device)
    losses: list[float] = []

    def measure(contender: str) -> Row:
        model = build_peer(work.depth, work.width).train().requires_grad_(True)
        if contender == "transformers, padded":
            call = peer_call(model.to(work.device), theirs, [grids])
        else:
            model = vit_from(model).train().requires_grad_(True).to(work.device)
            model.gradient_checkpointing = "checkpointed" in contender
            call = lambda: model(patches, grids)  # noqa: E731
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

        def step() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(work.device, torch.bfloat16):
                loss = call().float().square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        losses.append(step().item())
        step()
        problem = beyond(abs(losses[-1] / losses[0] - 1), 1e-2)
        return {"peak_mib": peak_mib(step), "ms": bench.time_us(step) / 1e3, "problem": problem}

    for contender in ("transformers, padded", "uhd, packed", "uhd, packed, checkpointed"):
        yield guarded({"contender": contender, "patches": len(patches)}, measure, contender)


def waits_of(call: Callable[[], object]) -> Row:
    """How often a warm call makes the host wait for the GPU: as torch warns, and as the profiler sees CUDA called."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    told = [each for each in seen if "called a synchronizing CUDA operation" in str(each.message)]
    kinds = torch.profiler.ProfilerActivity
    profiler = torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA])
    with profiler as profile, torch.profiler.record_function("from pixels to tokens"):
        call()
    events = profile.events()
    span = next(each.time_range for each in events if each.name == "from pixels to tokens")
    blocking = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
    found = [each for each in events if each.name in blocking and span.start <= each.time_range.start <= span.end]
    places = Counter(f"{Path(each.filename).name}:{each.lineno}" for each in told)
    return {"warned": len(told), "profiled": len(found), "where": ", ".join(f"{p} x{n}" for p, n in places.items())}


@torch.no_grad()
def wait_rows(work: Work) -> Iterator[Row]:
    """Host waits between pixels and tokens: none are wanted where the pixels are on the GPU."""
    from uhd.demo import untrained_encoder

    def measure(encoder: Any, batch: Any, wanted: bool) -> Row:
        found = waits_of(lambda: encoder.encode(batch))
        return {"problem": "it waits" if wanted and (found["warned"] or found["profiled"]) else None, **found}

    for strategy in ("llava-uhd", "llava-next", "llava-onevision"):
        for dtype in (torch.float32, torch.bfloat16):
            encoder = untrained_encoder(strategy=strategy, depth=2, out_dim=1024).to(work.device, dtype)
            host = encoder.prepare(pictures(work))
            batch = host.to(work.device)
            about = {"encoder": strategy, "dtype": str(dtype).removeprefix("torch.")}
            yield guarded({**about, "pixels": "on the GPU"}, measure, encoder, batch, True)
            if strategy == "llava-uhd":
                yield guarded({**about, "pixels": "on the host"}, measure, encoder, host, False)
                encoder.compressor.inference = "narrow"
                yield guarded({**about, "pixels": "on the GPU, narrow"}, measure, encoder, batch, False)


class Step(NamedTuple):
    """What a step is called, what it gives, how many seconds it may take, and what of its rows a table shows."""

    title: str
    rows: Callable[[Work], Iterator[Row]]
    bound_s: float
    timed: bool  # so nothing may run beside it
    summary: Callable[[list[Row]], list[Row]] = list


def _kernels(dtype: str) -> Step:
    title = f"Kernels in {dtype} against float64, forward and backward"
    return Step(title, partial(kernel_rows, dtype=dtype), 120, False, counted)


STEPS = {
    **{f"kernels_{dtype}": _kernels(dtype) for dtype in DTYPES},
    "operator": Step("The operator", operator_rows, 90, False),
    "parts": Step("ViT and encoder against the CPU", part_rows, 120, False),
    "waits": Step("Host waits from pixels to tokens", wait_rows, 90, False),
    "training": Step("A training step of the ViT", training_rows, 40, True),
    "front_ends": Step("Front ends beside transformers, bfloat16", front_end_rows, 80, True),
    "times": Step("Kernels timed, bfloat16", time_rows, 110, True),
}
