from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from snake_lora_pl.training.loss_normalization import StepLoss, normalize_gradients


def fake_trainer(other_loss_sum: float, other_num_targets: float) -> Any:
    """A trainer of two ranks that accumulates two micro-batches; the other rank contributes the given sums."""

    def reduce(sums: Tensor, reduce_op: str) -> Tensor:
        assert reduce_op == "sum"
        return sums + torch.tensor([other_loss_sum, other_num_targets], dtype=sums.dtype)

    return SimpleNamespace(world_size=2, accumulate_grad_batches=2, strategy=SimpleNamespace(reduce=reduce))


def test_loss_is_the_mean_over_target_tokens_of_all_micro_batches_and_ranks() -> None:
    step_loss = StepLoss()
    step_loss.add(torch.tensor(6.0, requires_grad=True), torch.tensor(2), ["f:1"])
    step_loss.add(torch.tensor(1.0), torch.tensor(1), ["f:2"])
    loss, num_targets = step_loss.reduce(fake_trainer(3.0, 2.0))
    assert (float(loss), float(num_targets)) == (2.0, 5.0)
    assert not loss.requires_grad
    step_loss.clear()
    assert not step_loss.micro_batches


def test_gradients_are_divided_by_target_tokens_alone() -> None:
    gradients = [torch.tensor([10.0, 20.0]), torch.tensor(5.0)]
    # Lightning has divided by two micro-batches, the strategy by two ranks.
    divided = [gradient / 4 for gradient in gradients]
    normalize_gradients(divided, torch.tensor(5.0), fake_trainer(0.0, 0.0))
    assert [gradient.tolist() for gradient in divided] == [[2.0, 4.0], 1.0]
