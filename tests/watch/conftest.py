"""A session with a scripted player."""

from __future__ import annotations

import pytest

from snake_lora_pl.errors import UserError
from snake_lora_pl.evaluation.policy import Answer
from snake_lora_pl.game import Board, Move, read_move
from snake_lora_pl.watch.players import PlayerChoices, TeacherPlayer, Thought, WatchedPlayer
from snake_lora_pl.watch.session import WatchSession


class ScriptedPlayer:
    """Always writes the same completion, on grids of at most 12 cells a side."""

    name, reading = "scripted", "generate"

    def __init__(self, completion: str) -> None:
        self._completion = completion

    def think(self, board: Board, seed: int) -> Thought:
        if board.size > 12:
            raise UserError("the prompt is too long")
        answer = Answer(read_move(self._completion), self._completion)
        return Thought(answer, f"prompt of length {board.length}", dict(zip(Move, (0.5, 0.2, 0.1, 0.05), strict=True)))


class ScriptedChoices(PlayerChoices):
    """Players that write ``UP`` or no move, and teachers."""

    def __init__(self) -> None:
        super().__init__([], lambda path: pytest.fail("no adapter to load"))

    @property
    def ids(self) -> list[str]:
        return ["adapter:up", "adapter:mute", *super().ids]

    def load(self, player_id: str) -> WatchedPlayer:
        scripts = {"adapter:up": "UP", "adapter:mute": "42"}
        if player_id in scripts:
            return ScriptedPlayer(scripts[player_id])
        return TeacherPlayer(player_id.partition(":")[2]) if player_id in self.ids else super().load(player_id)


@pytest.fixture
def session() -> WatchSession:
    return WatchSession(ScriptedChoices(), "adapter:up", teacher="bfs", grid_size=6, seed=1)
