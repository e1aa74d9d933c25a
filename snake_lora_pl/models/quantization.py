"""Quantized base models in 4 or 8 bits, with bitsandbytes.

Weights are quantized while they load; the model directory keeps the full weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from snake_lora_pl.errors import UserError, one_line
from snake_lora_pl.models.transformers_internals import silence_8bit_cast_warnings

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import BitsAndBytesConfig, PreTrainedModel

_STORAGE_DTYPES = ("uint8", "bfloat16", "float16", "float32")


@dataclass
class QuantizationConfig:
    """Quantization of the frozen base's linear layers. They compute in ``model.dtype``.

    Args:
        bits: 4 (QLoRA, https://arxiv.org/abs/2305.14314) or 8 (LLM.int8(), https://arxiv.org/abs/2208.07339).
        quant_type: 4-bit data type: ``nf4`` (for normally distributed weights) or ``fp4``.
        double_quant: Quantize the 4-bit scales too, which saves 0.4 bits per weight.
        storage_dtype: Dtype that 4-bit values are packed into: ``uint8``, or the base's float dtype for FSDP, which
            shards tensors of one dtype together.

    Raises:
        UserError: If a value is out of range.
    """

    bits: int = 4
    quant_type: str = "nf4"
    double_quant: bool = True
    storage_dtype: str = "uint8"

    def __post_init__(self) -> None:
        """Check all values and report every problem at once."""
        problems = []
        if self.bits not in (4, 8):
            problems.append(f"bits must be 4 or 8, not {self.bits!r}")
        if self.quant_type not in ("nf4", "fp4"):
            problems.append(f"quant_type must be nf4 or fp4, not '{self.quant_type}'")
        if self.storage_dtype not in _STORAGE_DTYPES:
            problems.append(f"storage_dtype must be one of {', '.join(_STORAGE_DTYPES)}, not '{self.storage_dtype}'")
        if self.bits == 8 and (self.quant_type, self.double_quant, self.storage_dtype) != ("nf4", True, "uint8"):
            problems.append("quant_type, double_quant and storage_dtype apply to bits=4 only: remove them")
        if problems:
            raise UserError("model.lora.quantization: " + "; ".join(problems) + ".")


def bitsandbytes_config(quantization: QuantizationConfig, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return the configuration object of transformers.

    Raises:
        UserError: If bitsandbytes cannot be imported.
    """
    try:
        import bitsandbytes  # noqa: F401 - the error of transformers omits the cause
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"a {quantization.bits}-bit base requires bitsandbytes, which cannot be imported ({one_line(error, 160)}). "
            "Run `pip install 'bitsandbytes>=0.50,<0.51'`, or set model.adapter_type=lora."
        ) from error
    from transformers import BitsAndBytesConfig

    if quantization.bits == 8:
        # transformers ignores the compute dtype in 8 bits; `compute_dtype` below reads it.
        return BitsAndBytesConfig(load_in_8bit=True, bnb_4bit_compute_dtype=compute_dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.quant_type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_quant_storage=quantization.storage_dtype,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def quantization_of(model: PreTrainedModel) -> QuantizationConfig | None:
    """Return a base model's quantization; None if it is not quantized."""
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
    """Return the dtype that a base model computes in."""
    config: Any = getattr(model.config, "quantization_config", None)
    dtype: torch.dtype = model.get_output_embeddings().weight.dtype if config is None else config.bnb_4bit_compute_dtype
    return dtype


def make_trainable(model: PreTrainedModel) -> None:
    """Make a quantized model differentiable with respect to its input on every CPU.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks 4-bit weights in place in the first forward pass without
    gradients (https://github.com/bitsandbytes-foundation/bitsandbytes/pull/1804). After that the layer silently returns
    no gradient for its input, and its weights can be neither moved (#2078) nor dequantized. This disables repacking.
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    silence_8bit_cast_warnings()


def weight_bytes(model: nn.Module) -> int:
    """Return the memory of a model's weights in bytes, including quantization scales."""
    size = sum(_stored_bytes(parameter) for parameter in model.parameters())
    # The first forward pass of an 8-bit layer moves the scales from its weight to its state.
    scales: list[torch.Tensor | None] = [
        getattr(getattr(module, "state", None), "SCB", None) for module in model.modules()
    ]
    return size + sum(scale.numel() * scale.element_size() for scale in scales if scale is not None)


def full_weight_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Return the memory in bytes that a model's weights would take, unquantized, in one dtype."""
    elements = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        elements += parameter.numel() if state is None else state.shape.numel()
    return elements * dtype.itemsize


def _stored_bytes(parameter: torch.nn.Parameter) -> int:
    size = parameter.numel() * parameter.element_size()
    if (state := getattr(parameter, "quant_state", None)) is not None:  # 4 bits
        size += sum(t.numel() * t.element_size() for t in state.as_dict(packed=True).values())
    if (scales := getattr(parameter, "SCB", None)) is not None:  # 8 bits, before the first forward pass
        size += scales.numel() * scales.element_size()
    return size
