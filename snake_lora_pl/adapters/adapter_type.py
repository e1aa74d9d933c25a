"""What one kind of adapter is: a builder, and hooks where its training or its file differs from LoRA's.

The training room calls these hooks and knows no kind by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from snake_lora_pl.adapters.config import LoRAConfig
from snake_lora_pl.adapters.initialization import as_plain_lora
from snake_lora_pl.errors import UserError

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

    from snake_lora_pl.models.base_model import BaseModelSpec

    AdapterBuilder = Callable[[PreTrainedModel, LoRAConfig], PeftModel]


class AdapterType:
    """One kind of adapter; every hook does nothing until a subclass says otherwise.

    A kind holds no state of a run: one object serves every model. What must outlive a step lies in the PEFT model, and
    what must outlive the process goes through ``state``.

    Args:
        build: Puts a fresh adapter on a loaded base model and returns the PEFT model.
    """

    ignored_settings: tuple[str, ...] = ()
    """Fields of ``LoRAConfig`` that mean nothing to this kind; setting one is refused."""

    def __init__(self, build: AdapterBuilder) -> None:
        self.build = build

    def check(self, name: str, config: LoRAConfig) -> None:
        """Refuse settings that this kind would ignore.

        Args:
            name: The name that the kind is registered by.
            config: The settings.

        Raises:
            UserError: If one of ``ignored_settings`` is not at its default.
        """
        default = LoRAConfig()
        given = [field for field in self.ignored_settings if getattr(config, field) != getattr(default, field)]
        if given:
            keys = ", ".join(f"model.lora.{field}" for field in given)
            raise UserError(f"{keys}: without effect on adapter_type '{name}'. Leave out, or choose another type.")

    def load_base(self, base_model: BaseModelSpec | str, config: LoRAConfig, **load_options: Any) -> PreTrainedModel:
        """Load the base model for a fresh adapter; ``load_options`` are those of ``load_base_model``."""
        from snake_lora_pl.models import load_base_model

        return load_base_model(base_model, **load_options)

    def optimizer_class(self, parameters: Sequence[torch.nn.Parameter]) -> tuple[type[Any], dict]:
        """The AdamW that trains ``parameters``, and the options it needs beside learning rate, betas and decay."""
        import torch

        return torch.optim.AdamW, {"fused": True}

    def start(self, model: PeftModel, config: LoRAConfig, total_steps: int | None) -> None:
        """Prepare for a run.

        Args:
            model: The PEFT model, fresh or loaded to train on.
            config: The settings.
            total_steps: Optimizer steps of the run, or None where only the clock will end it.

        Raises:
            UserError: If the run is of a length that the kind cannot work with.
        """

    def regularizer(self, model: PeftModel) -> Tensor | None:
        """A term to minimize beside the mean loss of each optimizer step, as a scalar with a graph; None for none."""
        return None

    def after_step(self, model: PeftModel, step: int) -> dict[str, float]:
        """Work that follows an optimizer step, while its gradients are still there.

        Args:
            model: The PEFT model.
            step: Number of the step, from 1.

        Returns:
            Figures to log.
        """
        return {}

    def end(self, model: PeftModel, step: int) -> None:
        """Say what a run that ended after ``step`` steps leaves undone."""

    def state(self, model: PeftModel) -> dict[str, Any]:
        """What a resumed run needs beside the weights: tensors and plain values."""
        return {}

    def load_state(self, model: PeftModel, state: dict[str, Any]) -> None:
        """Take up what ``state`` returned; the model is on its device and its weights are loaded."""

    def saved_form(self, model: PeftModel, weights: dict[str, Tensor]) -> tuple[PeftConfig, dict[str, Tensor]]:
        """What goes to disk: an adapter that gives the same logits on the unchanged base.

        Args:
            model: The PEFT model.
            weights: Its weights by the names of ``model.state_dict()``; the base's may be absent.

        Returns:
            The PEFT config and the weights to save, which may differ in shape from those in memory.
        """
        return as_plain_lora(model, weights)


def adapter_tensors(model: PeftModel) -> dict[str, Tensor]:
    """The parameters and buffers that an adapter consists of, by their names in ``model.state_dict()``.

    Beside what is trained these are whatever else lies in PEFT's layers and is not the base's, such as the half of a
    factor that a kind keeps frozen.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name in trained or (name.startswith(layers) and ".base_layer." not in name)
    }
