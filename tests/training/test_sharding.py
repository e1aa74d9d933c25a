"""Refused strategies. Training with a sharded model is tested with two processes in tests/e2e."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from snake_lora_pl.errors import UserError
from snake_lora_pl.training.sharding import FullyShardedStrategy, check_strategy


@pytest.mark.parametrize("strategy_class", [FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy])
def test_strategies_that_shard_in_another_way_are_refused(strategy_class: type) -> None:
    # Without __init__, because some of them need an accelerator or another package.
    with pytest.raises(UserError, match=rf"trainer\.strategy: {strategy_class.__name__} .*fsdp\.yaml.*ddp\.yaml"):
        check_strategy(strategy_class.__new__(strategy_class))


@pytest.mark.parametrize("strategy", [DDPStrategy(), FullyShardedStrategy(), None])
def test_supported_strategies_are_accepted(strategy: Any) -> None:
    check_strategy(strategy)


def test_model_of_a_strategy_that_is_not_set_up_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no model"):
        FullyShardedStrategy().lightning_module_state_dict()
