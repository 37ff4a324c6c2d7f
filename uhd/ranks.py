"""Whether parameters are spread over ranks, and by which modules they are gathered: FSDP1, FSDP2, DeepSpeed ZeRO-3.

Ranks gather together, each time that such a module is called. So all of them must call the same modules in the same
order, whatever their batches hold, and always through ``forward``, which is where the gathering happens.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn


def is_unit(module: nn.Module) -> bool:
    """Tell whether calling a module gathers its parameters, as in FSDP1 and FSDP2.

    >>> is_unit(nn.Linear(2, 3))
    False
    """
    if not _ranks():
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return isinstance(module, (FSDPModule, FullyShardedDataParallel))


def is_sharded(module: nn.Module) -> bool:
    """Tell whether any parameter of a module is spread over ranks; never outside of distributed work.

    >>> is_sharded(nn.Linear(2, 3))
    False
    """
    if not _ranks():
        return False
    # ds_id is what DeepSpeed's ZeRO-3 numbers its parameters by
    return any(map(is_unit, module.modules())) or any(hasattr(p, "ds_id") for p in module.parameters())


def gathered_between(outer: nn.Module, inner: nn.Module) -> bool:
    """Tell whether ``inner``, a part of ``outer``, has its parameters only while ``outer`` or one between them runs.

    >>> net = nn.Sequential(nn.Linear(2, 3))
    >>> gathered_between(net, net[0])
    False
    """
    if not _ranks():
        return False
    units = (unit for unit in outer.modules() if unit is not inner and is_unit(unit))
    return any(part is inner for unit in units for part in unit.modules())


def gather_for(module: nn.Module, method: str) -> None:
    """Let FSDP2 gather parameters for calls of this method too, as it does for ``forward``."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    register_fsdp_forward_method(module, method)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside FSDP1's wrapper, or the module itself: to look at, while the wrapper is what is called.

    >>> unwrapped(nn.Linear(2, 3))
    Linear(in_features=2, out_features=3, bias=True)
    """
    if not _ranks():
        return module
    from torch.distributed.fsdp import FullyShardedDataParallel

    return module.module if isinstance(module, FullyShardedDataParallel) else module


def gathered_dtype(module: nn.Module, own: torch.dtype) -> torch.dtype:
    """Return the dtype in which FSDP1 will gather a module's parameters, which do not show it before; else ``own``.

    FSDP2 casts what a module is called on by itself.
    """
    policy = None if unwrapped(module) is module else module.mixed_precision
    return own if policy is None or policy.param_dtype is None else policy.param_dtype


def _ranks() -> bool:
    return dist.is_available() and dist.is_initialized()
