"""Tiny parts for the transformers face: a byte tokenizer, an encoder, and language models built from configs."""

import functools

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tests import tiny
from tests.tiny import perceiver, tiny_encoder, vit
from uhd.hf import UHDForConditionalGeneration
from uhd.resampler import MLPProjector, PixelShuffleProjector, PoolProjector
from uhd.slicing import find

WIDTH = 32
COMMON = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 192,
    "initializer_range": 0.2,
}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
EMBEDS = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "gemma2": {"sliding_window": 64, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 64, "query_pre_attn_scalar": 8},
    "phi3": {"head_dim": None, "original_max_position_embeddings": 192},
    "gpt2": {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 192},
    "opt": {"word_embed_proj_dim": WIDTH, "ffn_dim": 48},
    "mamba": {"state_size": 8, "max_position_embeddings": None},
    "mixtral": {**MOE, "sliding_window": None},
    "deepseek_v3": {
        **MLA,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "head_dim": None,
    },
    "granite": {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "attention_multiplier": 0.2},
}


STATES = {
    "falcon_mamba": {"state_size": 8, "max_position_embeddings": None},
    "rwkv": {"context_length": 512, "attention_hidden_size": WIDTH, "max_position_embeddings": None, "head_dim": None},
}
"""Without attention, and not among the kinds that every test of batches runs over."""

TWO_KINDS = ["sliding_attention", "full_attention"]
HOOK = {
    "gemma3n_text": {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 260,
        "laurel_rank": 8,
        "num_kv_shared_layers": 0,
        "sliding_window": 64,
        "activation_sparsity_pattern": [0.0, 0.0],
        "altup_num_inputs": 2,
        "layer_types": TWO_KINDS,
    },
    "gemma4_text": {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 260,
        "num_kv_shared_layers": 0,
        "sliding_window": 64,
        "global_head_dim": 8,
        "num_global_key_value_heads": 2,
        "layer_types": TWO_KINDS,
    },
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "head_dim": 16,
        "q_lora_rank": 16,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "o_groups": 2,
        "o_lora_rank": 8,
        "hc_mult": 2,
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_topk": 4,
        "sliding_window": 64,
    },
    "nemotron_h": {
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 16,
        "layers_block_type": ["mamba", "attention"],
    },
}


@functools.cache
def tokenizer():
    """Bytes; ",\\n" merges, as it does under many real vocabularies. No image token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(",", "Ċ"), ("Ċ", "Ċ")]
    pieces = [*letters, ",Ċ", "ĊĊ"]
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")


def encoder(width=WIDTH, **parts):
    torch.manual_seed(1)
    return tiny_encoder(vision=vit(), compressor=perceiver(width=width), **parts)


def language_model(kind, **changes):
    torch.manual_seed(2)
    settings = {**COMMON, **{**EMBEDS, **STATES, **HOOK}[kind], **changes}
    eos, pad = tokenizer().eos_token_id, tokenizer().pad_token_id
    ids = {"vocab_size": len(tokenizer()), "pad_token_id": pad, "eos_token_id": eos, "bos_token_id": eos}
    config = AutoConfig.for_model(
        kind, **{**ids, **{key: value for key, value in settings.items() if value is not None}}
    )
    return AutoModelForCausalLM.from_config(config).eval()


@functools.cache
def model(kind):
    """Shared by tests that do not change it."""
    return attach(encoder(), kind)


def attach(eyes, lm="llama", **how):
    """A fresh model of these parts; a language model by its kind."""
    lm = language_model(lm) if isinstance(lm, str) else lm
    return UHDForConditionalGeneration.from_vision_and_lm(eyes, lm, tokenizer(), **how)


def checkpoint_activations(eyes):
    """Under the name that this release has for it."""
    named = "activation" if hasattr(eyes, "activation_checkpointing_enable") else "gradient"
    getattr(eyes, f"{named}_checkpointing_enable")()


def targets(eyes, batch):
    """Labels: all that is neither padding nor an image's or a video's."""
    ids = batch["input_ids"]
    return ids.masked_fill(eyes.visual_positions(ids) | (batch["attention_mask"] == 0), -100)


IMAGES = tiny.IMAGES[:3]
TEXTS = ["a<image>b", "hello", "x<image>yz<image>?"]


def packed_encoder(name, compressor=None, **parts):
    """An encoder of any strategy, for views of 56 px and patches of 14, with one feature a token unless told."""
    torch.manual_seed(3)
    slicing = find(name).for_vision(image_size=56, patch_size=14) if isinstance(name, str) else name
    return tiny_encoder(compressor or MLPProjector(32, WIDTH), vision=vit(depth=1), slicing=slicing, **parts)


COMPRESSORS = {
    "llava-1.5": lambda: MLPProjector(32, WIDTH),
    "llava-next": lambda: MLPProjector(32, WIDTH),
    "llava-onevision": lambda: MLPProjector(32, WIDTH),
    "internvl": lambda: PixelShuffleProjector(32, WIDTH, factor=2),
    "qwen2-vl": lambda: PoolProjector(32, WIDTH, factor=2),
    "deepseek-vl2": lambda: PoolProjector(32, WIDTH, factor=2),
    "openai-high-detail": lambda: perceiver(width=WIDTH),
    "smolvlm": lambda: perceiver(width=WIDTH, num_latents=1),
}
"""Strategies of every kind (one view, stitched and un-padded, apart, native, several canvases) and what fits them."""


def attached(name, kind="llama", *, unsaved=False, **changes):
    """A fresh model of a strategy of COMPRESSORS, or around a ready encoder."""
    torch.manual_seed(4)
    eyes = packed_encoder(name, COMPRESSORS[name]()) if isinstance(name, str) else name
    lm = language_model(kind, **{"max_position_embeddings": 1024, **changes})
    return attach(eyes, lm, unsaved=unsaved)


@functools.cache
def shared(name):
    """Shared by tests that do not change it."""
    return attached(name)
