"""Costs from headers, batches under a budget, and the same batches from any thread or worker process."""

import copy
import json
import pathlib
import pickle
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments

import uhd
from tests.hf import tiny
from tests.hf.test_training import fresh
from tests.hf.tiny import targets
from tests.tiny import noise, refuses
from uhd import loading
from uhd.hf import processing, training
from uhd.loading import Preparation, TokenBudgetSampler, image_costs, image_sizes_hw
from uhd.pixels import PixelSettings, load_image
from uhd.slicing import find

forks = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
"""Python 3.12 and later warn of it where there are threads, and torch has some."""

costs_of_items = st.lists(st.integers(1, 1000), min_size=1, max_size=120)
seeds = st.integers(0, 2**32)


def loads(costs, batches):
    return [sum(costs[item] for item in batch) for batch in batches]


def even_costs(seed, count=400):
    return np.random.default_rng(seed).integers(100, 1000, count)


class TestBatches:
    @given(costs_of_items, st.integers(0, 3000), st.none() | st.integers(1, 9), st.booleans(), seeds)
    def test_every_index_once_within_the_budget_in_every_epoch(self, costs, more, max_items, shuffle, seed):
        budget = max(costs) + more
        sampler = TokenBudgetSampler(costs, budget, max_items=max_items, shuffle=shuffle, seed=seed)
        for epoch in range(3):
            sampler.set_epoch(epoch)
            batches = list(sampler)
            assert len(batches) == len(sampler)
            assert sorted(item for batch in batches for item in batch) == list(range(len(costs)))
            assert all(batches)
            assert max(loads(costs, batches)) <= budget
            assert max_items is None or max(map(len, batches)) <= max_items

    @given(costs_of_items, st.integers(0, 3000), st.booleans())
    def test_costs_of_batches_differ_by_an_item_at_most(self, costs, more, shuffle):
        found = loads(costs, list(TokenBudgetSampler(costs, max(costs) + more, shuffle=shuffle)))
        assert max(found) - min(found) <= max(costs)

    @given(seeds, st.sampled_from([0.0, 0.25, 0.9]))
    def test_many_small_items_fill_batches_evenly(self, seed, jitter):
        costs = even_costs(seed)  # a batch holds about 14 of them
        found = loads(costs, list(TokenBudgetSampler(costs, 8000, seed=seed, jitter=jitter)))
        assert min(found) >= 0.9 * max(found)
        assert sum(found) >= 0.9 * 8000 * len(found)

    def test_items_too_large_to_share_are_alone(self):
        costs = [51] * 20 + [3]
        batches = list(TokenBudgetSampler(costs, 100))
        assert sorted(map(len, batches)) == [1] * 19 + [2]

    def test_no_batch_is_empty_however_fast_their_number_grows(self, monkeypatch):
        monkeypatch.setattr("uhd.sampling._SLACK", 1)
        assert list(map(len, TokenBudgetSampler([51] * 20 + [3], 100))) == [1] * 21

    def test_without_shuffling_batches_come_by_their_first_items(self):
        costs = even_costs(0)
        sampler = TokenBudgetSampler(costs, 5000, shuffle=False)
        batches = list(sampler)
        sampler.set_epoch(1)
        assert batches == list(sampler)
        assert [batch[0] for batch in batches] == sorted(batch[0] for batch in batches)
        assert all(batch == sorted(batch) for batch in batches)

    def test_a_crowded_epoch_is_drawn_again_and_stays_as_long(self, monkeypatch):
        costs = np.random.default_rng(0).integers(200, 1000, 150)
        sampler = TokenBudgetSampler(costs, 2500)
        fills = []
        fill = TokenBudgetSampler._fill
        monkeypatch.setattr(TokenBudgetSampler, "_fill", lambda *args: fills.append(None) or fill(*args))
        for epoch in range(40):
            sampler.set_epoch(epoch)
            batches = list(sampler)
            assert len(batches) == len(sampler)
            assert max(loads(costs, batches)) <= 2500
        assert len(fills) > 40


