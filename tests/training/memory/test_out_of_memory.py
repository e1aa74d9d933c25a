from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from snake_lora_pl.errors import UserError
from snake_lora_pl.training.memory import out_of_memory
from snake_lora_pl.training.memory.estimate import blank_batch
from snake_lora_pl.training.memory.out_of_memory import explain_out_of_memory, is_out_of_memory
from tests.training.conftest import make_trainer

OUT_OF_MEMORY = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")


@pytest.fixture
def message_of(make_module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return the message on a fake machine of a given size."""

    def fail(num_bytes: int, batch_size: Any = 64, **settings: Any) -> str:
        monkeypatch.setattr(out_of_memory, "available_bytes", lambda device: num_bytes)
        monkeypatch.setattr(out_of_memory, "used_bytes", lambda device: 0)
        monkeypatch.setattr(out_of_memory, "limit_memory", lambda limit: contextlib.nullcontext())
        trainer = make_trainer(tmp_path, accumulate_grad_batches=2)
        data = SimpleNamespace(batch_size=batch_size)
        with pytest.raises(UserError) as caught, explain_out_of_memory(trainer, make_module(**settings), data):
            raise OUT_OF_MEMORY
        return str(caught.value)

    return fail


def test_errors_of_every_allocator_are_recognized() -> None:
    assert is_out_of_memory(OUT_OF_MEMORY)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert is_out_of_memory(RuntimeError("[enforce fail] data. DefaultCPUAllocator: not enough memory: you tried"))
    assert is_out_of_memory(RuntimeError("can't start new thread"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("not enough memory of what was read"))


def test_other_errors_are_not_changed(make_module, tmp_path: Path) -> None:
    data = SimpleNamespace(batch_size=64)
    with (
        pytest.raises(RuntimeError, match="^shapes do not match$"),
        explain_out_of_memory(make_trainer(tmp_path), make_module(), data),
    ):
        raise RuntimeError("shapes do not match")


def test_message_suggests_float_if_copies_in_int8_take_memory(make_module, tmp_path: Path) -> None:
    module = make_module()
    for trains_in_int8 in (False, True):
        module._trains_in_int8 = trains_in_int8
        with (
            pytest.raises(UserError) as caught,
            explain_out_of_memory(make_trainer(tmp_path), module, SimpleNamespace(batch_size=8)),
        ):
            raise OUT_OF_MEMORY
        assert ("--model.base_compute=float" in str(caught.value)) == trains_in_int8


def test_message_has_available_memory_and_cause(message_of) -> None:
    message = message_of(7 * 2**30)
    assert "7.0 GiB" in message
    assert "can't allocate memory" in message


def test_suggested_batch_size_keeps_the_rows_per_optimizer_step(message_of) -> None:
    message = message_of(2**30)
    assert "--data.batch_size=32 --trainer.accumulate_grad_batches=4" in message
    assert "--model.gradient_checkpointing=true" in message
    assert "--model.adapter_type=qlora" in message


def test_settings_in_use_are_not_suggested(message_of) -> None:
    message = message_of(2**30, batch_size=1, gradient_checkpointing=True, adapter_type="qlora")
    assert not any(key in message for key in ("data.batch_size", "gradient_checkpointing", "adapter_type"))
    assert "model.base_model" in message


def test_automatic_batch_size_is_not_halved(message_of) -> None:
    assert "data.batch_size" not in message_of(2**30, batch_size="auto")


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux only")
def test_run_beyond_the_available_memory_ends_with_the_message(
    make_module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(out_of_memory, "available_bytes", lambda device: 50 * 2**20)
    trainer, module = make_trainer(tmp_path), make_module()
    loader = DataLoader([blank_batch(4096, 128, 50)], batch_size=None)
    with pytest.raises(UserError, match=r"^out of memory: .* GiB .*\(.*memory.*\)"):
        with explain_out_of_memory(trainer, module, SimpleNamespace(batch_size=4096)):
            trainer.fit(module, loader)
    # The limit is lifted.
    torch.ones(100 * 2**18)
