"""The dtype of base weights, chosen by what the hardware computes fast."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

from snake_lora_pl.errors import UserError
from snake_lora_pl.models.transformers_internals import has_onednn_bfloat16, has_x86_bfloat16_instructions

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "bfloat16", "float32", "float16")


def choose_dtype(dtype: str = "auto", device_type: str | None = None) -> torch.dtype:
    """Return the torch dtype of base weights.

    Args:
        dtype: One of ``DTYPES``. ``auto`` is bfloat16 if the device computes it fast, else float32.
        device_type: Device that computes, e.g. ``cpu``; None means ``cuda`` if available, else ``cpu``.

    Raises:
        UserError: If ``dtype`` is not one of ``DTYPES``.
    """
    import torch

    if dtype not in DTYPES:
        raise UserError(f"unknown dtype '{dtype}'. Choose one of: {', '.join(DTYPES)}.")
    if dtype != "auto":
        named: torch.dtype = getattr(torch, dtype)
        return named
    if device_type is None:
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.bfloat16 if _has_fast_bfloat16(device_type) else torch.float32


def _has_fast_bfloat16(device_type: str) -> bool:
    import torch

    if device_type == "cuda":
        # Compute capability 8.0 or ROCm. Older GPUs emulate bfloat16, slower than they compute float32.
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    onednn: Any = torch.backends.mkldnn
    if device_type != "cpu" or not onednn.is_available():
        return False
    if platform.machine().lower() in ("x86_64", "amd64"):
        return has_x86_bfloat16_instructions()
    return has_onednn_bfloat16()
