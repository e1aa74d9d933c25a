"""Fully sharded data parallelism (FSDP2): each rank stores a shard of every layer and gathers the layer to run it.

It builds on Lightning's ``ModelParallelStrategy``, not on ``FSDPStrategy``. FSDP2 shards each parameter separately, so
a frozen base in bfloat16 or 4 bits and an adapter in float32 can share a layer, where FSDP1 flattens a layer into one
tensor of one data type. And FSDP2 runs on a CPU, where it is tested.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, ParallelStrategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.constants import default_pg_timeout
from torch.distributed.tensor import DTensor, distribute_tensor
from typing_extensions import override

from snake_lora_pl.adapters import store
from snake_lora_pl.errors import UserError
from snake_lora_pl.models import repeated_layers
from snake_lora_pl.models.text_decoder import text_decoder
from snake_lora_pl.training.lightning_internals import shard_data_over_all_ranks

if TYPE_CHECKING:
    from peft import PeftModel
    from torch.distributed.device_mesh import DeviceMesh
    from torch.optim import Optimizer


class FullyShardedStrategy(ModelParallelStrategy):
    """Shards the model over all ranks and writes the same checkpoints as any other strategy.

    Lightning's strategy gathers the frozen base for every checkpoint, and writes the optimizer's state under keys that
    no other strategy reads. This one gathers the adapter only. Its checkpoints can be resumed with another number of
    ranks or with DDP.

    Args:
        process_group_backend: Backend of the collectives; None chooses that of the device.
        timeout: Time limit of a collective.
    """

    def __init__(
        self, process_group_backend: str | None = None, timeout: timedelta | None = default_pg_timeout
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    @override
    def setup_environment(self) -> None:
        shard_data_over_all_ranks(self)
        super().setup_environment()

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Division of rows among the ranks; prompts to complete are not divided.

        Completions differ in length, and a rank that still generates needs the shards of all others.
        """
        module = self.lightning_module
        if module is not None and module.trainer.predicting:
            return {"num_replicas": 1, "rank": 0}
        return super().distributed_sampler_kwargs

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the trained parameters, unsharded, on rank 0 and an empty dict elsewhere; all ranks must call it."""
        return gather_trained(self._sharded_model)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the optimizer's state with unsharded tensors; all ranks must call it."""
        state = ParallelStrategy.optimizer_state(self, optimizer)
        whole: dict[str, Any] = apply_to_collection(state, DTensor, lambda tensor: tensor.full_tensor().cpu())
        return whole

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        # The same file on every rank.
        return ParallelStrategy.load_checkpoint(self, self.broadcast(checkpoint_path), weights_only)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self._sharded_model, dict(checkpoint["state_dict"]), options=options)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            sharded = {index: _shard_state(values, parameters[index]) for index, values in state["state"].items()}
            optimizer.load_state_dict({**state, "state": sharded})

    @property
    def _sharded_model(self) -> nn.Module:
        if self.model is None:
            raise RuntimeError("The strategy has no model yet. A Trainer sets it before a checkpoint is used.")
        return self.model


def check_strategy(strategy: Any) -> None:
    """Check that adapters can be saved from a strategy.

    Raises:
        UserError: If ``strategy`` shards the model in another way than ``FullyShardedStrategy``.
    """
    is_foreign = isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, FullyShardedStrategy)
    if is_foreign or isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy)):
        raise UserError(
            f"trainer.strategy: {type(strategy).__name__} is not supported, because adapters cannot be saved from it. "
            "Use --config fsdp.yaml to shard the model, or --config ddp.yaml if it fits on each device."
        )


def shard(model: nn.Module, strategy: FullyShardedStrategy) -> None:
    """Shard the layers of a PEFT model over the ranks, in place.

    Embeddings, the last norm and the output head stay whole on every rank. They are frozen, so they cause no
    communication, and the loss multiplies by the head's weight directly. In a model of billions of parameters they are
    a few percent.

    Args:
        model: The PEFT model, the same on every rank except for the random values of a new adapter.
        strategy: The strategy, with its ranks connected.

    Raises:
        UserError: If the model does not declare its layers.
    """
    from torch.distributed.fsdp import fully_shard

    mesh: DeviceMesh = strategy.device_mesh["data_parallel"]
    _broadcast_trained(model, strategy)
    base = model.get_base_model()  # type: ignore[operator]
    backbone = text_decoder(base)
    layers = repeated_layers(backbone)
    if not layers:
        raise UserError(
            f"trainer.strategy: {type(base).__name__} does not declare its layers, so it cannot be sharded. Use "
            "--config ddp.yaml."
        )
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    in_layers = {id(p) for layer in layers for p in layer.parameters()}
    whole = {p for p in backbone.parameters() if id(p) not in in_layers and not p.requires_grad}
    fully_shard(backbone, mesh=mesh, ignored_params=whole)


def _broadcast_trained(model: nn.Module, strategy: ParallelStrategy) -> None:
    """Copy rank 0's adapter to every rank; their random states may have differed when it was created."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for name, values in strategy.broadcast(trained).items():
        trained[name].copy_(values)


def is_sharded(model: nn.Module) -> bool:
    """Return whether any parameter is sharded."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def gather_trained(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained parameters, unsharded, on the CPU of rank 0; other ranks get none, but all must call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return dict(get_model_state_dict(model, options=options))  # type: ignore[arg-type]


def load_saved(model: PeftModel, adapter_dir: str | os.PathLike[str]) -> None:
    """Load the weights of a saved adapter into a model, sharded or not, whose adapter has the same shapes.

    Raises:
        UserError: If the adapter is damaged or has other keys or shapes.
    """
    from peft import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    store.verify(adapter_dir)
    store.check_weights(model, adapter_dir)
    saved = load_peft_weights(str(adapter_dir), device="cpu")
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    set_peft_model_state_dict(model, {name: _shard_like(weights, own[name]) for name, weights in saved.items()})


def _shard_like(whole: Tensor, like: Tensor) -> Tensor:
    """Return this rank's shard of a tensor that every rank holds whole, or the whole if ``like`` is not sharded."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _shard_state(state: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
    """Return the optimizer's state of a parameter with the tensors of its shape sharded like it."""
    return {
        name: _shard_like(value, parameter) if isinstance(value, Tensor) and value.shape == parameter.shape else value
        for name, value in state.items()
    }


def local_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return this rank's shard of each tensor, or the tensor if it is not sharded."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def total_norm(gradients: list[Tensor]) -> Tensor:
    """Return the Euclidean norm of all gradients together, sharded or not; all ranks must call it."""
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
