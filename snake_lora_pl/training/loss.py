"""Completion-only cross-entropy over the rows of hidden state that predict a target, a chunk at a time.

A causal model spends a large share of its memory on logits: tokens x vocabulary, in float32. Prompt and padding carry
no loss, so their logits are never computed; the others are computed in chunks of which only one is alive.

The loss is a *sum* over target tokens. What it is divided by, the number of targets in the whole optimizer step, is
known only when the step's last micro-batch has been seen; ``LoRALightningModule`` divides the gradients then. A mean of
per-batch means would weigh rows by the company they keep (https://github.com/huggingface/trl/issues/2604).
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn

from snake_lora_pl.constants import IGNORE_INDEX

logger = logging.getLogger(__name__)


# Rows of logits whose float32 copy stays in a CPU's cache from one pass over it to the next.
_CPU_ROWS = 32


class Targets(NamedTuple):
    """The positions of a batch that carry loss.

    Args:
        mask: Which positions' hidden state predicts a target; bool of shape (batch, length - 1).
        token_ids: The targets in row order; int64 of shape (num_targets,).
    """

    mask: Tensor
    token_ids: Tensor


def select_targets(labels: Tensor) -> Targets:
    """Shift labels by one and keep those that are not ``IGNORE_INDEX``.

    Args:
        labels: int64 of shape (batch, length), aligned with the input ids.
    """
    shifted = labels[:, 1:]
    mask = shifted != IGNORE_INDEX
    return Targets(mask, shifted[mask])


def completion_loss(hidden: Tensor, token_ids: Tensor, head: nn.Module, chunk_tokens: int = 512) -> Tensor:
    """Sum of the cross-entropies of ``head(hidden)`` against ``token_ids``.

    Args:
        hidden: Hidden state that predicts each target, shape (num_targets, hidden_size).
        token_ids: Targets, int64 of shape (num_targets,).
        head: Maps hidden state to logits.
        chunk_tokens: Targets whose logits are alive at a time. Liger Kernel, which takes over on a GPU where it is
            installed and the head is frozen, chooses its own number.

    Returns:
        float32 scalar; zero, with a graph, where there is no target.
    """
    if token_ids.numel() == 0:
        return hidden.sum() * 0.0
    if type(head) is nn.Linear and not any(p.requires_grad for p in head.parameters()):
        if hidden.is_cuda and liger_is_installed():
            return liger_loss(hidden, token_ids, head)
        return _FrozenHeadCrossEntropy.apply(hidden, token_ids, head.weight, head.bias, chunk_tokens)
    loss = hidden.new_zeros((), dtype=torch.float32)
    for h, t in zip(hidden.split(chunk_tokens), token_ids.split(chunk_tokens), strict=True):
        # Recomputed in backward, so that one chunk's logits are alive at a time here too.
        loss = loss + torch.utils.checkpoint.checkpoint(_plain_loss, head, h, t, use_reentrant=False)
    return loss


@functools.cache
def liger_is_installed() -> bool:
    """Whether Liger Kernel (extra ``gpu``) is there; said once in the log."""
    installed = importlib.util.find_spec("liger_kernel") is not None
    name = "Liger Kernel's fused linear cross-entropy" if installed else "PyTorch, as liger-kernel is not installed"
    logger.info("The loss is computed by %s.", name)
    return installed


def liger_loss(hidden: Tensor, token_ids: Tensor, head: nn.Linear) -> Tensor:
    """``completion_loss`` by Liger Kernel's fused linear cross-entropy, https://arxiv.org/abs/2410.10989.

    Chunks as below, but softmax and its gradient are one Triton kernel that reads the logits once and writes the
    gradient over them. It needs a GPU (or Triton's interpreter).
    """
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    with torch.autocast(hidden.device.type, enabled=False):
        loss: Tensor = LigerFusedLinearCrossEntropyLoss(reduction="sum")(
            head.weight, hidden.to(head.weight.dtype), token_ids, head.bias
        )
    return loss


def _plain_loss(head: Callable[[Tensor], Tensor], hidden: Tensor, token_ids: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).float(), token_ids, reduction="sum")


class _FrozenHeadCrossEntropy(torch.autograd.Function):
    """Cross-entropy whose gradient is taken chunk by chunk in the forward pass, while the logits are at hand.

    The gradient of a summed cross-entropy with respect to the logits is ``softmax - one_hot``; times the frozen head's
    weight it is that of the hidden state. Nothing of the size of the logits outlives its chunk and nothing is computed
    twice (the idea of Liger Kernel's fused linear cross-entropy, https://arxiv.org/abs/2410.10989).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, token_ids: Tensor, weight: Tensor, bias: Tensor | None, chunk_tokens: int
    ) -> Tensor:
        """Return the summed loss; keep the gradient of ``hidden`` for the backward pass."""
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if hidden.requires_grad else None
        # Autocast would cast the head's weight anew for every chunk.
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, token_ids.numel(), chunk_tokens):
                chunk = slice(start, start + chunk_tokens)
                logits = F.linear(hidden[chunk].to(weight.dtype), weight, bias)  # (chunk, vocab)
                rows = _CPU_ROWS if logits.device.type == "cpu" else chunk_tokens
                for part, targets in zip(logits.split(rows), token_ids[chunk, None].split(rows), strict=True):
                    log_probabilities = torch.log_softmax(part, dim=-1, dtype=torch.float32)
                    loss -= log_probabilities.gather(1, targets).sum()
                    if grad_hidden is not None:
                        grad_part = log_probabilities.exp_()
                        grad_part.scatter_add_(1, targets, grad_part.new_full((1, 1), -1.0).expand_as(targets))
                        part.copy_(grad_part)
                if grad_hidden is not None:
                    grad_hidden[chunk] = logits @ weight
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Scale the kept gradient by that of the loss."""
        (grad_hidden,) = ctx.saved_tensors
        return grad_hidden * grad_outputs[0].to(grad_hidden.dtype), None, None, None, None


@torch.no_grad()
def completion_predictions(
    hidden: Tensor, token_ids: Tensor, head: nn.Module, chunk_tokens: int = 512
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and most likely token at each target, for validation.

    Args:
        hidden: As in ``completion_loss``.
        token_ids: As in ``completion_loss``.
        head: As in ``completion_loss``.
        chunk_tokens: As in ``completion_loss``.

    Returns:
        Losses, float32, and predicted token ids, int64, each of shape (num_targets,).
    """
    losses, predictions = [], []
    for h, t in zip(hidden.split(chunk_tokens), token_ids.split(chunk_tokens), strict=True):
        logits = head(h).float()
        losses.append(F.cross_entropy(logits, t, reduction="none"))
        predictions.append(logits.argmax(dim=-1))
    return torch.cat(losses), torch.cat(predictions)
