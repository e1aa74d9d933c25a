import pytest
from hypothesis import given

from snake_lora_pl.game import Board, End, Move, get_teacher
from snake_lora_pl.game.search import shortest_path, survives_eating
from snake_lora_pl.game.senses import Sense, sense
from tests.game.board_strategies import boards


@given(boards())
def test_what_is_sensed_holds_after_the_move(board):
    senses = sense(board)
    assert list(senses) == list(Move)
    for move, sensed in senses.items():
        after = board.after(move)
        if sensed.obstacle is not None:
            assert (sensed.obstacle == "wall") == (after is End.WALL)
            assert move not in board.legal_moves()
            continue
        assert move in board.legal_moves()
        assert (sensed.apple_distance == 0) == (board.target(move) == board.apple)
        assert sensed.room <= board.size**2 - after.length
        # A trap may be wide, but no way out is none at all.
        assert sensed.tail_distance is not None or sensed.room < board.size**2 - after.length or after.length > 2


@given(boards())
def test_bait_is_what_safe_greedy_does_not_go_for(board):
    path = shortest_path(board)
    if not path:
        return
    first = get_teacher("bfs")(board)
    assert sense(board)[first].is_bait != survives_eating(board, path) or len(path) > 1


def test_the_apple_in_a_pocket_is_bait():
    board = Board(4, ((1, 0), (1, 1), (0, 1), (0, 2), (1, 2), (2, 2), (3, 2)), (0, 0))
    senses = sense(board)
    assert senses[Move.LEFT] == Sense(None, apple_distance=0, is_bait=True, tail_distance=None, room=0)
    assert senses[Move.DOWN] == Sense("wall")
    assert senses[Move.UP] == Sense("body")


def test_a_full_board_has_nothing_to_be_sensed():
    with pytest.raises(ValueError, match="without an apple"):
        sense(Board(2, ((0, 0), (0, 1), (1, 1), (1, 0)), None))
