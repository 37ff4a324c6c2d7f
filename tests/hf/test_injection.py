"""The embedding hook, and the probe that decides between it and ``inputs_embeds``."""

import threading

import pytest
import torch
from torch import nn

from tests.hf.tiny import EMBEDS, HOOK, attach, encoder, language_model
from uhd.hf import UHDForConditionalGeneration, choose_injection, inject

IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def doubled(embeds):
    return 2 * embeds


class TestInject:
    def test_only_the_prompt_is_changed(self):
        embed = nn.Embedding(10, 4)
        with inject(embed, IDS, doubled) as count:
            assert torch.equal(embed(IDS), 2 * embed.weight[IDS])
            assert torch.equal(embed(input=IDS), 2 * embed.weight[IDS])
            for other in (IDS[:, :1], IDS.flip(0), IDS[:1], IDS.repeat(2, 1)):
                assert torch.equal(embed(other), embed.weight[other])
            beams = IDS.repeat_interleave(3, 0)
            assert torch.equal(embed(beams), 2 * embed.weight[beams])
            longer = torch.cat([IDS, torch.tensor([[7], [8]])], 1)  # a step without a cache
            assert torch.equal(embed(longer)[:, :3], 2 * embed.weight[IDS])
            assert torch.equal(embed(longer)[:, 3:], embed.weight[longer[:, 3:]])
        assert count.calls == 5
        assert torch.equal(embed(IDS), embed.weight[IDS])

    def test_gradients_pass(self):
        embed, rows = nn.Embedding(10, 4), torch.randn(2, 3, 4, requires_grad=True)
        with inject(embed, IDS, lambda _: rows):
            embed(IDS).pow(2).sum().backward()
        assert torch.equal(rows.grad, 2 * rows.detach())

    def test_it_is_removed_after_an_error(self):
        embed = nn.Embedding(10, 4)
        with pytest.raises(KeyError), inject(embed, IDS, doubled):
            raise KeyError
        assert torch.equal(embed(IDS), embed.weight[IDS])
        assert not embed._forward_hooks

    def test_contexts_nest(self):
        embed, other = nn.Embedding(10, 4), IDS + 1
        with inject(embed, IDS, doubled):
            with inject(embed, other, lambda embeds: 3 * embeds):
                assert torch.equal(embed(other), 3 * embed.weight[other])
                assert torch.equal(embed(IDS), 2 * embed.weight[IDS])
            assert torch.equal(embed(other), embed.weight[other])

    def test_another_thread_is_left_alone(self):
        embed, seen = nn.Embedding(10, 4), []
        with inject(embed, IDS, doubled):
            embed(IDS)
            thread = threading.Thread(target=lambda: seen.append(embed(IDS)))
            thread.start()
            thread.join()
        assert torch.equal(seen[0], embed.weight[IDS])

    def test_a_hook_that_never_fires_is_an_error(self):
        with (
            pytest.raises(ValueError, match="never called its input embedding"),
            inject(nn.Embedding(10, 4), IDS, doubled),
        ):
            pass


class TestChoice:
    @pytest.mark.parametrize("kind", HOOK)
    def test_ids_are_needed_also_where_a_branch_is_silent_at_first(self, kind):
        """gemma3n's per-layer branch is multiplied by zero before training: outputs alone would show nothing."""
        lm = language_model(kind)
        before = {name: value.clone() for name, value in lm.state_dict().items()}
        state = torch.random.get_rng_state()
        assert choose_injection(lm) == "hook"
        assert all(torch.equal(value, before[name]) for name, value in lm.state_dict().items())
        assert torch.equal(torch.random.get_rng_state(), state)

    def test_a_silent_branch_of_the_same_modules_is_heard(self):
        """A branch on ids that calls no module of its own, behind a gate of zero."""
        lm = language_model("llama")
        lm.gate = nn.Parameter(torch.zeros(()))
        inner = lm.forward

        def forward(input_ids=None, inputs_embeds=None, **kwargs):
            out = inner(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)
            if input_ids is not None:
                out.logits = out.logits + lm.gate * input_ids[..., None]
            return out

        assert choose_injection(lm) == "embeds"
        lm.forward = forward
        assert choose_injection(lm) == "hook"
        assert lm.gate == 0

    def test_a_branch_that_is_switched_off_by_a_buffer_is_seen(self):
        """No noise reaches it, but a module is called that embeddings alone do not call."""
        lm = language_model("llama")
        lm.extra = nn.Embedding(260, 260)
        lm.register_buffer("gate", torch.zeros(()))
        inner = lm.forward

        def forward(input_ids=None, inputs_embeds=None, **kwargs):
            out = inner(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)
            if input_ids is not None:
                out.logits = out.logits + lm.gate * lm.extra(input_ids)
            return out

        lm.forward = forward
        assert choose_injection(lm) == "hook"

    def test_modes_of_modules_are_kept(self):
        lm = language_model("llama").train()
        lm.model.layers[1].eval()
        choose_injection(lm)
        assert lm.training
        assert lm.model.layers[0].training
        assert not lm.model.layers[1].training

    def test_a_model_that_embeds_elsewhere_is_refused(self):
        lm = language_model("llama")
        other = nn.Embedding(260, 32)
        lm.get_input_embeddings = lambda: other
        with pytest.raises(ValueError, match="LlamaForCausalLM cannot be given images: .* never called"):
            choose_injection(lm)

    @pytest.mark.parametrize("mode", ["embeds", "hook"])
    def test_the_choice_can_be_made_by_hand_and_is_saved(self, mode, tmp_path):
        found = attach(encoder(), mode=mode)
        found.save_pretrained(tmp_path)
        assert UHDForConditionalGeneration.from_pretrained(tmp_path).config.injection_mode == mode

    def test_unknown_modes(self):
        with pytest.raises(ValueError, match="mode must be 'auto' or one of"):
            attach(encoder(), mode="magic")

    def test_most_kinds_take_embeddings(self):
        assert {kind: choose_injection(language_model(kind)) for kind in EMBEDS} == dict.fromkeys(EMBEDS, "embeds")
