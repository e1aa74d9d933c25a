"""Cross-entropy of the completion tokens, computed in chunks.

Logits take a large part of a causal model's memory: tokens x vocabulary, in float32. Prompt and padding carry no loss,
so their logits are never computed. The other logits are computed in chunks, of which one is in memory at a time.

The loss is a sum over target tokens; ``loss_normalization`` divides it.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - the common alias
from torch import Tensor, nn

from snake_lora_pl.constants import IGNORE_INDEX
from snake_lora_pl.training.logit_transform import IDENTITY, LogitTransform
from snake_lora_pl.training.torch_internals import Function

logger = logging.getLogger(__name__)

# Rows of logits whose float32 copy stays in a CPU's cache between passes over it.
_CPU_ROWS = 32


class Targets(NamedTuple):
    """Positions of a batch that carry loss. Their number depends on the labels, so a GPU would have to wait for it."""

    rows: Tensor
    """Row of each target; int64 of shape (num_targets,)."""
    positions: Tensor
    """Position whose hidden state predicts each target; int64 of shape (num_targets,)."""
    token_ids: Tensor
    """Targets in row order; int64 of shape (num_targets,)."""
    row_sizes: list[int]
    """Number of targets of each row."""
    num_tokens: int
    """Tokens of the batch without padding: the last label of a row is its last token."""


def select_targets(labels: Tensor) -> Targets:
    """Shift labels by one and select those that are not ``IGNORE_INDEX``.

    Args:
        labels: int64 of shape (B, T), aligned with the input ids.
    """
    shifted = labels[:, 1:]
    mask = shifted != IGNORE_INDEX
    rows, positions = mask.nonzero().unbind(1)
    ends = torch.arange(1, labels.shape[1] + 1, device=labels.device) * (labels != IGNORE_INDEX)  # (B, T)
    return Targets(rows, positions, shifted[mask], mask.sum(dim=1).tolist(), int(ends.amax(dim=1).sum()))


def completion_loss(
    hidden: Tensor,
    token_ids: Tensor,
    lm_head: nn.Module,
    chunk_tokens: int = 512,
    transform: LogitTransform = IDENTITY,
) -> Tensor:
    """Return the cross-entropy of ``transform(lm_head(hidden))`` summed over the targets.

    Args:
        hidden: Hidden state that predicts each target, shape (num_targets, hidden_size).
        token_ids: Targets, int64 of shape (num_targets,).
        lm_head: Output head, which maps hidden states to logits.
        chunk_tokens: Targets whose logits are in memory at a time. Liger Kernel, which is used on a GPU if it is
            installed, the head is frozen and the logits are not transformed, chooses its own number.
        transform: Change of the logits after the output head.

    Returns:
        float32 scalar; zero, with a graph, if there is no target.
    """
    if token_ids.numel() == 0:
        return hidden.sum() * 0.0
    if type(lm_head) is nn.Linear and not any(p.requires_grad for p in lm_head.parameters()):
        # Liger's kernel has no scale, and its cap cannot be tested in Triton's interpreter.
        if hidden.is_cuda and transform == IDENTITY and liger_is_installed():
            return liger_loss(hidden, token_ids, lm_head)
        return _FrozenHeadCrossEntropy.apply(hidden, token_ids, lm_head.weight, lm_head.bias, chunk_tokens, transform)
    loss = hidden.new_zeros((), dtype=torch.float32)
    for h, t in zip(hidden.split(chunk_tokens), token_ids.split(chunk_tokens), strict=True):
        # Recomputed in the backward pass, so that one chunk's logits are in memory at a time here too.
        loss = loss + torch.utils.checkpoint.checkpoint(_chunk_loss, lm_head, h, t, transform, use_reentrant=False)
    return loss


@functools.cache
def liger_is_installed() -> bool:
    """Return whether Liger Kernel (extra ``gpu``) is installed, and log the loss implementation once."""
    installed = importlib.util.find_spec("liger_kernel") is not None
    name = "Liger Kernel's fused linear cross-entropy" if installed else "PyTorch, because liger-kernel is missing"
    logger.info("Loss implementation: %s.", name)
    return installed


def liger_loss(hidden: Tensor, token_ids: Tensor, lm_head: nn.Linear) -> Tensor:
    """Compute ``completion_loss`` with Liger Kernel's fused linear cross-entropy (https://arxiv.org/abs/2410.10989).

    One Triton kernel per chunk reads the logits once and overwrites them with their gradient. It needs a GPU, or
    Triton's interpreter.
    """
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    with torch.autocast(hidden.device.type, enabled=False):
        loss: Tensor = LigerFusedLinearCrossEntropyLoss(reduction="sum")(
            lm_head.weight, hidden.to(lm_head.weight.dtype), token_ids, lm_head.bias
        )
    return loss


def _chunk_loss(
    lm_head: Callable[[Tensor], Tensor], hidden: Tensor, token_ids: Tensor, transform: LogitTransform
) -> Tensor:
    return F.cross_entropy(transform(lm_head(hidden).float()), token_ids, reduction="sum")


class _FrozenHeadCrossEntropy(Function):
    """Cross-entropy whose gradient is computed in the forward pass, chunk by chunk, from the logits in memory.

    The gradient of a summed cross-entropy with respect to the logits is ``softmax - one_hot``; multiplied by the
    derivative of their transform and by the frozen head's weight it is the gradient of the hidden state. No tensor of
    the size of the logits outlives its chunk, and nothing is computed twice, as in Liger Kernel's fused linear
    cross-entropy (https://arxiv.org/abs/2410.10989).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        token_ids: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        chunk_tokens: int,
        transform: LogitTransform,
    ) -> Tensor:
        """Return the summed loss and keep the gradient of ``hidden`` for the backward pass."""
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if hidden.requires_grad else None
        # Autocast would cast the head's weight again for every chunk.
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, token_ids.numel(), chunk_tokens):
                chunk = slice(start, start + chunk_tokens)
                logits = F.linear(hidden[chunk].to(weight.dtype), weight, bias)  # (chunk, vocab_size)
                num_rows = _CPU_ROWS if logits.device.type == "cpu" else chunk_tokens
                for part, targets in zip(logits.split(num_rows), token_ids[chunk, None].split(num_rows), strict=True):
                    transformed = part if transform == IDENTITY else transform(part.float())
                    log_probabilities = torch.log_softmax(transformed, dim=-1, dtype=torch.float32)
                    loss -= log_probabilities.gather(1, targets).sum()
                    if grad_hidden is not None:
                        grad_part = log_probabilities.exp_()
                        grad_part.scatter_add_(1, targets, grad_part.new_full((1, 1), -1.0).expand_as(targets))
                        transform.multiply_by_derivative(grad_part, transformed)
                        part.copy_(grad_part)
                if grad_hidden is not None:
                    grad_hidden[chunk] = logits @ weight
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        """Scale the kept gradient by the gradient of the loss."""
        (grad_hidden,) = ctx.saved_tensors
        return grad_hidden * grad_outputs[0].to(grad_hidden.dtype), None, None, None, None, None


@torch.no_grad()
def completion_predictions(
    hidden: Tensor,
    token_ids: Tensor,
    lm_head: nn.Module,
    chunk_tokens: int = 512,
    transform: LogitTransform = IDENTITY,
) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy and the most likely token at each target; see ``completion_loss`` for the arguments.

    Returns:
        Losses, float32, and predicted token ids, int64, both of shape (num_targets,).
    """
    losses, predictions = [], []
    for h, t in zip(hidden.split(chunk_tokens), token_ids.split(chunk_tokens), strict=True):
        logits = transform(lm_head(h).float())  # (chunk, vocab_size)
        losses.append(F.cross_entropy(logits, t, reduction="none"))
        predictions.append(logits.argmax(dim=-1))
    return torch.cat(losses), torch.cat(predictions)
