from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, UnsupportedOperatorException

from snake_lora_pl.training.torch_internals import (
    has_forward_hooks,
    has_vnni,
    int8_product,
    pack_int8,
    softmax_backward,
)


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


@pytest.mark.skipif(not has_vnni(), reason="needs AVX512-VNNI")
@pytest.mark.parametrize("num_rows", [1, 17])
def test_product_of_integers_is_exact(num_rows: int) -> None:
    x = torch.randint(0, 256, (num_rows, 64), dtype=torch.uint8)
    weight, scales = torch.randint(-127, 128, (40, 64), dtype=torch.int8), torch.rand(40)
    expected = ((x.long() - 128) @ weight.t().long()).float() * scales
    assert torch.equal(int8_product(x, pack_int8(weight), scales, torch.float32), expected)


def test_fake_weights_have_no_packed_form_but_the_same_shapes() -> None:
    with FakeTensorMode():
        weight = torch.empty(40, 64, dtype=torch.int8)
        with pytest.raises(UnsupportedOperatorException):  # pack_int8 need not distinguish once this passes
            torch.ops.onednn.qlinear_prepack(weight, None)
        x, scales = torch.empty(3, 64, dtype=torch.uint8), torch.empty(40)
        assert int8_product(x, pack_int8(weight), scales, torch.bfloat16).shape == (3, 40)
