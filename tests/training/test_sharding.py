"""What cannot be cut into slices is refused, in words that say what to use. The rest is tried by two processes."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from snake_lora_pl.adapters.config import LoRAConfig
from snake_lora_pl.errors import UserError
from snake_lora_pl.models import QuantizationConfig
from snake_lora_pl.training.sharding import FullyShardedStrategy, check_strategy


@pytest.mark.parametrize(
    ("adapter_type", "settings", "remedy"),
    [
        ("qlora", {"quantization": QuantizationConfig(bits=8)}, "in 8 bits .* --config ddp.yaml, or .*bits=4"),
        ("adalora", {}, "adalora.* is not trained .* Use --config ddp.yaml"),
        ("lora", {"init_lora_weights": "orthogonal", "use_dora": True}, None),
        ("qlora", {}, None),
        ("qlora", {"quantization": QuantizationConfig(storage_dtype="bfloat16")}, None),
    ],
)
def test_what_cannot_be_cut_is_refused(
    make_module, adapter_type: str, settings: dict[str, Any], remedy: str | None
) -> None:
    module = make_module(adapter_type=adapter_type, lora=LoRAConfig(rank=4, alpha=8, **settings))
    module.configure_model()
    if remedy is None:
        module._check_shardable()
        return
    with pytest.raises(UserError, match=remedy):
        module._check_shardable()


@pytest.mark.parametrize("strategy_class", [FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy])
def test_strategies_that_cut_a_model_in_another_way_are_refused(strategy_class: type) -> None:
    # Without __init__: that of some asks for an accelerator, or for a package.
    with pytest.raises(UserError, match=f"{strategy_class.__name__} is not supported.*--config fsdp.yaml"):
        check_strategy(strategy_class.__new__(strategy_class))


@pytest.mark.parametrize("strategy", [DDPStrategy(), FullyShardedStrategy(), None])
def test_strategies_that_work_are_not(strategy: Any) -> None:
    check_strategy(strategy)
