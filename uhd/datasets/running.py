"""A run over a data set: what is settled before, the units that are still to do, and the index at the end."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

import uhd
from uhd import machine
from uhd.datasets import index, local, on_ray, sources
from uhd.datasets.local import Done
from uhd.datasets.plan import FORMAT, Plan
from uhd.datasets.sources import listed
from uhd.datasets.units import Job
from uhd.files import read_json
from uhd.loading import Preparation
from uhd.saving import CONFIG_FILE, WEIGHTS_FILE
from uhd.settings import check_choice, whole
from uhd.writing import is_file, write_text

try:
    import fcntl
except ImportError:  # not POSIX: two runs are told apart by nothing, and write the same bytes
    fcntl = None  # type: ignore[assignment]

RULES = 1
"""Raised where this library gives an encoder's images other plans, pixels or tokens than before, beyond rounding."""

BUDGET = 16_384
"""Patches that are encoded at once: some 30 views of 336 px."""

DTYPES = ("float32", "bfloat16", "float16")
ENGINES = {"local": local.run, "ray": on_ray.run}


def encode(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    encoder: Any,
    *,
    budget_patches: int = BUDGET,
    dtype: str | None = None,
    columns: Sequence[str] = (),
    limit: int | None = None,
    dedupe: bool = False,
    shard: tuple[int, int] = (0, 1),
    engine: str = "local",
    on_error: str = "record",
    device: str | None = None,
    progress: Callable[[Iterator[Done]], Iterator[Any]] = iter,
    **settings: Any,
) -> dict[str, Any]:
    """Encode every image of a source into a folder, or the rest of it where an earlier call was ended.

    What is written does not depend on engine, processes or kills, bit by bit, on CPUs or GPUs of one model.

    Args:
        source: What :func:`uhd.datasets.sources.listed` takes.
        out: The folder; :class:`uhd.datasets.Tokens` reads it.
        encoder: A folder of :meth:`uhd.VisualEncoder.save_pretrained`, or an encoder, which is saved for the workers.
        budget_patches: Most patches that are encoded at once, unless an image alone has more.
        dtype: Of the tokens, one of :data:`DTYPES`; ``None``: the encoder's own.
        columns, limit: What of the source is kept in the index; how many of its images, from the first, are encoded.
        dedupe: Encode files of equal bytes once. Every file is read twice, see :class:`uhd.datasets.plan.Plan`.
        shard: (i, n): the i-th, from 0, of n runs that together do all of it, at once or one after the other.
        engine, settings: ``"local"`` or ``"ray"``, and keywords of :func:`uhd.datasets.local.run` (``processes``) or
            of :func:`uhd.datasets.on_ray.run`.
        on_error: ``"record"`` images that are refused, or ``"stop"`` at the first.
        device: ``"cpu"`` or ``"cuda"``; ``None``: a GPU where there is one.
        progress: Wraps what comes while units are done: (number, counts).

    Returns:
        ``inputs``, ``images``, ``errors``, ``tokens``, ``units`` of ``out``, ``done``: how many of these this call
        did, and ``complete``: whether all are there and the index is written. If not, counts are of those there.

    Raises:
        ValueError: There is no image; ``out`` is of another recipe or source, or another run is writing there; a
            setting is out of range; or an image is refused, and ``on_error`` says stop.
        OSError: ``out`` cannot be written. What was done is kept, and the same call goes on.
    """
    out = Path(out)
    form = {"dtype": dtype, "budget_patches": budget_patches, "columns": columns, "limit": limit, "dedupe": dedupe}
    check_form(form | settings, shard)
    form["columns"] = columns = list(dict.fromkeys(columns))
    check_choice("engine", engine, ENGINES)
    check_choice("on_error", on_error, ("record", "stop"))
    _check_source(source, out, columns)
    with saved(encoder) as folder, _alone(out, shard):
        with _locked(out / ".lock-run"):  # shards that begin at once settle one thing
            settled = _settle(out, _recipe(folder, form), device)
        job = job_of(out, folder, budget_patches, dtype, stop=on_error == "stop", settled=settled)
        plan = Plan(out, listed(source, columns=columns, skip=out), limit, shard, dedupe)
        done = sum(1 for _ in progress(ENGINES[engine](job, iter(plan), **settings)))
        return {**index.finish(out, plan.inputs, plan.units), "done": done}


def _check_source(source: str | os.PathLike[str], out: Path, columns: Sequence[str]) -> None:
    if out.is_dir() and os.path.isdir(source) and out.samefile(source):
        raise ValueError(f"{out} is the source: give another folder for the tokens")
    if next(iter(listed(source, columns=columns, skip=out)), None) is None:
        raise ValueError(f"{source} holds no images")