class TestOrder:
    def test_seed_and_epoch_decide(self):
        costs = even_costs(1)

        def batches(seed, epoch):
            sampler = TokenBudgetSampler(costs, 5000, seed=seed)
            sampler.set_epoch(epoch)
            return list(sampler)

        assert batches(1, 2) == batches(1, 2)
        assert len({str(batches(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9

    def test_items_meet_others_in_every_epoch(self):
        costs = list(range(300, 364))  # all different, so only the jitter can mix them
        sampler, met = TokenBudgetSampler(costs, 2700), []
        for epoch in range(2):
            sampler.set_epoch(epoch)
            met.append({(a, b) for batch in sampler for a in batch for b in batch if a < b})
        assert len(met[0] & met[1]) < 0.4 * len(met[0])

    def test_batches_are_not_in_the_order_of_their_sizes(self):
        costs = [100] * 64 + [1000] * 64
        batches = list(TokenBudgetSampler(costs, 2200))
        large = [sum(costs[item] == 1000 for item in batch) for batch in batches]
        assert set(large) == {2}  # each is a mixture
        costs = even_costs(9)
        found = loads(costs, list(TokenBudgetSampler(costs, 1500)))
        assert found not in (sorted(found), sorted(found, reverse=True))


class TestRanks:
    @given(st.lists(st.integers(1, 1000), min_size=20, max_size=120), st.integers(1, 8), st.booleans(), seeds)
    def test_ranks_share_all_items_in_equal_numbers_of_batches_of_near_costs(self, costs, ranks, shuffle, seed):
        samplers = [
            TokenBudgetSampler(costs, 4000, rank=rank, num_replicas=ranks, shuffle=shuffle, seed=seed)
            for rank in range(ranks)
        ]
        for sampler in samplers:
            sampler.set_epoch(3)
        shares = [list(sampler) for sampler in samplers]
        assert {len(share) for share in shares} == {len(sampler) for sampler in samplers}
        assert len({len(share) for share in shares}) == 1
        items = [item for share in shares for batch in share for item in batch]
        assert sorted(items) == list(range(len(costs)))
        steps = sorted(sorted(loads(costs, step)) for step in zip(*shares, strict=True))
        assert all(before[-1] <= after[0] for before, after in pairwise(steps))

    def test_no_rank_always_has_the_largest(self):
        costs = even_costs(2)
        shares = [list(TokenBudgetSampler(costs, 1500, rank=rank, num_replicas=4)) for rank in range(4)]
        largest = [int(np.argmax(loads(costs, step))) for step in zip(*shares, strict=True)]
        assert set(largest) == {0, 1, 2, 3}

    def test_too_few_items_are_an_error_or_repeated_or_left_out_as_asked(self):
        costs = [90] * 10
        with pytest.raises(
            ValueError, match=r"10 items make 10 batches, which 4 ranks cannot share.* gives 2 .*leaves 2"
        ):
            TokenBudgetSampler(costs, 100, rank=0, num_replicas=4)

        def items(uneven, epoch=0):
            samplers = [TokenBudgetSampler(costs, 100, rank=r, num_replicas=4, uneven=uneven) for r in range(4)]
            for sampler in samplers:
                sampler.set_epoch(epoch)
            shares = [list(sampler) for sampler in samplers]
            assert [len(share) for share in shares] == [len(sampler) for sampler in samplers]
            return sorted(item for share in shares for batch in share for item in batch)

        again = items("repeat")
        assert len(again) == 12
        assert set(again) == set(range(10))
        left = items("drop")
        assert len(left) == len(set(left)) == 8
        assert len({str(items("drop", epoch)) for epoch in range(4)}) > 1
        with pytest.raises(ValueError, match="would leave out all of them"):
            TokenBudgetSampler(costs[:3], 100, rank=0, num_replicas=4, uneven="drop")
        few = [list(TokenBudgetSampler(costs[:3], 100, rank=r, num_replicas=8, uneven="repeat")) for r in range(8)]
        assert {batch[0] for (batch,) in few} == {0, 1, 2}

    def test_ranks_are_those_of_torch_distributed(self, monkeypatch):
        costs = even_costs(3)
        assert (TokenBudgetSampler(costs, 5000).rank, TokenBudgetSampler(costs, 5000).num_replicas) == (0, 1)
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: 2)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
        assert list(TokenBudgetSampler(costs, 5000)) == list(TokenBudgetSampler(costs, 5000, rank=2, num_replicas=3))


class TestState:
    @given(st.integers(0, 45), st.integers(0, 2))
    def test_resumed_is_uninterrupted(self, done, rank):
        costs, ranks = even_costs(4), {"rank": rank, "num_replicas": 3}
        sampler = TokenBudgetSampler(costs, 5000, **ranks)
        sampler.set_epoch(5)
        whole = list(sampler)
        done = min(done, len(whole))
        batches = iter(sampler)
        for _ in range(done):
            next(batches)
        state = json.loads(json.dumps(sampler.state_dict()))
        assert state == sampler.state_dict(done)
        other = TokenBudgetSampler(costs, 5000, **ranks)
        other.load_state_dict(state)
        for epoch in range(other.epoch, 7):
            other.set_epoch(epoch)
            sampler.set_epoch(epoch)
            assert len(other) == (len(whole) - done if epoch == 5 else len(whole))
            assert list(other) == (whole[done:] if epoch == 5 else list(sampler))
            assert list(other) == list(sampler)  # the state is used once

    def test_a_state_says_where_a_resumed_epoch_stands(self):
        sampler = TokenBudgetSampler(even_costs(5), 5000)
        sampler.load_state_dict(sampler.state_dict(7))
        assert sampler.state_dict()["batches"] == 7
        next(iter(sampler))
        assert sampler.state_dict()["batches"] == sampler.state_dict(1)["batches"] == 8
        assert sampler.state_dict(0)["batches"] == 7
        sampler.set_epoch(1)
        assert sampler.state_dict()["batches"] == 0

    @pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more than this machine has processors
    @pytest.mark.parametrize("workers", [0, 1, 4])
    def test_a_loader_with_workers_resumes_where_it_stood(self, workers):
        """torch makes an iterator of a batch sampler twice, and asks for batches ahead."""
        costs = even_costs(4)
        sampler = TokenBudgetSampler(costs, 5000)
        settings = {"num_workers": workers, "persistent_workers": workers > 0, "collate_fn": list}
        loader = DataLoader(range(len(costs)), batch_sampler=sampler, **settings)
        whole = list(loader)
        assert len(whole) == len(loader)
        batches = iter(loader)
        used = [next(batches) for _ in range(3)]
        state = sampler.state_dict(len(used))
        del batches
        other = TokenBudgetSampler(costs, 5000)
        other.load_state_dict(state)
        again = DataLoader(range(len(costs)), batch_sampler=other, **settings)
        assert len(again) == len(whole) - 3
        assert used + list(again) == whole
        assert list(again) == whole
        assert len(again) == len(whole)

    @pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:.set_vital.")
    @pytest.mark.parametrize("persistent", [False, True])
    @pytest.mark.parametrize("workers", [0, 1, 4])
    def test_a_stateful_loader_carries_the_state(self, workers, persistent):
        stateful = pytest.importorskip("torchdata.stateful_dataloader")
        costs = even_costs(4)

        def loader():
            sampler = TokenBudgetSampler(costs, 5000)
            sampler.set_epoch(2)
            settings = {"num_workers": workers, "persistent_workers": persistent and workers > 0}
            return stateful.StatefulDataLoader(range(len(costs)), batch_sampler=sampler, collate_fn=list, **settings)

        whole = list(loader())
        first = loader()
        used = list(islice(first, 5))
        state = copy.deepcopy(first.state_dict())
        second = loader()
        second.load_state_dict(state)
        rest = iter(second)
        assert len(second) == len(whole) - 5  # the state is handed on where the loader is iterated
        assert used + list(rest) == whole
        assert list(second) == whole

    def test_accelerate_counts_epochs_itself_and_says_so(self):
        costs = even_costs(4)

        def prepared(state=None):
            sampler = TokenBudgetSampler(costs, 5000)
            if state is not None:
                sampler.load_state_dict(state)
            settings = {"batch_sampler": sampler, "collate_fn": torch.tensor}
            return sampler, Accelerator(cpu=True).prepare(DataLoader(range(len(costs)), **settings))

        def lists(batches):
            return [batch.tolist() for batch in batches]

        sampler, loader = prepared()
        loader.set_epoch(3)
        whole = lists(loader)
        sampler.set_epoch(3)
        assert whole == list(sampler)
        loader.set_epoch(3)
        used = lists(islice(loader, 4))
        _, again = prepared(sampler.state_dict(4))
        with pytest.raises(ValueError, match=r"stands in epoch 3, and set_epoch\(0\) would lose it.* set_epoch\(3\)"):
            next(iter(again))
        again.set_epoch(3)
        assert len(again) == len(whole) - 4
        assert used + lists(again) == whole
        _, again = prepared()
        again.set_epoch(3)
        assert used + lists(skip_first_batches(again, 4)) == whole

    @given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 9)), min_size=1, max_size=3), st.integers(1, 5))
    def test_other_numbers_of_ranks_take_what_is_left_of_the_epoch(self, kills, ranks):
        """Every sample exactly once, however often the number of ranks changes on the way, and whole epochs then."""
        costs = even_costs(9)
        state, used = None, []
        for replicas, steps in [*kills, (ranks, None)]:
            samplers = [TokenBudgetSampler(costs, 5000, rank=rank, num_replicas=replicas) for rank in range(replicas)]
            for sampler in samplers:
                sampler.set_epoch(1) if state is None else sampler.load_state_dict(state)
            promised = [len(sampler) for sampler in samplers]
            shares = [list(islice(sampler, steps)) for sampler in samplers]
            assert len({*promised, *map(len, shares)} if steps is None else {*map(len, shares)}) == 1
            assert all(sum(loads(costs, [batch])) <= 5000 for share in shares for batch in share)
            used += [item for share in shares for batch in share for item in batch]
            states = [json.loads(json.dumps(sampler.state_dict())) for sampler in samplers]
            assert states[1:] == states[:-1]
            state = states[0]
        assert sorted(used) == list(range(len(costs)))
        whole = TokenBudgetSampler(costs, 5000, rank=0, num_replicas=ranks)
        whole.set_epoch(2)
        samplers[0].set_epoch(2)
        assert list(samplers[0]) == list(whole)
        assert len(samplers[0]) == len(whole)

    def test_a_state_from_before_ranks_could_change_is_read(self):
        sampler = TokenBudgetSampler(even_costs(7), 5000)
        state = sampler.state_dict(3)
        state.pop("before")
        whole = list(sampler)
        sampler.load_state_dict(state)
        assert list(sampler) == whole[3:]

    def test_too_few_left_for_the_ranks(self):
        one = TokenBudgetSampler([90] * 10, 100)
        state = one.state_dict(7)
        three = TokenBudgetSampler([90] * 10, 100, rank=0, num_replicas=2, uneven="error")
        three.set_epoch(4)
        with pytest.raises(ValueError, match="3 items make 3 batches, which 2 ranks cannot share evenly"):
            three.load_state_dict(state)
        assert three.epoch == 4  # nothing was taken over
        assert len(three) == 5

    def test_a_copy_goes_on_like_the_original(self):
        sampler = TokenBudgetSampler(even_costs(6), 5000)
        sampler.load_state_dict({**sampler.state_dict(4), "epoch": 2})
        assert list(pickle.loads(pickle.dumps(sampler))) == list(sampler)

    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"budget": 6000}, "budget: saved 5000, now 6000"),
            ({"max_items": 9}, "max_items: saved"),
            ({"seed": 1}, "seed"),
            ({"costs": even_costs(8)}, "costs"),
        ],
    )
    def test_a_state_of_other_batches_is_refused(self, changes, named):
        settings = {"costs": even_costs(7), "budget": 5000}
        state = TokenBudgetSampler(**settings).state_dict(3)
        refuses(named, TokenBudgetSampler(**{**settings, **changes}).load_state_dict, state)

    def test_a_state_that_is_none_is_refused(self):
        sampler = TokenBudgetSampler([3, 4], 5)
        with pytest.raises(ValueError, match="a sampler.s state is not one: missing epoch"):
            sampler.load_state_dict({k: v for k, v in sampler.state_dict().items() if k != "epoch"})
        with pytest.raises(ValueError, match=r"an epoch has 2 batches, got batches=3"):
            sampler.load_state_dict({**sampler.state_dict(), "batches": 3})


