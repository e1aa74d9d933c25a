"""What vLLM needs of an adapter directory to serve it with ``--lora-modules``, read from its settings alone.

As in vLLM 0.32 (``PEFTHelper.validate_legal``, ``LoRAModel.from_local_checkpoint``, ``LoRAConfig.max_lora_rank``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that ``--max-lora-rank`` takes; its default is 16."""

# Ways to start the factors that leave the base as it is; the others (pissa, olora, ...) move a part of it into them.
_INITS_THAT_KEEP_THE_BASE = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_UNSUPPORTED = {
    "use_dora": "DoRA",
    "lora_bias": "a bias on B",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
}


def adapter_rank(peft_config: Mapping[str, Any]) -> int | None:
    """The largest rank that an adapter's settings allow a layer, or None where its kind has none."""
    if peft_config.get("peft_type") == "ADALORA":
        # It begins with init_r everywhere and prunes; its field r is not used.
        return peft_config.get("init_r")
    rank = peft_config.get("r")
    return None if rank is None else max([rank, *(peft_config.get("rank_pattern") or {}).values()])


def vllm_obstacles(peft_config: Mapping[str, Any]) -> list[str]:
    """Why vLLM cannot serve an adapter with ``--lora-modules``; empty where it can.

    Which layers carry the adapter does not matter: vLLM takes every linear layer of the models that it knows.

    Args:
        peft_config: The content of ``adapter_config.json``.
    """
    if (kind := peft_config.get("peft_type")) != "LORA":
        return [f"vLLM serves plain LoRA, not {kind}"]
    obstacles = [f"vLLM does not support {name}" for key, name in _UNSUPPORTED.items() if peft_config.get(key)]
    if modules := peft_config.get("modules_to_save"):
        obstacles.append(f"vLLM takes no fully trained layers (modules_to_save: {', '.join(modules)})")
    if peft_config.get("bias", "none") != "none":
        obstacles.append("vLLM does not support trained biases")
    init = peft_config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _INITS_THAT_KEEP_THE_BASE:
        obstacles.append(f"init_lora_weights={init} changed the base model too, which vLLM loads unchanged")
    rank = adapter_rank(peft_config)
    if rank is not None and rank > VLLM_RANKS[-1]:
        obstacles.append(f"rank {rank} is above vLLM's largest, {VLLM_RANKS[-1]}")
    return obstacles


def vllm_command(peft_config: Mapping[str, Any], base_model: str, adapter_dir: str, name: str = "snake") -> str:
    """The command that serves an adapter which ``vllm_obstacles`` finds nothing against.

    Args:
        peft_config: The content of ``adapter_config.json``.
        base_model: A hub id or a directory.
        adapter_dir: The adapter directory.
        name: What requests call the adapter.
    """
    rank = adapter_rank(peft_config) or VLLM_RANKS[0]
    max_rank = next(allowed for allowed in VLLM_RANKS if allowed >= rank)
    return f"vllm serve {base_model} --enable-lora --max-lora-rank {max_rank} --lora-modules {name}={adapter_dir}"
