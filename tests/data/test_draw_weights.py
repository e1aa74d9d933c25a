from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snake_lora_pl.data.draw_weights import UNKNOWN, StratumReader, balanced_levels, draw_probabilities
from snake_lora_pl.data.generated_rows import generate_rows
from snake_lora_pl.game import PromptMoves, read_board

ROWS = st.lists(
    st.tuples(st.floats(0.001, 1000), st.integers(UNKNOWN, 20), st.integers(UNKNOWN, 1)), min_size=1, max_size=60
)


def plain_probabilities(weights: list[float], *levels: list[int]) -> list[float]:
    """Return the probabilities by walking down the groups of one row at a time."""
    probabilities = []
    for row, weight in enumerate(weights):
        members, probability = list(range(len(weights))), 1.0
        for level in levels:
            probability /= len({level[member] for member in members})
            members = [member for member in members if level[member] == level[row]]
        probabilities.append(probability * weight / sum(weights[member] for member in members))
    return probabilities


@given(ROWS)
def test_probabilities_equal_those_of_the_plain_definition(rows):
    weights, first, second = (list(column) for column in zip(*rows, strict=True))
    for levels in ([], [first], [first, second]):
        found = draw_probabilities(np.array(weights), [np.array(level) for level in levels])
        assert found == pytest.approx(plain_probabilities(weights, *levels))
        assert found.sum() == pytest.approx(1)


def test_extreme_weights_do_not_overflow():
    assert draw_probabilities(np.array([1.7e308, 1.7e308, 1e-300])) == pytest.approx([0.5, 0.5, 0])


@pytest.mark.parametrize("style", ["bfs-512", "bfs-4096", "compact", "features", "cycle"])
def test_stratum_is_read_in_every_style(style):
    boards = [read_board(row["prompt"]) for row in generate_rows(3, 6, "safe_greedy", noise=0.2)]
    reader = StratumReader()
    strata = [reader.read(row["prompt"]) for row in generate_rows(3, 6, "safe_greedy", style, noise=0.2)]
    assert strata == [2 * board.length + PromptMoves.of(board).is_decisive for board in boards]
    assert {stratum & 1 for stratum in strata} == {0, 1}


def test_stratum_of_an_unknown_prompt_is_a_group_by_itself():
    strata = np.array([StratumReader().read("Who are you?"), 2 * 3, 2 * 3 + 1, 2 * 4])
    assert strata[0] == UNKNOWN
    assert [level.tolist() for level in balanced_levels(strata, "length+decisive")] == [[-1, 3, 3, 4], [-1, 0, 1, 0]]
    assert [level.tolist() for level in balanced_levels(strata, "decisive")] == [[-1, 0, 1, 0]]
