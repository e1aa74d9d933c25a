"""Greedy decoding of many texts in lockstep: many rows, several tokens of each, one pass. It knows nothing of Snake.

What all prompts begin with is read once and kept. The rest is read for all rows together; then each pass reads what was
written last and a guess of what follows, and keeps of the guess what the model itself would have written. A row that is
complete leaves the batch, and the last row takes its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from snake_lora_pl.decoding.drafter import Drafter, best_width
from snake_lora_pl.decoding.grouped_attention import grouped, is_grouped
from snake_lora_pl.decoding.lockstep_cache import LockstepCache
from snake_lora_pl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What a pass costs whatever it reads (every weight is loaded once), in tokens that could be read in that time: measured
# with smollm2-135m on two cores, and roughly what the ratio of an accelerator's arithmetic to its memory makes of it.
_PASS_COST_TOKENS = {"cpu": 48}
_PASS_COST_TOKENS_ACCELERATOR = 512

# Most tokens of prompts in one pass: enough for matrix products to run at full speed, and rows of about one length.
_PROMPT_TOKENS = {"cpu": 2048}
_PROMPT_TOKENS_ACCELERATOR = 16384

_MAX_DRAFT_TOKENS = 32

# Most logits of one pass: half a GiB in bfloat16.
_MAX_LOGITS = 2**28


@dataclass
class Written:
    """What the model wrote behind a prompt.

    Attributes:
        tokens: The tokens, without EOS.
        is_complete: Whether it came to an end of its own; otherwise it was cut off.
    """

    tokens: list[int] = field(default_factory=list)
    is_complete: bool = False


@dataclass
class _Row:
    written: Written
    position: int  # of the token that was written last and is still to be read
    pending: int = -1  # that token


class LockstepDecoder:
    """Decodes with one model and one beginning that all prompts share, or most.

    Args:
        model: A causal language model.
        drafter: Guesses the next tokens; it learns from what is written.
        head: Tokens that prompts begin with. A prompt that does not is read from where it differs.
        sample: A prompt, to see whether the model can be decoded so.
        pad_id: Any token.
        eos_id: The token that ends a text.
        ends_text: Whether a text is over with its last token, though no EOS is there.
        max_new_tokens: Longest text.

    Raises:
        UserError: If the model makes something else of the masks and positions that are given to it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        drafter: Drafter,
        head: Sequence[int],
        sample: list[int],
        *,
        pad_id: int,
        eos_id: int,
        ends_text: Callable[[list[int]], bool],
        max_new_tokens: int,
    ) -> None:
        self._model = model
        self._drafter = drafter
        self._head = list(head)
        self._pad_id = pad_id
        self._eos_id = eos_id
        self._ends_text = ends_text
        self._max_new_tokens = max_new_tokens
        self._base: PreTrainedModel = getattr(model, "get_base_model", lambda: model)()
        output_head = model.get_output_embeddings().weight
        self._vocab_size = len(output_head)
        self._device, self._dtype = output_head.device, output_head.dtype
        self._pass_cost_tokens = _PASS_COST_TOKENS.get(self._device.type, _PASS_COST_TOKENS_ACCELERATOR)
        self._prompt_tokens = _PROMPT_TOKENS.get(self._device.type, _PROMPT_TOKENS_ACCELERATOR)
        self._cache = LockstepCache(model.config.get_text_config().num_hidden_layers)
        self._check(sample)

    def _check(self, sample: list[int]) -> None:
        """Compare logits after two prompts with the model's own: architectures differ in what they make of a mask."""
        ids = torch.tensor([sample], device=self._device)
        expected = self._model(input_ids=ids, use_cache=False, logits_to_keep=2).logits[0].float()
        reason: Exception | None = None
        is_alike = False
        try:
            self._read_head()
            off = self.next_logits([sample[:-1], sample]).float() - expected
            # What all logits of a position are off by alike changes no choice; in bfloat16 it can be a tenth of their
            # spread.
            off -= off.mean(dim=-1, keepdim=True)
            # Wrong attention is off by about the spread of the logits; bfloat16 by a hundredth of it.
            is_alike = bool(off.abs().mean() <= 0.1 * expected.std(dim=-1).mean())  # not where there is a NaN
        except (NotImplementedError, TypeError, ValueError) as error:
            reason = error
        if not is_alike:
            raise UserError(
                f"{type(self._base).__name__} cannot play: its attention does not follow the masks and positions that "
                "are given to it. Choose another base, or train without games (play.val_games=0, play.final_games=0)."
            ) from reason

    def _read_head(self) -> None:
        if self._head:
            self._cache.start(1, len(self._head))
            with grouped(self._base):
                self._forward(0, [self._head], [0], num_logits=1)
            self._cache.keep_head(len(self._head))

    def next_logits(self, prompts: Sequence[list[int]]) -> Tensor:
        """Logits of the token after each prompt, shape (prompts, vocab)."""
        with grouped(self._base):
            return self._read(prompts, range(len(prompts)), room=0)

    def write(self, prompts: Sequence[list[int]]) -> list[Written]:
        """What the model writes behind each prompt, greedily."""
        # Rows of one length stand together, so that prompts are read with little padding.
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        written = [Written() for _ in prompts]
        rows = [_Row(written[index], len(prompts[index]) - 1) for index in order]
        with grouped(self._base):
            logits = self._read(prompts, order, room=self._max_new_tokens + _MAX_DRAFT_TOKENS)
            for row, token in zip(rows, _most_likely(logits), strict=True):
                self._accept(row, [token], [])
            while rows := self._close_ranks(rows):
                self._step(rows)
        return written

    def _step(self, rows: list[_Row]) -> None:
        """One pass over all rows: at least a token more for each."""
        max_tokens = min(_MAX_DRAFT_TOKENS, _MAX_LOGITS // (len(rows) * self._vocab_size) - 1)
        drafts = [
            self._drafter.guess(row.written.tokens, min(max_tokens, self._max_new_tokens - len(row.written.tokens) - 1))
            for row in rows
        ]
        width = best_width(drafts, self._pass_cost_tokens)
        guessed = [[guess.token for guess in draft[: width - 1]] for draft in drafts]
        tokens = [[row.pending, *guess] for row, guess in zip(rows, guessed, strict=True)]
        width = max(map(len, tokens))
        logits = self._forward(0, tokens, [row.position for row in rows], num_logits=width)
        for row, guess, likely in zip(rows, guessed, _most_likely(logits), strict=True):
            self._accept(row, likely[width - 1 - len(guess) :], guess)

    def _accept(self, row: _Row, likely: list[int], guess: list[int]) -> None:
        """Take the likeliest tokens, one after the other, as long as what was read before each was no wrong guess."""
        written = row.written
        start = len(written.tokens)
        for index, token in enumerate(likely):
            row.position += 1
            row.pending = token
            if token == self._eos_id:
                written.is_complete = True
                break
            written.tokens.append(token)
            if self._ends_text(written.tokens):
                written.is_complete = True
                break
            if index == len(guess) or guess[index] != token:
                break
        self._drafter.learn([*written.tokens, self._eos_id] if row.pending == self._eos_id else written.tokens, start)

    def _close_ranks(self, rows: list[_Row]) -> list[_Row]:
        """The rows that go on, those behind moved into the places of those that are complete."""
        goes_on = [not row.written.is_complete and len(row.written.tokens) < self._max_new_tokens for row in rows]
        num_left = sum(goes_on)
        holes = [index for index in range(num_left) if not goes_on[index]]
        movers = [index for index in range(num_left, len(rows)) if goes_on[index]]
        self._cache.move_rows(movers, holes, max((rows[index].position for index in movers), default=0))
        for hole, mover in zip(holes, movers, strict=True):
            rows[hole] = rows[mover]
        return rows[:num_left]

    def _read(self, prompts: Sequence[list[int]], order: Sequence[int], room: int) -> Tensor:
        """Read prompts into the rows of the cache, in an order; logits after each, shape (prompts, vocab)."""
        ordered = [prompts[index] for index in order]
        starts = [min(common_length(self._head, prompt), len(prompt) - 1) for prompt in ordered]
        self._cache.start(len(ordered), max(map(len, ordered)) + room)
        logits = []
        first = 0
        while first < len(ordered):
            end, width = first, 0
            while end < len(ordered):
                width = max(width, len(ordered[end]) - starts[end])
                if end > first and width * (end + 1 - first) > self._prompt_tokens:
                    break
                end += 1
            tails = [prompt[start:] for prompt, start in zip(ordered[first:end], starts[first:end], strict=True)]
            logits.append(self._forward(first, tails, starts[first:end], num_logits=1)[:, 0])
            first = end
        return torch.cat(logits)

    def _forward(self, first_row: int, tokens: list[list[int]], starts: list[int], num_logits: int) -> Tensor:
        """One pass: rows of tokens that begin at different positions, padded on the left.

        Returns:
            Logits after the last ``num_logits`` tokens, shape (rows, num_logits, vocab).
        """
        width = max(map(len, tokens))
        padding = [width - len(row) for row in tokens]
        ids = torch.tensor([[self._pad_id] * pad + row for pad, row in zip(padding, tokens, strict=True)])
        first_positions = torch.tensor([start - pad for start, pad in zip(starts, padding, strict=True)])
        positions = first_positions[:, None] + torch.arange(width)
        positions = positions.masked_fill(torch.arange(width) < torch.tensor(padding)[:, None], -1)
        length = int(positions.max()) + 1
        ids, positions = ids.to(self._device), positions.to(self._device)
        self._cache.expect(first_row, positions, length)
        # Padding looks at the first place: attention to nothing at all has no value.
        positions = positions.clamp(min=0)
        mask = torch.arange(length, device=self._device) <= positions[:, None, :, None]
        if not is_grouped(self._base):
            mask = torch.zeros(mask.shape, dtype=self._dtype, device=self._device).masked_fill_(
                ~mask, torch.finfo(self._dtype).min
            )
        return self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            # As indices, for a slice of few tokens of each row is not contiguous, and its product with the output head
            # would copy the head for every row.
            logits_to_keep=torch.arange(width - num_logits, width, device=self._device),
        ).logits


def _most_likely(logits: Tensor) -> list:
    # Four times as fast as argmax in bfloat16 on a CPU, and like it the first where several are equal.
    return logits.max(dim=-1).indices.tolist()


def common_length(*sequences: Sequence[int]) -> int:
    """Number of items that all sequences begin with."""
    length = 0
    for items in zip(*sequences, strict=False):
        if len(set(items)) > 1:
            break
        length += 1
    return length
