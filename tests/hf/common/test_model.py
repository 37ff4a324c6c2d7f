"""What transformers asks of every model, of ours: the contracts of its model tester over four language models."""

import copy
import inspect
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, LlamaConfig
from transformers.initialization import no_init_weights

from tests.hf.common.eyes import CLASSES, GREEDY, IMAGES, KINDS, PLACES, TEXTS, batch_of, fresh, shared, visual
from tests.hf.tiny import targets
from tests.tiny import silent
from uhd.hf import UHDConfig, UHDForConditionalGeneration, UHDModel
from uhd.hf.configuration import max_positions
from uhd.hf.versions import cache_name

every = pytest.mark.parametrize("kind", KINDS)


def of(kind, model_class):
    return shared(kind) if model_class is UHDForConditionalGeneration else shared(kind).base_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Saved models by kind, each in a subfolder of its own."""
    place = tmp_path_factory.mktemp("saved")
    for kind in KINDS:
        shared(kind).save_pretrained(place / kind)
    return place


@every
@pytest.mark.parametrize("model_class", CLASSES)
def test_a_saved_model_loads_by_every_name(kind, model_class, folder):
    batch = batch_of(kind)
    want = of(kind, model_class)(**batch)[0]
    for given in (
        {"pretrained_model_name_or_path": folder / kind},
        {"pretrained_model_name_or_path": str(folder), "subfolder": kind, "revision": "main"},
        {"pretrained_model_name_or_path": folder / kind, "use_safetensors": True, "weights_only": True},
        {
            "pretrained_model_name_or_path": None,
            "config": UHDConfig.from_pretrained(folder / kind),
            "state_dict": load_file(folder / kind / "model.safetensors"),
        },
    ):
        found, told = model_class.from_pretrained(**given, output_loading_info=True)
        assert not told["missing_keys"]
        assert not told["unexpected_keys"]
        assert torch.equal(found(**batch)[0], want), given
    half = model_class.from_pretrained(folder / kind, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@every
def test_a_processor_comes_from_where_its_model_came_from(kind, folder, tmp_path):
    found = UHDForConditionalGeneration.from_pretrained(folder, subfolder=kind)
    assert torch.equal(found.processor(text=TEXTS, images=IMAGES)["input_ids"], batch_of(kind)["input_ids"])
    again = UHDForConditionalGeneration.from_pretrained(folder, subfolder=kind)
    again.save_pretrained(tmp_path)
    assert (tmp_path / "processor_config.json").is_file()


@every
def test_other_shapes_load_only_when_asked(kind, folder):
    wider = {"text_config": {"vocab_size": shared(kind).config.text_config.vocab_size + 3}}
    if kind == "gemma4_text":
        wider["text_config"]["vocab_size_per_layer_input"] = wider["text_config"]["vocab_size"]
    with pytest.raises(RuntimeError, match="mismatch"):
        UHDModel.from_pretrained(folder / kind, **wider)
    found = UHDModel.from_pretrained(folder / kind, **wider, ignore_mismatched_sizes=True)
    assert len(found.get_input_embeddings().weight) == wider["text_config"]["vocab_size"]


@every
def test_every_tensor_is_initialised_by_its_own_rule(kind):
    config = shared(kind).config
    torch.manual_seed(0)
    found = UHDModel(copy.deepcopy(config))
    with no_init_weights(), torch.device("meta"):
        empty = UHDModel(copy.deepcopy(config))
    assert {name for name, t in empty.named_parameters() if t.device.type != "meta"} == set()
    empty.to_empty(device="cpu").tie_weights()
    for tensor in (*empty.parameters(), *empty.buffers()):
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else 0)
    empty._is_hf_initialized = False
    empty.initialize_weights()
    learned = dict(empty.named_parameters())
    assert [name for name, p in learned.items() if not p.isfinite().all()] == []
    assert {name: p.shape for name, p in learned.items()} == {name: p.shape for name, p in found.named_parameters()}


@every
def test_what_the_vision_encoder_saw_comes_out_where_it_is_asked_for(kind):
    model, batch = shared(kind), batch_of(kind)
    seen = visual(batch)
    blocks, views = len(model.visual.vision.blocks), len(seen["grids"])
    plain = model.get_image_features(**seen)
    assert plain.hidden_states is None
    assert plain.attentions is None
    full = model.get_image_features(**seen, output_hidden_states=True, output_attentions=True)
    assert all(map(torch.equal, plain.pooler_output, full.pooler_output))
    states = model.visual.vision(seen["pixel_values"], seen["grids"].tolist(), hidden_states=True)
    torch.testing.assert_close((full.last_hidden_state, full.hidden_states), states)
    assert [len(layer) for layer in full.attentions] == [views] * blocks
    for grid, weights in zip(seen["grids"].tolist(), full.attentions[0], strict=True):
        length = grid[0] * grid[1] + model.visual.vision.config.num_prefix_tokens
        assert weights.shape == (model.visual.vision.config.heads, length, length)
        torch.testing.assert_close(weights.sum(-1), torch.ones(len(weights), length))
    loose = model.get_image_features(**seen, return_dict=False)
    assert torch.equal(loose[0], plain.last_hidden_state)
    output = model(**batch, output_hidden_states=True)
    assert len(output.image_outputs.hidden_states) == blocks + 1
    assert len(output.hidden_states) == 1 + model.config.text_config.num_hidden_layers
    assert model(**batch).image_outputs.hidden_states is None


def test_attentions_are_those_that_weigh_the_values():
    """One block's attention from its weights and values, class token included, in every step of a bounded call."""
    model = shared("llama")
    seen, block = visual(batch_of("llama")), model.visual.vision.blocks[0].attn
    mixed = []
    handle = block.proj.register_forward_pre_hook(lambda module, args: mixed.append(args[0]))
    values = block.qkv.register_forward_hook(lambda module, args, out: mixed.append(out.chunk(3, -1)[2]))
    model.visual.max_patches_per_step = 40
    try:
        maps = model.get_image_features(**seen, output_attentions=True).attentions[0]
    finally:
        handle.remove()
        values.remove()
        del model.visual.max_patches_per_step
        model.visual.max_patches_per_step = None
    assert len(maps) == len(seen["grids"])
    first = maps[0].shape[-1]
    value, out = mixed[0], mixed[2]  # the second call of qkv is the recording's
    by_head = value[:first].unflatten(-1, (len(maps[0]), -1)).transpose(0, 1)
    candidates = [(weights @ by_head).transpose(0, 1).flatten(1) for weights in maps if weights.shape[-1] == first]
    assert any(torch.allclose(found, out[:first], atol=1e-5) for found in candidates)


