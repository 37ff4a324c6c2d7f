"""What is prepared for a GPU runs here as far as a CPU can: every step at a tiny size, without its clock."""

import importlib
import json
from functools import partial

import pytest
import torch

import uhd.demo
from tests.pretrained import released
from tests.scripts import among_scripts, load_script
from tests.tiny import encoded, noise


@pytest.fixture(scope="module")
def benchmark():
    return load_script("gpu")


@pytest.fixture
def steps(benchmark, monkeypatch):
    """The steps' module on a clock that stands, without a compiler, and with a narrow language model."""
    steps = benchmark.run_step.__globals__["STEPS"]["parts"].rows.__globals__
    monkeypatch.setattr(steps["bench"], "time_us", lambda call: (call(), 2000.0)[1])
    monkeypatch.setitem(steps, "peak_mib", lambda step: (step(), 12.5)[1])
    monkeypatch.setattr(uhd.VisualEncoder, "compile", lambda self: self)
    monkeypatch.setattr(uhd.demo, "untrained_encoder", partial(uhd.demo.untrained_encoder, width=64))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    with among_scripts():
        yield steps


@pytest.fixture
def work(steps):
    return steps["Work"]("cpu", "sdpa", 64, 1, ((90, 120), (60, 200)))


def fine(rows):
    rows = list(rows)
    assert rows
    assert [row for row in rows if row["problem"] is not None] == []
    assert json.loads(json.dumps(rows)) == rows
    return rows


def test_kernels_are_checked(steps, work, monkeypatch):
    shapes = steps["ragged"](30)
    assert len(set(shapes)) == 30
    assert {shape.head_dim for shape in shapes} == {64, 72, 128}
    assert any(0 in shape.lengths for shape in shapes)
    assert any(len(set(shape.lengths)) < len(shape.lengths) for shape in shapes)
    few = steps["ragged"](6, 20)
    for dtype in steps["DTYPES"]:
        rows = fine(steps["kernel_rows"](work, dtype, few))
        assert steps["counted"](rows) == [{"dtype": dtype, "shapes": 6, "right": 6, "problem": None}]
    check = steps["bench"].check
    wrong = lambda case, compute, *truth: check(case, lambda: 1.1 * compute(), *truth)  # noqa: E731
    monkeypatch.setattr(steps["bench"], "check", wrong)
    [row] = steps["counted"](list(steps["kernel_rows"](work, "fp32", few)))
    assert row["right"] == 0
    assert "wrong output" in row["problem"]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of opcheck itself
def test_the_operator(steps, work):
    assert [row["what"] for row in fine(steps["operator_rows"](work))] == ["opcheck", "compiled, forward and backward"]


def test_parts_against_the_cpu(steps, work):
    rows = fine(steps["part_rows"](work))
    assert len(rows) == 3 * 4
    assert {row["dtype"] for row in rows} == {"fp32", "fp16", "bf16"}


def test_front_ends_have_equal_weights_and_patches(steps, work, monkeypatch):
    released.skip_unless_packed(released.make("minicpmv4_6")[0])  # one of the peers
    monkeypatch.setattr(importlib.import_module("end_to_end_peers"), "LM_WIDTH", 128)
    monkeypatch.setitem(steps, "pictures", lambda work: [encoded(noise(*hw), "JPEG") for hw in work.images_hw])
    rows = fine(steps["front_end_rows"](work))
    assert [row["ratio"] for row in rows] == [1] * 9
    assert {row["contender"] for row in rows} == {"transformers", "uhd", "uhd, compiled"}


def test_training_steps_have_equal_losses(steps, work):
    rows = fine(steps["training_rows"](work))
    assert [row["peak_mib"] for row in rows] == [12.5] * 3


