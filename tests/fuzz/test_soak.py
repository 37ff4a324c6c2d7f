"""Memory stays flat over many images, readings of files, and plans."""

import gc

import pytest
import torch

import uhd
from tests.memory import held_mib
from tests.tiny import picture, tiny_encoder
from uhd.slicing import plan
from uhd.token_files import load_tokens, save_tokens


def soak(rounds, folder):
    """Encode, save and load; return the growth in MiB after a warm-up."""
    encoder = tiny_encoder()
    encoder.save_pretrained(folder)
    before = 0.0
    for number in range(rounds):
        images = [picture(20 + number * 7 % 190, 30 + number * 13 % 310, number) for _ in range(2)]
        with torch.no_grad():
            encoded = encoder(images)
        save_tokens(folder / "tokens.safetensors", encoded, schema=encoder.schema)
        load_tokens(folder / "tokens.safetensors")
        if number % 10 == 0:
            uhd.VisualEncoder.from_pretrained(folder)
        plan((number % 3000 + 1, number * 31 % 5000 + 1), "llava-uhd")
        if number == rounds // 3:
            gc.collect()
            before = held_mib()
    gc.collect()
    return held_mib() - before


def test_memory_is_flat_over_some_rounds(tmp_path):
    assert soak(60, tmp_path) < 30


@pytest.mark.slow
def test_memory_is_flat_over_many_rounds(tmp_path):
    assert soak(6000, tmp_path) < 60
