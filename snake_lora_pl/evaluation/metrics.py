"""Metrics that know Snake, handed to the training module as ``text_metrics`` and never imported by it."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from snake_lora_pl.game.text import read_board, read_move


class SnakeMoveMetrics(Metric):
    """Accuracy and legality of the move in a completion's conclusion, over rows of text.

    ``compute()`` returns ``move_accuracy``, the share of rows whose conclusion names the teacher's move, among rows
    whose target names one; and ``legal_move_rate``, the share whose conclusion names a move that the rules allow, among
    rows whose prompt holds the whole board. A conclusion that cannot be read counts as wrong and as not legal. Each is
    NaN where no row could be judged.
    """

    full_state_update = False

    judged_moves: Tensor
    right_moves: Tensor
    judged_boards: Tensor
    legal_moves: Tensor

    def __init__(self) -> None:
        super().__init__()
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
            if wanted is None:
                continue
            self.judged_moves += 1
            self.right_moves += int(said == wanted)
            board = read_board(prompt)
            if board is not None:
                self.judged_boards += 1
                self.legal_moves += int(said is not None and said in board.legal_moves())

    def compute(self) -> dict[str, Tensor]:
        """Return the two rates."""
        return {
            "move_accuracy": self.right_moves / self.judged_moves,
            "legal_move_rate": self.legal_moves / self.judged_boards,
        }
