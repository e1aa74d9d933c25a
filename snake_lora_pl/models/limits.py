"""Limits of what a model reads: the number of tokens, and their ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from snake_lora_pl.errors import UserError

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


class ModelLimits(NamedTuple):
    """Limits of what a model reads.

    Attributes:
        max_tokens: Maximum number of tokens of a text, generated ones included; None if there is no limit.
        num_embeddings: Number of token ids that have an embedding and a logit.
    """

    max_tokens: int | None
    num_embeddings: int

    @classmethod
    def of(cls, model: Any) -> ModelLimits:
        """Return the limits of a model, with an adapter or without."""
        embedding, lm_head = model.get_input_embeddings(), model.get_output_embeddings()
        return cls(context_length(model.config), min(len(embedding.weight), len(lm_head.weight)))

    def check_row(self, source: str, num_tokens: int) -> None:
        """Check that the model can read a row.

        Raises:
            UserError: If it has more tokens than the model reads.
        """
        if self.max_tokens is not None and num_tokens > self.max_tokens:
            raise UserError(
                f"{source}: the row has {num_tokens:,} tokens, but the model reads at most {self.max_tokens:,}. "
                f"Set data.max_length={self.max_tokens}, or choose another base model."
            )

    def check_prompts(self, prompts: Mapping[str, Sequence[int]], max_new_tokens: int) -> None:
        """Check that the model can complete every prompt.

        Args:
            prompts: Token ids of prompts by source.
            max_new_tokens: Maximum length of a completion.

        Raises:
            UserError: If the longest prompt and a completion exceed the limit; the message names the prompt.
        """
        source, token_ids = max(prompts.items(), key=lambda item: len(item[1]))
        num_tokens = len(token_ids)
        if self.max_tokens is None or num_tokens + max_new_tokens <= self.max_tokens:
            return
        if num_tokens < self.max_tokens:
            fix = f"Set model.max_new_tokens to at most {self.max_tokens - num_tokens}"
        else:
            fix = "Shorten the prompt"
        raise UserError(
            f"{source}: the prompt has {num_tokens:,} tokens and its completion up to {max_new_tokens:,} "
            f"(model.max_new_tokens), but the model reads at most {self.max_tokens:,}. {fix}, or choose another base "
            "model."
        )

    def check_ids(self, texts: Mapping[str, Sequence[int]], tokenizer: Any) -> None:
        """Check that every token has an embedding.

        Args:
            texts: Token ids by source.
            tokenizer: The tokenizer that gave them, for the message.

        Raises:
            UserError: If one has none; the message names the token and the source.
        """
        source, token_ids = max(texts.items(), key=lambda item: max(item[1], default=0))
        token_id = int(max(token_ids, default=0))
        if token_id >= self.num_embeddings:
            raise UserError(
                f"{source}: token {tokenizer.convert_ids_to_tokens(token_id)!r} has the id {token_id:,}, but the model "
                f"has {self.num_embeddings:,} embeddings (ids 0 to {self.num_embeddings - 1:,}). The tokenizer or its "
                "template does not belong to the model: copy all of its files again, or set another data.template."
            )
