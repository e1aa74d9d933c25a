"""Causality of a base model: no token may see a later one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from snake_lora_pl.models.limits import context_length
from snake_lora_pl.models.quantization import compute_dtype

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_NUM_TOKENS = 12


def is_causal(model: PreTrainedModel) -> bool:
    """Return whether the logits of the first tokens stay the same when the last token changes.

    It is computed, because configs do not state it reliably: BERT's class for causal language models is bidirectional
    unless ``is_decoder`` is set, and XLNet is bidirectional without a permutation mask.

    Args:
        model: A model in evaluation mode, with weights.
    """
    import torch

    input_ids = spread_token_ids(model, num_rows=2)
    input_ids[1, -1] = input_ids[1, 0]
    dtype = compute_dtype(model)
    # Some models compute in 16 bits only with autocast, which training uses.
    with torch.no_grad(), torch.autocast(input_ids.device.type, dtype=dtype, enabled=dtype != torch.float32):
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].float()
    differences = (logits[1] - logits[0]).norm(dim=-1) / logits[0].norm(dim=-1)
    # In 16 bits rounding depends on the other rows, and may send single tokens to another expert. Where logits are not
    # finite, a comparison is false.
    changed = differences.max() > 1e-4 if dtype == torch.float32 else differences.median() > 0.02
    return not changed


def spread_token_ids(model: PreTrainedModel, num_rows: int) -> Tensor:
    """Return a few token ids spread over the vocabulary, shape (num_rows, T) with equal rows.

    The first ids are often special tokens, for which a trained adapter's hidden states are so large that logits in 16
    bits are meaningless.
    """
    import torch

    embedding = model.get_input_embeddings().weight
    num_tokens = min(_NUM_TOKENS, context_length(model.config) or _NUM_TOKENS)
    ids = torch.arange(1, num_tokens + 1, device=embedding.device) * max(1, len(embedding) // 16) % len(embedding)
    return ids.repeat(num_rows, 1)
