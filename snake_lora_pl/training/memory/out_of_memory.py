"""Out of memory, said so that it can be mended: what was asked, what there was, and settings that fit."""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.memory import is_oom_error

from snake_lora_pl.errors import UserError
from snake_lora_pl.training.memory.available import available_bytes, refused_beyond, used_bytes
from snake_lora_pl.training.memory.estimate import estimate_memory, twin_of

logger = logging.getLogger(__name__)

_GIB = 2**30
# A thread's stack is memory too.
_REFUSALS = ("not enough memory", "can't start new thread")
_NUM_SUGGESTIONS = 3
# What an estimate may be too low by, and what other programs come to need.
_USABLE_SHARE = 0.9


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory, of whichever device, could not be had."""
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or is_oom_error(error)
        or (isinstance(error, RuntimeError) and any(words in str(error) for words in _REFUSALS))
    )


@contextlib.contextmanager
def explained(trainer: pl.Trainer, module: Any, data: Any) -> Iterator[None]:
    """Turn running out of memory while training into a message with three settings that fit.

    On a CPU memory is refused beyond what there is when this begins, where the system would otherwise end the process
    without a word.

    Args:
        trainer: What trains; on its device there was too little.
        module: What is trained.
        data: The data module; its ``longest_batch`` is what was asked for.

    Raises:
        UserError: In place of the device's own error.
    """
    device = trainer.strategy.root_device
    left = available_bytes(device)
    there = used_bytes(device) + left
    on_cpu = device.type == "cpu"
    try:
        with refused_beyond(left // trainer.num_devices) if on_cpu else contextlib.nullcontext():
            yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        # The frames hold the tensors that there was no room for.
        traceback.clear_frames(error.__traceback__)
        cause = " ".join(str(error).split())[:160] or type(error).__name__
    else:
        return
    module.zero_grad(set_to_none=True)
    raise UserError(_describe(trainer, module, data, there, cause))


def _describe(trainer: pl.Trainer, module: Any, data: Any, there: int, cause: str) -> str:
    message = f"out of memory: {there / _GIB:.1f} GiB were there ({cause})."
    if not isinstance(data.batch_size, int) or not data.num_train_rows:
        return f"{message} Choose a smaller model.base_model, or set model.adapter_type=qlora."
    search = _Search(trainer, module, data, there)
    asked, batch = search.asked, search.batch
    rows, tokens = batch["input_ids"].shape
    message = (
        f"out of memory: a step on {rows} rows of {tokens} tokens asks for about {asked / _GIB:.1f} GiB and "
        f"{there / _GIB:.1f} GiB were there ({cause})."
    )
    fitting = search.settings_that_fit()
    if not fitting:
        return f"{message} No setting of this base model fits: choose a smaller model.base_model."
    return f"{message} {'This fits' if len(fitting) == 1 else 'Any of these fits'}: {'; or '.join(fitting)}."


@dataclass
class _Search:
    """Looks for settings whose estimated peak is below what there was."""

    trainer: pl.Trainer
    module: Any
    data: Any
    there: int
    batch: dict[str, Any] = field(init=False)
    asked: int = field(init=False)
    usable: float = field(init=False)

    def __post_init__(self) -> None:
        self.batch = self.data.longest_batch(self.data.batch_size)
        self.asked = self._peak({}, *self.batch["input_ids"].shape)
        # What was asked did not fit, whatever its estimate says.
        self.usable = _USABLE_SHARE * min(self.there, self.asked)

    def settings_that_fit(self) -> list[str]:
        """Flags of up to three changes, those that change the training least first."""
        num_tokens = self.batch["input_ids"].shape[1]
        checkpointing = {"gradient_checkpointing": True}
        quantized = {"adapter_type": "qlora", "gradient_checkpointing": True}
        changes: list[tuple[dict[str, Any], int]] = [({}, num_tokens)]
        if not self.module.gradient_checkpointing:
            changes.append((checkpointing, num_tokens))
        changes.append(({}, num_tokens // 2))
        changes.append((checkpointing, num_tokens // 2))
        if self.module.adapter_type == "lora" and self.module.adapter_path is None:
            changes.append((quantized, num_tokens))
        found: list[str] = []
        for change, length in changes:
            flags = self._flags(change, length)
            if flags is not None and flags not in found:
                found.append(flags)
            if len(found) == _NUM_SUGGESTIONS:
                break
        return found

    def _flags(self, change: dict[str, Any], num_tokens: int) -> str | None:
        """What to set so that a step with these changes fits, with as many rows as possible; None if none does."""
        num_rows = self._most_rows(change, num_tokens)
        if num_rows is None:
            return None
        asked_rows, asked_tokens = self.batch["input_ids"].shape
        flags = [f"--model.{name}={str(value).lower()}" for name, value in change.items()]
        if num_tokens < asked_tokens:
            flags.append(f"--data.max_length={num_tokens}")
        if num_rows < asked_rows:
            times = asked_rows // num_rows * self.trainer.accumulate_grad_batches
            flags += [f"--data.batch_size={num_rows}", f"--trainer.accumulate_grad_batches={times}"]
        return " ".join(flags) or None

    def _most_rows(self, change: dict[str, Any], num_tokens: int) -> int | None:
        """The largest part of the rows asked for, into which they divide evenly, that fits."""
        asked_rows = self.batch["input_ids"].shape[0]
        parts = [rows for rows in range(asked_rows, 0, -1) if asked_rows % rows == 0]
        whole, one = self._peak(change, asked_rows, num_tokens), self._peak(change, 1, num_tokens)
        if whole <= self.usable:
            return asked_rows
        # Memory grows in proportion to the rows.
        row_bytes = (whole - one) / max(1, asked_rows - 1)
        for rows in parts[1:]:
            if one + (rows - 1) * row_bytes <= self.usable and self._peak(change, rows, num_tokens) <= self.usable:
                return rows
        return None

    def _peak(self, change: dict[str, Any], num_rows: int, num_tokens: int) -> int:
        # The end of a row holds its targets.
        part = {name: self.batch[name][:num_rows, -num_tokens:] for name in ("input_ids", "labels")}
        batch = {**part, "sources": self.batch["sources"][:num_rows]}
        return estimate_memory(twin_of(self.module, **change), batch, self.trainer.strategy.root_device.type).total
