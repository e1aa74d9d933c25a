"""The text decoder of a base model, which may also contain towers for images and sound."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """Return the config of a model's text decoder; the model's own config if it reads text only."""
    config: PreTrainedConfig = model.config.get_text_config()
    return config


def text_decoder(model: PreTrainedModel) -> Any:
    """Return the part of a causal language model that maps token ids to hidden states.

    ``model.base_model`` is not always that part: for Llama 4 it is the model itself, and for a multimodal model it is
    the combination of all towers.
    """
    from transformers import PreTrainedModel

    config, embeddings = text_config(model), model.get_input_embeddings()
    for module in model.modules():  # outermost first
        is_decoder = isinstance(module, PreTrainedModel) and module is not model and module.config is config
        if is_decoder and any(part is embeddings for part in module.modules()):
            return module
    return model.base_model
