"""Units on this machine: processes that each hold the encoder, with a thread that prepares the next part."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from uhd.datasets.plan import Unit
from uhd.datasets.units import Encoder, Job, Part, as_before, prepare

_AHEAD = 2  # units that a process has: one to encode, one to prepare
_TRIES = 3  # of a unit whose process dies, and to start one

Done = tuple[int, dict[str, int]]
"""A unit's number, and counts of what was written."""


def here(job: Job, units: Iterable[Unit]) -> Iterator[Done]:
    """Encode units one after the other in this process, while a thread prepares what comes next."""

    def work() -> Iterator[Unit | Part | None]:
        for unit in units:
            yield unit
            yield from prepare(unit, job)
            yield None

    with as_before():
        encoder, items = Encoder(job), _ahead(work())
        for unit in items:
            yield unit.number, encoder(unit, iter(partial(next, items), None))


def _ahead(stream: Iterator[Any]) -> Iterator[Any]:
    """The same items, each made on another thread while the one before is used."""
    pool, end = ThreadPoolExecutor(1), object()
    try:
        coming = pool.submit(next, stream, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, stream, end)
            yield item
    finally:
        pool.shutdown(wait=False)  # a worker's waits for the next unit


def _in_processes(job: Job, units: Iterable[Unit], processes: int) -> Iterator[Done]:
    """Encode units in so many processes; one that dies is replaced, and its units are done by another."""
    stream, again, tries = iter(units), [], {}
    workers: dict[Connection, tuple[Any, dict[int, Unit], str]] = {}
    gpus = torch.cuda.device_count() if job.device == "cuda" else 0
    try:
        for number in range(processes):
            _start(workers, job, f"cuda:{number % gpus}" if gpus else job.device)
        while True:
            for line, (_, mine, _) in workers.items():
                while len(mine) < _AHEAD and (unit := again.pop() if again else next(stream, None)) is not None:
                    mine[unit.number] = unit
                    with suppress(OSError):  # it is dead: told below
                        line.send(unit)
            if not any(mine for _, mine, _ in workers.values()):
                return
            for line in wait(list(workers)):
                process, mine, device = workers[line]
                try:
                    number, found = line.recv()
                except (EOFError, OSError):
                    del workers[line]
                    process.join()
                    for unit in mine.values():
                        tries[unit.number] = tries.get(unit.number, 0) + 1
                        if tries[unit.number] == _TRIES:
                            raise RuntimeError(
                                f"unit {unit.number}, from {unit.items[0].key!r} on: the process that encoded this "
                                f"ended {_TRIES} times, with exit status {process.exitcode}. -9: the system killed "
                                "it, take fewer processes or a smaller budget; 1: it said why; processes=0 has none"
                            ) from None
                    again += mine.values()
                    _start(workers, job, device)
                    continue
                if isinstance(found, Exception):
                    raise found
                del mine[number]
                yield number, found
    finally:
        for line, (process, *_) in workers.items():
            process.terminate()
            line.close()
            process.join()


def _start(workers: dict[Connection, Any], job: Job, device: str) -> None:
    ways = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in ways else "spawn")
    if "forkserver" in ways:  # workers are copies of a process that has imported torch, and done nothing with it
        context.set_forkserver_preload([__name__])
    for left in reversed(range(_TRIES)):
        ours, theirs = context.Pipe()
        process = context.Process(target=_worker, args=(job, device, theirs), daemon=True)
        try:
            process.start()
            break
        except (EOFError, OSError) as problem:  # that process was killed meanwhile: the next try makes another
            if not left:
                raise RuntimeError(
                    f"no process can be started here ({problem!r}): processes=0 needs none"
                ) from problem
            time.sleep(0.1)
    theirs.close()
    workers[ours] = process, {}, device


def _worker(job: Job, device: str, line: Connection) -> None:
    """Until nobody is there who asks; the interrupt of a terminal is for whoever does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def units() -> Iterator[Unit]:
        with suppress(EOFError, OSError):
            while True:
                yield line.recv()

    with suppress(BrokenPipeError):
        try:
            for done in here(replace(job, device=device), units()):
                line.send(done)
        except Exception as problem:
            line.send((-1, problem))


def run(job: Job, units: Iterable[Unit], *, processes: int | None = None) -> Iterator[Done]:
    """Encode units on this machine.

    Args:
        job, units: What, and how.
        processes: 0: in this process alone. ``None``: as many as there are CPU cores, or GPUs.

    Raises:
        ValueError, OSError: As of :func:`uhd.datasets.units.prepare` and of writing.
        RuntimeError: A unit's process died again and again.
    """
    if processes is None and job.device == "cuda":
        processes = torch.cuda.device_count()
    elif processes is None:
        processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return _in_processes(job, units, processes) if processes else here(job, units)
