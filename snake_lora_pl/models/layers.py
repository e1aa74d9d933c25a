"""The repeated layers of a base model."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def repeated_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The transformer layers of a model, in order, as its ``_no_split_modules`` names their classes.

    Args:
        model: A loaded base model.

    Returns:
        The layers; empty where the model does not say what they are.
    """
    names = set(model._no_split_modules or ())
    return [part for part in model.modules() if type(part).__name__ in names]
