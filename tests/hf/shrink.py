"""Any registered causal language model, built tiny from its config class."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.hf.tiny import COMMON, EMBEDS, HOOK, MLA, MOE, WIDTH, tokenizer

MAX_PARAMETERS = 20_000_000
SETTINGS: dict[str, Any] = {
    **COMMON,
    **MOE,
    **{name: value for name, value in MLA.items() if name != "num_key_value_heads"},
    **dict.fromkeys(
        ("d_model", "n_embd", "embedding_size", "word_embed_proj_dim", "emb_dim", "dim_model", "dim", "embed_dim"),
        WIDTH,
    ),
    **dict.fromkeys(
        (
            *("n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_encoder_layers"),
            *("num_decoder_layers", "num_blocks", "encoder_num_hidden_layers", "decoder_num_hidden_layers"),
        ),
        2,
    ),
    **dict.fromkeys(
        (
            *("n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"),
            *("num_encoder_attention_heads", "num_decoder_attention_heads", "num_swa_attention_heads"),
        ),
        4,
    ),
    **dict.fromkeys(("n_inner", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "dim_ff", "ffn_hidden_size"), 48),
    **dict.fromkeys(("n_positions", "max_seq_len", "max_position", "n_ctx", "max_sequence_length"), 192),
    **dict.fromkeys(("num_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "mamba_head_dim", "mamba_d_head"), 8),
    **dict.fromkeys(("n_group", "topk_group", "n_groups", "mamba_n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "global_head_dim", "swa_head_dim"), 8),
    **dict.fromkeys(("index_head_dim",), 8),
    "moe_topk": 2,
    "moe_k": 2,
    "rotary_dim": 8,
    "first_k_dense_replace": 1,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "num_global_key_value_heads": 2,
    "mamba_num_heads": 8,
    "mamba_n_heads": 8,
    "mamba_dt_rank": 4,
    "mamba_expand": 2,
    "chunk_size": 16,
    "mamba_chunk_size": 16,
    "dim_head": 8,
    "index_n_heads": 2,
    "index_topk": 128,
    "sliding_window": 64,
    "query_pre_attn_scalar": 8,
    "lru_width": WIDTH,
    "time_step_rank": 4,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 260,
    "unpadded_vocab_size": 260,
    "conv_kernel": 4,
    "is_decoder": True,
    "image_size": 28,
    "patch_size": 14,
}
"""What is set where a config has a field of that name."""

VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4},
    {"head_dim": None},
    {"head_dim": None, "num_key_value_heads": 4},
    {"num_hidden_layers": 4},
    {"num_hidden_layers": 4, "num_key_value_heads": 4},
    {"num_hidden_layers": 4, "head_dim": None},
    {"num_hidden_layers": 6},
    {"num_key_value_heads": 1},
)
"""Tried in this order (``None``: left to the config) until one builds and runs."""

LINEAR_AND_FULL = {"layer_types": ["linear_attention", "full_attention"]}
KIMI = {
    **LINEAR_AND_FULL,
    "num_key_value_heads": 4,
    "num_expert_group": 1,
    "num_experts_per_token": 2,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "mlp_layer_types": ["dense", "sparse"],
}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
ROBERTA = {"max_position_embeddings": 512}  # positions start after the padding id
EXTRA: dict[str, dict[str, Any]] = {
    "bailing_hybrid": KIMI,
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE},
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": WIDTH, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "gemma3n_vision": {"architecture": "mobilenetv3_small_050"},
    "bamba": {"attn_layer_indices": [1]},
    **dict.fromkeys(("camembert", "data2vec-text", "prophetnet", "roberta", "roberta-prelayernorm"), ROBERTA),
    **dict.fromkeys(("xlm-roberta", "xlm-roberta-xl", "xglm"), ROBERTA),
    "dots1": {"n_shared_experts": 1, "num_key_value_heads": 2},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "kimi_linear": KIMI,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 128,
        "indexer_compress_ratio": 4,
        "layer_types": ["linear_attention", "indexed_attention"],
        "hc_count": 2,
        "hc_lowrank": 8,
    },
    "reformer": {
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh"],
        "max_position_embeddings": 256,
        "attention_head_size": 8,
        "feed_forward_size": 48,
        "num_buckets": 4,
    },
    "xlstm": {"embedding_dim": 128, "hidden_size": 128},
    "xmod": {**ROBERTA, "default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"],
        "num_key_value_heads": 4,
        "n_mamba_heads": 8,
        "adapter_rank": 4,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
"""What single types need beside that."""


def shrink(kind: str) -> PreTrainedModel:
    """A tiny seeded model; parameters that start as a constant get noise, so that no branch is silent.

    Raises:
        ValueError: No variant builds and runs; the message holds what the first one said.
    """
    first: Exception | None = None
    for variant in VARIANTS:
        try:
            lm = _build(kind, variant)
            ids = torch.arange(1, 9)[None]
            with torch.no_grad():
                lm(input_ids=ids, attention_mask=torch.ones_like(ids))
        except Exception as problem:  # configs and models raise what they like on sizes that do not fit
            first = first or problem
        else:
            return lm
    raise ValueError(f"not built: {type(first).__name__}: {first}") from first


def _build(kind: str, variant: dict[str, Any]) -> PreTrainedModel:
    config = _config(CONFIG_MAPPING[kind], _extra(kind), variant)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if count > MAX_PARAMETERS:
        raise ValueError(f"{count / 1e6:.0f} M parameters, more than {MAX_PARAMETERS / 1e6:.0f} M")
    torch.manual_seed(2)
    lm = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.is_floating_point() and parameter.numel() and parameter.amin() == parameter.amax():
                parameter += 0.1 * torch.randn_like(parameter)
    return lm


def _config(kind: type, given: dict[str, Any], variant: dict[str, Any]) -> Any:
    names = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    names |= set(getattr(kind, "attribute_map", {}))
    eos, pad = tokenizer().eos_token_id, tokenizer().pad_token_id
    ids = {"vocab_size": len(tokenizer()), "pad_token_id": pad, "eos_token_id": eos, "bos_token_id": eos}
    settings = {name: value for name, value in {**SETTINGS, **ids, **variant}.items() if name in names}
    settings.update(given)
    for name, part in _parts(kind):
        settings.setdefault(name, _config(part, _extra(part.model_type), variant))
    return kind(**{name: value for name, value in settings.items() if value is not None})


def _extra(kind: str) -> dict[str, Any]:
    return {**EXTRA.get(kind, {}), **EMBEDS.get(kind, {}), **HOOK.get(kind, {})}


def _parts(kind: type) -> Iterator[tuple[str, type]]:
    """The configs inside a config, by the classes that its defaults have."""
    names = list(getattr(kind, "sub_configs", None) or {})
    default = kind() if names else None
    for name in names:
        part = getattr(default, name, None)
        if isinstance(part, PreTrainedConfig):
            yield name, type(part)
