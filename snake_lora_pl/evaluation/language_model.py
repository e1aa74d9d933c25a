"""A language model as a policy: boards become prompts, completions become moves, many games in one batch.

While games are played the adapter is merged into its base, and what all prompts of a style begin with is read once. How
many texts are written together, and several tokens of each in one pass, stands in ``lockstep_decoder``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from snake_lora_pl.adapters.temporary_merge import temporarily_merged
from snake_lora_pl.decoding.drafter import Drafter
from snake_lora_pl.decoding.lockstep_decoder import Completion, LockstepDecoder, common_prefix_length
from snake_lora_pl.errors import UserError
from snake_lora_pl.evaluation.policy import Answer
from snake_lora_pl.game.board import Board, Move
from snake_lora_pl.game.text import Style, read_move

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

READINGS = ("generate", "score")

# Boards whose true completions the drafter begins with; from then on it learns what the model writes.
_NUM_FIRST_BOARDS = 16


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
        self._pad_id = int(tokenizer.pad_token_id)
        self._eos_id = int(tokenizer.eos_token_id)
        self._session: _Session | None = None
        self._line_ends: dict[int, bool] = {}
        self._lead_ids, self._move_ids = self._find_parting() if self._scores else ([], {})

    @contextlib.contextmanager
    def playing(self) -> Iterator[None]:
        """Keep what many answers share from one to the next, as long as the context lasts.

        The adapter is merged, the model in eval mode, the beginning of the prompts read; so nobody may change the
        weights meanwhile. Then all is as it was, to the last bit.
        """
        if self._session is not None:
            yield
            return
        with in_eval_mode(self._model), temporarily_merged(self._model):
            self._session = _Session()
            try:
                yield
            finally:
                self._session = None

    def answer(self, boards: Sequence[Board], seeds: Sequence[int]) -> list[Answer]:
        """The model's words and move on each board; the seeds are not used, decoding is greedy."""
        # Every pass has another shape, so that layers compiled for training would be compiled anew and anew.
        eager = torch.compiler.set_stance("force_eager")
        with self.playing(), eager, torch.no_grad(), self._compute_context():
            assert self._session is not None
            answers = self._session.answers
            # The same board gets the same answer: a snake that circles until it starves costs one round.
            new = [board for board in dict.fromkeys(boards) if board not in answers]
            for start in range(0, len(new), self._max_batch):
                batch = new[start : start + self._max_batch]
                answers.update(zip(batch, self._answer_batch(batch, self._session.decoders), strict=True))
            return [answers[board] for board in boards]

    def _answer_batch(self, boards: Sequence[Board], decoders: dict[int, LockstepDecoder]) -> list[Answer]:
        grid_size = boards[0].size
        if grid_size not in decoders:
            decoders[grid_size] = self._make_decoder(boards)
        prompts = [ids + self._lead_ids for ids in self._encode(boards)]
        if self._scores:
            logits = decoders[grid_size].next_logits(prompts)
            return [self._best_move(row, board) for row, board in zip(logits, boards, strict=True)]
        texts = map(self._text, decoders[grid_size].complete(prompts))
        return [Answer(read_move(text), text) for text in texts]

    def _encode(self, boards: Sequence[Board]) -> list[list[int]]:
        return self._encode_prompts([self._style.write_prompt(board) for board in boards])

    def _make_decoder(self, boards: Sequence[Board]) -> LockstepDecoder:
        """A decoder for boards of the size of these, with the tokens that every prompt begins with."""
        drafter = Drafter()
        for board in () if self._scores else boards[:_NUM_FIRST_BOARDS]:
            for move in Move:
                text = self._style.write_completion(board, move)
                drafter.learn([*self._tokenizer(text, add_special_tokens=False)["input_ids"], self._eos_id])
        samples = self._encode(_sample_boards(boards[0].size))
        return LockstepDecoder(
            self._model,
            drafter,
            samples[0][: common_prefix_length(*samples)],
            samples[0],
            pad_id=self._pad_id,
            eos_id=self._eos_id,
            is_finished=self._ends_text,
            max_new_tokens=self._max_new_tokens,
        )

    # ------------------------------------------------------------------ the two readings

    def _find_parting(self) -> tuple[list[int], dict[Move, int]]:
        """The tokens that the four moves' completions share at their beginning, and the one that tells each apart."""
        board = _sample_boards(10)[0]
        texts = [self._style.write_completion(board, move) for move in Move]
        encoded = [self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        num_shared = common_prefix_length(*encoded)
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

    def _ends_text(self, tokens: list[int]) -> bool:
        """Whether a text is over without EOS: at a line's end after the conclusion, nothing can change the move."""
        if tokens[-1] not in self._line_ends:
            self._line_ends[tokens[-1]] = self._tokenizer.decode(tokens[-1:]).endswith("\n")
        if not self._line_ends[tokens[-1]]:
            return False
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text.endswith("\n") and read_move(text) is not None

    def _text(self, written: Completion) -> str:
        text: str = self._tokenizer.decode(written.tokens, skip_special_tokens=True)
        # Words that were cut off name no move, even if they happen to end in one.
        return text if written.is_complete else text + "..."


@dataclass
class _Session:
    """What is kept while games are played.

    Attributes:
        answers: What was said of each board.
        decoders: What reads and writes, for each size of boards.
    """

    answers: dict[Board, Answer] = field(default_factory=dict)
    decoders: dict[int, LockstepDecoder] = field(default_factory=dict)


@contextlib.contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Every part of a model in eval mode for a while, then each as it was."""
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for part, was_training in modes.items():
            part.training = was_training


def _sample_boards(size: int) -> list[Board]:
    """Boards that differ in all that a prompt can say of a position."""
    last = size - 1
    return [
        Board(size, ((0, 0),), (last, last)),
        Board(size, ((last, last), (last, last - 1)), (0, 0)),
        Board(size, ((0, last), (1, last), (1, last - 1)), (last, 0)),
        Board(size, ((1, 1), (0, 1), (0, 0)), (2, 1)),
    ]
