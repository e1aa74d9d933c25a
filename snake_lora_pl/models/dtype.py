"""The number format that base weights are loaded in, by what the hardware computes fast."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

from snake_lora_pl.errors import UserError

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "bfloat16", "float32", "float16")


def choose_dtype(dtype: str = "auto", device_type: str | None = None) -> torch.dtype:
    """The torch dtype for base weights.

    Args:
        dtype: One of ``DTYPES``. ``auto`` is bfloat16 where the device computes it fast, else float32.
        device_type: Device that will compute, e.g. ``cpu``. By default ``cuda`` where there is one, else ``cpu``.

    Raises:
        UserError: If ``dtype`` is none of ``DTYPES``.
    """
    import torch

    if dtype not in DTYPES:
        raise UserError(f"unknown dtype '{dtype}'. Choose one of: {', '.join(DTYPES)}.")
    if dtype != "auto":
        chosen = getattr(torch, dtype)
        assert isinstance(chosen, torch.dtype)
        return chosen
    if device_type is None:
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.bfloat16 if _computes_bfloat16_fast(device_type) else torch.float32


def _computes_bfloat16_fast(device_type: str) -> bool:
    import torch

    if device_type == "cuda":
        # Compute capability 8.0 and up, or ROCm; older cards emulate it and are slower than in float32.
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if platform.machine().lower() in ("x86_64", "amd64"):
        # Not `_is_mkldnn_bf16_supported`: on x86 that is true of any AVX-512 processor, most of which emulate bfloat16.
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
