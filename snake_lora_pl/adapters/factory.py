"""Creation and loading of adapters by the name of their type."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from snake_lora_pl.adapters import registry, store
from snake_lora_pl.adapters.config import LoRAConfig
from snake_lora_pl.adapters.qlora import prepare_quantized_base
from snake_lora_pl.adapters.targets import check_has_no_adapter
from snake_lora_pl.models.base_model import BaseModelSpec
from snake_lora_pl.models.quantization import quantization_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


class AdapterFactory:
    """Creates adapters of registered types, and loads adapters from disk.

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
        """Add a fresh adapter to a base model and freeze the base.

        Args:
            adapter_type: Name of a registered adapter type.
            base_model: A loaded model, or its spec or name.
            config: Rank, scale, dropout and target layers.
            load_options: Passed to ``load_base_model`` unless the base is loaded already.

        Returns:
            The PEFT model; its trainable parameters are the adapter's.

        Raises:
            UserError: If the adapter type is unknown, the config does not fit the model, or the model already carries
                an adapter.
        """
        hooks = registry.get_adapter_type(adapter_type)
        hooks.check(adapter_type, config)
        if isinstance(base_model, str | BaseModelSpec):
            base_model = hooks.load_base(base_model, config, **load_options)
        check_has_no_adapter(base_model)
        quantization = quantization_of(base_model)
        if quantization is not None:
            prepare_quantized_base(base_model, quantization)
        model = hooks.build(base_model, config)
        trainable, total = model.get_nb_trainable_parameters()
        share = trainable / total
        logger.info(f"{adapter_type} adapter: {trainable:,} of {total:,} parameters are trainable ({share:.2%})")
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
        """Verify a saved adapter and load it onto its base model.

        Args:
            adapter_path: Directory with ``adapter_model.safetensors`` and ``adapter_metadata.json``.
            base_model: The base it was trained on: a loaded model, its spec or its name; None takes the base from the
                metadata.
            is_trainable: Whether the adapter's parameters require gradients.
            full_precision_base: Load the base unquantized even if the adapter was trained on a quantized base.
            load_options: Passed to ``load_base_model`` unless the base is loaded already.

        Returns:
            The PEFT model.

        Raises:
            UserError: If the directory holds no intact adapter, or the adapter was trained on a different base.
        """
        return store.load(
            adapter_path,
            base_model,
            is_trainable=is_trainable,
            full_precision_base=full_precision_base,
            **load_options,
        )
