from __future__ import annotations

import torch
from torch import nn

from snake_lora_pl.training.torch_internals import has_forward_hooks, softmax_backward


def test_softmax_backward_equals_autograd() -> None:
    scores = torch.randn(3, 5, requires_grad=True)
    probabilities = scores.softmax(-1)
    grad = torch.randn(3, 5)
    (expected,) = torch.autograd.grad(probabilities, scores, grad)
    torch.testing.assert_close(softmax_backward(grad, probabilities.detach()), expected)


def test_forward_hooks_are_found_and_not_listed_publicly() -> None:
    module = nn.Linear(1, 1)
    assert not has_forward_hooks(module)
    handle = module.register_forward_pre_hook(lambda *_: None)
    assert has_forward_hooks(module)
    handle.remove()
    assert not has_forward_hooks(module)
    module.register_forward_hook(lambda *_: None)
    assert has_forward_hooks(module)
    assert not {name for name in dir(module) if "hooks" in name and not name.startswith("_")}