class TestBadSettings:
    def test_an_item_above_the_budget_is_named_at_once(self):
        with pytest.raises(
            ValueError, match=r"2 of 4 items cost more than budget=100, the most item 2 with 900: raise"
        ):
            TokenBudgetSampler([100, 101, 900, 5], 100)

    @pytest.mark.parametrize("costs", [[], [[1, 2]], [1.5, 2.0], [3, 0], [True, False], ["a"]])
    def test_costs_are_positive_ints(self, costs):
        refuses("costs are positive ints", TokenBudgetSampler, costs, 10)

    @pytest.mark.parametrize(
        ("settings", "named"),
        [
            ({"budget": None}, "budget must be a whole number of at least 1, got None"),
            ({"budget": 9.5}, "budget"),
            ({"max_items": 0}, "max_items"),
            ({"seed": -1}, "seed"),
            ({"jitter": 1.0}, "jitter"),
            ({"jitter": -0.1}, "jitter"),
            ({"rank": 1}, "together"),
            ({"rank": 2, "num_replicas": 2}, "ranks are numbered from 0, got rank=2"),
            ({"uneven": "pad"}, "'error', 'repeat' or 'drop', got 'pad'"),
        ],
    )
    def test_settings_out_of_range_are_named(self, settings, named):
        refuses(named, TokenBudgetSampler, [1, 2, 3], **{"budget": 10, **settings})

    def test_epochs_are_counted_from_zero(self):
        refuses("epoch", TokenBudgetSampler([1], 1).set_epoch, -1)

    def test_costs_can_be_a_tensor_or_an_array_of_any_int(self):
        plain = list(TokenBudgetSampler([5, 6, 7, 8], 13))
        for costs in (torch.tensor([5, 6, 7, 8]), np.array([5, 6, 7, 8], np.uint16)):
            assert list(TokenBudgetSampler(costs, 13)) == plain


