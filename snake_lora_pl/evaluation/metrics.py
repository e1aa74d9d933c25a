"""Metrics that know Snake, handed to the training module as ``text_metrics`` and never imported by it."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

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
    """

    full_state_update = False

    judged_decisions: Tensor
    right_decisions: Tensor
    judged_moves: Tensor
    right_moves: Tensor
    judged_boards: Tensor
    legal_moves: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in (
            "judged_decisions",
            "right_decisions",
            "judged_moves",
            "right_moves",
            "judged_boards",
            "legal_moves",
        ):
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
                self.judged_decisions += 1
                self.right_decisions += int(said_first == wanted_first)
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
            "decision_accuracy": self.right_decisions / self.judged_decisions,
            "move_accuracy": self.right_moves / self.judged_moves,
            "legal_move_rate": self.legal_moves / self.judged_boards,
        }
