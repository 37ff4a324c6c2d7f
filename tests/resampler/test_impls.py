"""One resampler through every implementation of its attention: same result, same gradients.

The Triton kernels run here on the CPU, which has to be chosen before Triton is imported: the last test runs this file
once more in a process of its own, where "triton" is one of the implementations.
"""

from __future__ import annotations

import pytest
import torch
from uhd_kernels import calls

from tests.kernels.ways import INTERPRETED, NUMPY
from tests.resampler.parts import TAGS, cases, released
from tests.scripts import interpreted
from tests.tiny import stirred
from uhd.resampler import PerceiverConfig, PerceiverResampler

pytestmark = NUMPY
IMPLS = ["auto", "sdpa", *(["triton"] if INTERPRETED else [])]
GRIDS = [(3, 5), (1, 1), (4, 2), (3, 5)]
CONFIGS = {
    "head dim 64": PerceiverConfig(width=128, vision_width=24, num_heads=2, num_latents=16),
    "head dim 72": PerceiverConfig.preset("minicpm-v-2.6", width=72, vision_width=24, num_heads=1, num_latents=5),
    "own latents in the second layer": PerceiverConfig(width=64, vision_width=24, num_heads=1, num_latents=4, depth=2),
    "no positions": PerceiverConfig(
        width=64, vision_width=64, num_heads=2, num_latents=3, query_position=False, key_position="none"
    ),
}


def run(module, features, grids, impl):
    """Output, then the gradient of the features and of every parameter, under one fixed cotangent."""
    module.attention_impl = impl
    calls.clear()
    features = features.clone().requires_grad_()
    out = module(features, grids)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    gradients = torch.autograd.grad(out, [features, *module.parameters()], cotangent)
    ran = {"auto": "sdpa"}.get(impl, impl)
    assert set(calls) <= {ran, f"{ran} backward"}
    assert calls[ran] >= 1
    return [out, *gradients]


def same(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5 * max(1, b.abs().max().item()))


def check_golden(tag, impl, rows):
    module = released(tag)
    assert module.config.width // module.attn.num_heads in (4, 8)
    chosen = [case for case in cases(tag) if len(case[0]) in rows]
    assert chosen
    for features, grids, y in chosen:
        got = run(module, features, grids, impl)
        torch.testing.assert_close(got[0], y, atol=1e-5, rtol=0)
        same(got, run(module, features, grids, "reference"))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tag", TAGS)
def test_small_golden_cases(tag, impl):
    check_golden(tag, impl, range(500))


@pytest.mark.parametrize("impl", [pytest.param(x, marks=[pytest.mark.slow] * (x == "triton")) for x in IMPLS])
@pytest.mark.parametrize("tag", TAGS)
def test_large_golden_cases(tag, impl):
    check_golden(tag, impl, range(500, 10_000))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CONFIGS)
def test_ragged_views(name, impl):
    torch.manual_seed(0)
    module = PerceiverResampler(CONFIGS[name])
    stirred(module, 0.1)
    features = torch.randn(sum(h * w for h, w in GRIDS), module.in_dim)
    same(run(module, features, GRIDS, impl), run(module, features, GRIDS, "reference"))


def test_no_views():
    module = PerceiverResampler(CONFIGS["head dim 64"])
    for impl in IMPLS:
        module.attention_impl = impl
        assert module(torch.zeros(0, 24), []).shape == (0, 16, 128)


@pytest.mark.skipif(INTERPRETED, reason="it starts that process")
def test_interpreted():
    assert interpreted(__file__, "-k", "triton", "-m", "not slow") == len(TAGS) + len(CONFIGS)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="it starts that process")
def test_interpreted_large():
    assert interpreted(__file__, "-k", "triton", "-m", "slow") == len(TAGS)
