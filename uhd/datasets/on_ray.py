"""Units on a Ray cluster: tasks prepare, actors that hold the encoder encode and write.

The stages are Ray's own tasks and actors: units are sent as the source is listed, a bounded number at a time, so that
neither the driver nor the object store holds more than is being worked on. All machines must see the source, the
encoder's folder and ``out`` under the same paths.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from uhd.datasets.local import Done
from uhd.datasets.plan import Unit
from uhd.datasets.units import Encoder, Job, Part, prepare
from uhd.machine import use_products

_RETRIES = 5
"""How often a task or an actor whose process dies is tried again."""

_AHEAD = 2
"""Units that wait for every actor, prepared, beside the one that it encodes and those that the cores prepare."""


def run(job: Job, units: Iterable[Unit], *, actors: int | None = None, cpus_per_task: float = 1.0) -> Iterator[Done]:
    """Encode units on the cluster of ``RAY_ADDRESS``, or one that is started here.

    Args:
        job, units: As of the local engine.
        actors: Processes that hold the encoder; ``None``: as many as the cluster has GPUs, or half its cores.
        cpus_per_task: Cores that a task which prepares a unit takes.

    Raises:
        ValueError, OSError: As of the local engine.
        RuntimeError: A process died again and again.
    """
    try:
        import ray
    except ImportError:
        raise ValueError("engine='ray' needs Ray: pip install llava-uhd[ray]") from None
    mine = not ray.is_initialized()
    if mine:
        ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
    try:
        yield from _mapped(ray, job, units, actors, cpus_per_task)
    except ray.exceptions.RayTaskError as problem:
        raise problem.cause from None
    except (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError) as problem:
        raise RuntimeError(f"a process of Ray died {_RETRIES} times: {problem}") from problem
    finally:
        if mine:
            ray.shutdown()


def _mapped(ray: Any, job: Job, units: Iterable[Unit], actors: int | None, cpus: float) -> Iterator[Done]:
    cores = ray.cluster_resources().get("CPU", 0)
    gpus = ray.cluster_resources().get("GPU", 0) if job.device == "cuda" else 0
    actors = actors or int(gpus) or max(1, int(cores) // 2)
    if not 0 < cpus <= cores:
        raise ValueError(f"cpus_per_task is more than 0 and at most the cluster's {cores:g} cores, got {cpus:g}")
    own = 0 if gpus or cores - actors < cpus else 1  # tasks that no core is left for would wait for ever
    most = _AHEAD + math.ceil((cores - own * actors) / cpus / actors)
    how = {"max_restarts": _RETRIES, "max_task_retries": _RETRIES, "num_cpus": own}
    hold = ray.remote(_Actor).options(**how, num_gpus=min(1, gpus / actors))
    task = ray.remote(_prepared).options(num_cpus=cpus, max_retries=_RETRIES)
    holders, stream = [hold.remote(job) for _ in range(actors)], iter(units)
    waiting: dict[Any, tuple[int, int]] = {}
    load = [0] * actors
    while True:
        while min(load) < most and (unit := next(stream, None)) is not None:
            least = load.index(min(load))
            # the parts go from the task to the actor, not by way of here
            done = holders[least].encode.remote(unit, task.remote(unit, job))
            waiting[done] = unit.number, least
            load[least] += 1
        if not waiting:
            return
        for done in ray.wait(list(waiting), num_returns=1)[0]:
            number, least = waiting.pop(done)
            load[least] -= 1
            yield number, ray.get(done)


def _prepared(unit: Unit, job: Job) -> list[Part]:
    torch.set_num_threads(1)
    use_products(job.products)
    return [*prepare(unit, job)]


class _Actor:
    """A process that holds the encoder."""

    def __init__(self, job: Job) -> None:
        os.environ["OMP_NUM_THREADS"] = str(job.threads)  # Ray says how many it was given
        self.encoder = Encoder(job)

    def encode(self, unit: Unit, parts: list[Part]) -> dict[str, int]:
        return self.encoder(unit, parts)