PAGE = pathlib.Path(__file__).parent.parent / "docs" / "training.md"


def page_block(name):
    """The code of the training page that defines this."""
    (block,) = (code for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if f" {name}(" in code)
    return block


def test_the_page_prints_what_it_says(capsys):
    block = page_block("costliest")
    exec(compile(block, "docs/training.md", "exec"), {"uhd": uhd})
    assert capsys.readouterr().out.splitlines() == re.findall(r"print\(.*\)  # (.*)", block)


def jpeg(folder, name, size_hw, orientation=None):
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.fromarray(noise(*size_hw)).save(folder / name, exif=exif)
    return folder / name


def palette_png(folder, name, size_hw):
    Image.fromarray(noise(*size_hw)).convert("P").save(folder / name, transparency=3)
    return folder / name


@pytest.fixture
def files(tmp_path):
    return [
        jpeg(tmp_path, "plain.jpg", (40, 70)),
        *(jpeg(tmp_path, f"{turn}.jpg", (40, 70), turn) for turn in (3, 5, 6, 8)),
        palette_png(tmp_path, "palette.png", (31, 90)),
    ]


class TestSizes:
    @pytest.mark.parametrize("threads", [1, 3])
    def test_sizes_are_those_of_loaded_images(self, files, threads):
        photo = Image.open(files[3])
        images = [*files, str(files[3]), files[3].read_bytes(), photo, noise(20, 33), np.zeros((3, 21, 34))]
        images += [torch.zeros(22, 35), Image.new("L", (36, 23))]
        found = image_sizes_hw(images, threads=threads)
        loaded = [load_image(image) for image in images]
        assert found.dtype == np.int64
        assert found.tolist() == [[image.height, image.width] for image in loaded]
        assert found[:6].tolist() == [[40, 70], [40, 70], [70, 40], [70, 40], [70, 40], [31, 90]]
        photo.close()

    def test_no_pixel_of_a_file_is_decoded(self, files, monkeypatch):
        monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
        assert len(image_sizes_hw(files)) == len(files)

    def test_generators_and_datasets_without_an_end(self, files):
        class Endless(Dataset):
            def __len__(self):
                return len(files)

            def __getitem__(self, index):
                return files[index % len(files)]

        plain = image_sizes_hw(files)
        assert np.array_equal(image_sizes_hw(path for path in files), plain)
        assert np.array_equal(image_sizes_hw(Endless()), plain)
        assert image_sizes_hw([]).shape == (0, 2)

    @pytest.mark.parametrize("threads", [1, 2])
    def test_a_bad_file_is_named(self, files, threads, tmp_path):
        (tmp_path / "bad.jpg").write_bytes(b"not a picture")
        with pytest.raises(ValueError, match=r"^item 2: .*bad\.jpg' is not an image"):
            image_sizes_hw([files[0], files[1], tmp_path / "bad.jpg"], threads=threads)
        refuses(r"^item 1: an image is .*, got int", image_sizes_hw, [files[0], 7], threads=threads, error=TypeError)

    @pytest.mark.parametrize("none", [None, 7])
    def test_what_holds_no_images_is_refused(self, none):
        refuses(f"one after the other, got {type(none).__name__}", image_sizes_hw, none, error=TypeError)

    @pytest.mark.parametrize("one", ["a.png", b"a", Image.new("RGB", (4, 5)), np.zeros((4, 5, 3)), torch.zeros(4, 5)])
    def test_one_image_is_no_list(self, one):
        refuses("put it into a list", image_sizes_hw, one, error=TypeError)


