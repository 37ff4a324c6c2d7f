"""Folders that the first version wrote are read as they were meant."""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import uhd
import uhd.hf  # registers with the Auto classes

SAVED = Path(__file__).parents[1] / "golden" / "saved_by_0.1.0"
WANT = json.loads((SAVED / "outputs.json").read_text())
PICTURE = (np.arange(40 * 60 * 3) % 251).astype(np.uint8).reshape(40, 60, 3)


def test_an_encoder(tmp_path):
    found = uhd.VisualEncoder.from_pretrained(SAVED / "encoder")
    assert found.note == "of an older version"
    assert found.pixels.background == (1, 2, 3)
    with torch.no_grad():
        torch.testing.assert_close(found([PICTURE])[0].tokens.sum(1), torch.tensor(WANT["encoder"]))
    found.save_pretrained(tmp_path)
    old, new = (json.loads((folder / "uhd_encoder.json").read_text()) for folder in (SAVED / "encoder", tmp_path))
    assert new == old


def test_a_model_and_its_processor(tmp_path):
    found = AutoModelForImageTextToText.from_pretrained(SAVED / "model").eval()
    for processor in (found.processor, AutoProcessor.from_pretrained(SAVED / "model")):
        batch = processor(text="<image>ab", images=PICTURE)
        assert batch["input_ids"].tolist() == WANT["input_ids"]
        with torch.no_grad():
            torch.testing.assert_close(found(**batch).logits[0, -1], torch.tensor(WANT["model"]), rtol=1e-4, atol=1e-5)
    assert found.visual.note == "of an older version"
    found.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert again.config.encoder == found.config.encoder
