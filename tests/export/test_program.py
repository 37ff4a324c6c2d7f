"""`torch.export` of the packed form: saved, and loaded where only uhd_kernels is imported; and its decomposition."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import uhd_kernels
from uhd_kernels.decomposed import decomposed

from tests.export.parts import encoder, images, tokens_of
from tests.tiny import refuses
from uhd import export
from uhd.export.graph import described

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

NAMES = ["clip, paper", "siglip2, six latents", "window stem, paper"]
OPERATOR = "uhd_kernels.varlen_cross_attention"


def given_of(made, pictures):
    arrays = export.packed(export.inputs(pictures, described(made)))
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


@pytest.mark.parametrize("name", [NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])])
def test_one_program_serves_any_views_and_patches(name, tmp_path):
    made = encoder(name)
    program = export.torch_program(made)
    assert OPERATOR in str(program.graph)
    plain = program.run_decompositions(uhd_kernels.decompositions())
    assert OPERATOR not in str(plain.graph)
    for pictures in [*([image] for image in images()[:4]), images()]:
        wanted = tokens_of(made, pictures)
        for one in (program, plain):
            found = one.module()(given=given_of(made, pictures)).detach().numpy()
            np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_a_saved_program_loads_after_the_kernels_alone(tmp_path):
    made = encoder(NAMES[0])
    torch.export.save(export.torch_program(made), tmp_path / "encoder.pt2")
    torch.save(given_of(made, images()), tmp_path / "given.pt")
    code = """
import sys, torch, uhd_kernels
folder = sys.argv[1]
program = torch.export.load(folder + "/encoder.pt2")
torch.save(program.module()(given=torch.load(folder + "/given.pt")), folder + "/tokens.pt")
assert not any(name.partition(".")[0] == "uhd" for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "tokens.pt").detach().numpy()
    np.testing.assert_allclose(found, tokens_of(made, images()), rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.onnx
@pytest.mark.filterwarnings("ignore")
def test_another_exporter_takes_the_decomposed_program(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    made = encoder(NAMES[0])
    program = export.torch_program(made).run_decompositions(uhd_kernels.decompositions())
    torch.onnx.export(program, dynamo=True, verbose=False).save(tmp_path / "packed.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "packed.onnx", providers=["CPUExecutionProvider"])
    for pictures in (images()[:1], images()):
        given = {f"given_{name}": tensor.numpy() for name, tensor in given_of(made, pictures).items()}
        (found,) = session.run(None, {one.name: given[one.name] for one in session.get_inputs()})
        np.testing.assert_allclose(found, tokens_of(made, pictures), rtol=0, atol=1e-4)


@pytest.mark.parametrize("table", [True, False])
def test_the_decomposition_gives_what_the_operator_does(table):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 8)
    bounds = torch.tensor([0, 4, 4, 7, 9], dtype=torch.int32)  # a view without rows among them
    rows, starts = (torch.randn(6, 2, 8), torch.tensor([2, 0, 3, 0], dtype=torch.int32)) if table else (None, None)
    given = (q, k, v, bounds, 4, rows, starts, 0.3, "reference")
    wanted = torch.ops.uhd_kernels.varlen_cross_attention(*given)[0]
    torch.testing.assert_close(decomposed(*given)[0], wanted)
    assert not decomposed(*given)[0][1].any()


def test_other_compressors_are_refused():
    refuses("this has SpatialResampler", export.torch_program, encoder("dinov2 registers, spatial"), error=TypeError)
    refuses("this has PerceiverResampler", export.torch_program, encoder("dinov2, deep"), error=TypeError)
    refuses("this has compressors inside", export.torch_program, encoder("adaptive inside, paper"), error=TypeError)
    refuses("this has an int8 ViT", export.torch_program, encoder(NAMES[0]).quantize(), error=TypeError)
