"""Inference of the perceiver resampler by every path: equal tokens, never a stale product, training untouched."""

from __future__ import annotations

import copy
import math
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from tests.resampler import parts
from tests.tiny import stirred
from uhd.flop_counter import count_flops
from uhd.resampler import PerceiverConfig, PerceiverResampler, folded

VARIANTS = ("paper", "minicpm-v-2.0", "minicpm-v-2.6")
FOLDING = ("absorbed", "narrow")
GRIDS = [(3, 5), (4, 2), (1, 7), (3, 5), (6, 4), (5, 3)]


def made(variant="paper", *, vision_width=10, dtype=torch.float32, **sizes):
    """In eval mode, with no parameter at a special value."""
    torch.manual_seed(0)
    sizes = {"width": 24, "num_heads": 3, "num_latents": 9, **sizes}
    config = PerceiverConfig.preset(variant, vision_width=vision_width, **sizes)
    return stirred(PerceiverResampler(config).to(dtype))


def features_for(module, grids=GRIDS, *, seed=1):
    return parts.features_for(module, grids, seed=seed)


@torch.no_grad()
def by(path, module, features, grids=GRIDS):
    """The module's tokens by this path, which must be the one that is taken."""
    module.inference = path
    assert module.inference_path(grids, features) == path
    return module(features, grids)


def relative(found, wanted):
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize("vision_width", [10, 24, 40])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_path_gives_the_released_layers_tokens(variant, vision_width):
    module = made(variant, vision_width=vision_width)
    features = features_for(module)
    with torch.no_grad():
        wanted = parts.composed(module, features, GRIDS)
    for path in folded.PATHS:
        assert relative(by(path, module, features), wanted) < 3e-6, path


@pytest.mark.parametrize("variant", VARIANTS)
def test_float64_weights(variant):
    module = made(variant, dtype=torch.float64)
    features = features_for(module)
    wanted = by("plain", module, features)
    for path in FOLDING:
        assert relative(by(path, module, features), wanted) < 1e-6, path  # the table itself is float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision_is_as_good_as_the_released_layers_own(variant, dtype):
    module = made(variant, width=64, num_heads=4, vision_width=48, num_latents=16, dtype=dtype)
    features = features_for(module)
    with torch.no_grad():
        truth = parts.composed(copy.deepcopy(module).double(), features.double(), GRIDS)
        own = relative(parts.composed(module, features, GRIDS), truth)
    for path in FOLDING:
        found = by(path, module, features)
        assert found.dtype == dtype
        assert relative(found, truth) <= 2 * own, path


def test_half_precision_where_the_cpu_has_units_for_it(monkeypatch):
    """There products stay in bfloat16, elsewhere they run in float32, which is nearer to the truth."""
    module = made(width=64, num_heads=4, vision_width=48, num_latents=16, dtype=torch.bfloat16)
    features = features_for(module)
    truth = by("plain", copy.deepcopy(module).double(), features.double())
    off = []
    for product in ("float32", "native"):
        monkeypatch.setenv("UHD_PRODUCTS", f"bfloat16={product}")
        off.append(relative(by("narrow", module, features), truth))
    assert off[0] < off[1] < 0.02


def test_features_with_outliers_and_a_large_mean():
    """As ViTs give them: the norm that is folded away must not lose digits to them."""
    module = made(vision_width=20)
    features = features_for(module) + 3
    features[:, 4] *= 100
    wanted = by("plain", copy.deepcopy(module).double(), features.double())
    own = relative(by("plain", module, features), wanted)
    assert relative(by("narrow", module, features), wanted) < max(3 * own, 3e-6)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=6), st.sampled_from(FOLDING))
