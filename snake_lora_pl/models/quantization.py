"""Quantized base models in 4 or 8 bits, with bitsandbytes.

Weights are quantized while they load; the model directory keeps the full weights.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snake_lora_pl.errors import UserError, one_line
from snake_lora_pl.models.transformers_internals import silence_8bit_cast_warnings, was_conv1d
from snake_lora_pl.untrusted import read_json_object

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import BitsAndBytesConfig, PreTrainedModel

_METHODS = ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit")
_STORAGE_DTYPES = ("uint8", "bfloat16", "float16", "float32")
# RWKV scales its weights in place, and Mamba multiplies by those of `dt_proj` without calling the layer.
_UNSUPPORTED_TYPES = ("mamba", "rwkv")


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
    """Return a base model's quantization; None if it is not quantized.

    Raises:
        UserError: If it is quantized by another library than bitsandbytes.
    """
    config: Any = getattr(model.config, "quantization_config", None)
    return None if config is None else _from_settings(config if isinstance(config, dict) else config.to_dict())


def stored_quantization(model_dir: Path) -> QuantizationConfig | None:
    """Return the quantization of the weights in a model directory; None if bitsandbytes did not quantize them."""
    settings = read_json_object(model_dir / "config.json").get("quantization_config")
    if not isinstance(settings, dict) or settings.get("quant_method") not in _METHODS:
        return None
    return _from_settings(settings)


def check_quantizable(model_type: str) -> None:
    """Check that an architecture works with quantized weights.

    Raises:
        UserError: If it does not.
    """
    if model_type in _UNSUPPORTED_TYPES:
        raise UserError(f"model.base_model: {model_type} cannot be quantized. Set model.adapter_type=lora.")


def check_stored_quantization(stored: QuantizationConfig, requested: QuantizationConfig) -> None:
    """Check that a request does not contradict the quantization of stored weights; they cannot be quantized again.

    A setting at its default value is not a request, except for ``bits``.

    Raises:
        UserError: If it does.
    """
    default = QuantizationConfig()
    for field in fields(QuantizationConfig):
        value, wanted = getattr(stored, field.name), getattr(requested, field.name)
        if wanted != value and (field.name == "bits" or wanted != getattr(default, field.name)):
            raise UserError(
                f"model.lora.quantization.{field.name}={wanted}: the weights of the base model are stored quantized, "
                f"with {field.name}={value}. Set model.lora.quantization.{field.name}={value}."
            )


def _from_settings(settings: dict[str, Any]) -> QuantizationConfig:
    method = settings.get("quant_method", "bitsandbytes")
    method = str(getattr(method, "value", method))  # an enum in memory, a string in a file
    if method not in _METHODS:
        raise UserError(
            f"model.base_model: its weights are quantized with {method}, which is not supported. Choose the "
            "unquantized model, and model.adapter_type=qlora to quantize it while it loads."
        )
    if settings.get("load_in_8bit"):
        return QuantizationConfig(bits=8)
    return QuantizationConfig(
        bits=4,
        quant_type=settings["bnb_4bit_quant_type"],
        double_quant=settings["bnb_4bit_use_double_quant"],
        storage_dtype=str(settings["bnb_4bit_quant_storage"]).removeprefix("torch."),
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


def set_compute_dtype(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Set the dtype that a quantized model computes in; weights that are stored quantized come with another."""
    import bitsandbytes as bnb

    model.config.quantization_config.bnb_4bit_compute_dtype = dtype
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = dtype, True


def dequantize(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Replace the quantized layers of a model by plain ones with the dequantized weights, in place.

    transformers returns ``nn.Linear`` for the transposed layers of GPT-2 too, whose weights no other program could
    load.
    """
    import torch
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    transposed = [name for name, module in model.named_modules() if was_conv1d(module)]
    # dequantize() casts quantized layers only, but all layers must have the same dtype.
    model = model.dequantize(dtype=dtype).to(dtype)
    for name in transposed:
        linear = model.get_submodule(name)
        with torch.device("meta"):
            layer = Conv1D(linear.out_features, linear.in_features)
        layer.weight = nn.Parameter(linear.weight.detach().T.contiguous(), requires_grad=False)
        layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        model.set_submodule(name, layer)
    return model


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
