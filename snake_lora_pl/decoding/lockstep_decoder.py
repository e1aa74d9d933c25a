"""Greedy decoding of many prompts in lockstep, several tokens per row and forward pass; independent of Snake.

The prefix that the prompts share is read once and cached. The suffixes of all rows are read together. Each further pass
reads the last token of every row and a draft of the tokens after it, and keeps the draft tokens that the model would
have generated itself. A complete row leaves the batch, and the last row takes its slot in the cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from snake_lora_pl.decoding.completion import Completion
from snake_lora_pl.decoding.drafter import Drafter, best_width
from snake_lora_pl.decoding.grouped_attention import grouped, is_grouped
from snake_lora_pl.decoding.lockstep_cache import LockstepCache
from snake_lora_pl.decoding.transformers_internals import cache_argument_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Fixed cost of a pass (it loads every weight once), as the number of tokens that could be read in that time. Measured
# with smollm2-135m on two CPU cores; for accelerators roughly the ratio of arithmetic to memory bandwidth.
_PASS_COST_TOKENS = {"cpu": 48}
_PASS_COST_TOKENS_ACCELERATOR = 512

# Maximum number of suffix tokens in a pass: matrix products reach full speed, and rows of similar length share a pass.
_PROMPT_TOKENS = {"cpu": 2048}
_PROMPT_TOKENS_ACCELERATOR = 16384

_MAX_DRAFT_TOKENS = 32

# Maximum number of logits in one pass: half a GiB in bfloat16.
_MAX_LOGITS = 2**28


@dataclass
class _Row:
    completion: Completion
    position: int  # of the last token
    last_token: int = -1  # generated, but not yet read by the model


class LockstepDecoder:
    """Greedy decoder of one model for prompts that share a prefix.

    Args:
        model: A causal language model, with an adapter or without.
        drafter: Drafts the next tokens; it learns from the completions.
        prefix: Tokens that most prompts begin with. Other prompts are read from where they differ.
        pad_id: Any token id.
        eos_id: Id of the token that ends a completion.
        is_finished: Returns whether a completion ends with its last token although it is not EOS.
        max_new_tokens: Maximum length of a completion.
        dtype: Data type of hidden states; None for that of the output embeddings.
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
        dtype: torch.dtype | None = None,
    ) -> None:
        self._model = model
        self._drafter = drafter
        self._prefix = list(prefix)
        self._pad_id = pad_id
        self._eos_id = eos_id
        self._is_finished = is_finished
        self._max_new_tokens = max_new_tokens
        self._base: PreTrainedModel = getattr(model, "get_base_model", lambda: model)()
        output_weight = model.get_output_embeddings().weight
        self._vocab_size = len(output_weight)
        self._device, self._dtype = output_weight.device, dtype or output_weight.dtype
        self._pass_cost_tokens = _PASS_COST_TOKENS.get(self._device.type, _PASS_COST_TOKENS_ACCELERATOR)
        self._prompt_tokens = _PROMPT_TOKENS.get(self._device.type, _PROMPT_TOKENS_ACCELERATOR)
        self._cache_argument = cache_argument_name(self._base)
        self._cache = LockstepCache(model.config.get_text_config().num_hidden_layers)
        self._read_prefix()

    def _read_prefix(self) -> None:
        if self._prefix:
            self._cache.start_batch(1, len(self._prefix))
            with grouped(self._base):
                self._forward(0, [self._prefix], [0], num_logits=1)
            self._cache.keep_prefix(len(self._prefix))

    def next_logits(self, prompts: Sequence[list[int]]) -> Tensor:
        """Return the logits of the token after each prompt, shape (prompts, vocab)."""
        with grouped(self._base):
            return self._read_prompts(prompts, range(len(prompts)), num_reserved=0)

    def complete(self, prompts: Sequence[list[int]]) -> list[Completion]:
        """Return the greedy completion of each prompt, given as token ids."""
        # Rows of similar length are adjacent, so that reading the prompts needs little padding.
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        completions = [Completion() for _ in prompts]
        rows = [_Row(completions[index], len(prompts[index]) - 1) for index in order]
        with grouped(self._base):
            logits = self._read_prompts(prompts, order, num_reserved=self._max_new_tokens + _MAX_DRAFT_TOKENS)
            for row, (token,) in zip(rows, _most_likely(logits[:, None]), strict=True):
                self._accept(row, [token], [])
            while rows := self._drop_complete(rows):
                self._decode_step(rows)
        return completions

    def forced_logits(self, short: list[int], long: list[int], continuation: list[int]) -> Tensor:
        """Return the logits after two prompts and after the tokens of given continuations.

        It reads the short prompt with all tokens of the continuation but the last as a draft, and the long prompt with
        the first as a draft; then it drops the short row and reads the rest of the long one token by token.

        Args:
            short: The shorter prompt.
            long: The longer prompt.
            continuation: At least two tokens, the same for both prompts.

        Returns:
            Logits of shape (2, 1 + tokens of the continuation, vocab).
        """
        with grouped(self._base):
            num = len(continuation)
            read = self._read_prompts([short, long], range(2), num_reserved=num)
            drafts = self._forward(0, [continuation, continuation[:1]], [len(short), len(long)], num_logits=num)
            self._cache.move_rows([1], [0], len(long) + 1)
            steps = [
                self._forward(0, [continuation[index : index + 1]], [len(long) + index], num_logits=1)[0]
                for index in range(1, num)
            ]
        return torch.stack([torch.cat([read[:1], drafts[0]]), torch.cat([read[1:], drafts[1, -1:], *steps])])

    def _decode_step(self, rows: list[_Row]) -> None:
        """Run one forward pass over all rows, which generates at least one token for each."""
        max_tokens = min(_MAX_DRAFT_TOKENS, _MAX_LOGITS // (len(rows) * self._vocab_size) - 1)
        drafts = []
        for row in rows:
            num_left = self._max_new_tokens - len(row.completion.tokens) - 1
            draft = self._drafter.draft(row.completion.tokens, min(max_tokens, num_left))
            # The token before EOS predicts EOS, so reading EOS would generate nothing.
            drafts.append(list(itertools.takewhile(lambda draft_token: draft_token.token != self._eos_id, draft)))
        width = best_width(drafts, self._pass_cost_tokens)
        draft_ids = [[draft_token.token for draft_token in draft[: width - 1]] for draft in drafts]
        tokens = [[row.last_token, *ids] for row, ids in zip(rows, draft_ids, strict=True)]
        width = max(map(len, tokens))
        logits = self._forward(0, tokens, [row.position for row in rows], num_logits=width)
        for row, ids, likely in zip(rows, draft_ids, _most_likely(logits), strict=True):
            self._accept(row, likely[width - 1 - len(ids) :], ids)

    def _accept(self, row: _Row, likely: list[int], draft: list[int]) -> None:
        """Append the most likely tokens up to and including the first that differs from the draft."""
        completion = row.completion
        start = len(completion.tokens)
        for index, token in enumerate(likely):
            row.position += 1
            row.last_token = token
            if token == self._eos_id:
                completion.is_complete = True
                break
            completion.tokens.append(token)
            if self._is_finished(completion.tokens):
                completion.is_complete = True
                break
            if index == len(draft) or draft[index] != token:
                break
        has_eos = row.last_token == self._eos_id
        self._drafter.learn([*completion.tokens, self._eos_id] if has_eos else completion.tokens, start)

    def _drop_complete(self, rows: list[_Row]) -> list[_Row]:
        """Return the incomplete rows, after moving the last of them into the places of complete ones."""
        is_active = [
            not row.completion.is_complete and len(row.completion.tokens) < self._max_new_tokens for row in rows
        ]
        num_active = sum(is_active)
        holes = [index for index in range(num_active) if not is_active[index]]
        movers = [index for index in range(num_active, len(rows)) if is_active[index]]
        self._cache.move_rows(movers, holes, max((rows[index].position for index in movers), default=0))
        for hole, mover in zip(holes, movers, strict=True):
            rows[hole] = rows[mover]
        return rows[:num_active]

    def _read_prompts(self, prompts: Sequence[list[int]], order: Sequence[int], num_reserved: int) -> Tensor:
        """Read prompts into the rows of the cache.

        Args:
            prompts: Token ids.
            order: Index of the prompt of each row.
            num_reserved: Slots to reserve after the longest prompt.

        Returns:
            Logits after the prompt of each row, shape (rows, vocab).
        """
        ordered = [prompts[index] for index in order]
        starts = [min(common_prefix_length(self._prefix, prompt), len(prompt) - 1) for prompt in ordered]
        self._cache.start_batch(len(ordered), max(map(len, ordered)) + num_reserved)
        logits = []
        first = 0
        while first < len(ordered):
            end, width = first, 0
            while end < len(ordered):
                width = max(width, len(ordered[end]) - starts[end])
                if end > first and width * (end + 1 - first) > self._prompt_tokens:
                    break
                end += 1
            suffixes = [prompt[start:] for prompt, start in zip(ordered[first:end], starts[first:end], strict=True)]
            logits.append(self._forward(first, suffixes, starts[first:end], num_logits=1)[:, 0])
            first = end
        return torch.cat(logits)

    def _forward(self, first_row: int, tokens: list[list[int]], starts: list[int], num_logits: int) -> Tensor:
        """Run the model over rows of tokens, padded on the left.

        Args:
            first_row: Index of the first row in the cache.
            tokens: Token ids of each row.
            starts: Position of the first token of each row.
            num_logits: Number of tokens per row, from the end, whose logits are returned.

        Returns:
            Logits of shape (rows, num_logits, vocab).
        """
        width = max(map(len, tokens))
        padding = [width - len(row) for row in tokens]
        ids = torch.tensor([[self._pad_id] * pad + row for pad, row in zip(padding, tokens, strict=True)])
        first_positions = torch.tensor([start - pad for start, pad in zip(starts, padding, strict=True)])
        positions = first_positions[:, None] + torch.arange(width)  # (rows, width)
        positions = positions.masked_fill(torch.arange(width) < torch.tensor(padding)[:, None], -1)
        length = int(positions.max()) + 1
        ids, positions = ids.to(self._device), positions.to(self._device)
        self._cache.plan_forward(first_row, positions, length)
        # Padding attends to the first slot, because attention to no slot is undefined.
        positions = positions.clamp(min=0)
        mask = torch.arange(length, device=self._device) <= positions[:, None, :, None]  # (rows, 1, width, length)
        if not is_grouped(self._base):
            mask = torch.zeros(mask.shape, dtype=self._dtype, device=self._device).masked_fill_(
                ~mask, torch.finfo(self._dtype).min
            )
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            # As indices: a slice of few tokens of each row is not contiguous, and its product with the output
            # embeddings would copy them for every row.
            logits_to_keep=torch.arange(width - num_logits, width, device=self._device),
            **{self._cache_argument: self._cache},
        )
        return cast(Tensor, output.logits)


def _most_likely(logits: Tensor) -> list[list[int]]:
    """Return the most likely token ids; logits of shape (rows, tokens, vocab)."""
    # Four times as fast as argmax in bfloat16 on a CPU; like argmax, it returns the first of equal values.
    return cast(list[list[int]], logits.max(dim=-1).indices.tolist())


def common_prefix_length(*sequences: Sequence[int]) -> int:
    """Return the number of items that all sequences begin with."""
    length = 0
    for items in zip(*sequences, strict=False):
        if len(set(items)) > 1:
            break
        length += 1
    return length