def test_packed_views_equal_single_ones(grids, path):
    module = made("minicpm-v-2.0")
    features = features_for(module, grids)
    found = by(path, module, features, grids)
    parts = features.split([h * w for h, w in grids])
    singles = torch.cat([by(path, module, x, [grid]) for x, grid in zip(parts, grids, strict=True)])
    torch.testing.assert_close(found, singles, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, by("plain", module, features, grids), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("path", FOLDING)
def test_views_do_not_mix(path, monkeypatch):
    module = made()
    features = features_for(module)
    wanted = by(path, module, features)
    features[15:23] = math.nan  # the second view
    found = by(path, module, features)
    assert found[1].isnan().all()
    torch.testing.assert_close(found[[0, 2, 3, 4, 5]], wanted[[0, 2, 3, 4, 5]])
    monkeypatch.setattr(folded, "LOGITS_AT_ONCE", {"cpu": 1})  # every view in a step of its own
    torch.testing.assert_close(by(path, module, features)[[0, 3]], wanted[[0, 3]])


def test_no_views():
    module = made()
    for choice in folded.CHOICES:
        module.inference = choice
        assert module(torch.zeros(0, 10), []).shape == (0, 9, 24)
        assert module.inference_path([]) == "plain"


def test_no_positions():
    module = PerceiverResampler(parts.PERCEIVERS["no positions"]).eval()
    features = features_for(module)
    for path in FOLDING:
        torch.testing.assert_close(by(path, module, features), by("plain", module, features), atol=1e-5, rtol=1e-5)


def test_positions_that_are_no_sum_of_rows_and_columns():
    module = made()
    module.pos_embed.add_(torch.randn(module.pos_embed.shape))
    features = features_for(module)
    for path in FOLDING:
        assert relative(by(path, module, features), by("plain", module, features)) < 3e-6


# ---- nothing stale ----


def _step(optimizer):
    def change(module):
        module.train()
        module(features_for(module), GRIDS).square().sum().backward()
        optimizer(module.parameters()).step()
        module.zero_grad()
        module.eval()

    return change


def _everywhere(function):
    def change(module):
        with torch.no_grad():
            for tensor in module.state_dict(keep_vars=True).values():
                function(tensor)

    return change


def _loaded(assign):
    def change(module):
        other = made()
        with torch.no_grad():
            for tensor in other.state_dict().values():
                tensor.mul_(0.9)
        module.load_state_dict(other.state_dict(), assign=assign)

    return change


def _in_inference_mode(module):
    with torch.inference_mode():
        _everywhere(lambda x: x.add_(0.1))(module)


def _rows_swapped(module):
    weight = module.attn.in_proj_weight.data
    weight[[25, 40]] = weight[[40, 25]]


def _with_lora(module):
    from peft.tuners.lora import LoraConfig
    from peft.tuners.lora.model import LoraModel

    config = LoraConfig(r=2, target_modules=["kv_proj"], init_lora_weights=False)
    return LoraModel(nn.ModuleDict({"resampler": module}), config, "default").eval()


def _lora_merged(module):
    lora = _with_lora(module)
    by("absorbed", module, features_for(module))
    lora.merge_and_unload()
    assert type(module.kv_proj) is nn.Linear


CHANGES = {
    "AdamW": _step(lambda parameters: torch.optim.AdamW(parameters, lr=0.05)),
    "AdamW, fused": _step(lambda parameters: torch.optim.AdamW(parameters, lr=0.05, fused=True)),
    "SGD, foreach": _step(lambda parameters: torch.optim.SGD(parameters, lr=0.05, foreach=True)),
    "add_ under no_grad": _everywhere(lambda x: x.add_(0.1)),
    "mul_ through data": _everywhere(lambda x: x.data.mul_(1.1)),
    "data = new": _everywhere(lambda x: setattr(x, "data", 1.1 * x.data)),
    "data *=": _everywhere(lambda x: setattr(x, "data", x.data.mul_(1.1))),
    "in inference mode": _in_inference_mode,
    "one number through data": lambda module: module.attn.in_proj_weight.data[30, 5].add_(3),
    "rows swapped through data": _rows_swapped,
    "load_state_dict": _loaded(assign=False),
    "load_state_dict(assign)": _loaded(assign=True),
    "bfloat16 and back": lambda module: module.bfloat16().float(),
    "to_empty and reset": lambda module: module.to_empty(device="cpu").apply(
        lambda part: part.reset_parameters() if hasattr(part, "reset_parameters") else None
    ),
    "LoRA merged": _lora_merged,
    "a new parameter": lambda module: setattr(module.ln_kv, "bias", nn.Parameter(module.ln_kv.bias.detach() + 1)),
    "a new module": lambda module: setattr(module, "kv_proj", nn.Linear(10, 24, bias=False)),
    "eps": lambda module: setattr(module.ln_kv, "eps", 0.3),
}


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_stale_is_used(change):
    module = made()
    features = features_for(module)
    before = {path: by(path, module, features) for path in FOLDING}
    for path, tokens in before.items():  # a second call, by what is kept
        assert torch.equal(by(path, module, features), tokens)
    CHANGES[change](module)
    for path in FOLDING:
        wanted = by("plain", copy.deepcopy(module), features)  # a copy has kept nothing
        assert relative(wanted, before[path]) > 1e-3 or change == "bfloat16 and back"
        assert not torch.equal(wanted, before[path])
        assert relative(by(path, module, features), wanted) < 3e-6, path


def test_each_tensor_alone_is_watched():
    """Written where no version tells of it."""
    module = made()
    features = features_for(module)
    for name, tensor in module.state_dict(keep_vars=True).items():
        for path in FOLDING:
            by(path, module, features)
        tensor.data += 0.3 * torch.randn(tensor.shape)
        for path in FOLDING:
            wanted = by("plain", copy.deepcopy(module), features)
            assert relative(by(path, module, features), wanted) < 3e-6, (name, path)


@pytest.mark.parametrize("part", ["fold_latents", "fold_values"])
def test_products_are_kept_while_nothing_changes(monkeypatch, part):
    module, made_now, fold = made(), [], getattr(folded, part)
    features = features_for(module)
    monkeypatch.setattr(folded, part, lambda path, *how: made_now.append(path) or fold(path, *how))
    for _ in range(3):
        for path in FOLDING:
            by(path, module, features)
    assert made_now == list(FOLDING)
    for let_go in (lambda: module.train().eval(), lambda: module.double().float()):
        let_go()
        by("narrow", module, features)
    assert made_now == [*FOLDING, "narrow", "narrow"]


def test_parameters_at_odd_offsets():
    """Views into one buffer, as some loaders assign them, need not fill whole words."""
    for dtype in (torch.float32, torch.bfloat16):
        module = made(dtype=dtype)
        buffer = torch.randn(module.query.numel() + 1).to(dtype)
        module.query = nn.Parameter(buffer[1:].view(9, 24))
        features = features_for(module)
        before = by("narrow", module, features)
        buffer[1:] *= 1.5
        assert not torch.equal(by("narrow", module, features), before)


# ---- training and everything that is not plain execution ----


@pytest.mark.parametrize("choice", folded.CHOICES)
def test_training_is_always_plain(choice):
    module, plain = made(), made()
    plain.inference = "plain"
    features = features_for(module).requires_grad_()
    with torch.no_grad():
        module(features, GRIDS)  # something is kept
    module.inference = choice
    for mode in (True, False):
        module.train(mode)
        assert module.inference_path(GRIDS, features) == "plain"
        inputs = [features.detach().clone().requires_grad_() for _ in range(2)]
        for one, x in zip((module, plain), inputs, strict=True):
            one.zero_grad()
            one(x, GRIDS).square().sum().backward()
        assert torch.equal(inputs[0].grad, inputs[1].grad)
        for own, wanted in zip(module.parameters(), plain.parameters(), strict=True):
            assert torch.equal(own.grad, wanted.grad)
    module.train()
    with torch.no_grad():
        assert module.inference_path(GRIDS) == "plain"


def test_gradients_that_are_wanted_of_anything():
    module = made().requires_grad_(False)
    features = features_for(module)
    module.inference = "narrow"
    assert module.inference_path(GRIDS, features) == "narrow"
    assert module.inference_path(GRIDS, features.requires_grad_()) == "plain"
    module(features, GRIDS).sum().backward()
    assert features.grad.abs().min() > 0
    module.ln_post.bias.requires_grad_()
    assert module.inference_path(GRIDS, features.detach()) == "plain"


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def _hooked(name):
    def change(module):
        module.get_submodule(name).register_forward_hook(lambda *_: None)

    return change


def _replaced_forward(module):
    forward = module.ln_q.forward
    module.ln_q.forward = lambda x: forward(x)


NOT_PLAIN = {
    "parametrised": (lambda m: parametrize.register_parametrization(m.attn, "in_proj_weight", Doubled()), "plain"),
    "hook on the attention": (_hooked("attn"), "plain"),
    "hook on LN_q": (_hooked("ln_q"), "plain"),
    "hook on LN_kv": (_hooked("ln_kv"), "absorbed"),
    "forward replaced": (_replaced_forward, "plain"),
    "LoRA on kv_proj": (_with_lora, "absorbed"),
    "kv_proj with a bias": (lambda m: setattr(m, "kv_proj", nn.Linear(10, 24)), "absorbed"),
    "the latents are no parameter": (lambda m: m._parameters.update(query=m.query.detach().requires_grad_()), None),
    "mixed dtypes": (lambda m: m.ln_q.double(), "plain"),
}


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_layers_that_are_not_as_made(name):
    module = made()
    features = features_for(module)
    by("narrow", module, features)
    change, widest = NOT_PLAIN[name]
    change(module)
    with torch.no_grad():
        assert module.inference_path(GRIDS, features) == ("narrow" if widest is None else "plain")
        if name == "mixed dtypes":
            return
        module.inference = "plain"
        wanted = module(features, GRIDS)
        module.inference = widest or "narrow"
        assert module.inference_path(GRIDS, features) == (widest or "narrow")
        torch.testing.assert_close(module(features, GRIDS), wanted, atol=2e-5, rtol=2e-5)


def test_inference_mode_autocast_and_transforms():
    module = made()
    features = features_for(module)
    wanted = by("plain", module, features)
    module.inference = "narrow"
    with torch.inference_mode():
        torch.testing.assert_close(module(features, GRIDS), wanted, atol=1e-5, rtol=1e-5)
    module.train()
    module(features, GRIDS).sum().backward()  # what inference mode kept is not in the way
    module.eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert module.inference_path(GRIDS, features) == "plain"
        assert relative(module(features, GRIDS), wanted) < 0.03
    with torch.no_grad():
        weights = {"attn.in_proj_weight": 2 * module.attn.in_proj_weight.detach()}
        other = torch.func.functional_call(module, weights, (features, GRIDS))
        assert relative(other, wanted) > 1e-3
        torch.testing.assert_close(module(features, GRIDS), wanted, atol=1e-5, rtol=1e-5)
        module.inference = "plain"
        assert relative(torch.func.functional_call(module, weights, (features, GRIDS)), other) < 3e-6


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, on first use of dual numbers
def test_derivatives_by_transforms():
    module = made().requires_grad_(False)
    module.attention_impl = "reference"
    features = features_for(module)
    tangent = torch.randn_like(features)
    found = []
    for choice in ("narrow", "plain"):
        module.inference = choice
        primal, slope = torch.func.jvp(lambda x: module(x, GRIDS), (features,), (tangent,))
        slopes = torch.func.grad(lambda x: module(x, GRIDS).square().sum())(features)
        found.append((primal, slope, slopes))
        with torch.autograd.forward_ad.dual_level():
            dual = module(torch.autograd.forward_ad.make_dual(features, tangent), GRIDS)
            slope = torch.autograd.forward_ad.unpack_dual(dual).tangent
        torch.testing.assert_close(slope, found[0][1], atol=1e-4, rtol=1e-4)
    assert all(torch.equal(own, wanted) for own, wanted in zip(*found, strict=True))


def test_parameters_made_in_inference_mode_are_not_folded():
    with torch.inference_mode():
        module = made()
        features = features_for(module)
        module.inference = "narrow"
        assert module.inference_path(GRIDS, features) == "plain"
        assert module(features, GRIDS).isfinite().all()


def test_compiled_it_is_plain_and_follows_the_weights():
    module = made().requires_grad_(False)
    features = features_for(module)
    module.inference = "narrow"
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    for _ in range(2):
        with torch.no_grad():
            module(features, GRIDS)
            found = compiled(features, GRIDS)
            torch.testing.assert_close(found, by("plain", module, features))
            module.inference = "narrow"
            module.attn.in_proj_weight.mul_(1.5)


# ---- the choice ----


def test_flops_are_what_is_multiplied():
    module = made("minicpm-v-2.0", width=64, vision_width=32, num_heads=4, num_latents=16)
    features = features_for(module)
    after = 4 * len(GRIDS) * 16 * 64**2  # out_proj and proj
    positions = sum(2 * 4 * 16 * 32 * (h + w) for h, w in set(GRIDS))  # pairs times half the width; left out
    checks = {"absorbed": 3 * 64**2, "narrow": 3 * 64**2 + 64 * 32}
    for path in folded.PATHS:
        by(path, module, features)
        wanted = folded.flops(path, module.config, GRIDS) + after
        if path != "plain":
            wanted += positions - folded.CHECK_FLOPS * checks[path] - folded.CALL_FLOPS
        assert count_flops(lambda path=path: by(path, module, features)) == wanted, path


def test_the_cheapest_is_chosen():
    def chosen(width, grids=((24, 24),) * 7, vision_width=1024, latents=64, heads=None):
        sizes = {"width": width, "vision_width": vision_width, "num_latents": latents}
        return folded.cheapest(PerceiverConfig(**sizes, num_heads=heads or width // 128), list(grids))

    assert [chosen(width) for width in (1024, 2048, 4096, 8192)] == ["absorbed", "narrow", "narrow", "narrow"]
    assert chosen(1024, heads=64) == "plain"  # 4096 pairs are more than the width
    assert chosen(1024, vision_width=4096, heads=4) == "absorbed"  # the language model is the narrow one
    assert chosen(4096, latents=4096) == "plain"
    assert chosen(64, [(1, 1)], vision_width=32, heads=1) == "plain"  # the check costs more than it saves
    assert chosen(4096, [(24, 24)]) == "narrow"


@given(
    st.sampled_from([256, 512, 1024, 4096]),
    st.sampled_from([256, 384, 1024]),
    st.sampled_from([4, 8, 32]),
    st.sampled_from([16, 64, 144]),
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=8),
)
def test_flops_grow_with_everything(width, vision_width, heads, latents, grids):
    config = PerceiverConfig(width=width, vision_width=vision_width, num_heads=heads, num_latents=latents)

    def counts(grids=grids, **changes):
        return [folded.flops(path, config.replace(**changes), grids) for path in folded.PATHS]

    now, more = counts(), counts([*grids, (2, 3)])
    assert min(now) == folded.flops(folded.cheapest(config, grids), config, grids)
    assert all(a < b for a, b in zip(now, more, strict=True))
    assert all(a < b for a, b in zip(now, counts(num_latents=256), strict=True))
    assert counts(num_heads=64)[0] == now[0]  # heads cost only where W_k and W_v act on sums
    assert all(a < b for a, b in zip(now[1:], counts(num_heads=64)[1:], strict=True))
    assert all(isinstance(count, int) for count in now)


def test_auto_takes_the_choice(monkeypatch):
    monkeypatch.setattr(folded, "CALL_FLOPS", 0)
    monkeypatch.setattr(folded, "CHECK_FLOPS", 0)
    module = made(width=64, vision_width=8, num_heads=2, num_latents=4).requires_grad_(False)
    features = features_for(module)
    assert module.inference == "auto"
    assert module.inference_path(GRIDS) == module.inference_path(GRIDS, features) == "narrow"
    found = module(features, GRIDS)
    assert relative(found, by("plain", module, features)) < 3e-6
    module.inference, module.attention_impl = "auto", "reference"
    assert module.inference_path(GRIDS) == "plain", "a kernel was asked for by name"
    assert relative(module(features, GRIDS), found) < 3e-6


def test_unknown_choices():
    module = made()
    with pytest.raises(ValueError, match="inference must be 'auto', 'plain', 'absorbed' or 'narrow', got 'fast'"):
        module.inference = "fast"
    assert module.inference == "auto"
    with pytest.warns(DeprecationWarning, match="'auto' is taken"):
        module.inference = "cached"
    assert module.inference == "auto"
    with pytest.raises(ValueError, match="path must be .*, got 'auto'"):
        folded.flops("auto", module.config, GRIDS)
    for sizes in ({"depth": 2}, {"ffn_ratio": 2.0}):
        deep = made(**sizes)
        with pytest.raises(ValueError, match="inference='narrow' needs depth=1 and no FFN"):
            deep.inference = "narrow"
        with torch.no_grad():
            assert deep.inference_path(GRIDS) == "plain"
    with pytest.raises(TypeError, match="two integers"):
        module.inference_path([3])


# ---- copies, files, threads ----


def test_copies_pickles_and_files_hold_nothing_of_it():
    module = made()
    names, size = list(module.state_dict()), len(pickle.dumps(module))
    features = features_for(module)
    wanted = by("narrow", module, features)
    assert list(module.state_dict()) == names
    assert len(pickle.dumps(module)) <= size + 100
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.inference == "narrow"
        assert torch.equal(by("narrow", other, features), wanted)
        with torch.no_grad():
            other.attn.in_proj_weight.mul_(2)
        assert not torch.equal(by("narrow", other, features), wanted)
        assert torch.equal(by("narrow", module, features), wanted)


def test_threads():
    module = made()
    module.inference = "narrow"
    batches = [features_for(module, seed=seed) for seed in range(24)]

    @torch.no_grad()
    def run(x):
        return module(x, GRIDS)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(run, batches))
    for tokens, x in zip(found, batches, strict=True):
        assert torch.equal(tokens, run(x))
