"""A run that is killed, and killed again, uses every sample of its epoch exactly once."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

RUN = """
import json, os, sys, time
import numpy as np
import uhd
from torch.utils.data import DataLoader

start, out, rank, ranks, workers = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])


class Slow:  # so that workers are fetching at any time
    def __len__(self):
        return 120

    def __getitem__(self, number):
        time.sleep(0.002)
        return number


costs = np.random.default_rng(0).integers(1, 100, 120)
sampler = uhd.TokenBudgetSampler(costs, 300, rank=rank, num_replicas=ranks)
sampler.set_epoch(1)
told = json.load(open(start)) if os.path.exists(start) else {"used": []}
if "state" in told:
    sampler.load_state_dict(told["state"])
settings = {"num_workers": workers, "persistent_workers": workers > 0, "prefetch_factor": 4 if workers else None}
loader = DataLoader(Slow(), batch_sampler=sampler, collate_fn=list, **settings)
promised, used = len(loader), told["used"]
for step, batch in enumerate(loader, start=1):
    used += batch
    with open(out + ".new", "w") as file:  # model, optimizer and this in one go, or a sample may be used twice
        json.dump({"used": used, "state": sampler.state_dict(step)}, file)
    os.replace(out + ".new", out)
    time.sleep(0.02)
assert step == promised
"""


def run(start, out, rank=0, ranks=1, workers=0):
    arguments = [sys.executable, "-c", RUN, str(start), str(out), *map(str, (rank, ranks, workers))]
    return subprocess.Popen(arguments, start_new_session=True)


def used(file):
    return json.loads(file.read_text())["used"] if file.exists() else []


def kill_after(process, file, more):
    """With its workers, as a scheduler does, once it has used so many samples more."""
    wanted, end = len(used(file)) + more, time.monotonic() + 120
    while len(used(file)) < wanted:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs POSIX")
@pytest.mark.parametrize(
    ("workers", "ranks"),
    [pytest.param(0, 1, marks=pytest.mark.slow), (1, 3), pytest.param(4, 2, marks=pytest.mark.slow)],
)
def test_every_sample_is_used_once_across_kills(workers, ranks, tmp_path):
    """The last run has another number of ranks."""
    state = tmp_path / "state.json"
    for more in (10, 30):
        kill_after(run(state, state, workers=workers), state, more)
    before = used(state)
    assert 40 <= len(before) < 120
    files = [tmp_path / f"rank{rank}.json" for rank in range(ranks)]
    runs = [run(state, file, rank, ranks, workers) for rank, file in enumerate(files)]
    assert [process.wait(timeout=120) for process in runs] == [0] * ranks
    after = [number for file in files for number in used(file)[len(before) :]]
    assert sorted(before + after) == list(range(120))
