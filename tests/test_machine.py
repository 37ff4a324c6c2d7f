"""Which products inference takes: by measured rates, as asked, as pinned; kept between processes; never on a whim."""

import itertools
import json
import os
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.scripts import FOLDER
from tests.tiny import refuses
from uhd import machine

CPU = torch.device("cpu")
LARGE = machine.SMALL
SLOW_HALVES = {"float32 native": 142.0, "float32 onednn": 140.0, "bfloat16 native": 71.0, "float16 native": 100.0}
FAST_HALVES = {"float32 native": 97.0, "float32 onednn": 184.0, "float32 packed": 194.0, "bfloat16 native": 415.0}


@pytest.fixture
def unasked(monkeypatch, tmp_path):
    """Nothing asked for, pinned, or kept in a cache."""
    monkeypatch.delenv("UHD_PRODUCTS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machine._rates.cache_clear()
    yield tmp_path
    machine.use_products(None)
    machine._rates.cache_clear()


def test_rates_speak_for_a_product():
    assert machine.choose(SLOW_HALVES) == machine.NATIVE | {"bfloat16": "float32", "float16": "float32"}
    assert machine.choose(FAST_HALVES) == machine.NATIVE | {"float32": "packed"}
    assert machine.choose({}) == machine.NATIVE
    assert machine.choose({"float32 native": 100.0, "float32 onednn": 104.0}) == machine.NATIVE
    attention = {"bfloat16 attention native": 60.0, "bfloat16 attention products": 100.0}
    assert machine.choose(attention)["bfloat16 attention"] == "products"


def test_casting_takes_what_keeps_nothing(unasked, monkeypatch):
    monkeypatch.setattr(machine, "rates", lambda: {**FAST_HALVES, "bfloat16 native": 100.0})
    assert machine.product_of(torch.float32, CPU, LARGE, keeps=True) == (torch.float32, "packed")
    assert machine.product_of(torch.float32, CPU, LARGE) == (torch.float32, "onednn")
    assert machine.product_of(torch.bfloat16, CPU, LARGE, keeps=True) == (torch.float32, "onednn")


def test_small_layers_other_dtypes_and_other_devices_are_native_unmeasured(unasked, monkeypatch):
    monkeypatch.setattr(machine, "measure", None)
    assert machine.product_of(torch.bfloat16, CPU, LARGE - 1) == (torch.bfloat16, "native")
    assert machine.product_of(torch.float64, CPU, LARGE) == (torch.float64, "native")
    assert machine.product_of(torch.bfloat16, torch.device("cuda"), LARGE) == (torch.bfloat16, "native")
    assert machine.attention_of(torch.float32, CPU, LARGE) == "native"


def test_asked_and_pinned(unasked, monkeypatch):
    monkeypatch.setattr(machine, "measure", None)
    monkeypatch.setenv("UHD_PRODUCTS", " float32=onednn, bfloat16=float32")
    assert machine.products() == machine.NATIVE | {"float32": "onednn", "bfloat16": "float32"}
    assert machine.product_of(torch.bfloat16, CPU, 1) == (torch.float32, "onednn")  # small ones too
    machine.use_products({"bfloat16": "packed"})
    assert machine.products() == machine.NATIVE | {"bfloat16": "packed"}
    machine.use_products(machine.products())
    assert machine.products()["bfloat16"] == "packed"
    machine.use_products(None)
    monkeypatch.setenv("UHD_PRODUCTS", "native")
    assert machine.products() == machine.NATIVE
    for text in ("float32=mkl", "int4=native", "packed", "float32=float32"):
        monkeypatch.setenv("UHD_PRODUCTS", text)
        refuses("UHD_PRODUCTS has .*expected native, or some of float32=native|onednn|packed", machine.products)
    refuses("use_products has float32=fast", machine.use_products, {"float32": "fast"})


def test_without_onednn_nothing_is_asked_of_it(unasked, monkeypatch):
    monkeypatch.setenv("UHD_PRODUCTS", "float32=onednn,float16=float32")
    monkeypatch.setattr(machine, "packed_products", lambda: None)
    assert machine.product_of(torch.float16, CPU, 1) == (torch.float32, "native")
    assert "float32 onednn" not in dict(machine._calls())


def test_measured_once_and_kept(unasked, monkeypatch):
    measured = []
    monkeypatch.setattr(machine, "measure", lambda: measured.append(1) or dict(FAST_HALVES))
    assert machine.rates() == machine.rates() == FAST_HALVES
    machine._rates.cache_clear()  # as in another process
    assert machine.rates() == FAST_HALVES
    assert len(measured) == 1
    [file] = (unasked / "uhd").iterdir()
    assert json.loads(file.read_text()) == FAST_HALVES
    for damaged in ("", "[1]", '{"float32 native": "fast"}'):
        file.write_text(damaged)
        machine._rates.cache_clear()
        assert machine.rates() == FAST_HALVES
    monkeypatch.setattr(machine, "cpu", lambda: "another CPU")
    machine._rates.cache_clear()
    machine.rates()
    assert len(measured) == 5
    assert len(list((unasked / "uhd").iterdir())) == 2


def test_what_a_call_runs_under_does_not_touch_the_measuring(unasked, monkeypatch):
    def plain():
        kind = type(torch.ones(1)), torch.ones(1).device.type, torch.is_autocast_enabled("cpu")
        return {"float32 native": 1.0} if kind == (torch.Tensor, "cpu", False) else {}

    monkeypatch.setattr(machine, "measure", plain)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"), FlopCounterMode(display=False) as counted:
        assert machine.rates() == {"float32 native": 1.0}
    assert counted.get_total_flops() == 0


def test_a_cache_that_cannot_be_written(unasked, monkeypatch):
    (unasked / "uhd").write_text("a file")
    monkeypatch.setattr(machine, "measure", lambda: dict(FAST_HALVES))
    assert machine.rates() == FAST_HALVES


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(machine, "SHAPES", ((16, 32, 48), (4, 32, 32)))
    monkeypatch.setattr(machine, "ATTENTION", (2, 8, 4))


def test_a_machine_too_slow_for_two_rounds_tells_nothing(unasked, quick, monkeypatch):
    assert machine.measure(seconds=0) == {}
    even = itertools.count().__next__
    assert machine.measure(clock=even, seconds=30)
    monkeypatch.setattr(machine, "_ROUNDS", 1)
    assert machine.measure(clock=even, seconds=30) == {}


def test_a_clock_that_cannot_be_trusted_tells_nothing(unasked, quick, monkeypatch):
    later = itertools.accumulate(1.5**n for n in range(999))  # ever slower
    assert machine.measure(clock=lambda: next(later), seconds=30) == {}
    monkeypatch.setattr(machine, "measure", dict)
    assert machine.products() == machine.NATIVE
    assert not (unasked / "uhd").exists()  # the next process tries again


def test_what_is_measured(quick):
    steady = itertools.count(step=1e-6)
    found = machine.measure(clock=lambda: next(steady), seconds=30)
    dense = sum(2 * rows * inputs * outputs for rows, inputs, outputs in machine.SHAPES) / 1e3
    assert {"float32 native", "bfloat16 native", "float16 native", "int8"} <= set(found)
    assert all(rate == pytest.approx(dense, abs=0.06) for name, rate in found.items() if "attention" not in name)


@pytest.mark.parametrize("size", [(2, 3, 7, 16), (1, 5, 1, 8), (0, 2, 4, 8)])
def test_attention_by_products(size, monkeypatch):
    monkeypatch.setattr(machine, "_SCORES", 40)  # a few rows at once
    q, k, v = torch.randn(3, *size)
    torch.testing.assert_close(machine.attend_by_products(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_threads_keep_the_order_and_raise_the_first(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    both, names = threading.Barrier(2, timeout=30), []

    def work(number, other):
        if number < 2:
            both.wait()  # two of them at once
        names.append(threading.current_thread().name)
        if number in (3, 5):
            raise ValueError(f"item {number}")
        return number * other

    assert machine.in_threads(work, range(3), [4, 5, 6]) == [0, 5, 12]
    assert threading.current_thread().name not in names
    with pytest.raises(ValueError, match="item 3"):
        machine.in_threads(work, range(7), range(7))


def test_a_fresh_process_measures_and_keeps(unasked):
    code = "import torch; from uhd import machine; torch.set_num_threads(1); print(machine.products(), machine.cpu())"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [FOLDER.parent, FOLDER.parent / "kernels"]))}
    told = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert told.stdout.startswith("{'float32': ")
