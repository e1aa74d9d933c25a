"""One place that turns a name into an adapter on a base model. New kinds join through ``register``."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from snake_lora_pl.adapters.config import LoRAConfig
from snake_lora_pl.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    AdapterBuilder = Callable[[PreTrainedModel, LoRAConfig], PeftModel]

logger = logging.getLogger(__name__)


class AdapterFactory:
    """Builds an adapter of a registered kind, and loads one from disk.

    Example:
        >>> AdapterFactory.create("lora", "smollm2-135m", LoRAConfig(rank=8))  # doctest: +SKIP
    """

    _builders: dict[str, AdapterBuilder] = {}  # noqa: RUF012 - the registry is shared by design

    @classmethod
    def register(cls, adapter_type: str, builder: AdapterBuilder) -> None:
        """Add a kind of adapter.

        Args:
            adapter_type: The name that ``model.adapter_type`` takes.
            builder: Puts the adapter on a loaded base model and returns the PEFT model.

        Raises:
            ValueError: If the name is taken.
        """
        if adapter_type in cls._builders:
            raise ValueError(f"Adapter type '{adapter_type}' is registered already.")
        cls._builders[adapter_type] = builder

    @classmethod
    def registered(cls) -> list[str]:
        """Names of the kinds there are, sorted."""
        return sorted(cls._builders)

    @classmethod
    def create(
        cls, adapter_type: str, base_model: PreTrainedModel | str, config: LoRAConfig, **load_options: Any
    ) -> PeftModel:
        """Put a fresh adapter on a base model; the base is frozen.

        Args:
            adapter_type: A registered kind.
            base_model: A loaded model, or a name as ``model.base_model`` takes it.
            config: Rank, scale, dropout and layers.
            load_options: Passed to ``load_base_model`` where ``base_model`` is a name.

        Returns:
            The PEFT model; its trainable parameters are the adapter's.

        Raises:
            UserError: If the kind is unknown (the message lists the known ones) or the config does not fit the model.
        """
        builder = cls._builders.get(adapter_type)
        if builder is None:
            known = cls.registered()
            near = difflib.get_close_matches(adapter_type, known, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise UserError(f"model.adapter_type: unknown type '{adapter_type}'. Known: {', '.join(known)}.{hint}")
        if isinstance(base_model, str):
            from snake_lora_pl.models import load_base_model

            base_model = load_base_model(base_model, **load_options)
        model = builder(base_model, config)
        trainable, total = model.get_nb_trainable_parameters()
        logger.info("%s adapter: %s of %s parameters trained (%.2f%%)", adapter_type, f"{trainable:,}", f"{total:,}",
                    100 * trainable / total)  # fmt: skip
        return model

    @classmethod
    def load(
        cls,
        adapter_path: str | os.PathLike[str],
        base_model: PreTrainedModel | str | None = None,
        *,
        is_trainable: bool = False,
        **load_options: Any,
    ) -> PeftModel:
        """Load a saved adapter, verified, onto its base model.

        Args:
            adapter_path: Directory that holds ``adapter_model.safetensors`` and ``adapter_metadata.json``.
            base_model: The base it was trained on, loaded or by name; None loads the one its metadata names.
            is_trainable: Whether the adapter's parameters take gradients.
            load_options: Passed to ``load_base_model`` where the base is loaded here.

        Returns:
            The PEFT model.

        Raises:
            UserError: If the directory is no intact adapter, or was trained on another base.
        """
        from snake_lora_pl.adapters import store

        return store.load(adapter_path, base_model, is_trainable=is_trainable, **load_options)


def build_lora(base_model: PreTrainedModel, config: LoRAConfig) -> PeftModel:
    """Plain LoRA (https://arxiv.org/abs/2106.09685): B starts at zero, so training starts at the base model."""
    from peft import LoraConfig, get_peft_model

    from snake_lora_pl.adapters.targets import resolve_target_modules

    peft_config = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=resolve_target_modules(base_model, config.target_modules),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base_model, peft_config)


AdapterFactory.register("lora", build_lora)
