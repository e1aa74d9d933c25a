import math

import pytest
import torch

from snake_lora_pl.evaluation.metrics import SnakeMoveMetrics
from snake_lora_pl.game import Board, Move, get_style

BOARD = Board(5, ((2, 0), (1, 0)), (2, 3))
# LEFT is a trap, RIGHT the only safe move, UP and DOWN are not legal.
DECISIVE_BOARD = Board(4, ((1, 0), (1, 1), (0, 1), (0, 2), (1, 2), (2, 2), (3, 2)), (0, 0))


def judge(*rows: tuple[str, str], style: str = "bfs-512", board: Board = BOARD) -> dict[str, float]:
    """Return the rates that the rows define."""
    metrics = SnakeMoveMetrics()
    prompt = get_style(style).write_prompt(board)
    for target, prediction in rows:
        metrics.update([prompt], [target], [prediction])
    return {name: float(value) for name, value in metrics.compute().items() if not math.isnan(value)}


def completion(move: Move, style: str = "bfs-512") -> str:
    return get_style(style).write_completion(BOARD, move)


@pytest.mark.parametrize("style", ["bfs-512", "bfs-1024", "bfs-4096", "compact", "features", "cycle"])
def test_teacher_completion_is_right_in_every_style(style: str) -> None:
    target = completion(Move.UP, style)
    assert judge((target, target), style=style) == {"decision_accuracy": 1, "move_accuracy": 1, "legal_move_rate": 1}


def test_conclusion_copied_from_the_target_is_not_a_decision() -> None:
    target = completion(Move.UP)
    copied = target.replace("Moving UP", "Moving RIGHT")
    rates = judge((target, copied), (target, target))
    assert rates == {"decision_accuracy": 0.5, "move_accuracy": 1, "legal_move_rate": 1}


def test_unreadable_announcement_is_wrong_even_with_a_right_conclusion() -> None:
    target = completion(Move.UP)
    assert judge((target, target.replace("Moving UP", "Mooving UP")))["decision_accuracy"] == 0


def test_conclusion_is_the_decision_without_an_announcement() -> None:
    rates = judge(("UP", "UP"), ("UP", "LEFT"), ("UP", "gibberish"), style="compact")
    assert rates["decision_accuracy"] == rates["move_accuracy"] == pytest.approx(1 / 3)
    assert rates["legal_move_rate"] == pytest.approx(1 / 3)  # LEFT is the reversal


def test_rows_without_a_target_move_are_not_judged() -> None:
    assert judge(("nothing", "UP")) == judge(("nothing", "LEFT"), board=DECISIVE_BOARD) == {}


@pytest.mark.parametrize("style", ["bfs-512", "compact", "features", "cycle"])
def test_trap_rate_is_the_share_of_decisions_for_the_trap(style: str) -> None:
    target, trap = (get_style(style).write_completion(DECISIVE_BOARD, move) for move in (Move.RIGHT, Move.LEFT))
    rates = judge((target, target), (target, trap), (target, trap), (target, "?"), style=style, board=DECISIVE_BOARD)
    assert rates["trap_rate"] == 0.5
    assert rates["legal_move_rate"] == 0.75


def test_rows_without_a_trap_or_without_a_safe_move_have_no_trap_rate() -> None:
    shut_in = Board(3, ((0, 0), (0, 1), (1, 1), (2, 1), (2, 2)), (0, 2))
    assert "trap_rate" not in judge(("UP", "UP"), style="features")
    assert "trap_rate" not in judge(("RIGHT", "RIGHT"), style="features", board=shut_in)


def test_trap_rate_counts_the_announced_move_and_not_the_copied_conclusion() -> None:
    target = get_style("bfs-512").write_completion(DECISIVE_BOARD, Move.RIGHT)
    copied = target.replace("Moving RIGHT", "Moving LEFT")
    assert judge((target, copied), board=DECISIVE_BOARD)["trap_rate"] == 1


def test_counts_do_not_depend_on_the_batches() -> None:
    whole, first, second = SnakeMoveMetrics(), SnakeMoveMetrics(), SnakeMoveMetrics()
    prompt, target = get_style("compact").write_prompt(BOARD), "UP"
    predictions = ["UP", "UP", "LEFT", "UP"]
    whole.update([prompt] * 4, [target] * 4, predictions)
    first.update([prompt], [target], predictions[:1])
    second.update([prompt] * 3, [target] * 3, predictions[1:])
    for name in ("decisions", "right_moves", "judged_moves", "legal_moves", "judged_boards", "offered_traps"):
        assert torch.equal(getattr(whole, name), getattr(first, name) + getattr(second, name))
