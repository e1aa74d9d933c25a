"""The chunked loss is compared with PyTorch's cross-entropy of the whole logits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from snake_lora_pl.training.logit_transform import IDENTITY, LogitTransform
from snake_lora_pl.training.loss import completion_loss, completion_predictions, select_targets

HIDDEN, VOCAB = 16, 101


def make_head(frozen: bool, bias: bool = False) -> nn.Linear:
    torch.manual_seed(1)
    head = nn.Linear(HIDDEN, VOCAB, bias=bias)
    return head.requires_grad_(not frozen)


def plain_loss(
    hidden: Tensor, token_ids: Tensor, head: nn.Module, transform: Callable[[Tensor], Tensor] = lambda logits: logits
) -> Tensor:
    return F.cross_entropy(transform(head(hidden).float()), token_ids, reduction="sum")


TRANSFORMS = {
    "none": IDENTITY,
    "scale": LogitTransform(scale=0.25),
    "cap": LogitTransform(cap=0.5),
    "scale and cap": LogitTransform(scale=3.0, cap=0.5),
}
PLAIN_TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda logits: logits,
    "scale": lambda logits: 0.25 * logits,
    "cap": lambda logits: 0.5 * (logits / 0.5).tanh(),
    "scale and cap": lambda logits: 0.5 * (3.0 * logits / 0.5).tanh(),
}


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_chunked_loss_and_gradients_equal_those_of_whole_logits(
    frozen: bool, bias: bool, chunk_tokens: int, transform: str
) -> None:
    head, twin = make_head(frozen, bias), make_head(frozen, bias)
    hidden = torch.randn(23, HIDDEN, requires_grad=True)
    token_ids = torch.randint(VOCAB, (23,))
    expected = plain_loss(hidden, token_ids, twin, PLAIN_TRANSFORMS[transform])
    (expected_gradient,) = torch.autograd.grad(expected * 3, hidden, retain_graph=True)

    loss = completion_loss(hidden, token_ids, head, chunk_tokens, TRANSFORMS[transform])
    (loss * 3).backward()

    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(hidden.grad, expected_gradient, rtol=1e-5, atol=1e-6)
    if not frozen:
        (expected * 3).backward()
        torch.testing.assert_close(head.weight.grad, twin.weight.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_loss_in_bfloat16_stays_near_float32(transform: str) -> None:
    head = make_head(frozen=True)
    hidden = torch.randn(64, HIDDEN)
    token_ids = torch.randint(VOCAB, (64,))
    exact = hidden.clone().requires_grad_()
    plain_loss(exact, token_ids, head, PLAIN_TRANSFORMS[transform]).backward()
    rounded = hidden.bfloat16().requires_grad_()
    loss = completion_loss(rounded, token_ids, head.bfloat16(), 16, TRANSFORMS[transform])
    loss.backward()

    assert loss.dtype == torch.float32
    expected = plain_loss(hidden, token_ids, make_head(True), PLAIN_TRANSFORMS[transform])
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)
    difference = (rounded.grad.float() - exact.grad).norm() / exact.grad.norm()
    assert difference < 2e-2


def test_batch_without_targets_has_zero_loss_and_zero_gradient() -> None:
    hidden = torch.randn(0, HIDDEN, requires_grad=True)
    loss = completion_loss(hidden, torch.empty(0, dtype=torch.int64), make_head(True))
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None


def test_targets_are_the_labels_shifted_by_one() -> None:
    labels = torch.tensor([[-100, -100, 5, 6], [-100, 7, -100, -100]])
    targets = select_targets(labels)
    assert targets.token_ids.tolist() == [5, 6, 7]
    assert list(zip(targets.rows.tolist(), targets.positions.tolist(), strict=True)) == [(0, 1), (0, 2), (1, 0)]
    assert targets.row_sizes == [2, 1]


def test_tokens_are_counted_without_padding() -> None:
    labels = torch.tensor([[-100, 5, 6, -100], [-100, -100, -100, 7], [-100, -100, -100, -100]])
    targets = select_targets(labels)
    assert (targets.num_tokens, targets.row_sizes) == (3 + 4, [2, 1, 0])


@pytest.mark.parametrize("chunk_tokens", [1, 5, 1000])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_predictions_are_the_most_likely_tokens_and_their_losses_sum_to_the_loss(
    chunk_tokens: int, transform: str
) -> None:
    head = make_head(frozen=True)
    hidden, token_ids = torch.randn(23, HIDDEN), torch.randint(VOCAB, (23,))
    losses, predicted = completion_predictions(hidden, token_ids, head, chunk_tokens, TRANSFORMS[transform])
    assert torch.equal(predicted, head(hidden).argmax(-1))
    torch.testing.assert_close(losses.sum(), plain_loss(hidden, token_ids, head, PLAIN_TRANSFORMS[transform]))
