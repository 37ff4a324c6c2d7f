"""Ranks whose batches hold other kinds of media do what one process does, see tests/hf/ranks.py."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from tests.hf.ranks import BACKENDS, KINDS, MIXES, SCHEMAS, TIED, batch_of, fresh, run
from tests.hf.test_family import COMPRESSORS
from tests.hf.tiny import WIDTH, attached
from tests.tiny import perceiver, tiny_encoder

DEEPSPEED = tuple(backend for backend in BACKENDS if backend.startswith("DeepSpeed"))


def check(jobs):
    assert run(jobs) == ["ok"] * len(jobs)


def test_fsdp2_text_and_image():
    check([["FSDP2, every part", ("text", "image"), SCHEMAS[1]]])  # the others among every mix below, which is slow


@pytest.mark.deepspeed
@pytest.mark.parametrize("backend", DEEPSPEED)
def test_deepspeed(backend):
    pytest.importorskip("deepspeed")
    check([[backend, ("text", "image"), SCHEMAS[1]]])


@pytest.mark.parametrize("schema", SCHEMAS)
def test_gradients_come_in_one_order_whatever_the_batch_holds(schema):
    """ZeRO-2 sums those of all ranks as they come, many in one go."""
    orders = {}
    for kind in KINDS:
        model = fresh(schema)
        model.encode_without_images = True
        orders[kind] = []
        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, kind=kind, name=name: orders[kind].append(name))
        model(**batch_of(model, kind)).loss.backward()
    assert sorted(orders["text"]) == sorted(name for name, _ in model.named_parameters())
    assert all(order == orders["text"] for order in orders.values())


@pytest.mark.slow
@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_mix(backend, schema):
    if backend in DEEPSPEED:
        pytest.importorskip("deepspeed")
    check([[backend, mix, schema] for mix in MIXES])


@pytest.mark.slow
@pytest.mark.parametrize("backend", [name for name in BACKENDS if "every part" not in name])
def test_tied_embeddings_in_one_unit(backend):
    if backend in DEEPSPEED:
        pytest.importorskip("deepspeed")
    check([[backend, ("text", "image"), SCHEMAS[1] + TIED]])


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


RESAMPLERS = {
    "perceiver": lambda: perceiver(width=WIDTH),
    "perceiver, direct": lambda: perceiver(width=WIDTH, key_position="direct"),
    **{name: COMPRESSORS[name] for name in ("spatial", "pyramid", "rewrite", "mlp")},
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of FSDP1 about itself
@pytest.mark.parametrize("wrapper", ["FSDP1", "FSDP2"])
@pytest.mark.parametrize("name", RESAMPLERS)
def test_parameters_may_be_gathered_in_bfloat16(one_rank, name, wrapper):
    torch.manual_seed(0)
    model = attached(tiny_encoder(RESAMPLERS[name]()), tie_word_embeddings=False).train()
    batches = [batch_of(model, kind) for kind in ("text", "image")]
    with torch.no_grad():
        want = [model(**batch).loss for batch in batches]
    units = [model.visual.vision, model.visual.compressor]
    if wrapper == "FSDP2":
        for part in (*units, model):
            fully_shard(part, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    else:
        model = FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy({type(unit) for unit in units}),
            mixed_precision=MixedPrecision(param_dtype=torch.bfloat16),
            sharding_strategy=ShardingStrategy.NO_SHARD,  # which one rank gets anyway
            device_id=torch.device("cpu"),
            use_orig_params=True,
        )
    for batch, loss in zip(batches, want, strict=True):
        found = model(**batch)
        found.loss.backward()
        assert found.logits.dtype == torch.bfloat16
        torch.testing.assert_close(found.loss.detach().float(), loss, rtol=0.02, atol=0.02)


def test_steps_of_a_bounded_size_are_refused_where_parameters_are_sharded(one_rank):
    model = fresh("llava-uhd")
    fully_shard(model.visual)
    fully_shard(model)
    batch = model.processor(text="no image")
    model(**batch)
    model.visual.max_patches_per_step = 8
    with pytest.raises(ValueError, match="max_patches_per_step is 8"):
        model(**batch)


def test_embeddings_that_only_the_language_model_gathers_need_ids(one_rank):
    model = fresh("llava-uhd")
    fully_shard(model.language_model)
    fully_shard(model)
    with pytest.raises(ValueError, match="pass input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 32))


def test_only_classes_that_are_there_are_not_to_be_split():
    model = fresh("llava-uhd")
    present = {type(module).__name__ for module in model.modules()}
    assert {"ViT", "PerceiverResampler", "LlamaDecoderLayer"} <= model._no_split_modules <= present
