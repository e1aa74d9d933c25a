"""Language model as a policy: boards become prompts, completions become moves, many games per batch.

``Style.write_prompt`` turns a board into a prompt, and ``game.text.read_move`` turns a completion into a move. While
games are played, the adapter is merged into its base model and the prefix that the prompts of a style share is cached.
``decoding.decoder`` generates the completions.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn

from snake_lora_pl.adapters.temporary_merge import temporarily_merged
from snake_lora_pl.decoding.completion import Completion
from snake_lora_pl.decoding.decoder import Decoder
from snake_lora_pl.decoding.drafter import Drafter
from snake_lora_pl.decoding.exactness import settle_weights
from snake_lora_pl.decoding.lockstep_decoder import common_prefix_length
from snake_lora_pl.errors import UserError
from snake_lora_pl.evaluation.policy import Answer, reading_problems
from snake_lora_pl.game.board import Board, Move
from snake_lora_pl.game.text import Style, find_move, read_move
from snake_lora_pl.models.limits import ModelLimits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Number of boards whose target completions the drafter learns first; later it learns the model's completions.
_NUM_DRAFTER_BOARDS = 16

# Answers that are remembered: about 100 MB with a long prompt and completion each.
_MAX_ANSWERS = 2**16


class LanguageModelPolicy:
    """Plays by greedy decoding.

    There are two ways to read a move, and every result names the one used:

    - ``generate``: decode a completion and read the move from its conclusion; any other completion names no move.
    - ``score``: compare the likelihoods of the four moves' completions at the first token in which they differ, in one
      forward pass. The style's completions must differ at one token; the model cannot give an invalid answer.

    Args:
        model: A causal language model, with an adapter or without.
        tokenizer: Its tokenizer.
        encode_prompts: Returns the token ids of prompts, encoded with the template of the training.
        style: Text format that the model was trained on.
        name: Name of the policy in tables.
        reading: ``generate`` or ``score``.
        legal_mask: Compare legal moves only; needs ``score``.
        max_new_tokens: Maximum length of a completion; a longer one names no move.
        max_batch: Maximum number of boards decoded at a time.
        compute_context: Returns the context for forward passes, such as autocast.

    Raises:
        UserError: If ``reading`` is unknown or does not fit the style, or ``legal_mask`` is set without ``score``.
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
        compute_context: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        if problems := reading_problems(reading, legal_mask=legal_mask):
            raise UserError("; ".join(problems))
        self.name = name
        self.reading = f"{reading}+mask" if legal_mask else reading
        self._model = model
        self._tokenizer = tokenizer
        self._encode_prompts = encode_prompts
        self._style = style
        self._uses_score = reading == "score"
        self._legal_mask = legal_mask
        self._max_new_tokens = max_new_tokens
        self._max_batch = max_batch
        self._compute_context = compute_context
        self._pad_id = int(tokenizer.pad_token_id)
        self._eos_id = int(tokenizer.eos_token_id)
        self._limits = ModelLimits.of(model)
        self._has_warned = False
        self._session: _Session | None = None
        self._ends_line: dict[int, bool] = {}
        self._shared_ids, self._move_ids = self._find_move_tokens() if self._uses_score else ([], {})

    @contextlib.contextmanager
    def playing(self) -> Iterator[None]:
        """Cache what answers share while the context is open.

        The adapter is merged, the model is in eval mode and the prefix of the prompts is cached, so the weights must
        not change meanwhile. Afterwards the weights are restored bit for bit.
        """
        with self._open_session() as session:
            yield
            if session.num_decoded < session.num_asked:
                share = 1 - session.num_decoded / session.num_asked
                logger.info("%s: %.0f%% of %d moves from equal prompts", self.name, 100 * share, session.num_asked)

    @contextlib.contextmanager
    def _open_session(self) -> Iterator[_Session]:
        if self._session is not None:
            yield self._session
            return
        with in_eval_mode(self._model), contextlib.ExitStack() as stack:
            with self._inference():
                settle_weights(self._model)
            stack.enter_context(temporarily_merged(self._model))
            self._session = _Session()
            try:
                yield self._session
            finally:
                self._session = None

    @contextlib.contextmanager
    def _inference(self) -> Iterator[None]:
        # Every pass has another shape, for which layers compiled for training would be compiled again.
        with torch.compiler.set_stance("force_eager"), torch.no_grad(), self._compute_context():
            yield

    def answer(self, boards: Sequence[Board], seeds: Sequence[int]) -> list[Answer]:
        """Return the model's completion and move on each board; greedy decoding does not use the seeds."""
        with self._open_session() as session, self._inference():
            # Greedy decoding is a function of the prompt. Prompts that do not contain the board repeat in other games,
            # and a snake that circles until it starves is decoded for one round only.
            questions = [self._ask(board) for board in boards]
            answers = {question: session.answers[question] for question in questions if question in session.answers}
            new = {q: board for q, board in zip(questions, boards, strict=True) if q not in answers}
            for start in range(0, len(new), self._max_batch):
                batch = dict(itertools.islice(new.items(), start, start + self._max_batch))
                answers.update(zip(batch, self._answer_batch(batch, session.decoders), strict=True))
            session.remember({question: answers[question] for question in new}, len(questions))
            return [answers[question] for question in questions]

    def _ask(self, board: Board) -> _Question:
        legal_moves = tuple(board.legal_moves()) if self._legal_mask else None
        return _Question(board.size, self._style.write_prompt(board), legal_moves)

    def _answer_batch(self, questions: dict[_Question, Board], decoders: dict[int, Decoder]) -> list[Answer]:
        if not questions:
            return []
        grid_size = next(iter(questions)).grid_size
        if grid_size not in decoders:
            self.check_prompts(grid_size)
            decoders[grid_size] = self._make_decoder(list(questions.values()))
        encoded = self._encode_prompts([question.prompt for question in questions])
        prompts = [ids + self._shared_ids for ids in encoded]
        fits = [self._fits(ids) for ids in prompts]
        if not all(fits):
            fitting = {q: board for (q, board), fit in zip(questions.items(), fits, strict=True) if fit}
            answers = iter(self._answer_batch(fitting, decoders))
            return [next(answers) if fit else Answer(None, "") for fit in fits]
        if self._uses_score:
            logits = decoders[grid_size].next_logits(prompts)
            return [self._best_move(row, question.legal_moves) for row, question in zip(logits, questions, strict=True)]
        texts = map(self._decode_completion, decoders[grid_size].complete(prompts))
        return [Answer(read_move(text), text) for text in texts]

    def prompt_text(self, board: Board) -> str:
        """Return the text that the model reads for a board: the prompt in its template, with special tokens."""
        return self._decode(self._encode([board])[0], skip_special_tokens=False)

    def move_probabilities(self, board: Board) -> dict[Move, float] | None:
        """Return the probability that the model gives to each move's name where its completion names the move.

        The context is the prompt and the completion up to the name of the move, which in styles with bare moves is the
        prompt alone. A name of several tokens has the product of their probabilities. The probabilities are shares of
        all possible texts, so they sum to 1 minus the probability of other text.

        Returns:
            The probabilities; None if the completion has no conclusion, or the model cannot read the prompt.
        """
        answer = self.answer([board], [0])[0]
        prompt = self._encode([board])[0]
        if self._uses_score:
            start, names = self._shared_ids, {move: [token] for move, token in self._move_ids.items()}
        else:
            found = find_move(answer.completion)
            if found is None and self._style.write_completion(board, Move.UP) != Move.UP.name:
                return None
            start, names = self._tokenize_moves(answer.completion[: found[1]] if found else "")
        if not self._fits(prompt + self._shared_ids):
            return None
        contexts = dict.fromkeys(tuple(names[move][:end]) for move in Move for end in range(len(names[move])))
        with self._open_session() as session, self._inference():
            logits = session.decoders[board.size].next_logits([[*prompt, *start, *context] for context in contexts])
            rows = dict(zip(contexts, logits.float().log_softmax(-1), strict=True))
            scores = {
                move: sum(float(rows[tuple(ids[:end])][token]) for end, token in enumerate(ids))
                for move, ids in names.items()
            }
        return {move: math.exp(score) for move, score in scores.items()}

    def _tokenize_moves(self, text: str) -> tuple[list[int], dict[Move, list[int]]]:
        """Return the tokens that a text followed by each move's name begins with, and the other tokens of each."""
        encoded = [cast(list[int], self._tokenizer(text + m.name, add_special_tokens=False)["input_ids"]) for m in Move]
        num_shared = common_prefix_length(*encoded)
        return encoded[0][:num_shared], {move: ids[num_shared:] for move, ids in zip(Move, encoded, strict=True)}

    def check_prompts(self, grid_size: int) -> None:
        """Check that the model can read and complete the prompts of a game's first positions.

        Raises:
            UserError: If it cannot.
        """
        shortest, *others = self._encode(_sample_boards(grid_size))
        source = f"games on {grid_size}x{grid_size} in style {self._style.name}"
        self._limits.check_prompts({source: shortest + self._shared_ids}, self._num_new_tokens)
        self._limits.check_ids({source: [*shortest, *itertools.chain(*others)]}, self._tokenizer)

    @property
    def _num_new_tokens(self) -> int:
        return 0 if self._uses_score else self._max_new_tokens

    def _fits(self, token_ids: Sequence[int]) -> bool:
        """Return whether the model can read and complete a prompt, which grows with the snake."""
        max_tokens = self._limits.max_tokens
        if max_tokens is None or len(token_ids) + self._num_new_tokens <= max_tokens:
            return True
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%s: a prompt of %d tokens and a completion of up to %d exceed the %d tokens that the model reads. In "
                "such positions the model names no move, which ends the game.",
                self.name,
                len(token_ids),
                self._num_new_tokens,
                max_tokens,
            )
        return False

    def _encode(self, boards: Sequence[Board]) -> list[list[int]]:
        return self._encode_prompts([self._style.write_prompt(board) for board in boards])

    def _encode_completion(self, board: Board, move: Move) -> list[int]:
        text = self._style.write_completion(board, move)
        return cast(list[int], self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _decode(self, tokens: list[int], *, skip_special_tokens: bool = True) -> str:
        return cast(str, self._tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens))

    def _make_decoder(self, boards: Sequence[Board]) -> Decoder:
        """Return a decoder for boards of the size of ``boards``, with the prefix that their prompts share."""
        drafter = Drafter()
        for board in () if self._uses_score else boards[:_NUM_DRAFTER_BOARDS]:
            for move in Move:
                drafter.learn([*self._encode_completion(board, move), self._eos_id])
        samples = self._encode(_sample_boards(boards[0].size))
        return Decoder(
            self._model,
            drafter,
            samples[0][: common_prefix_length(*samples)],
            pad_id=self._pad_id,
            eos_id=self._eos_id,
            is_finished=self._is_finished,
            max_new_tokens=self._max_new_tokens,
        )

    def _find_move_tokens(self) -> tuple[list[int], dict[Move, int]]:
        """Return the tokens that the completions of the four moves begin with, and each move's next token."""
        board = _sample_boards(10)[0]
        encoded = [self._encode_completion(board, move) for move in Move]
        num_shared = common_prefix_length(*encoded)
        next_tokens = {move: ids[num_shared] for move, ids in zip(Move, encoded, strict=True) if len(ids) > num_shared}
        if len(set(next_tokens.values())) < len(Move):
            raise UserError(
                f"play.reading=score does not fit style '{self._style.name}': with this tokenizer, the completions of "
                "the four moves do not differ at one token. Set play.reading=generate."
            )
        return encoded[0][:num_shared], next_tokens

    def _best_move(self, logits: Tensor, legal_moves: tuple[Move, ...] | None) -> Answer:
        # Without a legal move every move ends the game, so the mask does not apply.
        best = max(legal_moves or Move, key=lambda move: float(logits[self._move_ids[move]]))
        return Answer(best, best.name)

    def _is_finished(self, tokens: list[int]) -> bool:
        """Return whether a completion ends without EOS: after the line of the conclusion nothing changes the move."""
        if tokens[-1] not in self._ends_line:
            self._ends_line[tokens[-1]] = self._decode(tokens[-1:], skip_special_tokens=False).endswith("\n")
        if not self._ends_line[tokens[-1]]:
            return False
        text = self._decode(tokens)
        return text.endswith("\n") and read_move(text) is not None

    def _decode_completion(self, completion: Completion) -> str:
        text = self._decode(completion.tokens)
        # The ellipsis keeps a truncated completion from naming a move that it happens to end with.
        return text if completion.is_complete else text + "..."


