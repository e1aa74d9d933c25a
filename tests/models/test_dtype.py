from __future__ import annotations

import platform

import pytest
import torch

from snake_lora_pl.errors import UserError
from snake_lora_pl.models import choose_dtype


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch):
    """Return a function that simulates a CPU with the given features."""

    def simulate(machine: str, *, avx512_bf16: bool = False, amx: bool = False, onednn: bool = True) -> None:
        monkeypatch.setattr(platform, "machine", lambda: machine)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    return simulate


@pytest.mark.parametrize("machine", ["x86_64", "AMD64"])
def test_auto_is_bfloat16_on_x86_only_with_bfloat16_instructions(cpu, machine: str) -> None:
    cpu(machine, avx512_bf16=True)
    assert choose_dtype() == torch.bfloat16
    cpu(machine, amx=True)
    assert choose_dtype("auto", "cpu") == torch.bfloat16
    cpu(machine)
    assert choose_dtype() == torch.float32


def test_auto_depends_on_onednn_on_arm(cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu("aarch64")
    for supported, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(
            torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda supported=supported: supported, raising=False
        )
        assert choose_dtype() == expected


def test_auto_is_float32_without_onednn_and_on_unknown_devices(cpu) -> None:
    cpu("x86_64", avx512_bf16=True, onednn=False)
    assert choose_dtype() == torch.float32
    assert choose_dtype("auto", "mps") == torch.float32


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_prefers_cuda_and_ignores_emulated_bfloat16(
    cpu,
    monkeypatch: pytest.MonkeyPatch,
    native: bool,
    expected: torch.dtype,
) -> None:
    cpu("x86_64", avx512_bf16=not native)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)

    assert choose_dtype() == expected


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_named_dtype_is_returned(cpu, name: str) -> None:
    cpu("x86_64")
    assert choose_dtype(name) == getattr(torch, name)


def test_unknown_dtype_is_reported_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="'bf16'.*auto, bfloat16, float32, float16"):
        choose_dtype("bf16")
