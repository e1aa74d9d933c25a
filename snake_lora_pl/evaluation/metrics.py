"""Move metrics for validation rows; the training module receives them as ``text_metrics`` and does not know Snake."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from snake_lora_pl.game import Move
from snake_lora_pl.game.text import read_announced_move, read_move, read_moves


class SnakeMoveMetrics(Metric):
    """Accuracy and legality of the moves in completions.

    Predictions under teacher forcing see the target text, so a conclusion after an announcement (``Moving UP``) is a
    copy. The decision is the move that the completion names first.

    ``compute()`` returns the following rates, each NaN if there is no row to judge:

    - ``decision_accuracy``: share of rows whose announced move equals the teacher's, among rows whose target names a
      move. If the target announces none, its conclusion is compared.
    - ``move_accuracy``: share of rows whose conclusion names the teacher's move, among rows whose target has a
      conclusion.
    - ``legal_move_rate``: share of rows whose conclusion names a legal move, among those of these rows whose prompt
      contains the whole board or states which moves are legal.
    - ``trap_rate``: share of rows whose decision is a trap (see ``PromptMoves``), among rows with a decision of the
      teacher whose prompt offers both a trap and a safe move.

    A move that cannot be read counts as wrong and illegal, but not as a trap.

    Attributes:
        decisions: Confusion matrix of this rank, until synced: int64 of shape (4, 5), number of rows with each decision
            of the teacher (rows: UP, RIGHT, DOWN, LEFT) and of the model (columns: the same, unreadable).
    """

    full_state_update = False

    decisions: Tensor
    judged_moves: Tensor
    right_moves: Tensor
    judged_boards: Tensor
    legal_moves: Tensor
    offered_traps: Tensor
    taken_traps: Tensor

    def __init__(self) -> None:
        super().__init__()
        num_moves = len(Move)
        self.add_state(
            "decisions", default=torch.zeros(num_moves, num_moves + 1, dtype=torch.int64), dist_reduce_fx="sum"
        )
        for name in ("judged_moves", "right_moves", "judged_boards", "legal_moves", "offered_traps", "taken_traps"):
            self.add_state(name, default=torch.tensor(0), dist_reduce_fx="sum")

    @override
    def update(self, prompts: list[str], targets: list[str], predictions: list[str]) -> None:
        """Add rows.

        Args:
            prompts: Texts that contain the prompt of a row.
            targets: The teacher's completions.
            predictions: The model's completions.
        """
        for prompt, target, prediction in zip(prompts, targets, predictions, strict=True):
            expected, predicted = read_move(target), read_move(prediction)
            expected_decision, decision = read_announced_move(target), read_announced_move(prediction)
            if expected_decision is None:
                expected_decision, decision = expected, predicted
            # Read once for both: without an announcement, the expected decision is the expected move.
            moves = None if expected is None and expected_decision is None else read_moves(prompt)
            if expected_decision is not None:
                self.decisions[move_index(expected_decision), move_index(decision)] += 1
                if moves is not None and moves.is_decisive:
                    self.offered_traps += 1
                    self.taken_traps += int(decision in moves.traps)
            if expected is None:
                continue
            self.judged_moves += 1
            self.right_moves += int(predicted == expected)
            if moves is not None:
                self.judged_boards += 1
                self.legal_moves += int(predicted in moves.legal)

    @override
    def compute(self) -> dict[str, Tensor]:
        return {
            "decision_accuracy": self.decisions.diagonal().sum() / self.decisions.sum(),
            "move_accuracy": self.right_moves / self.judged_moves,
            "legal_move_rate": self.legal_moves / self.judged_boards,
            "trap_rate": self.taken_traps / self.offered_traps,
        }


def move_index(move: Move | None) -> int:
    """Return the index of a move in a confusion matrix; None has the last one."""
    return len(Move) if move is None else list(Move).index(move)
