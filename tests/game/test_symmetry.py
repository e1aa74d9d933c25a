from hypothesis import given
from hypothesis import strategies as st

from snake_lora_pl.game import SYMMETRIES, Board, Move
from tests.game.board_strategies import boards

symmetries = st.sampled_from(SYMMETRIES)
moves = st.sampled_from(list(Move))


@given(boards(), moves, symmetries)
def test_moves_and_symmetries_commute(board, move, symmetry):
    after = board.after(move)
    transformed = symmetry.board(board).after(symmetry.move(move))
    assert transformed == (symmetry.board(after) if isinstance(after, Board) else after)


@given(boards(), moves, symmetries)
def test_the_inverse_restores_board_and_move(board, move, symmetry):
    assert symmetry.inverse.board(symmetry.board(board)) == board
    assert symmetry.inverse.move(symmetry.move(move)) is move


def test_the_eight_symmetries_differ_and_the_first_is_the_identity():
    board = Board(4, ((0, 0), (1, 0)), (3, 1))
    assert len({symmetry.board(board) for symmetry in SYMMETRIES}) == len(SYMMETRIES) == 8
    assert SYMMETRIES[0].board(board) == board
    assert [SYMMETRIES[0].move(move) for move in Move] == list(Move)


@given(boards(), symmetries, symmetries)
def test_symmetries_are_closed_under_composition(board, first, second):
    assert second.board(first.board(board)) in [symmetry.board(board) for symmetry in SYMMETRIES]