SIZES = [(1008, 672), (300, 1200), (480, 640), (1008, 672), (37, 52)]


class TestCosts:
    @pytest.mark.parametrize("unit", ["patches", "tokens"])
    def test_every_strategy(self, unit):
        for name in uhd.strategies():
            wanted = [getattr(uhd.plan(size, name), f"num_{unit}") for size in SIZES]
            found = image_costs(np.array(SIZES), name, unit=unit)
            assert found.dtype == np.int64
            assert found.tolist() == wanted, name

    @pytest.mark.parametrize(
        "encoder", [tiny.encoder, partial(tiny.packed_encoder, "llava-next"), partial(tiny.packed_encoder, "qwen2-vl")]
    )
    def test_an_encoder_costs_what_it_prepares(self, encoder):
        encoder = encoder()
        sizes = [image.shape[:2] for image in tiny.IMAGES]
        alone = [encoder.prepare([image]) for image in tiny.IMAGES]
        for slicing in (encoder, encoder.slicing, Preparation.of(encoder)):
            assert image_costs(sizes, slicing).tolist() == [len(batch.patches) for batch in alone]
            tokens = image_costs(sizes, slicing, unit="tokens")
            assert tokens.tolist() == [batch.plans[0].num_tokens for batch in alone]

    def test_a_processor_costs_what_it_returns(self):
        images = copy.deepcopy(tiny.model("llama").processor.image_processor)
        images.max_slices = 2
        sizes = [image.shape[:2] for image in tiny.IMAGES]
        wanted = [len(images([image])["pixel_values"]) for image in tiny.IMAGES]
        assert image_costs(sizes, images.plan).tolist() == wanted

    def test_a_refused_size_is_named(self):
        refuses("^row 1: ", image_costs, [(100, 100), (28, 28 * 300)], "qwen2-vl")
        refuses("^row 1: ", image_costs, [(100, 100), (0, 5)], "llava-next")
        refuses("row 1", image_costs, [(100, 100), (0, 5)], "llava-uhd")

    def test_units(self):
        assert image_costs([], "llava-next").shape == (0,)
        refuses("'patches' or 'tokens', got 'slices'", image_costs, SIZES, "llava-next", unit="slices")


