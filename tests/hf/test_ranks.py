"""Ranks whose batches hold other kinds of media do what one process does, see tests/hf/ranks.py."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from tests.hf.ranks import BACKENDS, MIXES, SCHEMAS, fresh, run

DEEPSPEED = tuple(backend for backend in BACKENDS if backend.startswith("DeepSpeed"))


def check(jobs):
    assert run(jobs) == ["ok"] * len(jobs)


def test_fsdp2_text_and_image():
    check([[backend, ("text", "image"), SCHEMAS[1]] for backend in BACKENDS if backend.startswith("FSDP2")])


@pytest.mark.deepspeed
@pytest.mark.parametrize("backend", DEEPSPEED)
def test_deepspeed(backend):
    pytest.importorskip("deepspeed")
    check([[backend, mix, SCHEMAS[0]] for mix in (("text", "image"), ("image", "encoded"))])


@pytest.mark.slow
@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend not in DEEPSPEED])
def test_every_mix(backend, schema):
    check([[backend, mix, schema] for mix in MIXES])


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


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
