"""From pixels on a GPU to tokens nothing waits for the device: told by fake tensors, which hold no numbers."""

from functools import partial

import pytest
import torch
import uhd_kernels.dispatch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from uhd_kernels.sdpa import cross_attention_sdpa

import uhd
from tests.resampler import parts
from tests.tiny import tiny_encoder, vit
from uhd.batch import SliceBatch
from uhd.demo import untrained_encoder
from uhd.resampler import PerceiverConfig, PerceiverResampler, folded
from uhd.slicing import SlicingConfig
from uhd.vision import compress_vit

PLANS = [uhd.plan(hw, SlicingConfig(image_size=56, patch_size=14)) for hw in ((100, 60), (28, 200), (58, 112))]
GRIDS = [view.patches_hw for plan in PLANS for view in plan.views]


class Waits(TorchDispatchMode):
    """Lists the operators that make the host wait: those over tensors of two devices, unless told not to."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))  # which raises where numbers have to be known on the host
        places = {each.device for each in tree_leaves((args, kwargs, out)) if isinstance(each, torch.Tensor)}
        asks_nothing = operator.namespace == "uhd_kernels" or (kwargs or {}).get("non_blocking")
        if len(places) > 1 and not asks_nothing:
            self.found.append(operator.name())
        return out


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """As where the kernels run. Those of attention without them are called below."""
    monkeypatch.setattr(uhd_kernels.dispatch, "_triton_problem", lambda q: None)
    with torch.no_grad():
        yield


def waits(make, module=None):
    """What waits in the call that is made; where it is of a module, this is on the GPU by then."""
    with FakeTensorMode(allow_non_fake_inputs=True):  # of the weights, which are real, but for their numbers
        call = make() if module is None else make(module.to_empty(device="cuda"))
        with Waits() as mode:
            assert call().device.type == "cuda"
    return mode.found


@pytest.mark.parametrize("name", ["2.0", "depth 3 with FFN", "spatial", "rewrite", "pyramid", "merger", "pooled"])
def test_compressors(name):
    grids = parts.grids_for(name)

    def make(module):
        features = torch.zeros(sum(h * w for h, w in grids), module.in_dim, dtype=torch.float16, device="cuda")
        return lambda: module(features, grids)

    assert waits(make, parts.randomised(name, dtype=torch.float16).eval()) == []


VISION = {
    "resized positions": vit,
    "prefix": lambda: vit(class_token=True, num_registers=3),
    "buckets": lambda: vit(interpolation="nearest", bucket_rule="transformers"),
    "window stem": lambda: vit(stem_border=3),
    "compressed": lambda: compress_vit(vit(class_token=True, num_registers=2, image_size=None), after=1),
}


@pytest.mark.parametrize(("dtype", "inner"), [(torch.float32, "hwc"), (torch.bfloat16, "chw")])
@pytest.mark.parametrize("name", VISION)
def test_raw_pixels(name, dtype, inner):
    grids = [(2 * h, 2 * w) for h, w in GRIDS]

    def make(encoder):
        patches = torch.zeros(sum(h * w for h, w in grids), 3 * 14**2, dtype=torch.uint8, device="cuda")
        return lambda: encoder.encode_packed(patches, grids, inner=inner)[0]

    assert waits(make, tiny_encoder(vision=VISION[name]()).to(dtype)) == []


@pytest.mark.parametrize("strategy", ["llava-uhd", "llava-next", "llava-onevision"])
def test_whole_encoders(strategy):
    def make(encoder):
        plans = [encoder.plan(hw) for hw in ((100, 160), (720, 300))]
        shape = sum(plan.num_patches for plan in plans), 3 * encoder.vision.patch_size**2
        patches = torch.zeros(shape, dtype=torch.uint8, device="cuda")
        return lambda: encoder.encode(SliceBatch.from_patches(patches, plans))

    assert waits(make, untrained_encoder(strategy=strategy, depth=1, width=64)) == []


def test_attention_without_the_kernels():
    def make():
        q, k, positions = (torch.zeros(n, 2, 8, device="cuda") for n in (4, 11, 8))
        views = {"key_positions": positions, "offsets": [0, 3, 0], "scale": 1.0}
        return lambda: cross_attention_sdpa(q, k, k, [0, 3, 8, 11], **views)

    assert waits(make) == []


def test_what_waits_is_seen():
    def found(operation):
        return waits(lambda: partial(operation, torch.zeros(2, 3, device="cuda")))

    assert found(lambda x: x + torch.ones(3).to("cuda")) == ["aten::_to_copy"]
    assert found(lambda x: x[[1, 0]])
    for asks in (lambda x: x.sum().item(), lambda x: torch.equal(x, x), lambda x: x.nonzero(), lambda x: x[x > 0]):
        with pytest.raises(RuntimeError, match="aten"):
            found(asks)


def test_folding_is_left_to_the_cpu(monkeypatch):
    """Whether what is kept still holds has to be waited for."""
    config = PerceiverConfig(width=1024, vision_width=1024, num_heads=8, num_latents=64)
    grids = [(24, 20)] * 7
    monkeypatch.setattr(folded, "are_plain", lambda weights, like: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    found = {}
    for device in ("cpu", "cuda"):
        module = PerceiverResampler(config).eval().requires_grad_(False)
        with FakeTensorMode(allow_non_fake_inputs=True):
            module.to_empty(device=device)
            found[device] = module.inference_path(grids)
            module.inference = "narrow"
            assert module.inference_path(grids) == "narrow"
    assert found == {"cpu": "absorbed", "cuda": "plain"}
