"""Liger Kernel's loss is compared with that of whole logits, on a GPU and in Triton's interpreter on a CPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from snake_lora_pl.training.loss import completion_loss, liger_loss

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("liger_kernel", "triton")),
    reason="needs liger-kernel and triton",
)


def compare(device: str, dtype: torch.dtype, tolerance: float, *, bias: bool) -> None:
    torch.manual_seed(0)
    head = nn.Linear(64, 1001, bias=bias, device=device, dtype=dtype).requires_grad_(False)
    hidden = torch.randn(37, 64, device=device, requires_grad=True)
    token_ids = torch.randint(1001, (37,), device=device)
    whole = F.cross_entropy(
        F.linear(hidden, head.weight.float(), head.bias.float() if bias else None), token_ids, reduction="sum"
    )
    (expected,) = torch.autograd.grad(whole * 3, hidden)

    loss = liger_loss(hidden, token_ids, head)
    assert loss.dtype == torch.float32
    (gradient,) = torch.autograd.grad(loss * 3, hidden)

    torch.testing.assert_close(loss, whole, rtol=tolerance, atol=0)
    assert float((gradient - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("bias", [True, False])
def test_liger_loss_equals_that_of_whole_logits_in_the_interpreter(bias: bool) -> None:
    # In another process, because Triton reads this variable at import.
    script = f"import torch; from {__name__} import compare; compare('cpu', torch.float32, 1e-5, bias={bias})"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_liger_loss_equals_that_of_whole_logits_on_a_gpu(
    dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    compare("cuda", dtype, tolerance, bias=False)
    head = nn.Linear(64, 1001, bias=False, device="cuda", dtype=dtype).requires_grad_(False)
    hidden, token_ids = torch.randn(37, 64, device="cuda"), torch.randint(1001, (37,), device="cuda")
    assert torch.equal(completion_loss(hidden, token_ids, head), liger_loss(hidden, token_ids, head))
