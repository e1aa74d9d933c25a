"""Games distributed over the ranks of a trainer: each rank plays an equal share, and all get all summaries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from snake_lora_pl.evaluation.game_loop import PlayedGame, play_games
from snake_lora_pl.evaluation.policy import Policy
from snake_lora_pl.evaluation.statistics import GameSummary, compute_statistics

if TYPE_CHECKING:
    import lightning.pytorch as pl

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The ranks that share games, as seen from one of them.

    Attributes:
        rank: This rank.
        size: Number of ranks.
        gather_rows: All-gathers rows of integers; every rank passes the same number of rows of the same width.
    """

    rank: int = 0
    size: int = 1
    gather_rows: Callable[[list[list[int]]], list[list[list[int]]]] = lambda rows: [rows]

    @classmethod
    def of(cls, trainer: pl.Trainer) -> Ranks:
        """Return the ranks of a trainer.

        If the ranks hold shards of one model, every forward pass needs all of them, and games of unequal length would
        deadlock. Every rank then plays every game, as if it were the only one.
        """
        if trainer.world_size == 1 or shares_model(trainer.strategy):
            return cls()
        import torch

        def gather_rows(rows: list[list[int]]) -> list[list[list[int]]]:
            own = torch.tensor(rows, dtype=torch.int64, device=trainer.strategy.root_device)
            gathered: list[list[list[int]]] = trainer.strategy.all_gather(own).tolist()
            return gathered

        return cls(trainer.global_rank, trainer.world_size, gather_rows)

    def share(self, seeds: Sequence[int]) -> list[int]:
        """Return this rank's share of the seeds, padded with the first seed to the same length on every rank."""
        num_missing = -len(seeds) % self.size
        return [*seeds, *[seeds[0]] * num_missing][self.rank :: self.size]

    def join(self, parts: Sequence[Sequence[T]], num_seeds: int) -> list[T]:
        """Return the results of the ranks' shares in the order of the seeds, without the padding."""
        return [parts[index % self.size][index // self.size] for index in range(num_seeds)]


def shares_model(strategy: Any) -> bool:
    """Return whether a strategy shards the model, so that a forward pass needs all ranks."""
    from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

    return isinstance(strategy, (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy))


class PlayerResult(NamedTuple):
    """Games of one player.

    Attributes:
        name: The player.
        reading: How its moves were read.
        summaries: One per game of all ranks, in the order of the seeds.
        games: The games that this rank played.
        num_ranks: Number of ranks that shared the games.
    """

    name: str
    reading: str
    summaries: list[GameSummary]
    games: list[PlayedGame]
    num_ranks: int = 1

    def statistics(self) -> dict[str, float]:
        """Return ``compute_statistics`` of the games."""
        return compute_statistics(self.summaries, self.num_ranks)


def play_shared(policy: Policy, seeds: Sequence[int], ranks: Ranks, **settings: Any) -> PlayerResult:
    """Play one game per seed, each on one rank; the summaries do not depend on the number of ranks.

    Args:
        policy: The player.
        seeds: Seeds of the games, the same on every rank.
        ranks: The ranks.
        settings: Options of ``play_games``.
    """
    games = play_games(policy, ranks.share(seeds), **settings)
    rows = ranks.gather_rows([GameSummary.of(game).to_row() for game in games])
    summaries = [GameSummary.from_row(row) for row in ranks.join(rows, len(seeds))]
    return PlayerResult(policy.name, policy.reading, summaries, games, ranks.size)
