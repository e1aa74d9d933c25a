"""Private names of transformers, bitsandbytes and torch.

No other module of this package uses such a name. Each function links the upstream source and has a test that fails when
the name is gone or no longer needed.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def repeated_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the transformer layers of a base model in order; empty if the architecture does not declare them.

    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/modeling_utils.py (``_no_split_modules``)
    """
    class_names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in class_names]


def commit_hash(model: PreTrainedModel) -> str | None:
    """Return the commit of the hub model that a base model was loaded from; None for any other model.

    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/configuration_utils.py (``_commit_hash``)
    """
    commit: str | None = getattr(model.config, "_commit_hash", None)
    return commit


def set_commit_hash(model: PreTrainedModel, commit: str | None) -> None:
    """Record the commit that a base model was loaded from.

    transformers does not know it for a snapshot that is loaded from a local directory.
    """
    model.config._commit_hash = commit


def enable_activation_checkpointing(model: PreTrainedModel) -> None:
    """Recompute activations in the backward pass; transformers 5.23 renamed the method.

    https://github.com/huggingface/transformers/blob/v5.24.0/src/transformers/modeling_utils.py
    """
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def was_conv1d(layer: nn.Module) -> bool:
    """Return whether a quantized layer replaces a ``Conv1D``, GPT-2's linear layer with a transposed weight.

    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/integrations/bitsandbytes.py
    (``source_cls``)
    """
    from transformers.pytorch_utils import Conv1D

    return getattr(layer, "source_cls", None) is Conv1D


def has_x86_bfloat16_instructions() -> bool:
    """Return whether an x86 CPU has bfloat16 instructions (AVX512-BF16 or AMX).

    torch's ``_is_mkldnn_bf16_supported`` cannot be used here: on x86 it is true for every AVX-512 CPU, most of which
    emulate bfloat16.
    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/cpu/__init__.py
    """
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def has_onednn_bfloat16() -> bool:
    """Return whether oneDNN computes bfloat16 on this CPU; meaningful on architectures other than x86.

    https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/mkldnn/Utils.cpp
    """
    import torch

    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def silence_8bit_cast_warnings() -> None:
    """Silence the message that bitsandbytes logs on each call of each 8-bit layer: that it casts the input.

    https://github.com/bitsandbytes-foundation/bitsandbytes/blob/0.50.2/bitsandbytes/autograd/_functions.py
    """
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
