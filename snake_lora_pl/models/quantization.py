"""A base model in 4 or 8 bits through bitsandbytes: how it is loaded, how large it is, and how to train past it.

It is quantized while it loads; the directory that it is read from keeps its full weights.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from snake_lora_pl.errors import UserError, one_line

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import BitsAndBytesConfig, PreTrainedModel

_STORAGE_DTYPES = ("uint8", "bfloat16", "float16", "float32")


@dataclass
class QuantizationConfig:
    """How the frozen base's linear layers are stored; they compute in ``model.dtype``.

    Args:
        bits: 4 (QLoRA, https://arxiv.org/abs/2305.14314) or 8 (LLM.int8(), https://arxiv.org/abs/2208.07339).
        quant_type: Levels of the 4 bits: ``nf4``, spaced for normally distributed weights, or ``fp4``.
        double_quant: Whether the 4-bit scales are quantized too, which saves 0.4 bits a weight.
        storage_dtype: Type of the tensors that the 4-bit values are packed into: ``uint8``, or a float type, which
            FSDP needs: it shards tensors of one type together.

    Raises:
        UserError: If a value lies outside its range.
    """

    bits: int = 4
    quant_type: str = "nf4"
    double_quant: bool = True
    storage_dtype: str = "uint8"

    def __post_init__(self) -> None:
        """Check every value and report all that are wrong at once."""
        problems = []
        if self.bits not in (4, 8):
            problems.append(f"bits must be 4 or 8, not {self.bits!r}")
        if self.quant_type not in ("nf4", "fp4"):
            problems.append(f"quant_type must be nf4 or fp4, not '{self.quant_type}'")
        if self.storage_dtype not in _STORAGE_DTYPES:
            problems.append(f"storage_dtype must be one of {', '.join(_STORAGE_DTYPES)}, not '{self.storage_dtype}'")
        if self.bits == 8 and (self.quant_type, self.double_quant, self.storage_dtype) != ("nf4", True, "uint8"):
            problems.append("quant_type, double_quant and storage_dtype are settings of bits=4: leave them out")
        if problems:
            raise UserError("model.lora.quantization: " + "; ".join(problems) + ".")


def bitsandbytes_config(quantization: QuantizationConfig, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """The settings as transformers takes them.

    Raises:
        UserError: If bitsandbytes is not installed or does not work on this machine.
    """
    try:
        import bitsandbytes  # noqa: F401 - transformers would say less of why it fails
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"a base in {quantization.bits} bits needs bitsandbytes, which cannot be imported here "
            f"({one_line(error, 160)}). pip install 'bitsandbytes>=0.50,<0.51', or choose "
            "model.adapter_type=lora."
        ) from error
    from transformers import BitsAndBytesConfig

    if quantization.bits == 8:
        # The compute type has no meaning to transformers here; it stands in the config for `compute_dtype` below.
        return BitsAndBytesConfig(load_in_8bit=True, bnb_4bit_compute_dtype=compute_dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.quant_type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_quant_storage=quantization.storage_dtype,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def quantization_of(model: PreTrainedModel) -> QuantizationConfig | None:
    """How a base model is quantized; None for one that is not."""
    config: Any = getattr(model.config, "quantization_config", None)
    if config is None:
        return None
    if config.load_in_8bit:
        return QuantizationConfig(bits=8)
    return QuantizationConfig(
        bits=4,
        quant_type=config.bnb_4bit_quant_type,
        double_quant=config.bnb_4bit_use_double_quant,
        storage_dtype=str(config.bnb_4bit_quant_storage).removeprefix("torch."),
    )


def compute_dtype(model: PreTrainedModel) -> torch.dtype:
    """The type that a base model computes in: that of its weights, or the one set beside its quantization."""
    config: Any = getattr(model.config, "quantization_config", None)
    dtype: torch.dtype = model.get_output_embeddings().weight.dtype if config is None else config.bnb_4bit_compute_dtype
    return dtype


def make_trainable(model: PreTrainedModel) -> None:
    """Let gradients pass a quantized model on every kind of processor.

    On a CPU with AVX512-BF16 bitsandbytes 0.50 packs 4-bit weights anew, in place, in the first forward pass without
    gradients (bitsandbytes-foundation/bitsandbytes#1804). From then on the layer has no gradient with respect to its
    input, without an exception, and its weights can be neither moved (#2078) nor dequantized.
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    # It says at every call of every 8-bit layer that the input is cast.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def weight_bytes(model: nn.Module) -> int:
    """Memory of a model's weights in bytes, what quantization keeps beside them included."""
    return sum(_stored_bytes(parameter) for parameter in model.parameters())


def full_weight_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Memory that a model's weights would take in bytes if all were of one float type."""
    elements = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        elements += parameter.numel() if state is None else state.shape.numel()
    return elements * dtype.itemsize


def _stored_bytes(parameter: torch.nn.Parameter) -> int:
    size = parameter.numel() * parameter.element_size()
    if (state := getattr(parameter, "quant_state", None)) is not None:  # 4 bits
        size += sum(t.numel() * t.element_size() for t in state.as_dict(packed=True).values())
    if (scales := getattr(parameter, "SCB", None)) is not None:  # 8 bits
        size += scales.numel() * scales.element_size()
    return size
