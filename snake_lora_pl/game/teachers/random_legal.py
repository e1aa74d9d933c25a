"""The random policy, a baseline for players."""

from __future__ import annotations

import random

from snake_lora_pl.game.board import Board, Move
from snake_lora_pl.game.teachers.registry import Teacher, register_seeded_teacher


@register_seeded_teacher("random_legal")
def random_legal(seed: int) -> Teacher:
    """Return a teacher that draws uniformly from the legal moves; the same seed gives the same sequence of draws."""
    # A string seed, because a game of the same integer seed draws its apples from that.
    rng = random.Random(f"random_legal {seed}")

    def draw(board: Board) -> Move | None:
        moves = board.legal_moves()
        return moves[int(rng.random() * len(moves))] if moves else None

    return draw
