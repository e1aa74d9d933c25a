"""The session of the live page, without a server."""

from __future__ import annotations

from pathlib import Path

import pytest

from snake_lora_pl.errors import UserError
from snake_lora_pl.evaluation.game_loop import play_games
from snake_lora_pl.evaluation.policy import TeacherPolicy
from snake_lora_pl.game import End, Move
from snake_lora_pl.reporting.games_file import read_games
from snake_lora_pl.watch.session import WatchSession
from tests.watch.conftest import ScriptedChoices


def advance(session: WatchSession, move: Move | None = None) -> dict:
    return session.advance(session.state["game"], session.state["step"], move)


def test_state_shows_a_decision_before_it_is_made(session: WatchSession) -> None:
    state = session.state
    assert (state["step"], state["frame"]["head"], state["frame"]["move"]) == (0, (3, 3), "UP")
    assert state["prompt"] == "prompt of length 1"
    assert state["probabilities"] == {"UP": 0.5, "RIGHT": 0.2, "DOWN": 0.1, "LEFT": 0.05}
    assert advance(session)["frame"]["head"] == (3, 4)


def test_game_of_a_teacher_equals_that_of_play_games() -> None:
    session = WatchSession(ScriptedChoices(), "teacher:bfs", teacher="bfs", grid_size=4, seed=7)
    while session.state["end"] is None:
        advance(session)
    (game,) = play_games(TeacherPolicy("bfs"), [7], grid_size=4)
    assert session.recording().frames == game.recording.frames
    assert session.state["end"] == game.end.value
    assert (session.state["judged"], session.state["agreed"]) == (len(game.judgments),) * 2


def test_move_of_the_user_replaces_that_of_the_player(session: WatchSession) -> None:
    assert advance(session, Move.RIGHT)["frame"]["head"] == (4, 3)
    assert session.state["judged"] == 0
    assert advance(session)["frame"]["head"] == (4, 4)
    assert session.state["judged"] == 1


def test_reversal_into_the_neck_changes_nothing() -> None:
    session = WatchSession(ScriptedChoices(), "teacher:bfs", teacher="bfs", grid_size=4, seed=7)
    while session.state["length"] < 2:
        state = advance(session)
    body_step = state["frame"]["trail"][0]
    into_neck = next(move for move in Move if move.name[0] == body_step)
    assert advance(session, into_neck) == state


def test_request_from_an_outdated_page_changes_nothing(session: WatchSession) -> None:
    first = session.state
    second = advance(session)
    assert session.advance(first["game"], first["step"]) == second
    assert session.advance(first["game"] + 1, second["step"]) == second


@pytest.mark.parametrize(("player", "end"), [("adapter:up", End.WALL), ("adapter:mute", End.NO_VALID_ANSWER)])
def test_lost_game_keeps_its_last_decision(player: str, end: End) -> None:
    session = WatchSession(ScriptedChoices(), player, teacher="bfs", grid_size=6, seed=1)
    while session.state["end"] is None:
        advance(session)
    state = session.state
    assert state["end"] == end.value
    assert state["has_decision"]
    assert state["teacher_move"] is not None
    assert advance(session) == state


@pytest.mark.parametrize("num_moves", [0, 1, 20])
def test_downloaded_game_is_read_as_a_game_of_a_run(session: WatchSession, num_moves: int, tmp_path: Path) -> None:
    for index in range(num_moves):
        advance(session, Move.RIGHT if index == 0 else None)
    path = tmp_path / "games.jsonl"
    path.write_text(session.game_line())
    (game,) = read_games(path)
    assert game.recording.frames == session.recording().frames
    assert game.recording.end == session.recording().end
    assert game.seed == 1
    assert game.player == ("scripted + you" if num_moves else "scripted")


def test_player_and_teacher_change_within_a_game(session: WatchSession) -> None:
    advance(session)
    state = session.choose(player_id="teacher:hamiltonian", teacher="safe_greedy")
    assert (state["step"], state["player"], state["teacher"]) == (1, "teacher:hamiltonian", "safe_greedy")
    assert state["probabilities"] is None
    assert state["prompt"] == ""
    advance(session)
    assert session.game_line().startswith('{"player":"scripted + hamiltonian",')


@pytest.mark.parametrize(
    "change",
    [
        lambda session: session.choose(player_id="adapter:none"),
        lambda session: session.choose(teacher="none"),
        lambda session: session.new_game(1, 0),
        lambda session: session.new_game(6, -1),
        lambda session: session.new_game(13, 0),
    ],
)
def test_refused_change_keeps_the_game(session: WatchSession, change) -> None:
    advance(session)
    before = session.state
    with pytest.raises(UserError):
        change(session)
    assert session.state == before
    assert advance(session)["step"] == 2
