"""Changes of the logits after the output head: a scale, and a soft cap ``cap * tanh(logits / cap)``.

Training computes logits from hidden states, so it has to repeat what an architecture does after its output head. The
config names the values, but not how they are used: Granite divides by ``logits_scaling``, HyperCLOVA X multiplies by
it, and MPT ignores ``logit_scale``. Therefore the config only gives candidates, and ``checks`` chooses the one that
gives the model's own logits.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

_SCALE_KEYS = ("logits_scaling", "logit_scale", "lm_head_multiplier", "output_multiplier")
_CAP_KEYS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


class LogitTransform(NamedTuple):
    """Elementwise change of logits.

    Attributes:
        scale: Factor, applied first.
        cap: Bound of the absolute value, approached by a hyperbolic tangent; None for no bound.
    """

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the transformed logits."""
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def multiply_by_derivative(self, gradient: Tensor, transformed: Tensor) -> None:
        """Turn the gradient of the transformed logits into that of the logits, in place."""
        if self.cap is not None:
            gradient.mul_(1 - (transformed / self.cap).square_())
        if self.scale != 1:
            gradient.mul_(self.scale)


IDENTITY = LogitTransform()


def candidate_transforms(config: Any) -> list[LogitTransform]:
    """Return the transforms that the values in a config allow, those that use the most values first.

    Args:
        config: Config of a model; of a multimodal model, its text decoder's part is used.
    """
    values = _numbers(config.get_text_config(), _SCALE_KEYS)
    scales = [*values, *(1 / value for value in values), 1.0]
    caps = [*_numbers(config.get_text_config(), _CAP_KEYS), None]
    return [LogitTransform(scale, cap) for scale, cap in itertools.product(scales, caps)]


def _numbers(config: Any, keys: tuple[str, ...]) -> list[float]:
    values = [getattr(config, key, None) for key in keys]
    return [float(value) for value in values if isinstance(value, (int, float)) and value > 0]
