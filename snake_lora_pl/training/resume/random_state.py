"""The state of every generator that training may draw from, as plain values that a checkpoint can hold."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from snake_lora_pl.collectives import gather_objects

if TYPE_CHECKING:
    import lightning.pytorch as pl


def random_states(trainer: pl.Trainer) -> list[dict[str, Any]]:
    """The state of each process, in the order of their ranks; every process has to ask."""
    return gather_objects(trainer, _collect(trainer.strategy.root_device))


def restore_random_state(trainer: pl.Trainer, states: list[dict[str, Any]]) -> bool:
    """Put this process's generators where they stood.

    Returns:
        Whether there was a state for this process: a run may go on with more processes than it began with.
    """
    if trainer.global_rank >= len(states):
        return False
    _restore(states[trainer.global_rank], trainer.strategy.root_device)
    return True


# Checkpoints are read without pickles, which leaves tensors, numbers, strings and containers: no NumPy array.


def _collect(device: torch.device) -> dict[str, Any]:
    name, keys, position, has_gauss, gauss = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    state = {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state(device)
    return state


def _restore(state: dict[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type], device)
