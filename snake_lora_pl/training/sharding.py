"""Fully sharded data parallelism (FSDP2): every process holds a slice of each layer, and the layer only while it runs.

Lightning's ``ModelParallelStrategy`` is the engine rather than its ``FSDPStrategy``: FSDP2 cuts each parameter by
itself, so that a frozen base in bfloat16 or 4 bits and an adapter in float32 share a layer, where FSDP1 flattens a
layer into one tensor of one type; and it runs on a CPU, where it is tested.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, ParallelStrategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor

from snake_lora_pl.adapters import store
from snake_lora_pl.errors import UserError
from snake_lora_pl.models import repeated_layers

if TYPE_CHECKING:
    from peft import PeftModel
    from torch.distributed.device_mesh import DeviceMesh
    from torch.optim import Optimizer


class FullyShardedStrategy(ModelParallelStrategy):
    """Shards the model over all processes; checkpoints hold the whole adapter, and are those of any other strategy.

    Lightning's strategy would gather the frozen base too for every checkpoint, and write the optimiser's state under
    keys that no other strategy reads. Here a checkpoint is gathered from the adapter alone, is read by
    ``checkpoint_io``, and goes on with another number of processes, or with DDP, as it does with this one.

    Args:
        process_group_backend: Backend of the collectives; None takes the device's own.
        timeout: How long a process waits for the others in a collective.
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

    def setup_environment(self) -> None:
        """Let all processes share the data; Lightning's default is one share a node."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Each process its share of the rows; of prompts to complete each takes all.

        Completions differ in length, and a process that writes on needs the slices of all others.
        """
        assert self.lightning_module is not None
        if self.lightning_module.trainer.predicting:
            return {"num_replicas": 1, "rank": 0}
        return super().distributed_sampler_kwargs

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether Lightning hands the optimiser's state to ``load_optimizer_state_dict``."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The trained parameters, whole, in the first process; the others get an empty dict. All must call it."""
        assert self.model is not None
        return gather_trained(self.model)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimiser's state with whole tensors; all processes must call it."""
        state: dict[str, Any] = ParallelStrategy.optimizer_state(self, optimizer)
        return apply_to_collection(state, DTensor, lambda tensor: tensor.full_tensor().cpu())

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint, the same file in every process."""
        return ParallelStrategy.load_checkpoint(self, self.broadcast(checkpoint_path), weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Cut whole parameters into this process's slices."""
        assert self.model is not None
        load_whole(self.model, checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Cut the optimiser's whole state into this process's slices."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            cut = {index: _cut_state_like(values, parameters[index]) for index, values in state["state"].items()}
            optimizer.load_state_dict({**state, "state": cut})


def _cut_like(whole: Tensor, like: Tensor) -> Tensor:
    """This process's slice of what every process holds whole; the whole where ``like`` is not cut."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _cut_state_like(state: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
    """What an optimizer keeps of a parameter, the tensors of its shape cut as it is."""
    return {
        name: _cut_like(value, parameter) if isinstance(value, Tensor) and value.shape == parameter.shape else value
        for name, value in state.items()
    }


def check_strategy(strategy: Any) -> None:
    """Refuse strategies that cut a model in a way that adapters are not saved from here.

    Raises:
        UserError: If ``strategy`` is one; the message names those that work.
    """
    is_foreign = isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, FullyShardedStrategy)
    if is_foreign or isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy)):
        raise UserError(
            f"trainer.strategy: {type(strategy).__name__} is not supported, adapters could not be saved from it. Use "
            "--config fsdp.yaml to cut the model into slices, or --config ddp.yaml where it fits each device whole."
        )


def shard(model: nn.Module, strategy: FullyShardedStrategy) -> None:
    """Cut a PEFT model's layers into slices, one for each process.

    Embeddings, the last norm and the output head stay whole in every process: they are frozen, so nothing of them is
    ever exchanged, and the loss multiplies by the head's weight directly. Of a model of billions of parameters they are
    a few per cent.

    Args:
        model: The PEFT model, the same in every process save for the draws of a fresh adapter; changed in place.
        strategy: The strategy, its processes connected.

    Raises:
        UserError: If the model does not say which of its parts are layers.
    """
    from torch.distributed.fsdp import fully_shard

    mesh: DeviceMesh = strategy.device_mesh["data_parallel"]
    _share_trained(model, strategy)
    base = model.get_base_model()  # type: ignore[operator]
    backbone: nn.Module = base.base_model
    layers = repeated_layers(base)
    if not layers:
        raise UserError(
            f"trainer.strategy: {type(base).__name__} does not say which of its parts are layers, so it cannot be cut "
            "into slices. Use --config ddp.yaml."
        )
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    in_layers = {id(p) for layer in layers for p in layer.parameters()}
    whole = {p for p in backbone.parameters() if id(p) not in in_layers and not p.requires_grad}
    fully_shard(backbone, mesh=mesh, ignored_params=whole)


def _share_trained(model: nn.Module, strategy: ParallelStrategy) -> None:
    """Give every process the first one's adapter: what a process did before may have moved its random numbers."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for name, values in strategy.broadcast(trained).items():
        trained[name].copy_(values)


def is_sharded(model: nn.Module) -> bool:
    """Whether any parameter is held in slices."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def gather_trained(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters, whole, on the CPU of the first process; the others get nothing, but all must call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return dict(get_model_state_dict(model, options=options))  # type: ignore[arg-type]


def load_whole(model: nn.Module, state_dict: Mapping[str, Tensor], *, strict: bool = False) -> None:
    """Put whole parameters into a model that is held in slices; every process has them all."""
    set_model_state_dict(model, dict(state_dict), options=StateDictOptions(full_state_dict=True, strict=strict))


def load_saved(model: PeftModel, adapter_dir: str | os.PathLike[str]) -> None:
    """Put the weights of a saved adapter into a model that carries one of the same shapes, whole or in slices.

    Raises:
        UserError: If the adapter is damaged or has other keys or shapes.
    """
    from peft import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    store.verify(adapter_dir)
    store.check_weights(model, adapter_dir)
    saved = load_peft_weights(str(adapter_dir), device="cpu")
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    set_peft_model_state_dict(model, {name: _cut_like(weights, own[name]) for name, weights in saved.items()})


def local_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What this process holds of each tensor: its slice, or the whole where it is not cut."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def total_norm(gradients: list[Tensor]) -> Tensor:
    """Euclidean norm of all gradients together, whole or in slices; all processes must call it."""
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
