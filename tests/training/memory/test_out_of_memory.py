from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from snake_lora_pl.errors import UserError
from snake_lora_pl.training.memory import out_of_memory
from snake_lora_pl.training.memory.estimate import blank_batch, estimate_memory, twin_of
from snake_lora_pl.training.memory.out_of_memory import explained, is_out_of_memory
from tests.training.conftest import make_trainer

OUT_OF_MEMORY = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
LENGTH = 128


class Rows:
    """A data module as far as the message needs one."""

    num_train_rows = 100

    def __init__(self, batch_size: Any = 64) -> None:
        self.batch_size = batch_size

    def longest_batch(self, num_rows: int) -> dict[str, Any]:
        return blank_batch(num_rows, LENGTH, 50)


@pytest.fixture(autouse=True)
def model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out of the estimate what holds beside a model: the one here is small beside an interpreter."""
    monkeypatch.setattr("snake_lora_pl.training.memory.estimate._CPU_PROCESS_BYTES", 0)
    monkeypatch.setattr("snake_lora_pl.training.memory.estimate._CPU_KERNEL_BYTES", 0)


@pytest.fixture
def message_of(make_module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The message on a machine of so many bytes, which are made up and not enforced."""

    def fail(num_bytes: int, data: Rows, **settings: Any) -> str:
        monkeypatch.setattr(out_of_memory, "available_bytes", lambda device: num_bytes)
        monkeypatch.setattr(out_of_memory, "used_bytes", lambda device: 0)
        monkeypatch.setattr(out_of_memory, "refused_beyond", lambda limit: contextlib.nullcontext())
        trainer = make_trainer(tmp_path, accumulate_grad_batches=2)
        with pytest.raises(UserError) as caught, explained(trainer, make_module(**settings), data):
            raise OUT_OF_MEMORY
        return str(caught.value)

    return fail


def test_errors_of_every_allocator_are_known() -> None:
    assert is_out_of_memory(OUT_OF_MEMORY)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert is_out_of_memory(RuntimeError("[enforce fail] data. DefaultCPUAllocator: not enough memory: you tried"))
    assert is_out_of_memory(RuntimeError("can't start new thread"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("not enough memory of what was read"))


def test_other_errors_pass_as_they_are(make_module, tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="^shapes do not match$"),
        explained(make_trainer(tmp_path), make_module(), Rows()),
    ):
        raise RuntimeError("shapes do not match")


def test_the_message_says_what_was_asked_and_what_there_was(make_module, message_of) -> None:
    asked = estimate_memory(make_module(), blank_batch(64, LENGTH, 50)).total
    message = message_of(int(0.7 * asked), Rows())
    assert f"a step on 64 rows of {LENGTH} tokens asks for about {asked / 2**30:.1f} GiB" in message
    assert f"{0.7 * asked / 2**30:.1f} GiB were there" in message
    assert "can't allocate memory" in message


@pytest.mark.parametrize("share", [0.95, 0.88])
def test_each_of_three_settings_fits(make_module, message_of, share: float) -> None:
    module = make_module()
    num_bytes = int(share * estimate_memory(module, blank_batch(64, LENGTH, 50)).total)
    message = message_of(num_bytes, Rows())
    suggestions = message.partition("Any of these fits: ")[2].rstrip(".").split("; or ")
    assert len(set(suggestions)) == 3
    for suggestion in suggestions:
        flags = dict(re.findall(r"--(\S+)=(\S+)", suggestion))
        rows = int(flags.get("data.batch_size", 64))
        length = int(flags.get("data.max_length", LENGTH))
        # As many rows in an optimizer step as before.
        assert rows * int(flags.get("trainer.accumulate_grad_batches", 2)) == 128
        changes: dict[str, Any] = {"gradient_checkpointing": "model.gradient_checkpointing" in flags}
        if "model.adapter_type" in flags:
            changes["adapter_type"] = flags["model.adapter_type"]
        batch = blank_batch(rows, length, 50)
        assert estimate_memory(twin_of(module, **changes), batch).total < num_bytes


def test_the_first_setting_changes_nothing_but_the_size_of_the_parts(make_module, message_of) -> None:
    asked = estimate_memory(make_module(), blank_batch(64, LENGTH, 50)).total
    assert "fits: --data.batch_size=32 --trainer.accumulate_grad_batches=4;" in message_of(int(0.95 * asked), Rows())


def test_settings_that_failed_are_not_suggested_where_the_estimate_is_too_low(make_module, message_of) -> None:
    message = message_of(10**15, Rows())
    assert "--data.batch_size=" in message.partition("fits: ")[2].partition("; or")[0]


def test_a_machine_too_small_for_the_model_says_so(message_of) -> None:
    assert "No setting of this base model fits: choose a smaller model.base_model." in message_of(2**15, Rows())


def test_without_rows_there_is_still_a_way_on(message_of) -> None:
    assert "Choose a smaller model.base_model, or set model.adapter_type=qlora." in message_of(2**20, Rows("auto"))


@pytest.mark.skipif(sys.platform != "linux", reason="only there is memory refused")
def test_a_run_that_takes_more_than_there_is_ends_with_the_message(
    make_module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(out_of_memory, "available_bytes", lambda device: 50 * 2**20)
    trainer, module = make_trainer(tmp_path), make_module()
    loader = DataLoader([blank_batch(4096, LENGTH, 50)], batch_size=None)
    with pytest.raises(UserError, match=r"^out of memory: .* GiB were there \(.*memory.*\)"):
        with explained(trainer, module, Rows("auto")):
            trainer.fit(module, loader)
    # The system gives memory again.
    torch.ones(100 * 2**18)
