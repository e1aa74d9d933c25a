"""The player to be better than."""

from __future__ import annotations

import random

from snake_lora_pl.game.board import Board, Move
from snake_lora_pl.game.teachers.registry import Teacher, register_seeded_teacher


@register_seeded_teacher("random_legal")
def random_legal(seed: int) -> Teacher:
    """A teacher that draws uniformly among the legal moves; the same seed draws the same for the same boards."""
    # Not the seed itself: a game of the same seed draws its apples from that.
    rng = random.Random(f"random_legal {seed}")

    def draw(board: Board) -> Move | None:
        moves = board.legal_moves()
        return moves[int(rng.random() * len(moves))] if moves else None

    return draw
