"""Sizes against every rule: a plan or a refusal, sound, and the same from ``plan_many`` and from JSON.

``UHD_FUZZ_SEED`` and ``UHD_FUZZ_FIRST`` (the block to begin with) run others, and go on where a run was stopped:
``UHD_FUZZ_SEED=3 UHD_FUZZ_FIRST=40 python -m pytest -n 0 -m slow tests/fuzz/test_plans.py -s`` prints each block.
"""

import json
import os

import numpy as np
import pytest

from uhd.slicing import PRESETS, SlicePlan, plan, plan_many
from uhd.slicing.plan import MAX_SIDE, contradictions
from uhd.slicing.strategies import STRATEGIES

SEED = int(os.environ.get("UHD_FUZZ_SEED", 0))
FIRST = int(os.environ.get("UHD_FUZZ_FIRST", 0))
RULES = [*PRESETS, *STRATEGIES]
COLUMNS = ("grid", "slice_hw", "overview_hw", "num_views", "num_patches", "num_tokens")


def sizes_of(block, count):
    """(height, width), px: log-uniform, some nearly square, some at the ends of what is planned."""
    rng = np.random.default_rng([SEED, block])
    largest = rng.choice([60, 800, 5000, MAX_SIDE], (count, 1))
    sizes = np.exp(rng.uniform(0, np.log(largest), (count, 2))).astype(np.int64)
    near = rng.random(count) < 0.2
    sizes[near, 1] = np.clip(sizes[near, 0] + rng.integers(-2, 3, near.sum()), 1, MAX_SIDE)
    sizes[rng.random((count, 2)) < 0.01] = MAX_SIDE
    return sizes


def planned(size, rule):
    try:
        return plan(size, rule)
    except ValueError:
        return None


def check_block(block, count, *, whole):
    """Plans of every rule; the adaptive ones' are compared with ``plan_many``, ``whole`` checks each from JSON."""
    sizes = sizes_of(block, count)
    for rule in RULES:
        found = [planned(size, rule) for size in map(tuple, sizes.tolist())]
        kept = [one for one in found if one is not None]
        for one in kept if whole else kept[:: max(len(kept) // 3, 1)]:
            assert list(contradictions(one)) == [], (rule, one.image_hw)
            assert SlicePlan.from_dict(json.loads(json.dumps(one.to_dict()))) == one
        if rule in PRESETS:
            columns = plan_many(sizes, rule)
            for name in COLUMNS:
                wanted = np.array([getattr(one, name) or (0, 0) for one in found])
                wrong = np.flatnonzero((columns[name] != wanted).reshape(count, -1).any(axis=1))
                assert not len(wrong), (rule, name, sizes[wrong[0]])
    return count * len(RULES)


def test_a_few_sizes_by_every_rule():
    check_block(0, 8, whole=True)


@pytest.mark.slow
def test_a_million_plans():
    total, block, count = 0, FIRST, 500
    while total < 1_000_000:
        total += check_block(block, count, whole=False)
        block += 1
        print(f"seed {SEED}, block {block}: {total} plans")
