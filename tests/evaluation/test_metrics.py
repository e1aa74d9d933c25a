import math

import pytest
import torch

from snake_lora_pl.evaluation.metrics import SnakeMoveMetrics
from snake_lora_pl.game import Board, Move, get_style

BOARD = Board(5, ((2, 0), (1, 0)), (2, 3))


def judge(*rows: tuple[str, str], style: str = "bfs-512") -> dict[str, float]:
    metrics = SnakeMoveMetrics()
    prompt = get_style(style).write_prompt(BOARD)
    for target, prediction in rows:
        metrics.update([prompt], [target], [prediction])
    return {name: float(value) for name, value in metrics.compute().items()}


def completion(move: Move, style: str = "bfs-512") -> str:
    return get_style(style).write_completion(BOARD, move)


@pytest.mark.parametrize("style", ["bfs-512", "bfs-1024", "bfs-4096", "compact"])
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
    assert all(math.isnan(rate) for rate in judge(("nothing", "UP")).values())


def test_counts_do_not_depend_on_the_batches() -> None:
    whole, first, second = SnakeMoveMetrics(), SnakeMoveMetrics(), SnakeMoveMetrics()
    prompt, target = get_style("compact").write_prompt(BOARD), "UP"
    predictions = ["UP", "UP", "LEFT", "UP"]
    whole.update([prompt] * 4, [target] * 4, predictions)
    first.update([prompt], [target], predictions[:1])
    second.update([prompt] * 3, [target] * 3, predictions[1:])
    for name in ("decisions", "right_moves", "judged_moves", "legal_moves", "judged_boards"):
        assert torch.equal(getattr(whole, name), getattr(first, name) + getattr(second, name))
