"""The merger of 2 x 2 features, against recorded outputs of transformers' MiniCPM-V 4.6."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.resampler.parts import features_for, randomised
from uhd.resampler import MergeProjector

GOLDEN = Path(__file__).parent.parent / "golden" / "v4_compressor.npz"
GRIDS = [(4, 8), (8, 4), (4, 4)]


def make(rounds=1):
    return randomised("merger" if rounds == 1 else "merger, twice")


def features(grids=GRIDS):
    return features_for(make(), grids)


def test_equals_transformers():
    with np.load(GOLDEN) as data:
        state = {name[9:]: torch.tensor(data[name]) for name in data.files if name.startswith("merger/w/")}
        grids = [(int(h), int(w)) for h, w in data["target_sizes"]]
        x, y = torch.tensor(data["merger/x"][0]), [torch.tensor(data[f"merger/y{i}"]) for i in range(len(grids))]
    projector = MergeProjector.from_state_dict(state)
    assert (projector.in_dim, projector.out_dim, projector.rounds) == (16, 20, 1)
    assert set(projector.state_dict()) == set(state)
    with torch.no_grad():
        torch.testing.assert_close(projector(x, grids), torch.cat(y), atol=1e-5, rtol=0)


def test_two_rounds_are_one_after_the_other():
    twice = make(2)
    first, second = MergeProjector(10, 10).double(), MergeProjector(10, 24).double()
    first.mlp[0].load_state_dict(twice.mlp[0].state_dict())
    second.mlp[0].load_state_dict(twice.mlp[1].state_dict())
    x = features()
    torch.testing.assert_close(twice(x, GRIDS), second(first(x, GRIDS), [(h // 2, w // 2) for h, w in GRIDS]))


def test_a_token_holds_its_2x2_block():
    projector, x = make(), features([(4, 6)])
    changed = x.clone()
    changed[2 * 6 + 3] += 1  # row 2, column 3: block (1, 1) of 2 x 3
    moved = (projector(changed, [(4, 6)]) - projector(x, [(4, 6)])).abs().amax(1) > 1e-9
    assert moved.tolist() == [False, False, False, False, True, False]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"grids\[1\] is \(2, 3\); both sides must be multiples of 2"):
        make()(features([(2, 2), (2, 3)]), [(2, 2), (2, 3)])
    with pytest.raises(ValueError, match=r"grids\[0\] is \(4, 6\); both sides must be multiples of 4"):
        make(2).output_lengths([(4, 6)])
    with pytest.raises(ValueError, match="rounds must be at least 1; got 0"):
        MergeProjector(6, 10, rounds=0)
    state = make().state_dict()
    with pytest.raises(ValueError, match=r"unexpected \['mlp.0.bias'\]"):
        MergeProjector.from_state_dict({**state, "mlp.0.bias": state["mlp.0.pre_norm.bias"]})
    with pytest.raises(ValueError, match="expected 'mlp.0.linear_1.weight'"):
        MergeProjector.from_state_dict({})
    with pytest.raises(TypeError, match="features are torch.float32"):
        make()(features().float(), GRIDS)
