"""Tiny random models of many architectures, built from a config; nothing is downloaded.

``CONFIGS`` maps a model type of transformers to the arguments of its config. The models have a vocabulary of 384 tokens
and the special tokens of the tokenizer in ``tests/conftest.py``, about two layers and a hidden size of 32.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

NUM_POSITIONS = 2048

# Without a pad token: most checkpoints have none, and some configs have no such attribute.
_TOKENS = {"vocab_size": 384, "bos_token_id": 1, "eos_token_id": 2}
_PAD = {"pad_token_id": 2}  # where the default is beyond the vocabulary
# With a small range a random model repeats one token, and every comparison of outputs passes.
_COMMON = {"initializer_range": 0.3, "max_position_embeddings": NUM_POSITIONS}
_SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = {**_COMMON, **_SHAPE, "num_key_value_heads": 2}
_HEADS_OF_8 = {**_LLAMA, "head_dim": 8}
_EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": NUM_POSITIONS, "initializer_range": 0.3}
# Latent attention (MLA).
_LATENT = {
    **_LLAMA,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    **_EXPERTS,
}
_LINEAR_ATTENTION = {
    **_HEADS_OF_8,
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

CONFIGS: dict[str, dict[str, Any]] = {
    # Attention in every layer.
    "llama": _LLAMA,
    "arcee": _LLAMA,
    "apertus": _LLAMA,
    "bitnet": _LLAMA,
    "cohere": {**_LLAMA, "logit_scale": 0.5},
    "cohere2": {**_LLAMA, "head_dim": 8, "logit_scale": 0.5, "sliding_window": 16, "num_hidden_layers": 4},
    "diffllama": _LLAMA,
    "ernie4_5": _LLAMA,
    "exaone4": {**_LLAMA, "sliding_window": 16, "num_hidden_layers": 4},
    "gemma": _HEADS_OF_8,
    "gemma2": {
        **_HEADS_OF_8,
        "sliding_window": 16,
        "final_logit_softcapping": 5.0,
        "attn_logit_softcapping": 10.0,
        "query_pre_attn_scalar": 8,
    },
    "gemma3_text": {**_HEADS_OF_8, "sliding_window": 16, "num_hidden_layers": 6, "query_pre_attn_scalar": 8},
    "gemma4_text": {**_HEADS_OF_8, "sliding_window": 16, "global_head_dim": 8, "hidden_size_per_layer_input": 8}
    | {"vocab_size_per_layer_input": 384, "layer_types": ["sliding_attention", "full_attention"]},
    "glm": {**_HEADS_OF_8, **_PAD},
    "glm4": {**_HEADS_OF_8, **_PAD},
    "granite": {**_LLAMA, "logits_scaling": 4.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5},
    "helium": _HEADS_OF_8,
    "mistral": {**_LLAMA, "sliding_window": 16},
    "ministral": {**_HEADS_OF_8, "sliding_window": 16},
    "nemotron": _LLAMA,
    "olmo": _LLAMA,
    "olmo2": _LLAMA,
    "olmo3": {**_LLAMA, "sliding_window": 16, "num_hidden_layers": 4},
    "phi": _LLAMA,
    "phi3": {**_LLAMA, **_PAD},
    "qwen2": _LLAMA,
    "qwen3": _HEADS_OF_8,
    "seed_oss": _HEADS_OF_8,
    "smollm3": {**_LLAMA, **_PAD, "num_hidden_layers": 4},
    "stablelm": _LLAMA,
    "starcoder2": _LLAMA,
    "persimmon": {**_COMMON, **_SHAPE},
    # Mixtures of experts.
    "mixtral": {**_LLAMA, "num_local_experts": 4},
    "olmoe": {**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**_LLAMA, "num_experts": 4, "shared_expert_intermediate_size": 16, **_EXPERTS},
    "qwen3_moe": {**_HEADS_OF_8, "num_experts": 4, **_EXPERTS},
    "gpt_oss": {**_HEADS_OF_8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
    "granitemoe": {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": {**_LATENT, "topk_method": "greedy"},
    "deepseek_v3": _LATENT,
    "llama4_text": {
        **_HEADS_OF_8,
        "intermediate_size_mlp": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 16,
        "num_hidden_layers": 4,
    },
    # Learned positions, position biases, other names.
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gptj": {**_GPT2, "rotary_dim": 4},
    "codegen": {**_GPT2, "rotary_dim": 4},
    "gpt_neo": {
        **_COMMON,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
    },
    "gpt_neox": {**_COMMON, **_SHAPE},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True, **_COMMON},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": NUM_POSITIONS, "initializer_range": 0.3},
    "opt": {**_COMMON, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "init_std": 0.3},
    "xglm": {**_COMMON, "d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4, "init_std": 0.3},
    "biogpt": {**_COMMON, **_SHAPE},
    # Recurrent layers, alone or between layers of attention.
    "mamba": {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "initializer_range": 0.3},
    "falcon_mamba": {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "initializer_range": 0.3},
    "mamba2": {
        "hidden_size": 32,
        "state_size": 8,
        "num_hidden_layers": 2,
        "num_heads": 8,
        "head_dim": 8,
        "n_groups": 1,
        "chunk_size": 16,
        "initializer_range": 0.3,
    },
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "context_length": NUM_POSITIONS},
    "recurrent_gemma": {
        **_HEADS_OF_8,
        "num_hidden_layers": 3,
        "lru_width": 32,
        "attention_window_size": 16,
        "block_types": ["recurrent", "recurrent", "attention"],
        "w_init_variance_scale": 1.0,
    },
    "lfm2": {
        **_LLAMA,
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"],
        "block_ff_dim": 64,
        "block_multiple_of": 8,
    },
    "jamba": {
        **_LLAMA,
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        **_LLAMA,
        **_MAMBA2,
        "num_key_value_heads": 4,
        "num_hidden_layers": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_mem_blocks": 1,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "mamba_ngroups": 1,
        "adapter_rank": 8,
        "chunk_size": 16,
        "use_mamba_kernels": False,
    },
    "bamba": {**_LLAMA, **_MAMBA2, "attn_layer_indices": [1], "mamba_chunk_size": 16},
    "granitemoehybrid": {
        **_LLAMA,
        **_MAMBA2,
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 16,
        "mamba_chunk_size": 16,
    },
    "falcon_h1": {**_HEADS_OF_8, **_MAMBA2, "mamba_d_ssm": 64, "mamba_chunk_size": 16},
    "qwen3_next": {**_LINEAR_ATTENTION, "num_experts": 4, "shared_expert_intermediate_size": 16, **_EXPERTS},
    "qwen3_5_text": _LINEAR_ATTENTION,
    # Text decoders of multimodal models.
    "gemma4": {
        "text_config": {**_HEADS_OF_8, "sliding_window": 16, "global_head_dim": 8, "hidden_size_per_layer_input": 8}
        | {"vocab_size_per_layer_input": 384, "layer_types": ["sliding_attention", "full_attention"]},
        "vision_config": {**_VISION, "model_type": "gemma4_vision"},
        "audio_config": None,
        "image_token_id": 380,
        "boi_token_id": 381,
        "eoi_token_id": 382,
    },
    "gemma3": {
        "text_config": {**_HEADS_OF_8, "sliding_window": 16, "query_pre_attn_scalar": 8},
        "vision_config": {**_VISION, "model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
        "image_token_index": 380,
        "boi_token_index": 381,
        "eoi_token_index": 382,
    },
    "mllama": {
        "text_config": {**_LLAMA, **_PAD, "num_hidden_layers": 3, "cross_attention_layers": [1]},
        "vision_config": {**_VISION, "model_type": "mllama_vision_model"},
        "image_token_index": 380,
    },
}
"""Causal language models."""

NOT_CAUSAL: dict[str, dict[str, Any]] = {
    "bert": {**_COMMON, **_SHAPE},
    "roberta": {**_COMMON, **_SHAPE},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "initializer_range": 0.3},
    "xlm": {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": NUM_POSITIONS, "init_std": 0.3},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
}
"""Models that read both sides of a token, or have an encoder."""


def build_model(model_type: str, **overrides: Any) -> PreTrainedModel:
    """Return a tiny random model in float32 and evaluation mode; equal arguments give equal weights.

    Args:
        model_type: A key of ``CONFIGS`` or ``NOT_CAUSAL``.
        overrides: Arguments of the config that replace those of the table.
    """
    arguments = {**(CONFIGS | NOT_CAUSAL)[model_type], **overrides}
    if "text_config" in arguments:
        arguments["text_config"] = _TOKENS | arguments["text_config"]
    config = AutoConfig.for_model(model_type, **_TOKENS | arguments)
    if model_type == "t5":
        factory = AutoModelForSeq2SeqLM
    else:
        factory = AutoModelForImageTextToText if "text_config" in arguments else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return factory.from_config(config, dtype=torch.float32).eval()


def save_model(model_type: str, directory: Path, tokenizer_dir: Path, **overrides: Any) -> Path:
    """Write a tiny random model as a Hugging Face directory, with the tokenizer of another one.

    Returns:
        ``directory``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for path in tokenizer_dir.glob("tokenizer*"):
        shutil.copy(path, directory)
    for path in tokenizer_dir.glob("chat_template*"):
        shutil.copy(path, directory)
    build_model(model_type, **overrides).save_pretrained(directory)
    return directory
