from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from snake_lora_pl.training.loss_normalization import StepLoss, clip_gradients, normalize_gradients


def test_losses_and_targets_are_summed_over_micro_batches() -> None:
    step_loss = StepLoss()
    step_loss.add(torch.tensor(6.0, requires_grad=True), 2, ["f:1"])
    step_loss.add(torch.tensor(1.0), 1, ["f:2"])
    assert (float(step_loss.loss_sum), step_loss.num_targets) == (7.0, 3)
    assert not step_loss.loss_sum.requires_grad
    step_loss.clear()
    assert not step_loss.micro_batches


def test_gradients_are_divided_by_target_tokens_alone() -> None:
    gradients = [torch.tensor([10.0, 20.0]), torch.tensor(5.0)]
    # Lightning has divided by two micro-batches, the strategy by two ranks.
    divided = [gradient / 4 for gradient in gradients]
    trainer: Any = SimpleNamespace(world_size=2, accumulate_grad_batches=2)
    normalize_gradients(divided, torch.tensor(5.0), trainer)
    assert [gradient.tolist() for gradient in divided] == [[2.0, 4.0], 1.0]


def test_clipping_equals_that_of_torch() -> None:
    for scale in (0.1, 10.0):
        parameters = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2, 2))]
        for parameter in parameters:
            parameter.grad = scale * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        gradients = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        clip_gradients(gradients, norm, 1.0)
        assert all(torch.equal(own, p.grad) for own, p in zip(gradients, parameters, strict=True))
