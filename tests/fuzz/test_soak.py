"""Memory stays flat over many images, readings of files, and plans."""

import gc
import resource

import pytest
import torch

import uhd
from tests.tiny import picture, tiny_encoder
from uhd.slicing import plan
from uhd.token_files import load_tokens, save_tokens


def resident_mib():
    """What this process holds now, in MiB; where the system does not tell, the most that it ever held."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize() / 2**20
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


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
            before = resident_mib()
    gc.collect()
    return resident_mib() - before


def test_memory_is_flat_over_some_rounds(tmp_path):
    assert soak(60, tmp_path) < 30


@pytest.mark.slow
def test_memory_is_flat_over_many_rounds(tmp_path):
    assert soak(6000, tmp_path) < 60
