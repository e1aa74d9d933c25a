"""SHiRA (https://arxiv.org/abs/2406.13175): a sparse, high-rank update that trains a few entries of each weight.

The entries are drawn at random, as many as a LoRA of the same rank has parameters. Their indices are part of the
adapter. PEFT keeps them outside the state of the model, and does not check those that it loads; this module stores them
for a resume and checks them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from typing_extensions import override

from snake_lora_pl.adapters.adapter_type import LORA_ONLY_SETTINGS, AdapterType
from snake_lora_pl.adapters.config import LoRAConfig
from snake_lora_pl.adapters.targets import add_adapter, check_are_linear, resolve_target_modules, selected_layers
from snake_lora_pl.errors import UserError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel

# The same entries on every rank and in every run of one shape.
_SEED = 0


def build_shira(base_model: PreTrainedModel, config: LoRAConfig) -> PeftModel:
    """Add SHiRA to a base model; the update is zero, so logits are unchanged at first.

    Raises:
        UserError: If a selected layer is not linear, or has fewer weights than the adapter would train.
    """
    from peft import ShiraConfig

    targets = resolve_target_modules(base_model, config.target_modules, config.layers)
    layers = selected_layers(base_model, targets)
    check_are_linear("shira", layers)
    for name, layer in layers.items():
        size, trained = layer.in_features * layer.out_features, config.rank * (layer.in_features + layer.out_features)
        if trained > size:
            raise UserError(
                f"model.lora.rank: {config.rank} would train {trained:,} weights of {name}, which has {size:,}. Lower "
                "it, or select other layers with model.lora.target_modules."
            )
    peft_config = ShiraConfig(r=config.rank, random_seed=_SEED, target_modules=targets, task_type="CAUSAL_LM")
    peft_config.mask_fn = random_mask
    return add_adapter(base_model, peft_config)


def random_mask(base_layer: nn.Linear, r: int, random_seed: int | None = None, **kwargs: Any) -> Tensor:
    """Return a boolean mask of ``r * (out_features + in_features)`` weights, shape (out_features, in_features).

    It is on the CPU, so that the same entries are drawn for every device, and for a model without content.
    """
    import torch

    shape = (base_layer.out_features, base_layer.in_features)
    generator = torch.Generator("cpu").manual_seed(_SEED if random_seed is None else random_seed)
    chosen = torch.randperm(shape[0] * shape[1], generator=generator, device="cpu")[: r * sum(shape)]
    mask = torch.zeros(shape[0] * shape[1], dtype=torch.bool, device="cpu")
    mask[chosen] = True
    return mask.view(shape)


class SHiRA(AdapterType):
    """Trained values at fixed random entries of each adapted weight."""

    ignored_settings = (*LORA_ONLY_SETTINGS, "dropout")
    integer_tensors = ("shira_indices",)
    peft_setting_types: ClassVar[Mapping[str, Any]] = {**AdapterType.peft_setting_types, "peft_type": Literal["SHIRA"]}
    card_settings: ClassVar[Mapping[str, str]] = {"r": "rank"}

    def __init__(self) -> None:
        super().__init__(build_shira)

    @override
    def state(self, model: PeftModel) -> dict[str, Any]:
        """Return the indices of the trained entries, by layer."""
        return {name: layer.shira_indices["default"].cpu() for name, layer in _layers(model)}

    @override
    def load_state(self, model: PeftModel, state: dict[str, Any]) -> None:
        for name, layer in _layers(model):
            layer.shira_indices["default"] = state[name]
        if problems := list(self.problems(model, "default")):
            raise ValueError(problems[0])

    @override
    def load_config(self, adapter_dir: Path) -> PeftConfig:
        """Read the settings; the indices that are drawn at first are replaced by the saved ones."""
        config = super().load_config(adapter_dir)
        config.mask_fn = random_mask
        return config

    @override
    def problems(self, model: PeftModel, adapter_name: str) -> Iterator[str]:
        """Yield the layers with an index outside the weight, which torch would access unchecked."""
        import torch

        for name, layer in _layers(model):
            if adapter_name not in layer.shira_indices:
                continue
            indices = layer.shira_indices[adapter_name]
            if indices.shape != (2, len(layer.shira_weight[adapter_name])):
                yield f"{name}.shira_indices has the shape {tuple(indices.shape)}"
                continue
            limits = torch.tensor([[layer.out_features], [layer.in_features]], device=indices.device)
            if not ((indices >= 0) & (indices < limits)).all():
                yield f"{name}.shira_indices is outside the {layer.out_features}x{layer.in_features} weight"


def _layers(model: PeftModel) -> Iterator[tuple[str, Any]]:
    from peft.tuners.shira import ShiraLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, ShiraLayer))
