"""Compatibility of an adapter's settings with ``vllm serve --lora-modules``.

Follows vLLM 0.32 (``PEFTHelper.validate_legal``, ``LoRAModel.from_local_checkpoint``, ``LoRAConfig.max_lora_rank``).
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from snake_lora_pl.adapters.registry import get_adapter_type

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of ``--max-lora-rank``; the default is 16."""

# Initializations that do not change the base, unlike PEFT's pissa, olora and others.
_INITS_THAT_KEEP_THE_BASE = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_UNSUPPORTED = {
    "use_dora": "DoRA",
    "lora_bias": "a bias in B",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
}


def vllm_obstacles(peft_config: Mapping[str, Any]) -> list[str]:
    """Return why vLLM cannot serve an adapter with ``--lora-modules``; an empty list if it can.

    The adapted layers do not matter: vLLM supports every linear layer of the architectures that it supports.

    Args:
        peft_config: The content of ``adapter_config.json``.
    """
    if (peft_type := peft_config.get("peft_type")) != "LORA":
        return [f"vLLM serves plain LoRA, not {peft_type}"]
    obstacles = [f"vLLM does not support {name}" for key, name in _UNSUPPORTED.items() if peft_config.get(key)]
    if modules := peft_config.get("modules_to_save"):
        obstacles.append(f"vLLM does not support fully trained layers (modules_to_save: {', '.join(modules)})")
    if peft_config.get("bias", "none") != "none":
        obstacles.append("vLLM does not support trained biases")
    init = peft_config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _INITS_THAT_KEEP_THE_BASE:
        obstacles.append(f"init_lora_weights={init} changed the base model, which vLLM loads unchanged")
    rank = _lora_rank(peft_config)
    if rank is not None and rank > VLLM_RANKS[-1]:
        obstacles.append(f"rank {rank} exceeds vLLM's maximum, {VLLM_RANKS[-1]}")
    return obstacles


def vllm_command(peft_config: Mapping[str, Any], base_model: str, adapter_dir: str, name: str = "snake") -> str:
    """Return the command that serves an adapter without ``vllm_obstacles``.

    Args:
        peft_config: The content of ``adapter_config.json``.
        base_model: A hub id or a directory.
        adapter_dir: The adapter directory.
        name: Name of the adapter in requests.
    """
    rank = _lora_rank(peft_config) or VLLM_RANKS[0]
    max_rank = next(allowed for allowed in VLLM_RANKS if allowed >= rank)
    command = ["vllm", "serve", base_model, "--enable-lora", "--max-lora-rank", str(max_rank)]
    return shlex.join([*command, "--lora-modules", f"{name}={adapter_dir}"])


def _lora_rank(peft_config: Mapping[str, Any]) -> int | None:
    return get_adapter_type("lora").saved_rank(peft_config)
