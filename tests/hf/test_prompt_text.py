"""Rules of generation read the prompt's text, whatever stands for images in the ids."""

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    TextStreamer,
)
from transformers.generation import BaseStreamer, CandidateGenerator

from tests.hf.tiny import IMAGES, TEXTS, attach, encoder, language_model, model, tokenizer
from tests.tiny import noise

KINDS = ("llama", "gpt2", "mamba", "gemma3n_text", "nemotron_h")


def byte_ids(text):
    return tokenizer()(text, add_special_tokens=False)["input_ids"]


def penalised(out):
    """By row: the ids whose scores a rule changed in the first step."""
    changed = out.scores[0] != out.logits[0]
    return [set(row.nonzero().flatten().tolist()) for row in changed]


def without_padding(lm):
    """The language model attached with a tokenizer whose end-of-sequence token pads."""
    found = attach(encoder(), lm)
    found.generation_config.pad_token_id = found.config.fill_token_id = tokenizer().eos_token_id
    return found


RECORD = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True}
SCORES = {**RECORD, "output_scores": True, "output_logits": True}


class Seen(LogitsProcessor, StoppingCriteria, BaseStreamer):
    """A rule of every kind that keeps what it is given."""

    def __init__(self):
        self.ids = []

    def __call__(self, input_ids, scores):
        self.ids.append(input_ids.clone())
        return scores

    def put(self, value):
        self.ids.append(value)

    def end(self):
        self.ids.append(None)


class Criterion(Seen):
    def __call__(self, input_ids, scores, **kwargs):
        super().__call__(input_ids, scores)
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [model, without_padding])
def test_penalties_touch_the_ids_of_the_text_alone(kind, make):
    found = make(kind)
    out = found.generate(**found.processor(text="ba<image>b", images=IMAGES[0]), repetition_penalty=1.5, **SCORES)
    assert penalised(out) == [set(byte_ids("ba"))]
    texts = ["ba<image>b", "c", "<image>d<image>ef"]
    batch = found.processor(text=texts, images=[[IMAGES[0]], [], list(IMAGES[1:3])], padding=True)
    out = found.generate(**batch, repetition_penalty=1.5, **SCORES)
    assert penalised(out) == [set(byte_ids(text)) for text in ("ba", "c", "def")]


@pytest.mark.parametrize("kind", ["llama", "gemma3n_text"])
def test_sequences_of_ids_are_those_of_the_text(kind):
    """ "ab" stands around the image, so it is an n-gram of the text; what fills the image's positions is none."""
    found = without_padding(kind)
    batch = found.processor(text="a<image>bxa", images=IMAGES[0])
    out = found.generate(**batch, no_repeat_ngram_size=2, **SCORES)
    assert penalised(out) == [set(byte_ids("b"))]
    bad = [byte_ids("ab"), [found.config.fill_token_id] * 3]
    out = found.generate(**found.processor(text="xa<image>", images=IMAGES[0]), bad_words_ids=bad, **SCORES)
    assert penalised(out) == [set(byte_ids("b"))]


@pytest.mark.parametrize("kind", ["llama", "gemma3n_text"])
def test_rules_about_the_prompt_know_its_text(kind):
    found = without_padding(kind)
    batch = found.processor(text="ab<image>c", images=IMAGES[0])
    out = found.generate(**batch, encoder_repetition_penalty=1.5, **SCORES)
    assert penalised(out) == [set(byte_ids("abc"))]


@pytest.mark.parametrize("kind", KINDS)
def test_rules_of_the_caller_see_the_text(kind):
    found = without_padding(kind)
    batch = found.processor(text="ba<image>b", images=IMAGES[0])
    processor, criterion, streamer = Seen(), Criterion(), Seen()
    given = {"logits_processor": LogitsProcessorList([processor]), "stopping_criteria": [criterion]}
    out = found.generate(**batch, streamer=streamer, max_new_tokens=3, min_new_tokens=3, do_sample=False, **given)
    new = out[0, batch["input_ids"].shape[1] :].tolist()
    assert len(new) == 3
    text = byte_ids("bab")
    assert [ids[0].tolist() for ids in processor.ids] == [text, [*text, *new[:1]], [*text, *new[:2]]]
    assert [ids[0].tolist() for ids in criterion.ids] == [[*text, *new[:count]] for count in (1, 2, 3)]
    assert streamer.ids[0].flatten().tolist() == text
    assert [ids.item() for ids in streamer.ids[1:-1]] == new
    assert streamer.ids[-1] is None


def test_a_streamer_prints_the_prompt_without_its_images(capsys):
    found = model("llama")
    batch = found.processor(text="ba<image>b", images=IMAGES[0])
    out = found.generate(**batch, streamer=TextStreamer(found.processor.tokenizer), max_new_tokens=2, do_sample=False)
    new = found.processor.tokenizer.decode(out[0, batch["input_ids"].shape[1] :])
    assert capsys.readouterr().out == f"bab{new}\n"


@pytest.mark.parametrize("kind", ["llama", "gemma3n_text"])
def test_counts_of_new_tokens_and_of_ignored_ones_are_of_all_positions(kind):
    found = without_padding(kind)
    batch = found.processor(text="ba<image>b", images=IMAGES[0])
    length = batch["input_ids"].shape[1]
    for how in ({"min_new_tokens": 5}, {"min_length": length + 5}):
        bias = {(token,): 100.0 for token in [tokenizer().eos_token_id]}
        out = found.generate(**batch, sequence_bias=bias, max_new_tokens=9, do_sample=False, **how)
        assert out.shape[1] == length + 6  # five forced ones and the end
    ignoring = RepetitionPenaltyLogitsProcessor(1.5, prompt_ignore_length=length)
    out = found.generate(**batch, logits_processor=[ignoring], **SCORES)
    assert penalised(out) == [set()]


