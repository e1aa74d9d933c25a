"""Probe of a model before training: how do its logits follow from its hidden states?

It is found by computing a few tokens, because configs do not state it reliably. The output head and everything after it
run in float32 whatever the model's data type, so that a soft cap is not mistaken for rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - the common alias
from torch import Tensor, nn

from snake_lora_pl.errors import UserError
from snake_lora_pl.models.causality import spread_token_ids
from snake_lora_pl.models.quantization import compute_dtype
from snake_lora_pl.training.logit_transform import LogitTransform, candidate_transforms

if TYPE_CHECKING:
    from peft import PeftModel

# Logits of more tokens would need a float32 copy of a large part of the output head.
_MAX_VOCABULARY = 8192


class Probe:
    """Logits of a model for a few tokens.

    Args:
        model: The PEFT model, in evaluation mode.
        source: The key and value that the model was loaded from, for messages.

    Attributes:
        input_ids: Token ids, shape (2, T).
        logits: The model's logits, computed in float32 from the input of its output head; shape (2, T, V) with the
            first V tokens of the vocabulary.

    Raises:
        UserError: If the logits are not finite.
    """

    def __init__(self, model: PeftModel, source: str) -> None:
        self._base: Any = model.get_base_model()
        self._head: nn.Module = self._base.get_output_embeddings()
        self._source = source
        self._is_float32 = compute_dtype(self._base) == torch.float32
        self._head_inputs: list[Tensor] = []
        self.input_ids = spread_token_ids(self._base, num_rows=2)
        hook = self._head.register_forward_hook(self._record)
        try:
            self.logits: Tensor = model(input_ids=self.input_ids, use_cache=False).logits.float()
        finally:
            hook.remove()
        if not self.logits.isfinite().all():
            dtype = str(compute_dtype(self._base)).removeprefix("torch.")
            raise UserError(
                f"{source}: the model's logits are not finite. Its weights are damaged, or they overflow in {dtype}. "
                "Copy its files again, or set model.dtype=float32."
            )

    def find_transform(self, hidden: Tensor) -> LogitTransform:
        """Return what the model does with its logits after the output head.

        Args:
            hidden: Last hidden state of ``input_ids``, as training computes it; shape (2, T, hidden_size).

        Raises:
            UserError: If the logits do not follow from the hidden state by the output head, a scale and a soft cap.
        """
        if (transform := self._matching_transform(hidden)) is not None:
            return transform
        if not self._head_inputs:
            reason = "computes its logits without calling its output head"
        elif self._matching_transform(self._head_inputs[-1]) is not None:
            reason = "transforms the hidden states before its output head"
        else:
            reason = "changes its logits after its output head by more than a scale and a soft cap from its config"
        raise UserError(
            f"{self._source}: {self._name} {reason}, which training does not support. Choose another base model."
        )

    def check_fused(self, hidden: Tensor, transform: LogitTransform) -> None:
        """Check that fused layers compute the model's logits.

        Args:
            hidden: Hidden states of all positions but the last from the fused layers, shape (2 * (T - 1), hidden_size).
            transform: The result of ``find_transform``.

        Raises:
            UserError: If they do not.
        """
        expected = self.logits[:, :-1].flatten(0, 1)
        differences = _differences(transform(self._project(hidden)), expected)
        # The two sum in different order. In 16 bits a few positions may differ by their whole size, but the median
        # agrees.
        if not differences.median() <= (1e-3 if self._is_float32 else 0.1):
            raise UserError(
                f"{self._source}: fused layers do not compute the logits of {self._name}. Set model.fused_layers=never."
            )

    @property
    def _name(self) -> str:
        return type(self._base).__name__

    def _matching_transform(self, hidden: Tensor) -> LogitTransform | None:
        logits = self._project(hidden)
        errors = {
            transform: float(_differences(transform(logits), self.logits).median())
            for transform in candidate_transforms(self._base.config)
        }
        best = min(errors, key=lambda transform: errors[transform])
        return best if errors[best] <= (1e-4 if self._is_float32 else 5e-3) else None

    def _record(self, head: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        self._head_inputs.append(args[0])
        return output.float() if type(head) is not nn.Linear else self._project(args[0])

    def _project(self, hidden: Tensor) -> Tensor:
        """Apply the output head in float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            if type(self._head) is not nn.Linear:
                logits: Tensor = self._head(hidden).float()
                return logits
            bias = None if self._head.bias is None else self._head.bias[:_MAX_VOCABULARY].float()
            return F.linear(hidden.float(), self._head.weight[:_MAX_VOCABULARY].float(), bias)


def probe_model(
    model: PeftModel,
    hidden_states: Callable[[Tensor], Tensor],
    fused_states: Callable[[Tensor], Tensor] | None,
    source: str,
) -> LogitTransform:
    """Check that training can compute a model's logits, and return their transform.

    Args:
        model: The PEFT model; its mode is restored.
        hidden_states: Computes last hidden states, shape (B, T, hidden_size), from token ids, shape (B, T).
        fused_states: Computes those of all positions but the last, shape (B * (T - 1), hidden_size), with fused layers;
            None if training uses the model's own layers.
        source: The key and value that the model was loaded from, for messages.

    Raises:
        UserError: If it cannot.
    """
    was_training = model.training
    model.eval()
    try:
        probe = Probe(model, source)
        transform = probe.find_transform(hidden_states(probe.input_ids))
        if fused_states is not None:
            probe.check_fused(fused_states(probe.input_ids), transform)
    finally:
        model.train(was_training)
    return transform


def _differences(actual: Tensor, expected: Tensor) -> Tensor:
    """Return the relative difference at each position."""
    differences: Tensor = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
    return differences