def check_form(form: dict[str, Any], shard: tuple[int, int]) -> None:
    """Raise a ``ValueError`` for what no run can be asked for."""
    whole("budget_patches", form["budget_patches"], least=1)
    for name, least in (("limit", 1), ("processes", 0), ("actors", 1)):
        if form.get(name) is not None:
            whole(name, form[name], least=least)
    if not 0 <= shard[0] < shard[1]:
        raise ValueError(f"shard is i/n with i of 0 to n - 1, got {shard[0]}/{shard[1]}")
    if form["dtype"] is not None:
        check_choice("dtype", form["dtype"], DTYPES)
    if isinstance(names := form["columns"], str):
        raise TypeError(f"columns are a list, got the string {names!r}: write [{names!r}]")
    if taken := set(names) & {*index.COLUMNS, index.BORDERS}:
        raise ValueError(f"{', '.join(sorted(taken))}: the index itself has columns of these names")


def _recipe(folder: Path, form: dict[str, Any]) -> dict[str, Any]:
    """All that the bytes of ``out`` depend on."""
    encoder = {"encoder": read_json(folder / CONFIG_FILE), "weights": _digest(folder / WEIGHTS_FILE)}
    return {**encoder, "rules": RULES, "unit": sources.UNIT, **form}


def job_of(out: Any, folder: Path, budget: int, dtype: str | None, *, stop: bool, settled: dict[str, Any]) -> Job:
    """What every worker is told; a ``ValueError`` where the folder holds no encoder."""
    how = Preparation.of(uhd.VisualEncoder.describe(folder))
    return Job(str(out), str(folder), how, budget, dtype, stop, **settled)


@contextmanager
def saved(encoder: Any) -> Iterator[Path]:
    """The folder of an encoder."""
    if isinstance(encoder, (str, os.PathLike)):
        if not is_file(Path(encoder) / CONFIG_FILE):
            raise ValueError(f"{encoder} holds no {CONFIG_FILE}: give a folder that save_pretrained wrote")
        yield Path(encoder)
        return
    with tempfile.TemporaryDirectory() as folder:
        encoder.save_pretrained(folder)
        yield Path(folder)


@contextmanager
def _alone(out: Path, shard: tuple[int, int]) -> Iterator[None]:
    """A folder that no other run of this shard writes to meanwhile."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file, expected a folder for the tokens")
    out.mkdir(parents=True, exist_ok=True)
    busy = f"another run is writing to {out}: wait for its end, or end it"
    with _locked(out / ".lock-{}-{}".format(*shard), busy):
        yield


@contextmanager
def _locked(path: Path, refused: str = "") -> Iterator[None]:
    """Hold a lock; while another process does, it is ``refused``, or waited for."""
    with open(path, "w") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if refused else 0))
        except BlockingIOError:
            raise ValueError(refused) from None
        except OSError:  # no locks here: two runs write the same bytes
            pass
        yield
        with suppress(OSError):  # another one may have it open
            path.unlink()


def _settle(out: Path, recipe: dict[str, Any], device: str | None) -> dict[str, Any]:
    """Where and how every worker multiplies, from now on; ``run.json`` says so, and of what the folder is."""
    path = out / index.RUN
    if path.exists():
        run = index.read_run(out)
        if other := [name for name in {**recipe, **run["recipe"]} if run["recipe"].get(name) != recipe.get(name)]:
            told = "; ".join(f"{name}: {_shown(run['recipe'], recipe, name)}" for name in other)
            raise ValueError(f"{out} is of another recipe ({told}): give it another folder, or what it was made with")
        if device not in (None, run["settled"]["device"]):
            raise ValueError(f"{out} was begun on {run['settled']['device']}, and device={device!r} rounds otherwise")
        return run["settled"]
    if index.units_in(out):
        raise ValueError(f"{out} holds units and no {index.RUN}, so nobody knows their recipe: another folder")
    settled = settled_on(device)
    on = {"cpu": machine.cpu(), **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})}
    versions = {"uhd": uhd.__version__, "torch": torch.__version__, **on}
    index.write_json(path, {"format": FORMAT, "recipe": recipe, "settled": settled, "versions": versions})
    write_text(out / "README.md", index.README)
    return settled


def settled_on(device: str | None) -> dict[str, Any]:
    """Device, threads, and the products that a worker with so many threads would choose."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_choice("device", device, ("cpu", "cuda"))
    threads = max(1, (os.cpu_count() or 1) // max(1, torch.cuda.device_count())) if device == "cuda" else 1
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        return {"device": device, "threads": threads, "products": machine.products()}
    finally:
        torch.set_num_threads(before)


def _shown(old: dict[str, Any], new: dict[str, Any], name: str) -> str:
    """How one entry of two recipes differs, without what they share."""
    one, two = old.get(name), new.get(name)
    while isinstance(one, dict) and isinstance(two, dict):
        name = next(name for name in {**one, **two} if one.get(name) != two.get(name))
        one, two = one.get(name), two.get(name)
    return f"{json.dumps(one)[:80]} there, {json.dumps(two)[:80]} asked for"


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while some := file.read(1 << 22):
            found.update(some)
    return found.hexdigest()