def test_states_are_asked_for_by_a_config_and_come_of_videos_too():
    model = fresh("llama")
    batch = model.processor(videos=[[IMAGES[0], IMAGES[0]]])
    model.config.vision_config.output_hidden_states = True
    assert len(model.get_video_features(**batch).hidden_states) == 1 + len(model.visual.vision.blocks)
    assert model.get_video_features(**batch, output_hidden_states=False).hidden_states is None
    encoded = model.visual([IMAGES[0]])
    assert model.get_image_features(image_tokens=encoded).last_hidden_state is None


@pytest.mark.parametrize("kind", KINDS[:3])
def test_images_beside_embeddings_go_where_their_token_is_embedded(kind):
    model, batch = shared(kind), batch_of(kind)
    ids = batch.pop("input_ids")
    embeds = model.get_input_embeddings()(ids)
    for found in (model, model.base_model):
        torch.testing.assert_close(found(inputs_embeds=embeds, **batch)[0], found(input_ids=ids, **batch)[0])


@every
def test_every_parameter_trains_with_and_without_checkpoints(kind):
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0) if kind == "gpt2" else {}
    model = fresh(kind, **dropout).train()
    batch = batch_of(kind)
    labels = targets(model, batch)
    gradients = []
    for checkpoints in (False, True):
        model.zero_grad()
        if checkpoints:
            named = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
            getattr(model, f"{named}_checkpointing_enable")()
            model.enable_input_require_grads()
        model(**batch, labels=labels, use_cache=False).loss.backward()
        unused = [name for name in silent(model) if not name.startswith("language_model.")]
        assert unused == []
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)


@every
def test_the_vocabulary_is_resized_as_the_language_models_own(kind):
    model, bare = fresh(kind), copy.deepcopy(fresh(kind).language_model)
    size = len(model.get_input_embeddings().weight)
    for given in ({"new_num_tokens": size + 5}, {"new_num_tokens": size + 6, "pad_to_multiple_of": 8}):
        resized = model.resize_token_embeddings(**given, mean_resizing=False)
        own = bare.resize_token_embeddings(**given, mean_resizing=False)
        assert resized is model.get_input_embeddings()
        assert len(resized.weight) == len(own.weight) == model.config.text_config.vocab_size == model.vocab_size
        shapes = {name: p.shape for name, p in model.language_model.named_parameters()}
        assert shapes == {name: p.shape for name, p in bare.named_parameters()}
    assert model(**batch_of(kind)).logits.shape[-1] == len(resized.weight)


@every
def test_attention_is_chosen_part_by_part_and_gives_the_same(kind):
    model = fresh(kind)
    batch = model.processor(text=TEXTS[2], images=IMAGES[1:])
    want = model(**batch).logits
    for given in ("eager", "sdpa", {"text_config": "eager"}):
        model.set_attn_implementation(given)
        assert model.language_model.config._attn_implementation == (given if isinstance(given, str) else "eager")
        torch.testing.assert_close(model(**batch).logits, want, rtol=1e-3, atol=1e-4)


