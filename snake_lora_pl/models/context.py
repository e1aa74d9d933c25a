"""Number of tokens that a model reads."""

from __future__ import annotations

from typing import Any

# By the same name in rope settings and as attributes of configs that have no such settings.
_ORIGINAL_LENGTH = "original_max_position_embeddings"


def context_length(config: Any) -> int | None:
    """Return the maximum number of tokens of a text, generated ones included; None if there is no limit.

    The limit is the number of positions in the config, times the factor by which a scaling of rotary positions lifts
    it. Most recurrent models have none.

    Args:
        config: Config of a model; of a multimodal model, its text decoder's part is used.
    """
    text_config = config.get_text_config()
    limit: int = getattr(text_config, "max_position_embeddings", None) or getattr(text_config, "max_seq_len", None) or 0
    # Falcon's ALiBi biases are computed for any length. XLNet states the absence of a limit by -1.
    if limit <= 0 or getattr(text_config, "alibi", False):
        return None
    settings = getattr(text_config, "rope_parameters", None) or {}
    # Models with several types of attention layers have settings for each.
    for rope in [settings, *settings.values()]:
        if not isinstance(rope, dict) or rope.get("rope_type", "default") == "default":
            continue
        # Some configs state the lifted limit, others that of the pretraining before the scaling.
        original = rope.get(_ORIGINAL_LENGTH) or getattr(text_config, _ORIGINAL_LENGTH, None) or limit
        limit = max(limit, int(original * (rope.get("factor") or 1)))
    return limit
