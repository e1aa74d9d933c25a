"""State of all random number generators that training uses, as plain values that fit into a checkpoint."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from snake_lora_pl.collectives import gather_objects

if TYPE_CHECKING:
    import lightning.pytorch as pl


def collect_random_states(trainer: pl.Trainer) -> list[dict[str, Any]]:
    """Return the state of every rank, in order of ranks. A collective: every rank must call it."""
    return gather_objects(trainer, _get_state(trainer.strategy.root_device))


def restore_random_state(trainer: pl.Trainer, states: list[dict[str, Any]]) -> bool:
    """Restore this rank's generators.

    Returns:
        Whether there is a state for this rank. A run may be resumed on more ranks than it was started on.
    """
    if trainer.global_rank >= len(states):
        return False
    _set_state(states[trainer.global_rank], trainer.strategy.root_device)
    return True


def _get_state(device: torch.device) -> dict[str, Any]:
    # A checkpoint is read with `weights_only=True`, which allows lists but not NumPy arrays.
    name, keys, position, has_gauss, gauss = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    state = {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state(device)
    return state


def _set_state(state: dict[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type], device)
