"""The model with its adapter, without it, a teacher and chance: all through the same loop and seeds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl

from snake_lora_pl.errors import UserError
from snake_lora_pl.evaluation.play_settings import PlaySettings
from snake_lora_pl.evaluation.players import PlayData, TrainedModule, find_style, make_player, shown_progress
from snake_lora_pl.evaluation.policy import Policy, TeacherPolicy
from snake_lora_pl.evaluation.ranks import PlayerResult, Ranks, play_shared
from snake_lora_pl.game.seeds import play_seeds

ADAPTER, BASE, CHANCE = "adapter", "base", "random_legal"


class Contest(pl.LightningModule):
    """For ``Trainer.test``: every player plays the same games. The trainer places the model and starts the processes.

    Args:
        module: The trained module.
        data: Its data module.
        settings: How games are played.
        num_games: Games for each player.
        has_adapter: Whether the module's adapter plays; the base model plays in any case.

    Attributes:
        results: After the test: each player's result. In the first process they hold the games of all processes.
        title: What was played, in words.
        facts: The same for a file.
    """

    def __init__(
        self,
        module: TrainedModule,
        data: PlayData,
        settings: PlaySettings,
        num_games: int,
        *,
        has_adapter: bool = True,
    ) -> None:
        super().__init__()
        style = find_style(settings, data)
        if style is None:
            raise UserError(
                "nothing says which style the prompts of these games are to be written in. Set play.style, or name "
                "data.train_path with rows of a known one."
            )
        try:
            self.seeds = play_seeds(num_games, settings.seed)
        except ValueError as error:
            raise UserError(f"--games: {error}") from error
        self.module = module
        self.data = data
        self.settings = settings
        self.style = style
        self.has_adapter = has_adapter
        self.loop = settings.loop(settings.grid_size or data.resolved_grid_size)
        self.results: list[PlayerResult] = []

    @property
    def title(self) -> str:
        """What was played."""
        size, max_steps = self.loop["grid_size"], self.loop["max_steps"]
        limit = f" and {max_steps:,} in all" if max_steps is not None else ""
        return (
            f"{len(self.seeds):,} games on {size}x{size}, at most {self.loop['max_steps_without_apple']:,} steps "
            f"without an apple{limit}; prompts in {self.style.name}, greedy decoding, teacher {self.settings.teacher}"
        )

    @property
    def facts(self) -> dict[str, Any]:
        """Everything that the games follow from, the model aside."""
        loop = {name: value for name, value in self.loop.items() if name != "batch_size"}
        return {
            "num_games": len(self.seeds),
            "seed": self.settings.seed,
            "first_game_seed": self.seeds[0],
            **loop,
            "style": self.style.name,
            "decoding": "greedy",
        }

    def prepare_data(self) -> None:
        """Fetch the base model, in one process."""
        self.data.trainer = self.trainer
        self.data.prepare_data()

    def configure_model(self) -> None:
        """Load the model."""
        self.module.configure_model()

    def test_dataloader(self) -> list[int]:
        """One step, in which everything is played."""
        return [0]

    def test_step(self, batch: int, batch_idx: int) -> None:
        """Let every player play."""
        ranks = Ranks.of(self.trainer)
        for player in self._players():
            with player as policy, shown_progress(self.trainer, policy.name) as progress:
                result = play_shared(policy, self.seeds, ranks, **self.loop, progress=progress)
            parts = ranks.gather_objects(result.games)
            if parts:
                result = result._replace(games=ranks.join(parts, len(self.seeds)))
            self.results.append(result)

    def _players(self) -> Iterator[contextlib.AbstractContextManager[Policy]]:
        if self.has_adapter:
            yield contextlib.nullcontext(self._player(ADAPTER))
            if self.settings.legal_mask:
                yield contextlib.nullcontext(self._player(f"{ADAPTER}+mask", legal_mask=True))
        yield self._base_player()
        for name in dict.fromkeys([self.settings.teacher, CHANCE]):
            yield contextlib.nullcontext(TeacherPolicy(name))

    def _player(self, name: str, *, legal_mask: bool = False) -> Policy:
        return make_player(self.module, self.data, self.style, self.settings.reading, name, legal_mask=legal_mask)

    @contextlib.contextmanager
    def _base_player(self) -> Iterator[Policy]:
        with self.module.peft_model.disable_adapter():
            yield self._player(BASE)