def same(one, other):
    """Whether two batches hold the same, to the bit."""
    if isinstance(one, uhd.SliceBatch):
        return torch.equal(one.patches, other.patches) and (one.plans, one.inner) == (other.plans, other.inner)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


PICTURES = [noise(20 + 9 * number, 90 - 7 * number, number) for number in range(8)]


class TestPreparation:
    @pytest.mark.parametrize("backend", ["pillow", "fast"])
    def test_it_prepares_as_the_encoder_does(self, backend):
        encoder = tiny.encoder()
        encoder.pixels = PixelSettings(*encoder.pixels.mean_std(), backend=backend)
        prepare = Preparation.of(encoder)
        assert same(prepare(PICTURES), encoder.prepare(PICTURES))
        assert prepare.inner == ("hwc" if backend == "fast" else "chw")
        large = [noise(120, 170), noise(150, 90)]
        few = sum(encoder.plan(image.shape[:2]).num_tokens for image in large) - 1
        assert same(prepare(large, max_tokens=few), encoder.prepare(large, max_tokens=few))
        assert not same(prepare(large, max_tokens=few), prepare(large))
        assert prepare([]).patches.shape == encoder.prepare([]).patches.shape == (0, 3 * 14**2)

    @pytest.mark.parametrize("backend", ["pillow", "fast"])
    def test_it_takes_as_many_threads_as_torch_has(self, backend, monkeypatch):
        settings = PixelSettings(backend=backend)
        prepare = Preparation("llava-uhd", settings, 14)
        wanted, both = prepare(PICTURES), threading.Barrier(2, timeout=30)

        def met(step):
            def work(image, *rest, **how):
                if any(image is each for each in PICTURES[:2]):
                    both.wait()  # two images at once
                return step(image, *rest, **how)

            return work

        monkeypatch.setattr(loading, "load_picture", met(loading.load_picture))
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        assert same(prepare(PICTURES), wanted)

    def test_several_images_of_a_sample(self):
        encoder = tiny.packed_encoder("llava-onevision")
        prepare = Preparation.of(encoder)
        together = prepare(PICTURES[:2], multi_image=True)
        assert same(together, encoder.prepare(PICTURES[:2], multi_image=True))
        assert not same(together, prepare(PICTURES[:2]))

    def test_a_pickle_holds_no_weights(self):
        encoder = tiny.packed_encoder("internvl", tiny.COMPRESSORS["internvl"]())
        weights = sum(parameter.nbytes for parameter in encoder.parameters())
        saved = pickle.dumps(Preparation.of(encoder))
        assert len(saved) < 2000 < weights
        assert pickle.loads(saved) == copy.deepcopy(Preparation.of(encoder)) == Preparation.of(encoder)
        assert same(pickle.loads(saved)(PICTURES), encoder.prepare(PICTURES))

    def test_a_strategy_can_be_named(self):
        pixels = PixelSettings()
        assert Preparation("qwen2-vl", pixels, 14) == Preparation(find("qwen2-vl"), pixels, 14)

    def test_a_bad_image_is_named(self, tmp_path):
        prepare = Preparation("qwen2-vl", PixelSettings(), 14)
        whole = jpeg(tmp_path, "whole.jpg", (60, 80))
        (tmp_path / "half.jpg").write_bytes(whole.read_bytes()[:900])
        refuses(r"^image 1: .*half\.jpg' cannot be decoded", prepare, [whole, str(tmp_path / "half.jpg")])
        with pytest.raises(ValueError, match=r"^image 2: this file of 900 bytes cannot be decoded"):
            prepare([whole, whole, (tmp_path / "half.jpg").read_bytes()])
        refuses(r"^image 1: an image is .*, got tuple", prepare, [whole, (whole, 3)], error=TypeError)
        refuses(r"nowhere\.jpg", prepare, [whole, tmp_path / "nowhere.jpg"], error=FileNotFoundError)
        deep = tmp_path / "deep.png"
        Image.fromarray(np.full((5, 7), 70000, np.int32)).save(deep.with_suffix(".tif"))
        refuses(r"^image 0: .*deep\.tif': a gray image of mode I", prepare, [deep.with_suffix(".tif")])
        long = jpeg(tmp_path, "long.jpg", (20, 6000))
        refuses(r"^image 1 \(.*long\.jpg'\): ", prepare, [whole, long])

    def test_what_is_wrong_with_all_images_blames_none(self):
        prepare = Preparation("llava-uhd", PixelSettings(), 14)
        refuses("^2 images cost at least", prepare, PICTURES[:2], max_tokens=70)
        refuses("expected a list of images, got ndarray", prepare, PICTURES[0], error=TypeError)


