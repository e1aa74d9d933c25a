"""Greedy decoding with transformers' ``generate``, for models that cannot be decoded in lockstep."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from typing_extensions import override

from snake_lora_pl.decoding.completion import Completion
from snake_lora_pl.decoding.exactness import (
    MACHINE_ERRORS,
    UNSUPPORTED_ERRORS,
    Exactness,
    float32_weights,
    logits_agree,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_NUM_PROBED = 3  # tokens


class GenerateDecoder:
    """Greedy decoder that calls ``generate`` on batches.

    Prompts of different lengths are padded on the left. If that changes what a model writes, only prompts of equal
    length share a batch; if batches as such change it, each prompt is completed alone. Both are tried out at first.
    Settings in the model's ``generation_config``, such as a repetition penalty, are not used.

    Args:
        model: A causal language model, with an adapter or without.
        pad_id: Any token id.
        eos_id: Id of the token that ends a completion.
        max_new_tokens: Maximum length of a completion.
        is_finished: Returns whether a completion ends with its last token although it is not EOS.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        pad_id: int,
        eos_id: int,
        max_new_tokens: int,
        is_finished: Callable[[list[int]], bool] = lambda tokens: False,
    ) -> None:
        self._model: PreTrainedModel = getattr(model, "get_base_model", lambda: model)()
        self._pad_id = pad_id
        self._eos_id = eos_id
        self._max_new_tokens = max_new_tokens
        self._is_finished = is_finished
        self._padding = Exactness(model, "padding", self._is_padding_exact)
        self._batching = Exactness(model, "batches", self._is_batching_exact)

    def next_logits(self, prompts: Sequence[list[int]]) -> Tensor:
        """Return the logits of the token after each prompt, shape (prompts, vocab)."""
        rows: list[Tensor] = [torch.empty(0)] * len(prompts)
        for batch in self._batches(prompts, num_new=1):
            output = self._generate([prompts[index] for index in batch], 1, output_logits=True)
            for index, logits in zip(batch, output.logits[0], strict=True):
                rows[index] = logits
        return torch.stack(rows)

    def complete(self, prompts: Sequence[list[int]]) -> list[Completion]:
        """Return the greedy completion of each prompt, given as token ids."""
        completions = [Completion() for _ in prompts]
        for batch in self._batches(prompts, self._max_new_tokens):
            width = max(len(prompts[index]) for index in batch)
            output = self._generate(
                [prompts[index] for index in batch],
                self._max_new_tokens,
                eos_token_id=self._eos_id,
                stopping_criteria=StoppingCriteriaList([_Finished(width, self._is_finished)]),
            )
            for index, row in zip(batch, output.sequences[:, width:].tolist(), strict=True):
                completions[index] = self._cut(row)
        return completions

    def _cut(self, tokens: list[int]) -> Completion:
        """Return the tokens up to the end of the completion; ``generate`` pads rows that end before others."""
        for index, token in enumerate(tokens):
            if token == self._eos_id:
                return Completion(tokens[:index], is_complete=True)
            if self._is_finished(tokens[: index + 1]):
                return Completion(tokens[: index + 1], is_complete=True)
        return Completion(tokens)

    def _batches(self, prompts: Sequence[list[int]], num_new: int) -> list[list[int]]:
        """Return the indices of the prompts that share a batch."""
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        longest = prompts[order[-1]]
        if len(prompts[order[0]]) < len(longest) and self._padding.holds(longest, num_new):
            return [order]
        groups = [list(group) for _, group in groupby(order, key=lambda index: len(prompts[index]))]
        if len(groups) == len(prompts) or self._batching.holds(longest, num_new):
            return groups
        return [[index] for index in order]

    def _is_padding_exact(self, text: list[int]) -> bool:
        if self._is_exact(text[: len(text) // 4 + 1], text[:-_NUM_PROBED] or text):
            return True
        _log_smaller_batches(type(self._model).__name__, "of equal length only")
        return False

    def _is_batching_exact(self, text: list[int]) -> bool:
        prompt = text[:-_NUM_PROBED] or text
        if self._is_exact(prompt, prompt[::-1]):
            return True
        _log_smaller_batches(type(self._model).__name__, "one at a time")
        return False

    def _is_exact(self, *prompts: list[int]) -> bool:
        """Return whether prompts are completed in one batch as they are alone."""
        with float32_weights(self._model) as precision:
            alone = [self._generate([prompt], _NUM_PROBED, output_logits=True) for prompt in prompts]
            try:
                together = self._generate(prompts, _NUM_PROBED, output_logits=True)
            except MACHINE_ERRORS:
                raise
            except UNSUPPORTED_ERRORS:
                return False
        for row, expected in enumerate(alone):
            for step in range(_NUM_PROBED):
                logits, expected_logits = together.logits[step][row], expected.logits[step][0]
                if not logits_agree(logits, expected_logits, precision.tolerance):
                    return False
                # If two tokens are equally likely, the texts part here, and the steps after it cannot be compared.
                if logits.argmax() != expected_logits.argmax():
                    break
        return True

    def _generate(self, prompts: Sequence[list[int]], max_new_tokens: int, **options: Any) -> Any:
        width = max(map(len, prompts))
        ids = torch.tensor([[self._pad_id] * (width - len(row)) + list(row) for row in prompts])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
        with _plain_generation(self._model):
            return self._model.generate(
                input_ids=ids.to(self._model.device),
                attention_mask=mask.to(self._model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=self._pad_id,
                return_dict_in_generate=True,
                **options,
            )


class _Finished(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, num_prompt_tokens: int, is_finished: Callable[[list[int]], bool]) -> None:
        self._num_prompt_tokens = num_prompt_tokens
        self._is_finished = is_finished

    @override
    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        rows = input_ids[:, self._num_prompt_tokens :].tolist()
        return torch.tensor([self._is_finished(row) for row in rows], device=input_ids.device)


@contextlib.contextmanager
def _plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Replace a model's settings of ``generate`` in the block; those given to ``generate`` do not replace all."""
    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


@functools.cache
def _log_smaller_batches(model_class: str, batches: str) -> None:
    logger.warning("%s: prompts are completed %s, because larger batches change the result", model_class, batches)
