"""The interface of an adapter type: a builder, and hooks for what differs from LoRA in training and on disk.

Other packages call these hooks; they never test an adapter type by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from snake_lora_pl.adapters.config import LoRAConfig
from snake_lora_pl.adapters.initialization import as_plain_lora
from snake_lora_pl.adapters.peft_internals import is_adapter_layer
from snake_lora_pl.errors import UserError

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

    from snake_lora_pl.models.base_model import BaseModelSpec

    AdapterBuilder = Callable[[PreTrainedModel, LoRAConfig], PeftModel]


LORA_ONLY_SETTINGS = (
    "alpha",
    "use_rslora",
    "use_dora",
    "init_lora_weights",
    "rank_pattern",
    "alpha_pattern",
    "loraplus_lr_ratio",
    "quantization",
    "adalora",
)
"""Fields of ``LoRAConfig`` that only LoRA and its variants use: ``ignored_settings`` of other methods."""


class AdapterType:
    """An adapter type. The default hooks are those of LoRA.

    An adapter type is stateless: one object serves every model. State that must survive a step belongs in the PEFT
    model; state that must survive the process is returned by ``state``.

    Args:
        build: Function that adds a fresh adapter to a loaded base model and returns the PEFT model.
    """

    ignored_settings: ClassVar[tuple[str, ...]] = ()
    """Fields of ``LoRAConfig`` without effect on this type; setting one is an error."""
    integer_tensors: ClassVar[tuple[str, ...]] = ()
    """Last parts of the names of saved tensors that hold integers; all others must be floating-point."""
    peft_setting_types: ClassVar[Mapping[str, Any]] = {
        "peft_type": str | None,
        "r": int | None,
        "init_r": int | None,
        "rank_pattern": dict[str, int] | None,
        "target_modules": list[str] | str | None,
        "modules_to_save": list[str] | None,
    }
    """Type hints of the settings in ``adapter_config.json`` that this package reads."""
    card_settings: ClassVar[Mapping[str, str]] = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}
    """Labels of the settings in ``adapter_config.json`` that the model card lists."""

    def __init__(self, build: AdapterBuilder) -> None:
        self.build = build

    def check(self, name: str, config: LoRAConfig) -> None:
        """Reject settings that this type ignores.

        Args:
            name: The name that the type is registered under.
            config: The settings.

        Raises:
            UserError: If one of ``ignored_settings`` is not at its default.
        """
        default = LoRAConfig()
        given = [field for field in self.ignored_settings if getattr(config, field) != getattr(default, field)]
        if given:
            keys = ", ".join(f"model.lora.{field}" for field in given)
            raise UserError(f"{keys}: no effect on adapter_type '{name}'. Remove it, or choose another adapter type.")

    def load_base(self, base_model: BaseModelSpec | str, config: LoRAConfig, **load_options: Any) -> PreTrainedModel:
        """Load the base model for a fresh adapter; ``load_options`` are passed to ``load_base_model``."""
        from snake_lora_pl.models import load_base_model

        return load_base_model(base_model, **load_options)

    def optimizer_class(self, parameters: Sequence[torch.nn.Parameter]) -> tuple[type[Any], dict[str, Any]]:
        """Return the AdamW class for ``parameters``, and its options other than learning rate, betas and decay."""
        import torch

        return torch.optim.AdamW, {"fused": True}

    def start(self, model: PeftModel, config: LoRAConfig, total_steps: int | None) -> None:
        """Prepare for a run.

        Args:
            model: The PEFT model, fresh or loaded.
            config: The settings.
            total_steps: Optimizer steps of the run; None if only a time limit ends it.

        Raises:
            UserError: If the type cannot be trained for this number of steps.
        """

    def regularizer(self, model: PeftModel) -> Tensor | None:
        """Return a differentiable scalar to add to the loss of each optimizer step; None for no regularization."""
        return None

    def after_step(self, model: PeftModel, step: int) -> dict[str, float]:
        """Update the adapter after an optimizer step, before its gradients are cleared.

        Args:
            model: The PEFT model.
            step: Number of the step, from 1.

        Returns:
            Metrics to log.
        """
        return {}

    def end(self, model: PeftModel, step: int) -> None:
        """Log a warning if a run that ended after ``step`` steps is incomplete."""

    def state(self, model: PeftModel) -> dict[str, Any]:
        """Return the state that a resumed run needs besides the weights: tensors and plain values."""
        return {}

    def load_state(self, model: PeftModel, state: dict[str, Any]) -> None:
        """Restore what ``state`` returned. The model is on its device and its weights are loaded."""

    def saved_form(self, model: PeftModel, weights: dict[str, Tensor]) -> tuple[PeftConfig, dict[str, Tensor]]:
        """Return the form of an adapter on disk, which computes the same logits on the unchanged base.

        Args:
            model: The PEFT model.
            weights: Its weights by name in ``model.state_dict()``; base weights may be absent.

        Returns:
            The PEFT config and the weights to save, whose shapes may differ from those in memory.
        """
        return as_plain_lora(model, weights)

    def load_config(self, adapter_dir: Path) -> PeftConfig:
        """Read the PEFT config of a verified adapter directory."""
        from peft import PeftConfig

        return PeftConfig.from_pretrained(str(adapter_dir))

    def problems(self, model: PeftModel, adapter_name: str) -> Iterable[str]:
        """Return what is invalid in a loaded adapter, other than keys, shapes and values that are not finite."""
        return ()

    def saved_rank(self, peft_config: Mapping[str, Any]) -> int | None:
        """Return the largest rank of any layer of a saved adapter; None if it has no rank.

        Args:
            peft_config: The content of ``adapter_config.json``.
        """
        rank = peft_config.get("r")
        return None if rank is None else max([rank, *(peft_config.get("rank_pattern") or {}).values()])


def adapter_tensors(model: PeftModel) -> dict[str, Tensor]:
    """Return the parameters and buffers of an adapter, by name in ``model.state_dict()``.

    They include everything in PEFT's layers except base weights, such as factors that an adapter type keeps frozen.
    """
    layers = tuple(f"{name}." for name, module in model.named_modules() if is_adapter_layer(module))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name in trained or (name.startswith(layers) and ".base_layer." not in name)
    }
