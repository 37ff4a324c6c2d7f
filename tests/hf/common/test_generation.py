"""What transformers asks of every model that generates: the contracts of its generation and pipeline testers."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import GenerationMixin, pipeline

from tests.hf.common.eyes import GREEDY, IMAGES, KINDS, PLACES, TEXTS, batch_of, shared, visual
from uhd.hf import UHDForConditionalGeneration

every = pytest.mark.parametrize("kind", KINDS)


@every
def test_greedy_is_the_argmax_of_forward_step_by_step(kind):
    model, batch = shared(kind), batch_of(kind)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        for _ in range(3):
            logits = model(input_ids=ids, attention_mask=mask, **visual(batch), logits_to_keep=1).logits[:, -1]
            logits[:, [*PLACES, model.generation_config.eos_token_id]] = -torch.inf
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    for how in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(**batch, **GREEDY, **how), ids), how


@every
@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])
def test_dictionaries_hold_every_step(kind, how):
    model, batch = shared(kind), batch_of(kind)
    torch.manual_seed(0)
    asked = {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "output_hidden_states": True,
    }
    found = model.generate(**batch, **{**GREEDY, **how}, **asked)
    rows = len(batch["input_ids"]) * how.get("num_return_sequences", 1)
    assert found.sequences.shape == (rows, batch["input_ids"].shape[1] + 3)
    assert torch.equal(found.sequences[:: rows // 3, :-3], batch["input_ids"])
    wide = 3 * max(how.values(), default=1) if "do_sample" not in how else rows
    for steps in (found.scores, found.logits):
        assert [step.shape for step in steps] == [(wide, model.config.text_config.vocab_size)] * 3
    assert len(found.hidden_states) == 3
    torch.manual_seed(0)
    assert torch.equal(model.generate(**batch, **{**GREEDY, **how}), found.sequences)


@every
def test_it_stops_where_it_is_told_and_goes_on_from_a_cache(kind):
    model, batch = shared(kind), batch_of(kind)
    want = model.generate(**batch, **{**GREEDY, "max_new_tokens": 6, "min_new_tokens": 6})
    first = model.generate(**batch, **GREEDY, return_dict_in_generate=True)
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 3, dtype=torch.long)], 1)
    cache = first.get("cache", first.get("past_key_values"))
    given = {"attention_mask": mask, "past_key_values": cache, **visual(batch)}
    assert torch.equal(model.generate(first.sequences, **given, **GREEDY), want)
    one = model.processor(text=TEXTS[0], images=IMAGES[:1])
    new = model.generate(**one, **GREEDY)[0, -3:]
    stopped = model.generate(**one, max_new_tokens=3, do_sample=False, eos_token_id=int(new[0]))[0]
    assert stopped[one["input_ids"].shape[1] :].tolist() == new[:1].tolist()


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"cache_implementation": "static"}])
def test_embeddings_alone_or_nothing_at_all(kind, how):
    model = shared(kind)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    embeds = model.get_input_embeddings()(ids)
    for given in ({}, {"attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])}):
        want = model.generate(ids, **given, **GREEDY, **how)[:, -3:]
        assert torch.equal(model.generate(inputs_embeds=embeds, **given, **GREEDY, **how), want)
    assert model.generate(**GREEDY, **how).shape == (1, 4)  # from the token that begins


def test_it_is_a_generating_class_of_transformers():
    assert GenerationMixin in UHDForConditionalGeneration.__bases__
    assert UHDForConditionalGeneration.can_generate()


@every
@pytest.mark.parametrize("task", ["image-text-to-text", "any-to-any"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pipelines_answer_one_and_many(kind, task, dtype, tmp_path):
    shared(kind).save_pretrained(tmp_path)
    model = UHDForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    pipe = pipeline(task, model=model, processor=model.processor)
    image = Image.fromarray(IMAGES[0])
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": t}]}] for t in "ab"
    ]
    many = pipe(text=chats, generate_kwargs=GREEDY, return_full_text=False)
    for chat, answer in zip(chats, many, strict=True):
        [alone] = pipe(text=chat, generate_kwargs=GREEDY, return_full_text=False)
        assert answer[0]["generated_text"] == alone["generated_text"]


def test_every_test_of_theirs_has_one_of_ours():
    """The list names tests that exist, and each of theirs once."""
    root = Path(__file__).parents[3]
    lines = [line.split() for line in (Path(__file__).parent / "theirs.txt").read_text().splitlines()]
    pairs = [(line[0], line[1:]) for line in lines if line and not line[0].startswith("#")]
    theirs = [name for _, names in pairs for name in names]
    assert len(theirs) == len(set(theirs)) >= 30
    for ours, _ in pairs:
        file, *names = ours.split("::")
        assert f"def {names[-1]}(" in (root / file).read_text(), ours