def test_contenders_that_cannot_run_are_rows(steps, work):
    rows = list(steps["time_rows"](work, [steps["Shape"]((5, 3, 5), 2, 2, 16)]))
    told = {row["contender"]: row["problem"] for row in rows}
    assert told["triton"].startswith("ValueError: impl='triton' cannot run")
    assert told["padded SDPA"] is told["per-view SDPA"] is None
    assert {row.get("forward_us") for row in rows if row["problem"] is None} == {2000.0}
    assert all(len(problem or "") <= 300 for problem in told.values())


def test_a_roofline_for_a_chip_that_is_known(steps, work, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(steps["bench"], "timings", lambda case: {"triton": {"forward_us": 30.0, "backward_us": 60.0}})
    monkeypatch.setattr(steps["Case"], "make", lambda *given: None)
    shape = steps["bench"].SHAPES[1]
    [row] = steps["time_rows"](work._replace(device="cuda"), [shape])
    floor = steps["bench"].model(shape, chip="H200", dtype=torch.bfloat16)["forward_floor"]
    assert row["forward_over_roofline"] == pytest.approx(30e-6 / (floor / 4.3e12))


def test_waits_are_counted(steps, work, monkeypatch):
    waits = {"warned": 1, "profiled": 0, "where": "vit.py:3 x1"}
    counts = iter([{**waits, "warned": 0, "where": ""}, waits] * 9)
    monkeypatch.setitem(steps, "waits_of", lambda call: (call(), next(counts))[1])
    rows = list(steps["wait_rows"](work))
    assert [row["problem"] for row in rows if row["warned"] and row["pixels"] == "on the GPU"] == ["it waits"] * 3
    assert not any(row["problem"] for row in rows if not row["warned"] or row["pixels"] != "on the GPU")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_written(benchmark, tmp_path, capsys):
    assert benchmark.main(["--out", str(tmp_path)]) == 1
    assert "Nothing was run: torch sees no GPU here." in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    said = benchmark.in_a_process("waits", tmp_path / "rows", 300)
    assert said == "exit status 1: Nothing was run: torch sees no GPU here."
    assert benchmark.in_a_process("waits", tmp_path / "rows", 0.01) == "stopped after 0 s"


def test_one_run(benchmark, tmp_path, capsys):
    """A step that is cut short keeps the rows that it had; the rest runs."""

    def start(name, file, bound_s):
        if name == "operator":
            return "exit status -11: nothing was said"
        row = json.dumps({"contender": "uhd, packed", "ms": 12.345, "peak_mib": 100.4, "problem": None})
        file.write_text(f"{row}\n{row[:9]}" if name == "training" else f"{row}\n")
        return "stopped after 40 s" if name == "training" else None

    result = benchmark.run(["waits", "training", "operator"], tmp_path, start)
    assert json.loads((tmp_path / "gpu.json").read_text()) == result
    assert benchmark.problems(result) == 2
    assert "training: 0.0 s, 1 rows, 0 with a problem; stopped after 40 s" in capsys.readouterr().out
    assert benchmark.main(["--table", str(tmp_path / "gpu.json")]) == 0
    said = capsys.readouterr().out
    assert "| contender | ms | peak mib | |\n|---|---:|---:|---|\n| uhd, packed | 12.35 | 100 |  |" in said
    assert "This step ended early: exit status -11: nothing was said." in said
    assert "### The operator\n\nNo rows." in said


def test_all_steps_fit_in_six_minutes(benchmark):
    steps = benchmark.run_step.__globals__["STEPS"]
    side_by_side = max(step.bound_s for step in steps.values() if not step.timed)
    assert side_by_side + sum(step.bound_s for step in steps.values() if step.timed) <= 350


def test_arguments(benchmark, capsys):
    asked = benchmark.options(["--steps", "times", "waits"])
    assert (asked.steps, asked.out.name, asked.table) == (["times", "waits"], "results", None)
    with pytest.raises(SystemExit):
        benchmark.options(["--steps", "nothing"])
    assert "invalid choice: 'nothing'" in capsys.readouterr().err
