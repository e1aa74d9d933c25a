import pytest
from hypothesis import given

from snake_lora_pl.game import Board, End, Move
from snake_lora_pl.game.features import MoveFeatures, move_features
from snake_lora_pl.game.search import (
    apple_distances,
    is_safe_to_eat,
    reachable_space,
    shortest_moves,
    shortest_path,
    tail_distances,
)
from tests.game.board_strategies import boards


@given(boards())
def test_features_describe_the_board_after_the_move(board):
    features = move_features(board)
    assert list(features) == list(Move)
    for move, feature in features.items():
        after = board.after(move)
        if feature.obstacle is not None:
            assert (feature.obstacle == "wall") == (after is End.WALL)
            assert move not in board.legal_moves()
            continue
        assert move in board.legal_moves()
        assert (feature.apple_distance == 0) == (board.target(move) == board.apple)
        assert feature.apple_distance == apple_distances(board).get(move)
        assert feature.tail_distance == tail_distances(board).get(move)
        assert feature.num_reachable == reachable_space(board)[move] <= board.size**2 - after.length


@given(boards())
def test_an_adjacent_apple_is_bait_if_it_is_not_safe_to_eat(board):
    path = shortest_path(board)
    if len(path) == 1:
        (move,) = shortest_moves(board)
        assert move_features(board)[move].is_bait is not is_safe_to_eat(board, path)


def test_the_apple_in_a_dead_end_is_bait():
    board = Board(4, ((1, 0), (1, 1), (0, 1), (0, 2), (1, 2), (2, 2), (3, 2)), (0, 0))
    features = move_features(board)
    assert features[Move.LEFT] == MoveFeatures(apple_distance=0, is_bait=True, tail_distance=None, num_reachable=0)
    assert features[Move.DOWN] == MoveFeatures("wall")
    assert features[Move.UP] == MoveFeatures("body")


def test_a_board_without_an_apple_has_no_features():
    with pytest.raises(ValueError, match="apple"):
        move_features(Board(2, ((0, 0), (0, 1), (1, 1), (1, 0)), None))
