"""Which part trains in which stage, at which rate, and that nothing else moves."""

import pytest
import torch
from torch import nn

from tests.hf.test_training import batch_of, fresh
from tests.hf.tiny import attach, checkpoint_activations, encoder, language_model
from uhd.hf import UHDForConditionalGeneration, training
from uhd.resampler.stitch import FeaturePacker

STAGES = {
    training.align: {"connector": 1e-3},
    training.tune: {"connector": 2e-5, "language": 2e-5},
    training.tune_all: {"connector": 1e-5, "language": 1e-5, "vision": 2e-6},
}


def with_learned_separators():
    lm = language_model("llama", tie_word_embeddings=True)
    eyes = encoder(schema="llava-uhd-better")
    return attach(eyes, lm).train()


@pytest.mark.parametrize("build", [fresh, lambda: fresh("gpt2"), with_learned_separators])
def test_every_parameter_is_of_one_part(build):
    found = build()
    parts = training.split_parameters(found)
    assert tuple(parts) == training.PARTS
    names = [name for parameters in parts.values() for name in parameters]
    assert sorted(names) == sorted(name for name, _ in found.named_parameters())
    for part, module in (("vision", found.visual.vision), ("language", found.language_model)):
        assert {id(p) for p in parts[part].values()} == {id(p) for p in module.parameters()}
    learned = found.learned_separators is not None
    assert ("learned_separators" in parts["connector"]) == learned
    assert len(parts["connector"]) == len(list(found.visual.compressor.parameters())) + learned


def test_learned_newlines_are_of_the_connector():
    found = fresh()
    found.visual.packer = FeaturePacker(32)
    assert "visual.packer.newline" in training.split_parameters(found)["connector"]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
@pytest.mark.parametrize("build", [fresh, with_learned_separators])
def test_a_stage_moves_its_parts_and_no_other(stage, build):
    found = build()
    training.set_trainable(found, "vision")  # left over from before
    groups = stage(found)
    assert {group["name"]: group["lr"] for group in groups} == STAGES[stage]
    before = {name: p.detach().clone() for name, p in found.named_parameters()}
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    found(**batch_of(found)).loss.backward()
    optimizer.step()
    for part, parameters in training.split_parameters(found).items():
        assert all(p.requires_grad == (part in STAGES[stage]) for p in parameters.values())
        moved = [name for name, p in parameters.items() if not torch.equal(p, before[name])]
        if part not in STAGES[stage]:
            assert moved == []
        else:  # embeddings of ids that did not occur, say, have gradient 0
            assert len(moved) > 0.7 * len(parameters)
        rate = STAGES[stage].get(part, 0)
        steps = [(p.detach() - before[name]).abs().max() for name, p in parameters.items()]
        assert max(steps) <= rate * 1.01 + 1e-7  # Adam's first step is the rate itself
    if found.learned_separators is not None:
        assert not torch.equal(found.learned_separators, before["learned_separators"])


def test_rates_can_be_chosen():
    found = fresh()
    assert [g["lr"] for g in training.align(found, lr=0.5)] == [0.5]
    assert [g["lr"] for g in training.tune(found, lr=0.5)] == [0.5, 0.5]
    assert [g["lr"] for g in training.tune_all(found, lr=0.5, vision_lr=0.1)] == [0.5, 0.5, 0.1]


def test_groups_follow_what_was_frozen_by_hand():
    found = fresh()
    training.set_trainable(found, "connector", "language")
    found.language_model.lm_head.requires_grad_(False)
    groups = training.parameter_groups(found, {"connector": 1.0, "language": 0.1, "vision": 0.01})
    assert [group["name"] for group in groups] == ["connector", "language"]
    assert all(p is not found.language_model.lm_head.weight for p in groups[1]["params"])
    assert len(groups[1]["params"]) == len(list(found.language_model.parameters())) - 1


def test_refused():
    found = fresh()
    with pytest.raises(ValueError, match="a model has the parts .*, got 'resampler'"):
        training.set_trainable(found, "resampler")
    with pytest.raises(ValueError, match="a model has the parts .*, got 'llm'"):
        training.parameter_groups(found, {"llm": 1.0})
    with pytest.raises(ValueError, match="parameters of the vision train and have no learning rate"):
        training.parameter_groups(found, {"connector": 1.0, "language": 1.0})
    for rate in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="learning rate must be above 0"):
            training.align(found, lr=rate)
    training.set_trainable(found)
    with pytest.raises(ValueError, match="no parameter of this model trains"):
        training.parameter_groups(found, {"connector": 1.0})
    with pytest.raises(TypeError, match="need the UHD model itself, got DataParallel"):
        training.align(nn.DataParallel(found))


def test_a_frozen_vision_side_keeps_no_graph():
    found = fresh()
    training.align(found)
    seen = []
    found.visual.vision.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    found(**batch_of(found)).loss.backward()
    assert seen == [False]


def test_text_alone_has_nothing_to_train_in_the_first_stage():
    found = fresh()
    groups = training.align(found)
    batch = batch_of(found, ["hello"], None)
    assert not found(**batch).loss.requires_grad
    found.encode_without_images = True
    found(**batch).loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in groups[0]["params"])


def test_checkpointing_with_a_frozen_language_model():
    found = fresh()
    training.align(found)
    batch = batch_of(found)
    found(**batch).loss.backward()
    want = {name: p.grad.clone() for name, p in found.visual.compressor.named_parameters()}
    found.zero_grad()
    checkpoint_activations(found)
    found(**batch).loss.backward()
    for name, p in found.visual.compressor.named_parameters():
        torch.testing.assert_close(p.grad, want[name], rtol=1e-4, atol=1e-6)


def test_a_run_that_was_cut_goes_on_as_if_it_had_not_been(tmp_path):
    def steps(found, optimizer, count):
        losses = []
        for _ in range(count):
            loss = found(**batch_of(found)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def optimizer_of(found):
        return torch.optim.AdamW(training.tune_all(found, lr=1e-2, vision_lr=1e-3))

    whole = fresh()
    want = steps(whole, optimizer_of(whole), 4)
    first = fresh()
    optimizer = optimizer_of(first)
    got = steps(first, optimizer, 2)
    first.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    again = UHDForConditionalGeneration.from_pretrained(tmp_path).train()
    optimizer = optimizer_of(again)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    assert got + steps(again, optimizer, 2) == want
    assert want[-1] < want[0]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_the_encoders_note_is_saved_as_it_is_now(tmp_path):
    eyes = encoder(note="untrained")
    found = attach(eyes)
    for note in ("untrained", ""):
        found.visual.note = note
        found.save_pretrained(tmp_path)
        assert UHDForConditionalGeneration.from_pretrained(tmp_path).visual.note == note


def test_a_checkpoint_of_a_checkpoint_has_the_processor(tmp_path):
    fresh().save_pretrained(tmp_path / "first")
    UHDForConditionalGeneration.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    again = UHDForConditionalGeneration.from_pretrained(tmp_path / "second")
    assert torch.equal(batch_of(again)["input_ids"], batch_of(fresh())["input_ids"])
