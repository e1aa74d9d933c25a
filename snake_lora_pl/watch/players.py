"""Players that the page offers: adapters, loaded when they are chosen, and teachers."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from snake_lora_pl.errors import UserError, did_you_mean
from snake_lora_pl.evaluation.policy import Answer, TeacherPolicy
from snake_lora_pl.game import TEACHERS, Board, Move
from snake_lora_pl.paths import distinct_names

if TYPE_CHECKING:
    from snake_lora_pl.player import Player


class Thought(NamedTuple):
    """A player's decision in one position.

    Attributes:
        answer: Move and completion.
        prompt: The text that the player read; empty for a teacher, which reads the board.
        probabilities: Probability of each move (``LanguageModelPolicy.move_probabilities``); None if there is none.
    """

    answer: Answer
    prompt: str = ""
    probabilities: dict[Move, float] | None = None


class WatchedPlayer(Protocol):
    """A player of the page."""

    @property
    def name(self) -> str:
        """Name in the file of the game."""

    @property
    def reading(self) -> str:
        """Method of reading its moves, as in the file of the game."""

    def think(self, board: Board, seed: int) -> Thought:
        """Decide on a move.

        Args:
            board: A position of a game that is not over.
            seed: Seed of the game, for players that draw random numbers.
        """


class TeacherPlayer:
    """A teacher as a player of the page.

    Args:
        name: A registered teacher.
    """

    def __init__(self, name: str) -> None:
        self._policy = TeacherPolicy(name)
        self.name, self.reading = name, self._policy.reading

    def think(self, board: Board, seed: int) -> Thought:
        """Return the teacher's move."""
        return Thought(Answer(self._policy.move(board, seed), ""))


class AdapterPlayer:
    """An adapter as a player of the page.

    Args:
        player: The loaded adapter.
        name: Its name.
    """

    def __init__(self, player: Player, name: str) -> None:
        self._player = player  # merged into its base for the lifetime of this object
        self.name, self.reading = name, player.policy.reading

    def think(self, board: Board, seed: int) -> Thought:
        """Return the adapter's move, completion and probabilities."""
        policy = self._player.policy
        answer = policy.answer([board], [seed])[0]
        return Thought(answer, policy.prompt_text(board), policy.move_probabilities(board))


class PlayerChoices:
    """Players by an id that the page sends.

    Args:
        adapter_dirs: Adapter directories.
        load_adapter: Loads an adapter.
    """

    def __init__(
        self, adapter_dirs: Sequence[str | os.PathLike[str]], load_adapter: Callable[[str | os.PathLike[str]], Player]
    ) -> None:
        names = distinct_names(adapter_dirs)
        self._adapters = {f"adapter:{name}": path for name, path in zip(names, adapter_dirs, strict=True)}
        self._load_adapter = load_adapter

    @property
    def ids(self) -> list[str]:
        """All ids: ``adapter:NAME`` and ``teacher:NAME``, in the order of the page."""
        return [*self._adapters, *(f"teacher:{name}" for name in sorted(TEACHERS))]

    def load(self, player_id: str) -> WatchedPlayer:
        """Load a player.

        Raises:
            UserError: If the player is unknown, or its adapter cannot be loaded.
        """
        if player_id not in self.ids:
            raise UserError(f"unknown player '{player_id}'.{did_you_mean(player_id, self.ids)}")
        name = player_id.partition(":")[2]
        if player_id in self._adapters:
            return AdapterPlayer(self._load_adapter(self._adapters[player_id]), name)
        return TeacherPlayer(name)
