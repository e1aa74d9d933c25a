"""Greedy decoder that chooses between lockstep and ``generate``."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from snake_lora_pl.decoding.completion import Completion
from snake_lora_pl.decoding.drafter import Drafter
from snake_lora_pl.decoding.exactness import (
    MACHINE_ERRORS,
    UNSUPPORTED_ERRORS,
    Exactness,
    float32_weights,
    logits_agree,
)
from snake_lora_pl.decoding.generate_decoder import GenerateDecoder
from snake_lora_pl.decoding.lockstep_decoder import LockstepDecoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_NUM_FORCED = 4


class Decoder:
    """Greedy decoder of one model: in lockstep if that is exact for the model, else with ``generate``.

    Args:
        model: A causal language model, with an adapter or without.
        drafter: Drafts the next tokens; it learns from the completions.
        prefix: Tokens that most prompts begin with.
        pad_id: Any token id.
        eos_id: Id of the token that ends a completion.
        is_finished: Returns whether a completion ends with its last token although it is not EOS.
        max_new_tokens: Maximum length of a completion.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        drafter: Drafter,
        prefix: Sequence[int],
        *,
        pad_id: int,
        eos_id: int,
        is_finished: Callable[[list[int]], bool],
        max_new_tokens: int,
    ) -> None:
        self._model = model
        self._base: PreTrainedModel = getattr(model, "get_base_model", lambda: model)()
        self._max_new_tokens = max_new_tokens
        self._settings: dict[str, Any] = {
            "pad_id": pad_id,
            "eos_id": eos_id,
            "is_finished": is_finished,
            "max_new_tokens": max_new_tokens,
        }
        self._drafter, self._prefix = drafter, prefix
        self._lockstep: LockstepDecoder | None = None
        self._exactness = Exactness(model, "lockstep", self._is_lockstep_exact)
        self._generate = GenerateDecoder(model, **self._settings)

    def next_logits(self, prompts: Sequence[list[int]]) -> Tensor:
        """Return the logits of the token after each prompt, shape (prompts, vocab)."""
        return self._choose(prompts, num_new=1).next_logits(prompts)

    def complete(self, prompts: Sequence[list[int]]) -> list[Completion]:
        """Return the greedy completion of each prompt, given as token ids."""
        return self._choose(prompts, self._max_new_tokens).complete(prompts)

    def _choose(self, prompts: Sequence[list[int]], num_new: int) -> LockstepDecoder | GenerateDecoder:
        if not self._exactness.holds(max(prompts, key=len), num_new):
            return self._generate
        if self._lockstep is None:
            self._lockstep = LockstepDecoder(self._model, self._drafter, self._prefix, **self._settings)
        return self._lockstep

    def _is_lockstep_exact(self, text: list[int]) -> bool:
        """Compare the logits of lockstep decoding after a short and a long prompt with those of a plain pass."""
        # The continuation is a part of the text, because models with learned positions have none after its end.
        num = min(_NUM_FORCED, len(text) - 1)
        prompts, continuation = (text[: len(text) // 4 + 1], text[:-num]), text[-num:]
        with float32_weights(self._base) as precision:
            expected = []
            for prompt in prompts:
                ids = torch.tensor([prompt + continuation], device=self._base.device)
                kept = torch.arange(len(prompt) - 1, ids.shape[1], device=ids.device)
                expected.append(self._model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits[0])
            try:
                prefix = text[: len(text) // 2]
                lockstep = LockstepDecoder(self._model, Drafter(), prefix, **self._settings, dtype=precision.dtype)
                logits = lockstep.forced_logits(*prompts, continuation)
            except MACHINE_ERRORS:
                raise
            except UNSUPPORTED_ERRORS as error:
                reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            else:
                if logits_agree(logits, torch.stack(expected), precision.tolerance):
                    return True
                reason = "its logits differ from those of a plain forward pass"
        _log_fallback(type(self._base).__name__, reason)
        return False


@functools.cache
def _log_fallback(model_class: str, reason: str) -> None:
    logger.warning(
        "%s cannot be decoded in lockstep (%s): completions are decoded with transformers' generate, which is slower",
        model_class,
        reason,
    )
