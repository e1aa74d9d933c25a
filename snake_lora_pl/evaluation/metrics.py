"""Metrics that know Snake, handed to the training module as ``text_metrics`` and never imported by it."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from snake_lora_pl.game import Move
from snake_lora_pl.game.text import read_announced_move, read_board, read_move


class SnakeMoveMetrics(Metric):
    """Accuracy and legality of the moves in completions, over rows of text.

    Predictions under teacher forcing follow the true text, so that a conclusion after an announcement (``Moving UP``)
    is a copy. What was decided is the move that is named first.

    ``compute()`` returns, each NaN where no row could be judged:

    - ``decision_accuracy``: the share of rows whose announced move is the teacher's, or, where the target announces
      none, whose conclusion is; among rows whose target names a move.
    - ``move_accuracy``: the share whose conclusion names the teacher's move, among rows whose target has a conclusion.
    - ``legal_move_rate``: the share whose conclusion names a move that the rules allow, among those rows whose prompt
      holds the whole board.

    A move that cannot be read counts as wrong and as not legal.

    Attributes:
        decisions: int64 of shape (4, 5): how often each announced move of the teacher (rows: UP, RIGHT, DOWN, LEFT) met
            each of the model (columns: the same, and none that could be read); of this process, until it is synced.
    """

    full_state_update = False

    decisions: Tensor
    judged_moves: Tensor
    right_moves: Tensor
    judged_boards: Tensor
    legal_moves: Tensor

    def __init__(self) -> None:
        super().__init__()
        num_moves = len(Move)
        self.add_state(
            "decisions", default=torch.zeros(num_moves, num_moves + 1, dtype=torch.int64), dist_reduce_fx="sum"
        )
        for name in ("judged_moves", "right_moves", "judged_boards", "legal_moves"):
            self.add_state(name, default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, prompts: list[str], targets: list[str], predictions: list[str]) -> None:
        """Judge rows.

        Args:
            prompts: Text that holds the board.
            targets: The teacher's completions.
            predictions: The model's completions, one for each target.
        """
        for prompt, target, prediction in zip(prompts, targets, predictions, strict=True):
            wanted, said = read_move(target), read_move(prediction)
            wanted_first, said_first = read_announced_move(target), read_announced_move(prediction)
            if wanted_first is None:
                wanted_first, said_first = wanted, said
            if wanted_first is not None:
                self.decisions[move_index(wanted_first), move_index(said_first)] += 1
            if wanted is None:
                continue
            self.judged_moves += 1
            self.right_moves += int(said == wanted)
            board = read_board(prompt)
            if board is not None:
                self.judged_boards += 1
                self.legal_moves += int(said is not None and said in board.legal_moves())

    def compute(self) -> dict[str, Tensor]:
        """Return the rates."""
        return {
            "decision_accuracy": self.decisions.diagonal().sum() / self.decisions.sum(),
            "move_accuracy": self.right_moves / self.judged_moves,
            "legal_move_rate": self.legal_moves / self.judged_boards,
        }


def move_index(move: Move | None) -> int:
    """Place of a move in a table of moves; the last one is that of no move."""
    return len(Move) if move is None else list(Move).index(move)
