"""Names of transformers that are private or differ between the supported versions.

``tests/decoding/test_transformers_internals.py`` fails when one of them is no longer needed.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def attention_implementation(model: PreTrainedModel) -> str:
    """Return the name of the attention function in use; only its setter is public.

    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/configuration_utils.py
    """
    return str(model.config._attn_implementation)


def can_set_attention_implementation(model: PreTrainedModel) -> bool:
    """Return whether an architecture uses ``AttentionInterface``; the setter ignores a name for others.

    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/modeling_utils.py
    """
    return bool(model._can_set_attn_implementation())


def cache_argument_name(model: PreTrainedModel) -> str:
    """Return the name of the cache argument of ``forward``, which transformers 5.24 renamed to ``cache``.

    https://github.com/huggingface/transformers/blob/v5.24.0/src/transformers/models/llama/modeling_llama.py
    """
    # A subclass may override ``forward`` without naming the argument.
    for model_class in type(model).__mro__:
        forward = vars(model_class).get("forward")
        names = inspect.signature(forward).parameters if forward is not None else {}
        for name in ("cache", "past_key_values"):
            if name in names:
                return name
    return "cache"
