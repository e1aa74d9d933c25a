"""Checks before training: settings, tokenizer, sharding, and checkpoints of another adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from snake_lora_pl.adapters.adapter_type import adapter_tensors
from snake_lora_pl.adapters.config import LoRAConfig
from snake_lora_pl.adapters.factory import AdapterFactory
from snake_lora_pl.errors import UserError
from snake_lora_pl.models.limits import ModelLimits
from snake_lora_pl.models.quantization import quantization_of

if TYPE_CHECKING:
    from peft import PeftModel

_MAX_TOKENS = 2**20
"""Upper limit of ``max_new_tokens`` and ``loss_chunk_tokens``."""


def check_settings(
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    warmup_steps: int,
    final_learning_rate_fraction: float,
    adapter_type: str,
    lora: LoRAConfig,
    **token_counts: int,
) -> None:
    """Check arguments of ``LoRALightningModule``; ``token_counts`` are those that count tokens.

    Raises:
        UserError: If any argument is invalid; the message lists all of them.
    """
    problems = []
    if not (learning_rate > 0 and math.isfinite(learning_rate)):
        problems.append(f"model.learning_rate must be a number above 0, not {learning_rate}")
    if not weight_decay >= 0:
        problems.append(f"model.weight_decay must be at least 0, not {weight_decay}")
    if warmup_steps < 0:
        problems.append(f"model.warmup_steps must be at least 0, not {warmup_steps}")
    if not 0 <= final_learning_rate_fraction <= 1:
        problems.append(
            f"model.final_learning_rate_fraction must be between 0 and 1, not {final_learning_rate_fraction}"
        )
    if adapter_type not in AdapterFactory.registered():
        known = ", ".join(AdapterFactory.registered())
        problems.append(f"model.adapter_type must be one of {known}, not '{adapter_type}'")
    if not all(0 <= beta < 1 for beta in betas):
        problems.append(f"model.betas must be at least 0 and below 1, not {list(betas)}")
    for name, count in token_counts.items():
        if not 1 <= count <= _MAX_TOKENS:
            problems.append(f"model.{name} must be between 1 and {_MAX_TOKENS:,}, not {count}")
    if problems:
        raise UserError("; ".join(problems) + ".")
    AdapterFactory.get_adapter_type(adapter_type).check(adapter_type, lora)


def check_precision(precision: str | int | None) -> None:
    """Check that a trainer leaves data types to the module: the adapter and its optimizer are float32.

    Args:
        precision: ``trainer.precision``, as Lightning accepts it.

    Raises:
        UserError: If it is not 32-true, Lightning's default; the message names the key that chooses the data type.
    """
    if str(precision) in ("None", "32", "32-true"):
        return
    name = str(precision)
    base_dtype = "bfloat16" if name.startswith("bf16") else "float16" if name.startswith("16") else "auto"
    raise UserError(
        f"trainer.precision={name}: only 32-true is supported, because the adapter and its optimizer stay in float32. "
        f"Remove it; the frozen base computes in model.dtype, so set model.dtype={base_dtype}."
    )


def check_vocabulary(model: PeftModel, tokenizer: Any, base_model: str) -> None:
    """Check that the model has an embedding for every token of its tokenizer.

    Raises:
        UserError: If it has fewer.
    """
    ordinary_ids = {*tokenizer.get_vocab().values()} - {*tokenizer.all_special_ids}
    num_tokens = 1 + max(tokenizer.eos_token_id, tokenizer.pad_token_id, *ordinary_ids)
    num_embeddings = model.get_input_embeddings().weight.shape[0]
    if num_tokens > num_embeddings:
        raise UserError(
            f"model.base_model {base_model}: its tokenizer has {num_tokens:,} tokens, its weights have embeddings for "
            f"{num_embeddings:,}. The files are from different models: copy all of them again."
        )


def check_shardable(model: PeftModel, adapter_type: str, lora: LoRAConfig) -> None:
    """Check that base and adapter can be sharded with FSDP2.

    bitsandbytes finds its 8-bit weights through an attribute that sharded tensors lack. And only trained parameters are
    gathered and saved, so an adapter with frozen tensors would be saved in part.

    Raises:
        UserError: If they cannot.
    """
    quantization = quantization_of(model.get_base_model())
    if quantization is not None and quantization.bits == 8:
        raise UserError(
            "trainer.strategy: an 8-bit base cannot be sharded. Use --config ddp.yaml, or "
            "--model.lora.quantization.bits=4."
        )
    frozen = [name for name, tensor in adapter_tensors(model).items() if not tensor.requires_grad]
    if frozen:
        raise UserError(
            f"trainer.strategy: an adapter of type {adapter_type} with init_lora_weights={lora.init_lora_weights} "
            f"cannot be sharded: {frozen[0]} is not trained and would not be saved. Use --config ddp.yaml."
        )


def check_rows(rows: Sequence[Any], model: PeftModel, tokenizer: Any) -> None:
    """Check that the model can read every row.

    Args:
        rows: Encoded rows (``input_ids``, ``source``), among them one with the most tokens and one with the largest id.
        model: The model to train.
        tokenizer: Its tokenizer.

    Raises:
        UserError: If a row has more tokens than the model has positions, or a token without an embedding; the message
            names the row.
    """
    if not rows:
        return
    limits = ModelLimits.of(model)
    longest = max(rows, key=lambda row: len(row.input_ids))
    limits.check_row(longest.source, len(longest.input_ids))
    limits.check_ids({row.source: row.input_ids for row in rows}, tokenizer)


def check_prompts(prompts: Mapping[str, Sequence[int]], model: PeftModel, tokenizer: Any, max_new_tokens: int) -> None:
    """Check that the model can read every prompt and complete it.

    Args:
        prompts: Token ids of prompts by source.
        model: The model.
        tokenizer: Its tokenizer.
        max_new_tokens: Maximum length of a completion.

    Raises:
        UserError: If the longest prompt and a completion have more tokens than the model has positions, or a token has
            no embedding; the message names the prompt.
    """
    limits = ModelLimits.of(model)
    limits.check_prompts(prompts, max_new_tokens)
    limits.check_ids(prompts, tokenizer)


def check_checkpoint_tensors(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Check that a checkpoint holds exactly the tensors of this adapter.

    Raises:
        UserError: If a name is missing or unknown, or a shape differs.
    """
    different = sorted(saved.keys() ^ own.keys()) or sorted(k for k in own if saved[k].shape != own[k].shape)
    if different:
        raise UserError(
            f"The checkpoint does not hold this adapter: {len(different)} parameters differ, such as {different[0]}. "
            "Use the config it was trained with (config.yaml in its run directory)."
        )


def check_checkpoint_identity(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Check that a checkpoint was written with the base model and scale of this adapter.

    Args:
        saved: Values by key, from the checkpoint.
        own: Values by key, of this adapter.

    Raises:
        UserError: If a value differs; the message names the key.
    """
    for key, value in own.items():
        if saved.get(key) != value:
            raise UserError(
                f"The checkpoint was written by a run with another {key} ({_format(saved.get(key))}, here "
                f"{_format(value)}), so its adapter would compute something else. Use the config it was trained with "
                "(config.yaml in its run directory)."
            )


def _format(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items()) or "none"
    return f"{value!s:.60}"
