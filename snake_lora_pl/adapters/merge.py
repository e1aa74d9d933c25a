"""Merging of an adapter into its base: the merged model is written, read back and compared before it appears."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from snake_lora_pl.adapters import store
from snake_lora_pl.adapters.card import merged_model_card
from snake_lora_pl.adapters.peft_internals import is_adapter_layer
from snake_lora_pl.adapters.qlora import dequantize_base
from snake_lora_pl.durable import directory_durably
from snake_lora_pl.errors import UserError, one_line
from snake_lora_pl.models.chat_template import save_tokenizer
from snake_lora_pl.models.quantization import QuantizationConfig
from snake_lora_pl.models.text_decoder import text_config

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

    from snake_lora_pl.models.base_model import BaseModelSpec

logger = logging.getLogger(__name__)

MERGE_DTYPES = ("auto", "float32", "bfloat16", "float16")

# Relative to the standard deviation of the logits. All are computed in float32; only the order of additions differs.
_TOLERANCE = 1e-2
_PROBE_SHAPE = (4, 64)


class MergedModel(NamedTuple):
    """The result of ``merge``.

    Attributes:
        path: The model directory.
        num_parameters: Parameters of the model; tied parameters count once.
        dtype: Dtype of its weights.
        logit_difference: Largest difference between the logits of merged model and adapter, from rounding to ``dtype``,
            relative to the standard deviation of the logits.
    """

    path: Path
    num_parameters: int
    dtype: str
    logit_difference: float


def merge(
    adapter_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    base_model: BaseModelSpec | str | None = None,
    dtype: str = "auto",
) -> MergedModel:
    """Merge an adapter into its base and write a directory that ``AutoModelForCausalLM`` loads without PEFT.

    The merge is computed in float32, at four bytes per parameter. An adapter that was trained on a quantized base is
    merged into the dequantized base. The written model is read back and its logits are compared before the directory
    appears.

    Args:
        adapter_dir: The adapter directory.
        out_dir: Directory to write; it must not exist or be empty.
        base_model: Spec or name of the base; None takes the name from the metadata.
        dtype: Dtype of the merged weights: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for the stored dtype of
            the base.

    Raises:
        UserError: If the adapter cannot be loaded, ``out_dir`` is not empty or cannot be written, or the logits of the
            merged model differ from the adapter's.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from snake_lora_pl.models import load_base_model, load_tokenizer, prepare_base_model, stored_dtype

    out_dir = Path(out_dir)
    if dtype not in MERGE_DTYPES:
        raise UserError(f"--dtype must be one of {', '.join(MERGE_DTYPES)}, not '{dtype}'.")
    _check_is_free(out_dir)
    metadata = store.verify(adapter_dir)
    try:
        spec = store.base_spec(metadata, base_model)
    except UserError as error:
        raise UserError(f"{error} Pass the base model's current location with --base_model.") from error
    store.check_base(metadata, spec, adapter_dir, option="--base_model")
    chosen = stored_dtype(Path(prepare_base_model(spec).path_or_id)) if dtype == "auto" else dtype
    tokenizer = load_tokenizer(spec)
    quantization = QuantizationConfig(**metadata.quantization) if metadata.quantization else None
    base = load_base_model(spec, dtype="float32", quantization=quantization, device="cpu")
    base = dequantize_base(base)
    model = store.load(adapter_dir, base).eval()
    expected = _probe(model)
    merged = _merge(model)
    _check_same(_probe(merged), expected, out_dir, "the merged model")
    num_parameters, config_name = merged.num_parameters(), type(merged.config).__name__
    try:
        with directory_durably(out_dir) as directory:
            _cast(merged, getattr(torch, chosen))
            merged.save_pretrained(str(directory))
            save_tokenizer(tokenizer, directory, metadata.data.get("template_date"))
            (directory / store.CARD_FILE).write_text(merged_model_card(metadata, chosen), encoding="utf-8")
            _cast(merged, torch.float32)
            rounded = _probe(merged)
            del model, merged, base  # free the memory for the model that is read back
            try:
                written = AutoModelForCausalLM.from_pretrained(
                    directory, dtype=torch.float32, trust_remote_code=spec.trust_remote_code
                )
            except ValueError as error:  # the text decoder of a multimodal model may have no automatic class
                raise UserError(
                    f"--out {out_dir}: not written: transformers cannot load a model with a {config_name} "
                    f"({one_line(error, 80)}). Load the adapter with PEFT instead."
                ) from error
            _check_same(_probe(written), rounded, out_dir, "the model read back from disk")
    except (OSError, SafetensorError) as error:
        raise UserError(f"--out {out_dir}: cannot be written ({one_line(error)}). Choose another directory.") from error
    return MergedModel(out_dir, num_parameters, chosen, _difference(rounded, expected))


def _check_is_free(out_dir: Path) -> None:
    if out_dir.is_dir() and not any(out_dir.iterdir()):
        return
    if out_dir.exists():
        found = "the directory is not empty" if out_dir.is_dir() else "the path is a file"
        raise UserError(f"--out {out_dir}: {found}. Choose another directory, or delete it first.")


def _merge(model: PeftModel) -> PreTrainedModel:
    base = model.get_base_model()
    if getattr(base.config, "tie_word_embeddings", False) or getattr(text_config(base), "tie_word_embeddings", False):
        _untie_adapted_embeddings(base)
    with warnings.catch_warnings():
        # The embedding and the LM head are untied on purpose.
        warnings.filterwarnings("ignore", message=".*no longer tied.*")
        try:
            return model.merge_and_unload(safe_merge=True)
        except (ValueError, RuntimeError) as error:  # raised by PEFT for adapter types that it cannot merge
            raise UserError(f"the adapter cannot be merged: {one_line(error)}. Load it with PEFT instead.") from error


def _untie_adapted_embeddings(base: PreTrainedModel) -> None:
    """Copy the weight of the LM head if an adapter on it, or on the embedding, would be merged into both.

    PEFT then records in the config that they are untied (https://github.com/huggingface/peft/issues/2018,
    https://github.com/huggingface/transformers/issues/45127).
    """
    from torch import nn

    embedding, lm_head = base.get_input_embeddings(), base.get_output_embeddings()
    if not any(is_adapter_layer(layer) for layer in (embedding, lm_head)):
        return
    layer = lm_head.get_base_layer() if is_adapter_layer(lm_head) else lm_head
    layer.weight = nn.Parameter(layer.weight.detach().clone())


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast the weights but not the buffers: rotary frequencies are not saved and would remain rounded."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _probe(model: PreTrainedModel | PeftModel) -> Tensor:
    """Return the logits on fixed random tokens, float32, of shape (batch, length, vocab)."""
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(len(model.get_input_embeddings().weight), _PROBE_SHAPE, generator=generator)
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits.float()
    return logits


def _check_same(logits: Tensor, expected: Tensor, out_dir: Path, what: str) -> None:
    difference = _difference(logits, expected)
    if not difference <= _TOLERANCE:
        raise UserError(
            f"--out {out_dir}: not written: the logits of {what} differ from the expected logits by {difference:.2g} "
            "standard deviations. This architecture cannot be merged; load the adapter with PEFT instead."
        )


def _difference(logits: Tensor, expected: Tensor) -> float:
    return float((logits - expected).abs().max() / expected.std())
