"""Register a teacher, then run any command.

python examples/custom_teacher.py generate --out clockwise.jsonl --games 100 --teacher clockwise --style compact
"""

from snake_lora_pl.__main__ import main
from snake_lora_pl.game import Board, Move, register_teacher


@register_teacher("clockwise")
def clockwise(board: Board) -> Move | None:
    """Take the first legal move in the order UP, RIGHT, DOWN, LEFT."""
    return next(iter(board.legal_moves()), None)


if __name__ == "__main__":
    raise SystemExit(main())
