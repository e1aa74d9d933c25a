"""An adapter and its base as one plain model: written, read back, and compared before it takes its place."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from snake_lora_pl.adapters import store
from snake_lora_pl.adapters.card import merged_model_card
from snake_lora_pl.adapters.qlora import dequantize_base
from snake_lora_pl.durable import directory_durably
from snake_lora_pl.errors import UserError, one_line
from snake_lora_pl.models.quantization import QuantizationConfig

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

    from snake_lora_pl.models.base_model import BaseModelSpec

logger = logging.getLogger(__name__)

MERGE_DTYPES = ("auto", "float32", "bfloat16", "float16")

# As a share of the logits' standard deviation. All are computed in float32, so only the order of additions differs.
_TOLERANCE = 1e-2
_PROBE_SHAPE = (4, 64)


class MergedModel(NamedTuple):
    """What ``merge`` wrote.

    Attributes:
        path: The model directory.
        num_parameters: Parameters of the model, tied ones counted once.
        dtype: Type of its weights.
        logit_difference: Largest difference between its logits and the adapter's, as a share of their standard
            deviation: what rounding to ``dtype`` did.
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
    """Write an adapter, merged into its base, as a directory that ``AutoModelForCausalLM`` loads without PEFT.

    The merge is computed in float32, whatever the base is stored in: four bytes a parameter. An adapter that was
    trained on a quantized base is merged into what that base stood for. What was written is read back and its logits
    are compared before the directory appears.

    Args:
        adapter_dir: The adapter directory.
        out_dir: Where to; absent or empty.
        base_model: Spec or name of the base; None takes the name from the metadata.
        dtype: Type of the merged weights: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for the one that the base
            is stored in.

    Raises:
        UserError: If the adapter cannot be loaded, ``out_dir`` holds something or cannot be written, or the merged
            model computes something else than the adapter.
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
    # The adapter corrects the rounded weights; merged into the rounding itself it would be lost.
    base = dequantize_base(base)
    model = store.load(adapter_dir, base).eval()
    expected = _probe(model)
    merged = _merge(model)
    _check_same(_probe(merged), expected, out_dir, "the merged model")
    num_parameters = merged.num_parameters()
    try:
        with directory_durably(out_dir) as directory:
            _cast(merged, getattr(torch, chosen))
            merged.save_pretrained(str(directory))
            tokenizer.save_pretrained(str(directory))
            (directory / store.CARD_FILE).write_text(merged_model_card(metadata, chosen), encoding="utf-8")
            _cast(merged, torch.float32)
            rounded = _probe(merged)
            del model, merged, base  # what is read back takes their place in memory
            written = AutoModelForCausalLM.from_pretrained(
                directory, dtype=torch.float32, trust_remote_code=spec.trust_remote_code
            )
            _check_same(_probe(written), rounded, out_dir, "what was written and read back")
    except (OSError, SafetensorError) as error:
        raise UserError(f"--out {out_dir}: cannot be written ({one_line(error)}). Choose another place.") from error
    return MergedModel(out_dir, num_parameters, chosen, _difference(rounded, expected))


def _check_is_free(out_dir: Path) -> None:
    if out_dir.is_dir() and not any(out_dir.iterdir()):
        return
    if out_dir.exists():
        what = "a directory that is not empty" if out_dir.is_dir() else "a file"
        raise UserError(f"--out {out_dir}: there is {what}. Choose another name, or remove it first.")


def _merge(model: PeftModel) -> PreTrainedModel:
    base = model.get_base_model()
    if base.config.tie_word_embeddings:
        _untie_what_was_trained(base)
    with warnings.catch_warnings():
        # That embedding and head are no longer one is what was just seen to.
        warnings.filterwarnings("ignore", message=".*no longer tied.*")
        try:
            return model.merge_and_unload(safe_merge=True)
        except (ValueError, RuntimeError) as error:  # PEFT's, by the kind of adapter that it cannot merge
            raise UserError(f"the adapter cannot be merged: {one_line(error)}.") from error


def _untie_what_was_trained(base: PreTrainedModel) -> None:
    """Give the head a weight of its own where an adapter on it, or on the embedding, would be merged into both.

    PEFT then notes in the config that they are two (https://github.com/huggingface/peft/issues/2018,
    https://github.com/huggingface/transformers/issues/45127).
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import nn

    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if not any(isinstance(layer, BaseTunerLayer) for layer in (embedding, head)):
        return
    layer = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
    layer.weight = nn.Parameter(layer.weight.detach().clone())


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast the weights, and not the buffers: those of rotary positions are not saved and would stay rounded."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _probe(model: PreTrainedModel | PeftModel) -> Tensor:
    """Logits on tokens that are the same in every call, float32, shape (batch, length, vocab)."""
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, _PROBE_SHAPE, generator=generator)
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float()


def _check_same(logits: Tensor, expected: Tensor, out_dir: Path, what: str) -> None:
    difference = _difference(logits, expected)
    if not difference <= _TOLERANCE:
        raise UserError(
            f"--out {out_dir}: not written, for the logits of {what} differ by {difference:.2g} of their standard "
            "deviation from those that they should be. This architecture cannot be merged; load the adapter with PEFT."
        )


def _difference(logits: Tensor, expected: Tensor) -> float:
    return float((logits - expected).abs().max() / expected.std())
