"""Out-of-memory errors during training: detection, and a message with settings that need less memory."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.memory import is_oom_error

from snake_lora_pl.errors import UserError
from snake_lora_pl.training.memory.available import available_bytes, limit_memory, used_bytes

_GIB = 2**30
# Messages that Lightning does not recognize. Starting a thread fails if there is no memory for its stack.
_MESSAGES = ("not enough memory", "can't start new thread")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception reports that memory could not be allocated, on any device."""
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or is_oom_error(error)
        or (isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES))
    )


@contextlib.contextmanager
def explain_out_of_memory(trainer: pl.Trainer, module: Any, data: Any) -> Iterator[None]:
    """Turn an out-of-memory error during training into a message with settings that need less memory.

    On a CPU, allocations beyond the available memory fail while this context is active. Otherwise Linux would grant
    them and later kill the process without a message.

    Args:
        trainer: The trainer; determines the device.
        module: The module that is trained.
        data: The data module.

    Raises:
        UserError: In place of the original error.
    """
    device = trainer.strategy.root_device
    available = available_bytes(device)
    total = used_bytes(device) + available
    is_cpu = device.type == "cpu"
    try:
        with limit_memory(available // trainer.num_devices) if is_cpu else contextlib.nullcontext():
            yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        # The frames hold references to the tensors of the failed step.
        traceback.clear_frames(error.__traceback__)
        cause = " ".join(str(error).split())[:160] or type(error).__name__
    else:
        return
    module.zero_grad(set_to_none=True)
    suggestions = "; ".join(_suggest(trainer, module, data.batch_size))
    raise UserError(f"out of memory: {total / _GIB:.1f} GiB were available ({cause}). To need less, {suggestions}.")


def _suggest(trainer: pl.Trainer, module: Any, batch_size: int | str) -> Iterator[str]:
    """Yield settings that need less memory, starting with those that change the training least."""
    if isinstance(batch_size, int) and batch_size > 1:
        smaller = batch_size // 2
        accumulate = trainer.accumulate_grad_batches * batch_size // smaller
        yield f"set --data.batch_size={smaller} --trainer.accumulate_grad_batches={accumulate}"
    if not module.gradient_checkpointing:
        yield "set --model.gradient_checkpointing=true"
    if module.trains_in_int8:  # the copies come in addition to the weights
        yield "set --model.base_compute=float"
    if module.adapter_type == "lora" and module.adapter_path is None:
        yield "set --model.adapter_type=qlora"
    yield "reduce data.max_length, or choose a smaller model.base_model"