@every
def test_forward_shows_what_tools_look_for(kind):
    for model_class in CLASSES:
        shown = inspect.signature(model_class.forward).parameters
        assert {"cache", "output_attentions", "output_hidden_states", "inputs_embeds", "labels"} <= set(shown)
        assert shown["kwargs"].kind is inspect.Parameter.VAR_KEYWORD
        assert model_class.main_input_name == next(name for name in shown if name != "self")
    model = shared(kind)
    assert getattr(model, model.base_model_prefix, model) is not None
    assert model.base_model.get_input_embeddings() is model.get_input_embeddings()


@pytest.mark.skipif(
    cache_name(shared("llama").language_model) != "cache", reason="this transformers has the old name only"
)
@torch.no_grad()
def test_the_old_name_of_the_cache_warns_as_everywhere():
    model, batch = shared("llama"), batch_of("llama")
    cache = model(**batch, use_cache=True).cache
    mask = torch.ones(3, batch["input_ids"].shape[1] + 1, dtype=torch.long)
    given = {"input_ids": torch.full((3, 1), 5), "attention_mask": mask}
    with pytest.warns(FutureWarning, match="`past_key_values` is deprecated"):
        old = model(**given, past_key_values=copy.deepcopy(cache)).logits
    assert torch.equal(model(**given, cache=copy.deepcopy(cache)).logits, old)  # a warning would be an error


def test_scaled_rotary_positions_are_positions():
    told = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 192}
    assert max_positions(LlamaConfig(max_position_embeddings=192, rope_parameters=told)) == 768
    assert max_positions(LlamaConfig(max_position_embeddings=192)) == 192
    model = fresh("llama", rope_parameters=told)
    assert model(input_ids=torch.full((1, 300), 5)).logits.shape[1] == 300


@every
def test_a_config_is_json_and_its_parts_load_alone(kind, folder, tmp_path):
    config = UHDConfig.from_pretrained(folder / kind)
    config.to_json_file(tmp_path / "again.json")
    assert UHDConfig.from_json_file(tmp_path / "again.json").to_dict() == config.to_dict()
    assert json.loads(config.to_json_string())["image_token_id"] == config.image_token_id
    for name, part in (("text_config", type(config.text_config)), ("vision_config", type(config.vision_config))):
        alone, whole = part.from_pretrained(folder / kind).to_dict(), getattr(config, name).to_dict()
        for told in (alone, whole):
            told.pop("transformers_version", None)
        assert alone == whole
    other = AutoConfig.from_pretrained(folder, subfolder=kind, text_config={"vocab_size": 20})
    assert {**config.text_config.to_dict(), "vocab_size": 20} == other.text_config.to_dict()
    assert type(AutoModel.from_config(config)) is UHDModel


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning", "ignore:Position ids")
@pytest.mark.parametrize("kind", KINDS[:3])
def test_prompt_tuning_reaches_forward_and_generate(kind):
    """Against a loop over forward. PEFT knows the cache by its old name only, so no cache here."""
    peft = pytest.importorskip("peft")
    model, batch = fresh(kind), batch_of(kind)
    plain = model.generate(**batch, **GREEDY)
    sizes = {"num_virtual_tokens": 2, "token_dim": 32, "num_layers": 2, "num_attention_heads": 4}
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_transformer_submodules=1, **sizes)
    tuned = peft.get_peft_model(model, config)
    with torch.no_grad():
        next(p for p in tuned.parameters() if p.requires_grad).normal_()
    got = tuned.generate(**batch, **GREEDY, use_cache=False)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        for _ in range(3):
            logits = tuned(input_ids=ids, attention_mask=mask, **visual(batch)).logits[:, -1:]
            new = logits.index_fill(-1, torch.tensor([*PLACES, model.generation_config.eos_token_id]), -1e9).argmax(-1)
            ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
    assert torch.equal(got, ids)
    assert not torch.equal(got, plain)


@pytest.mark.filterwarnings("ignore:Could not find a config file")  # PEFT, of a folder that is none
@every
def test_an_adapter_of_transformers_own(kind, monkeypatch, folder, tmp_path):
    peft = pytest.importorskip("peft")
    # the release of PEFT that the newest transformers asks for may not be out
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None, raising=False)
    model, batch = fresh(kind), batch_of(kind)
    target = r"language_model.*\.(q_proj|c_attn)"
    model.add_adapter(peft.LoraConfig(target_modules=target, fan_in_fan_out=kind == "gpt2", init_lora_weights=False))
    with torch.no_grad():
        on = model(**batch).logits
        model.disable_adapters()
        off = model(**batch).logits
        model.enable_adapters()
        torch.testing.assert_close(off, shared(kind)(**batch).logits)
        assert not torch.allclose(on, off)
        model.save_pretrained(tmp_path)
        again = UHDForConditionalGeneration.from_pretrained(folder / kind)
        try:
            again.load_adapter(tmp_path)
        except ImportError as problem:
            pytest.skip(f"this PEFT is too old for this transformers: {problem}")
        assert torch.equal(again(**batch).logits, on)
