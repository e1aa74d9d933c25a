from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from snake_lora_pl.training.resume.random_state import collect_random_states, restore_random_state


def make_trainer(rank: int = 0) -> Any:
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    return SimpleNamespace(world_size=1, global_rank=rank, strategy=strategy)


def draw() -> tuple[float, float, float, float]:
    return random.random(), np.random.rand(), np.random.randn(), float(torch.rand(()))


def test_restored_generators_draw_the_same_numbers() -> None:
    draw()  # leaves a cached Gaussian in NumPy's generator
    states = collect_random_states(make_trainer())
    expected = draw()
    draw()
    assert restore_random_state(make_trainer(), states)
    assert draw() == expected


def test_state_is_readable_without_pickled_code(tmp_path: Any) -> None:
    path = tmp_path / "state.pt"
    torch.save(collect_random_states(make_trainer()), path)
    assert restore_random_state(make_trainer(), torch.load(path, weights_only=True))


def test_additional_rank_has_no_state() -> None:
    states = collect_random_states(make_trainer())
    assert not restore_random_state(make_trainer(rank=1), states)