def calls(processor):
    """Many calls of other shapes, paddings and lengths, as one thread's would disturb another's."""
    for number, image in enumerate(PICTURES):
        texts = ["<image>" + "x" * (3 * number), "a<image>bc"]
        settings = [{}, {"padding_side": "right"}, {"max_length": 150, "truncation": True}, {"pad_to_multiple_of": 8}]
        yield partial(processor, text=texts, images=[[image], [image[:15]]], **settings[number % 4])
        yield partial(processor, text=texts[1], images=image, videos=None)
        yield partial(processor, text="<video>ab", videos=[np.stack([image[:16], image[:16]])])
        message = [
            {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "y" * number}]}
        ]
        yield partial(processor.apply_chat_template, message, tokenize=True, return_dict=True)


@pytest.fixture
def hasty():
    """Threads that take turns as often as they can."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


class TestThreads:
    def test_one_processor_in_many(self, hasty):
        todo = list(calls(tiny.model("llama").processor)) * 3
        alone = [call() for call in todo]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda call: call(), todo))
        assert all(map(same, alone, together))

    def test_a_tokenizer_may_call_its_processor(self):
        processor = copy.deepcopy(tiny.model("llama").processor)
        plain = type(processor.tokenizer)

        class Odd(plain):
            def __call__(self, *args, **kwargs):
                if not inside:
                    inside.append(True)
                    found.append(processor(text="a<image>", images=PICTURES[0]))
                    with ThreadPoolExecutor(1) as pool:
                        found.append(pool.submit(processing._TOKENIZING.acquire, blocking=False).result())
                return super().__call__(*args, **kwargs)

        wanted = processor(text="a<image>", images=PICTURES[0])
        processor.tokenizer.__class__ = Odd
        found, inside = [], []
        thread = threading.Thread(
            target=lambda: found.append(processor(text="a<image>", images=PICTURES[0])), daemon=True
        )
        thread.start()
        thread.join(20)
        assert len(found) == 3  # none where it waits for itself
        assert found[1] is False  # others wait
        assert same(found[0], wanted)
        assert same(found[2], wanted)

    @pytest.mark.parametrize("backend", ["pillow", "fast"])
    def test_one_encoder_in_many(self, hasty, backend):
        encoder = tiny.encoder()
        encoder.pixels = PixelSettings(*encoder.pixels.mean_std(), backend=backend)
        todo = [[image, image[:10]] for image in PICTURES] * 4
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(encoder.prepare, todo))
        assert all(same(batch, encoder.prepare(images)) for batch, images in zip(together, todo, strict=True))


class TestWorkers:
    def collates(self):
        model = tiny.model("llama")
        return [Preparation.of(model.visual), partial(model.processor, text=["<image>ab", "c<image>"])]

    def test_a_processor_survives_copies(self):
        processor = tiny.model("llama").processor
        for other in (pickle.loads(pickle.dumps(processor)), copy.deepcopy(processor)):
            assert all(same(one(), two()) for one, two in zip(calls(processor), calls(other), strict=True))

    def test_a_processor_names_a_bad_image_and_a_bad_sample(self):
        processor = tiny.model("llama").processor
        texts = ["<image>a", "<image><image>b"]
        with pytest.raises(ValueError, match="^image 2: this file of 3 bytes is not an image"):
            processor(text=texts, images=[[PICTURES[0]], [PICTURES[1], b"bad"]])
        with pytest.raises(ValueError, match="^sample 1: 2 images cost at least 8 tokens"):
            processor(text=texts, images=[PICTURES[:1], PICTURES[1:3]], max_tokens=7)

    @forks
    @pytest.mark.parametrize("which", [0, 1])
    def test_forked_workers_make_the_same_batches(self, which):
        self.check(self.collates()[which], "fork")

    def test_spawned_workers_make_the_same_batches(self):
        self.check(self.collates()[0], "spawn")

    @pytest.mark.slow
    def test_spawned_workers_have_a_processor_of_their_own(self):
        self.check(self.collates()[1], "spawn")

    def check(self, collate, start):
        settings = {"batch_size": 2, "collate_fn": collate}
        here = list(DataLoader(PICTURES, **settings))
        there = list(DataLoader(PICTURES, **settings, num_workers=2, multiprocessing_context=start))
        assert len(here) == 4
        assert all(map(same, here, there))

    @forks
    def test_a_bad_file_is_named_by_its_worker(self, tmp_path):
        bad = tmp_path / "bad.png"
        bad.write_bytes(b"not a picture")
        loader = DataLoader([bad], collate_fn=self.collates()[0], num_workers=1, multiprocessing_context="fork")
        batches = iter(loader)
        refuses(r"image 0: .*bad\.png' is not an image", next, batches)
        assert next(batches, None) is None  # the worker is told to end

    @forks
    def test_from_files_to_tokens(self, files):
        encoder = tiny.encoder()
        costs = image_costs(image_sizes_hw(files), encoder)
        sampler = TokenBudgetSampler(costs, int(2.5 * costs.max()))
        loader = DataLoader(
            files,
            batch_sampler=sampler,
            collate_fn=Preparation.of(encoder),
            num_workers=2,
            multiprocessing_context="fork",
        )
        assert 1 < len(loader) < len(files)
        with torch.no_grad():
            direct = encoder(files)
            for items, batch in zip(list(sampler), loader, strict=True):
                assert len(batch.patches) == costs[items].sum()
                for item, image in zip(items, encoder(batch), strict=True):
                    assert image.plan == direct[item].plan
                    torch.testing.assert_close(image.tokens, direct[item].tokens, atol=1e-5, rtol=1e-5)


@forks
def test_trainer_takes_its_batches_and_goes_on_with_them(tmp_path):
    samples = [{"image": noise(20 + number, 30 + number, number)} for number in range(12)]
    model = fresh()

    def collate(samples):
        batch = model.processor(
            text=["<image>\nwhat? a"] * len(samples), images=[[sample["image"]] for sample in samples]
        )
        return {**batch, "labels": targets(model, batch)}

    costs = np.arange(20, 32)
    sampler = TokenBudgetSampler(costs, 80)
    names = {"Trainer": Trainer, "DataLoader": DataLoader, "sampler": sampler}
    exec(compile(page_block("get_train_dataloader"), "docs/training.md", "exec"), names)
    trained = []

    class Watched(names["BudgetTrainer"]):
        def training_step(self, model, inputs, *args):
            trained.append([height - 20 for height in inputs["image_sizes"][:, 0].tolist()])
            return super().training_step(model, inputs, *args)

    def train(**settings):
        trained.clear()
        optimizer = torch.optim.SGD(training.align(model), lr=0.0)
        arguments = TrainingArguments(
            tmp_path, remove_unused_columns=False, num_train_epochs=3, save_steps=6, report_to="none", use_cpu=True
        )
        trainer = Watched(
            model,
            arguments,
            train_dataset=samples,
            data_collator=collate,
            optimizers=(optimizer, None),
            callbacks=[names["NextEpoch"]],
        )
        trainer.train(**settings)
        return list(trained)

    wanted = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        wanted += list(sampler)
    assert len(wanted) == 3 * len(sampler) == 12  # so the sixth is inside an epoch
    assert train() == wanted
    assert train(resume_from_checkpoint=str(tmp_path / "checkpoint-6")) == wanted[6:]
