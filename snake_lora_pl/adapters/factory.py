"""One place that turns a name into an adapter on a base model. New kinds join through ``register``."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from snake_lora_pl.adapters import registry, store
from snake_lora_pl.adapters.config import LoRAConfig
from snake_lora_pl.adapters.targets import check_carries_none
from snake_lora_pl.models.base_model import BaseModelSpec

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


class AdapterFactory:
    """Builds an adapter of a registered kind, and loads one from disk.

    Example:
        >>> AdapterFactory.create("lora", "smollm2-135m", LoRAConfig(rank=8))  # doctest: +SKIP
    """

    register = staticmethod(registry.register)
    registered = staticmethod(registry.registered)
    get_adapter_type = staticmethod(registry.get_adapter_type)

    @classmethod
    def create(
        cls,
        adapter_type: str,
        base_model: PreTrainedModel | BaseModelSpec | str,
        config: LoRAConfig,
        **load_options: Any,
    ) -> PeftModel:
        """Put a fresh adapter on a base model; the base is frozen.

        Args:
            adapter_type: A registered kind.
            base_model: A loaded model, or the name or spec of one.
            config: Rank, scale, dropout and layers.
            load_options: Passed to ``load_base_model`` where the base is loaded here.

        Returns:
            The PEFT model; its trainable parameters are the adapter's.

        Raises:
            UserError: If the kind is unknown (the message lists the known ones), the config does not fit the model, or
                the model carries an adapter already.
        """
        hooks = registry.get_adapter_type(adapter_type)
        hooks.check(adapter_type, config)
        if isinstance(base_model, str | BaseModelSpec):
            base_model = hooks.load_base(base_model, config, **load_options)
        check_carries_none(base_model)
        model = hooks.build(base_model, config)
        trainable, total = model.get_nb_trainable_parameters()
        logger.info("%s adapter: %s of %s parameters trained (%.2f%%)", adapter_type, f"{trainable:,}", f"{total:,}",
                    100 * trainable / total)  # fmt: skip
        return model

    @classmethod
    def load(
        cls,
        adapter_path: str | os.PathLike[str],
        base_model: PreTrainedModel | BaseModelSpec | str | None = None,
        *,
        is_trainable: bool = False,
        full_precision_base: bool = False,
        **load_options: Any,
    ) -> PeftModel:
        """Load a saved adapter, verified, onto its base model.

        Args:
            adapter_path: Directory that holds ``adapter_model.safetensors`` and ``adapter_metadata.json``.
            base_model: The base it was trained on, loaded or by name or spec; None loads the one its metadata names.
            is_trainable: Whether the adapter's parameters take gradients.
            full_precision_base: Load the base unquantized also where the adapter was trained on a quantized one.
            load_options: Passed to ``load_base_model`` where the base is loaded here.

        Returns:
            The PEFT model.

        Raises:
            UserError: If the directory is no intact adapter, or was trained on another base.
        """
        return store.load(
            adapter_path,
            base_model,
            is_trainable=is_trainable,
            full_precision_base=full_precision_base,
            **load_options,
        )