class _Question(NamedTuple):
    """All that an answer depends on.

    Attributes:
        grid_size: Cells along one side of the board.
        prompt: Text before the template.
        legal_moves: Moves to choose from; None for all.
    """

    grid_size: int
    prompt: str
    legal_moves: tuple[Move, ...] | None


@dataclass
class _Session:
    """Cache while games are played.

    Attributes:
        answers: The latest answers.
        decoders: Decoders by grid size.
        num_asked: Number of boards.
        num_decoded: Number of answers that the model gave; the others were remembered.
    """

    answers: dict[_Question, Answer] = field(default_factory=dict)
    decoders: dict[int, Decoder] = field(default_factory=dict)
    num_asked: int = 0
    num_decoded: int = 0

    def remember(self, new: dict[_Question, Answer], num_asked: int) -> None:
        """Add answers to a round of questions, and forget the oldest ones if there are too many."""
        self.answers.update(new)
        for question in list(itertools.islice(self.answers, max(0, len(self.answers) - _MAX_ANSWERS))):
            del self.answers[question]
        self.num_asked += num_asked
        self.num_decoded += len(new)


@contextlib.contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Set every submodule to eval mode in the block, then restore the mode of each."""
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for part, was_training in modes.items():
            part.training = was_training


def _sample_boards(size: int) -> list[Board]:
    """Return boards that differ in everything that a prompt can contain."""
    last = size - 1
    return [
        Board(size, ((0, 0),), (last, last)),
        Board(size, ((last, last), (last, last - 1)), (0, 0)),
        Board(size, ((0, last), (1, last), (1, last - 1)), (last, 0)),
        Board(size, ((1, 1), (0, 1), (0, 0)), (2, 1)),
    ]
