"""Graphs as they are written, in onnxruntime and OpenVINO: where these are installed."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import uhd
from tests.export.parts import PAIRS, encoder, images, tokens_of
from tests.export.test_padded import run_without
from tests.tiny import IMAGES, picture, refuses, tiny_encoder
from uhd import cli, export
from uhd.export import graph

for needed in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(needed)

pytestmark = [pytest.mark.onnx, pytest.mark.filterwarnings("ignore")]  # of the exporter and the runtimes

from uhd.export.running import Runner, session  # noqa: E402, after the skip

SMALL = {"timm clip, pixel shuffle"}


def openvino_session(file):
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(str(file)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda given: compiled(given)[0]


@pytest.mark.parametrize("runtime", [session, pytest.param(openvino_session, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in SMALL)) for name in PAIRS]
)
def test_encoders_at_eight_shapes_in_two_runtimes(name, runtime, tmp_path):
    made = encoder(name)
    error = export.onnx(made, tmp_path / "model.onnx")
    assert 0 < error <= 1e-4
    run = runtime(tmp_path / "model.onnx")
    for pictures in [*([image] for image in images()), images()]:
        found = run(export.inputs(pictures, tmp_path / "model.json"))
        np.testing.assert_allclose(found, tokens_of(made, pictures), rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip, paper", "dinov2 registers, spatial", "timm giant, mlp"])
@pytest.mark.parametrize("kind", ["float16", "int8"])
def test_half_and_int8_weights(name, kind, tmp_path):
    made = encoder(name)
    full = tokens_of(made, images())
    made = made.half() if kind == "float16" else made.quantize()
    assert 0 < export.onnx(made, tmp_path / "model.onnx") <= graph.BOUNDS[kind]
    found = session(tmp_path / "model.onnx")(export.inputs(images(), tmp_path / "model.json"))
    assert found.dtype == np.dtype(str(next(made.parameters()).dtype).removeprefix("torch."))
    off = np.abs(found - tokens_of(made, images())).max() / np.abs(full).max()
    assert off <= graph.BOUNDS[kind]
    assert not np.allclose(found, full, atol=1e-5)  # it has that precision


@pytest.mark.slow
def test_a_graph_of_fixed_shape(tmp_path):
    made = encoder("clip, paper")
    export.onnx(made, tmp_path / "model.onnx", dynamic=False)
    run = session(tmp_path / "model.onnx")
    for image in images():
        wanted = tokens_of(made, [image])
        found = run(export.inputs([image], tmp_path / "model.json"))[: len(wanted)]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


def test_the_commands_write_a_graph_and_encode_without_torch(tmp_path, capsys):
    made = tiny_encoder(note="small")
    made.save_pretrained(tmp_path / "encoder")
    assert cli.main(["export", str(tmp_path / "encoder"), "-o", str(tmp_path / "model.onnx")]) == 0
    assert "model.onnx and model.json: float32, within" in capsys.readouterr().out
    names = []
    for number, image in enumerate(IMAGES):
        names.append(str(tmp_path / f"{number}.png"))
        picture(*image.shape[:2], number).save(names[-1])
    (tmp_path / "broken.png").write_bytes(b"nothing")
    code = """
from uhd import cli
folder = sys.argv[1]
names = {names!r}
status = cli.main(["encode", "--onnx", folder + "/model.onnx", *names, "-o", folder + "/tokens.safetensors"])
assert "torch" not in sys.modules
sys.exit(status)
""".format(names=[*names, str(tmp_path / "broken.png")])
    done = run_without(code, tmp_path)
    assert done.returncode == 3, done.stderr
    assert "broken.png" in done.stderr
    assert "note: small" in done.stderr
    found = uhd.load_tokens(tmp_path / "tokens.safetensors")
    with torch.inference_mode():
        wanted = made(names)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours.plan, ours.layout) == (theirs.plan, theirs.layout)
        torch.testing.assert_close(ours.tokens, theirs.tokens, rtol=0, atol=1e-4)
    graphs_that_are_refused(tmp_path, names, capsys)


def graphs_that_are_refused(folder, names, capsys):
    """By the commands, in a sentence each, with nothing written."""
    start = ["encode", *names, "-o", str(folder / "new.safetensors"), "--onnx"]
    assert cli.main([*start, str(folder / "other.onnx")]) == 1
    assert "there is no graph" in capsys.readouterr().err
    assert cli.main([*start, str(folder / "model.onnx"), "--strategy", "llava-next"]) == 1
    assert "--strategy: not with --onnx" in capsys.readouterr().err
    described = json.loads((folder / "model.json").read_text())
    for other in ({"width": 25}, {"positions": None}):
        (folder / "model.json").write_text(json.dumps({**described, **other}))
        refuses("model.onnx does not run as model.json says, take both", Runner(folder / "model.onnx"), names[:1])
    rule = uhd.slicing.find("llava-next").for_vision(image_size=56, patch_size=14)
    (folder / "model.json").write_text(json.dumps({**described, "slicing": rule.to_dict()}))
    refuses("packs the views' tokens with learned embeddings", Runner(folder / "model.onnx"), names[:1])
    (folder / "model.onnx").write_bytes(b"no graph")
    assert cli.main([*start, str(folder / "model.onnx")]) == 1
    assert "model.onnx does not fit or is damaged" in capsys.readouterr().err
    assert not (folder / "new.safetensors").exists()


@pytest.mark.slow
def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    import onnxruntime
    import uhd_kernels

    monkeypatch.chdir(tmp_path)
    made, photo = encoder("clip, paper"), images()[4]
    names = {"uhd": uhd, "onnxruntime": onnxruntime, "torch": torch, "uhd_kernels": uhd_kernels}
    names |= {"encoder": made, "photo": photo}
    wanted = tokens_of(made, [photo])
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    blocks = re.findall(r"```python onnx\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "docs/export.md", "exec"), names)
        np.testing.assert_allclose(names.pop("tokens"), wanted, rtol=0, atol=1e-4)
    again = torch.export.load("encoder.pt2").module()(given=names["given"]).detach()
    np.testing.assert_allclose(again, wanted, rtol=0, atol=1e-4)


def test_a_graph_that_is_off_is_not_written(tmp_path, monkeypatch):
    old = {name: tmp_path / name for name in ("model.onnx", "model.json")}
    for path in old.values():
        path.write_text("old")
    monkeypatch.setattr(graph, "_export", lambda made, description, file: Path(file).write_bytes(b"new"))
    monkeypatch.setattr(graph, "_difference", lambda *_: 1.1e-4)
    refuses("off by 1.1e-04 of the largest, at most 1e-04", export.onnx, tiny_encoder(), old["model.onnx"])
    monkeypatch.setattr(graph, "_difference", lambda *_: float("nan"))
    refuses("off by nan", export.onnx, tiny_encoder(), old["model.onnx"])
    assert [path.read_text() for path in old.values()] == ["old", "old"]
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(graph, "_difference", lambda *_: 0.9e-4)
    assert export.onnx(tiny_encoder(), old["model.onnx"]) == 0.9e-4
    assert old["model.onnx"].read_bytes() == b"new"
    refuses("no folder", export.onnx, tiny_encoder(), tmp_path / "nowhere" / "model.onnx")
    refuses(r"written to an .onnx file", export.onnx, tiny_encoder(), tmp_path / "model.pt")
    monkeypatch.setattr(graph, "_EXTRA", ("no_such_library",))
    refuses("pip install", export.onnx, tiny_encoder(), old["model.onnx"], error=ImportError)
