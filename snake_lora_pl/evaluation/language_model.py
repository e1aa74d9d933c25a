"""A language model as a policy: boards become prompts, completions become moves, many games in one batch.

A move costs one pass over the prompt and one over each token that is written. What all prompts of a style begin with is
read once and kept; what differs is read for all games together; the cache of keys and values lies in one buffer that is
written in place, never copied for a token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from snake_lora_pl.errors import UserError
from snake_lora_pl.evaluation.policy import Answer
from snake_lora_pl.game.board import Board, Move
from snake_lora_pl.game.text import Style, read_move

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

READINGS = ("generate", "score")


class LanguageModelPolicy:
    """Plays by greedy decoding.

    Two ways to read a move, named in every result:

    - ``generate``: the model writes its completion, and the move is read from its conclusion; anything else is no move.
    - ``score``: the completions of the four moves are compared at the token where they part, in one pass. It fits a
      style whose completions part at one token; the model cannot answer nonsense then.

    Args:
        model: A causal language model, with an adapter or without.
        tokenizer: Its tokenizer.
        encode_prompts: From prompts to token ids, as in training: template included.
        style: The text format that the model was trained on.
        name: What to call the policy in a table.
        reading: ``generate`` or ``score``.
        legal_mask: Compare legal moves only; needs ``score``.
        max_new_tokens: Longest completion; a longer one names no move.
        max_batch: Boards in one pass; more are taken in turns.
        compute_context: Makes the context that the model computes in, such as autocast.

    Raises:
        UserError: If ``reading`` is unknown, does not fit the style, or ``legal_mask`` goes without ``score``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        encode_prompts: Callable[[Sequence[str]], list[list[int]]],
        style: Style,
        *,
        name: str,
        reading: str = "generate",
        legal_mask: bool = False,
        max_new_tokens: int = 192,
        max_batch: int = 128,
        compute_context: Callable[[], AbstractContextManager] = contextlib.nullcontext,
    ) -> None:
        if reading not in READINGS:
            raise UserError(f"play.reading must be one of {', '.join(READINGS)}, not '{reading}'.")
        if legal_mask and reading != "score":
            raise UserError("play.legal_mask=true needs play.reading=score: a mask compares moves, it does not write.")
        self.name = name
        self.reading = f"{reading}+mask" if legal_mask else reading
        self._model = model
        self._tokenizer = tokenizer
        self._encode_prompts = encode_prompts
        self._style = style
        self._scores = reading == "score"
        self._legal_mask = legal_mask
        self._max_new_tokens = max_new_tokens
        self._max_batch = max_batch
        self._compute_context = compute_context
        self._device = next(model.parameters()).device
        self._pad_id = int(tokenizer.pad_token_id)
        self._eos_id = int(tokenizer.eos_token_id)
        self._head: _Head | None = None
        self._lead_ids, self._move_ids = self._find_parting() if self._scores else ([], {})

    @torch.no_grad()
    def answer(self, boards: Sequence[Board], seeds: Sequence[int]) -> list[Answer]:
        """The model's words and move on each board; the seeds are not used, decoding is greedy."""
        was_training = self._model.training
        self._model.eval()
        try:
            with self._compute_context():
                return [
                    answer
                    for start in range(0, len(boards), self._max_batch)
                    for answer in self._answer_batch(boards[start : start + self._max_batch])
                ]
        finally:
            self._model.train(was_training)

    def _answer_batch(self, boards: Sequence[Board]) -> list[Answer]:
        prompts = [ids + self._lead_ids for ids in self._encode_prompts([self._style.write_prompt(b) for b in boards])]
        head = self._find_head(prompts, boards[0].size)
        logits, state = self._read(head, [ids[len(head.ids) :] for ids in prompts])
        if self._scores:
            return [self._best_move(row, board) for row, board in zip(logits, boards, strict=True)]
        words = self._write(logits, state)
        return [Answer(read_move(text), text) for text in words]

    # ------------------------------------------------------------------ the two readings

    def _find_parting(self) -> tuple[list[int], dict[Move, int]]:
        """The tokens that the four moves' completions share at their beginning, and the one that tells each apart."""
        board = _sample_boards(10)[0]
        texts = [self._style.write_completion(board, move) for move in Move]
        encoded = [self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        num_shared = _common_length(encoded)
        parting = {move: ids[num_shared] for move, ids in zip(Move, encoded, strict=True) if len(ids) > num_shared}
        if len(set(parting.values())) < len(Move):
            raise UserError(
                f"play.reading=score does not fit style '{self._style.name}': with this tokenizer its four moves do "
                "not part at one token. Set play.reading=generate."
            )
        return encoded[0][:num_shared], parting

    def _best_move(self, logits: Tensor, board: Board) -> Answer:
        moves = board.legal_moves() if self._legal_mask else list(Move)
        # A snake with no legal move dies by its first choice, mask or not.
        best = max(moves or Move, key=lambda move: float(logits[self._move_ids[move]]))
        return Answer(best, best.name)

    def _write(self, logits: Tensor, state: _State) -> list[str]:
        """Greedy completions, each up to EOS, to the end of its conclusion line, or to ``max_new_tokens``."""
        written: list[list[int]] = [[] for _ in range(len(logits))]
        texts = [""] * len(logits)
        open_rows = set(range(len(logits)))
        for step in range(self._max_new_tokens):
            tokens = logits.argmax(dim=-1)
            for row, token in enumerate(tokens.tolist()):
                if row not in open_rows:
                    continue
                if token == self._eos_id:
                    open_rows.discard(row)
                    continue
                written[row].append(token)
                texts[row] = self._tokenizer.decode(written[row], skip_special_tokens=True)
                # A line break after the conclusion: nothing that follows can change the move.
                if texts[row].endswith("\n") and read_move(texts[row]) is not None:
                    open_rows.discard(row)
            if not open_rows or step == self._max_new_tokens - 1:
                break
            logits = state.forward(self._model, tokens[:, None])
        # Words that were cut off name no move, even if they happen to end in one.
        return [text if row not in open_rows else text + "..." for row, text in enumerate(texts)]

    # ------------------------------------------------------------------ reading prompts

    def _find_head(self, prompts: list[list[int]], grid_size: int) -> _Head:
        """Keys and values of the tokens that every prompt of the style begins with, computed once for a grid size."""
        if self._head is None or self._head.grid_size != grid_size:
            samples = self._encode_prompts([self._style.write_prompt(b) for b in _sample_boards(grid_size)])
            ids = samples[0][: _common_length(samples)]
            cache = _BufferedCache(self._num_layers, capacity=len(ids))
            if ids:
                self._model(input_ids=torch.tensor([ids], device=self._device), past_key_values=cache, use_cache=True)
            self._head = _Head(grid_size, ids, cache)
        length = min(_common_length([self._head.ids, *prompts]), min(map(len, prompts)) - 1)
        return self._head if length >= len(self._head.ids) else _Head(grid_size, [], _BufferedCache(0, 0))

    @property
    def _num_layers(self) -> int:
        return int(self._model.config.num_hidden_layers)

    def _read(self, head: _Head, tails: list[list[int]]) -> tuple[Tensor, _State]:
        """Logits after each prompt, shape (batch, vocab), and the state to write from."""
        width = max(map(len, tails))
        # Left padding: all rows go on from the same place.
        ids = torch.tensor([[self._pad_id] * (width - len(tail)) + tail for tail in tails], device=self._device)
        own = torch.tensor([[0] * (width - len(tail)) + [1] * len(tail) for tail in tails], device=self._device)
        capacity = len(head.ids) + width + (0 if self._scores else self._max_new_tokens)
        cache = _BufferedCache(self._num_layers, capacity)
        if head.ids:
            cache.start_from(head.cache, batch_size=len(tails))
        mask = torch.cat([own.new_ones(len(tails), len(head.ids)), own], dim=1)
        state = _State(cache, mask[:, : len(head.ids)], torch.full((len(tails),), len(head.ids), device=self._device))
        return state.forward(self._model, ids, own), state


class _Head:
    """Tokens that every prompt begins with, and their keys and values."""

    def __init__(self, grid_size: int, ids: list[int], cache: _BufferedCache) -> None:
        self.grid_size = grid_size
        self.ids = ids
        self.cache = cache


class _State:
    """Where a batch stands: the cache, which of its places count, and each row's next position."""

    def __init__(self, cache: _BufferedCache, mask: Tensor, next_position: Tensor) -> None:
        self._cache = cache
        self._mask = mask  # (batch, places)
        self._next_position = next_position  # (batch,)

    def forward(self, model: PreTrainedModel, ids: Tensor, own: Tensor | None = None) -> Tensor:
        """Read more tokens.

        Args:
            model: The model.
            ids: int64 of shape (batch, tokens).
            own: 1 where a token counts, 0 on padding; None where all count.

        Returns:
            Logits after the last token, float, shape (batch, vocab).
        """
        own = torch.ones_like(ids) if own is None else own
        self._mask = torch.cat([self._mask, own], dim=1)
        positions = self._next_position[:, None] + (own.cumsum(dim=1) - 1).clamp(min=0)
        self._next_position = self._next_position + own.sum(dim=1)
        return model(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]


class _BufferedLayer(DynamicLayer):
    """One layer's keys and values in a buffer of fixed capacity; new ones are written behind the old."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity
        self._length = 0
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write behind what is there and return views of everything; shapes (batch, heads, places, head_dim)."""
        if self._buffers is None:
            self.lazy_initialization(key_states, value_states)
            batch, heads, _, width = key_states.shape
            shape = (batch, heads, self._capacity)
            self._buffers = (
                key_states.new_empty(*shape, width),
                value_states.new_empty(*shape, value_states.shape[-1]),
            )
        start, self._length = self._length, self._length + key_states.shape[-2]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start : self._length] = states
        self.keys, self.values = (buffer[:, :, : self._length] for buffer in self._buffers)
        return self.keys, self.values


class _BufferedCache(Cache):
    def __init__(self, num_layers: int, capacity: int) -> None:
        super().__init__(layers=[_BufferedLayer(capacity) for _ in range(num_layers)])

    def start_from(self, head: _BufferedCache, batch_size: int) -> None:
        """Begin with one row's keys and values, for every row of a batch."""
        for layer, head_layer in zip(self.layers, head.layers, strict=True):
            layer.update(
                head_layer.keys.expand(batch_size, -1, -1, -1), head_layer.values.expand(batch_size, -1, -1, -1)
            )


def _sample_boards(size: int) -> list[Board]:
    """Boards that differ in all that a prompt can say of a position."""
    last = size - 1
    return [
        Board(size, ((0, 0),), (last, last)),
        Board(size, ((last, last), (last, last - 1)), (0, 0)),
        Board(size, ((0, last), (1, last), (1, last - 1)), (last, 0)),
        Board(size, ((1, 1), (0, 1), (0, 0)), (2, 1)),
    ]


def _common_length(sequences: Sequence[Sequence[int]]) -> int:
    """Number of items that all sequences begin with."""
    length = 0
    for items in zip(*sequences, strict=False):
        if len(set(items)) > 1:
            break
        length += 1
    return length