@pytest.mark.parametrize("kind", ["llama", "gemma3n_text"])
def test_beams_and_samples_have_the_text_each(kind):
    found = without_padding(kind)
    batch = found.processor(text=TEXTS, images=[[IMAGES[0]], [], list(IMAGES[1:3])], padding=True)
    rule = Seen()
    found.generate(**batch, num_beams=3, num_return_sequences=2, max_new_tokens=2, logits_processor=[rule])
    texts = [byte_ids(text.replace("<image>", "")) for text in TEXTS]
    for row, ids in enumerate(rule.ids[0].tolist()):
        text = texts[row // 3]
        assert ids == [text[0]] * (len(ids) - len(text)) + text


DRAFTS = {
    "assistant": lambda kind: {"assistant_model": language_model("llama", num_hidden_layers=1)},
    "itself": lambda kind: {"assistant_model": language_model(kind)},
    "eyes": lambda kind: {"assistant_model": attach(encoder(), "qwen3")},
    "look-up": lambda kind: {"prompt_lookup_num_tokens": 3},
}
EARLY_EXIT = {"early exit": lambda kind: {"assistant_early_exit": 1}}
"""Not every language model of transformers can."""


@pytest.mark.parametrize(
    ("kind", "mode", "draft"),
    [
        *((kind, "auto", draft) for kind in ("llama", "gpt2", "gemma3_text", "gemma4_text") for draft in DRAFTS),
        *(("llama", mode, "early exit") for mode in ("embeds", "hook")),
        ("llama", "hook", "look-up"),
    ],
)
@pytest.mark.parametrize("text", ["abab<image>ab", "<image>", "a<image>b<image>a"])
def test_drafted_answers_are_the_greedy_ones(kind, mode, draft, text):
    found = model(kind) if mode == "auto" else attach(encoder(), kind, mode=mode)
    batch = found.processor(text=text, images=list(IMAGES[: text.count("<image>")]))
    how = {"max_new_tokens": 10, "do_sample": False, "repetition_penalty": 1.2}
    wanted = found.generate(**batch, **how)
    got = found.generate(**batch, **how, **{**DRAFTS, **EARLY_EXIT}[draft](kind))
    assert got.tolist() == wanted.tolist()


@pytest.mark.parametrize("kind", ["gpt2", "gemma3n_text"])
def test_layers_that_cannot_be_left_early_are_refused_and_kept(kind):
    found = model(kind)
    batch = found.processor(text="a<image>b", images=IMAGES[0])
    wanted = found(**batch).logits
    with pytest.raises(ValueError, match="leave assistant_early_exit out"):
        found.generate(**batch, assistant_early_exit=1, max_new_tokens=2)
    assert torch.equal(found(**batch).logits, wanted)


class Follows(CandidateGenerator):
    """Drafts nothing, and asks for the outputs of the model that it follows, as Gemma 4's assistants do."""

    requires_model_outputs = True
    model_kwargs_overrides = {"output_hidden_states": True}  # noqa: RUF012
    seen = None

    def get_candidates(self, input_ids, **kwargs):
        type(self).seen = input_ids.shape[1]
        return input_ids, None

    def update_candidate_strategy(self, *args):
        """Nothing to learn."""


def test_drafters_that_follow_the_model_see_its_positions(monkeypatch):
    found = attach(encoder(), "llama")
    monkeypatch.setattr(type(found.language_model), "_get_candidate_generator", lambda self, **how: Follows())
    if not hasattr(CandidateGenerator, "requires_model_outputs"):
        pytest.skip("this transformers has no such drafters")
    batch = found.processor(text="ab<image>", images=IMAGES[0])
    how = {"max_new_tokens": 4, "do_sample": False}
    got = found.generate(**batch, **how, prompt_lookup_num_tokens=2)
    assert got.tolist() == found.generate(**batch, **how).tolist()
    assert batch["input_ids"].shape[1] < Follows.seen < got.shape[1]


def test_look_up_finds_what_stands_around_an_image():
    """The text "ab" + "ab" is looked up across the image: the first draft is what followed."""
    found = model("llama")
    batch = found.processor(text="abcab<image>", images=IMAGES[0])
    rule = Seen()
    found.generate(**batch, prompt_lookup_num_tokens=1, max_new_tokens=2, do_sample=False, logits_processor=[rule])
    assert byte_ids("abcabc") in [ids[0].tolist() for ids in rule.ids]


def test_the_language_model_keeps_its_own_rules():
    """Text without images, and the language model used alone, see every id; nothing is left behind."""
    found = without_padding("llama")
    before = dict(vars(found.language_model))
    found.generate(**found.processor(text="a<image>", images=noise(40, 30)), max_new_tokens=2)
    after = vars(found.language_model)
    assert {name: after[name] for name in before} == before
    ids = torch.tensor([byte_ids("ab") + [found.config.fill_token_id]])
    for generate in (found.generate, found.language_model.generate):
        out = generate(input_ids=ids, attention_mask=torch.ones_like(ids), repetition_penalty=1.5, **SCORES)
        assert penalised(out) == [set(ids[0].tolist())]
