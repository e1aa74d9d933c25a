"""Games shared out among processes: every process plays as many, and all learn the figures of all games."""

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
    """The processes that share games, seen from one of them.

    Attributes:
        rank: This process's number.
        size: How many there are.
        gather_rows: From this process's rows of whole numbers, as many of one width in each process, to those of all.
        gather_objects: From anything to what each process gave; an empty list in all processes but the first.
    """

    rank: int = 0
    size: int = 1
    gather_rows: Callable[[list[list[int]]], list[list[list[int]]]] = lambda rows: [rows]
    gather_objects: Callable[[Any], list[Any]] = lambda value: [value]

    @classmethod
    def of(cls, trainer: pl.Trainer) -> Ranks:
        """The processes of a trainer.

        Where they share one model in slices, each forward pass is a matter of all, so that games of unequal length
        would hang them: then every process plays every game, in step, as if it were alone.
        """
        if trainer.world_size == 1 or shares_model(trainer.strategy):
            return cls()
        import torch

        def gather_rows(rows: list[list[int]]) -> list[list[list[int]]]:
            own = torch.tensor(rows, dtype=torch.int64, device=trainer.strategy.root_device)
            return trainer.strategy.all_gather(own).tolist()

        def gather_objects(value: Any) -> list[Any]:
            gathered = [None] * trainer.world_size if trainer.is_global_zero else None
            torch.distributed.gather_object(value, gathered)
            return gathered or []

        return cls(trainer.global_rank, trainer.world_size, gather_rows, gather_objects)

    def share(self, seeds: Sequence[int]) -> list[int]:
        """This process's part of some seeds. Every process gets as many; what is over repeats the first seed."""
        num_missing = -len(seeds) % self.size
        return [*seeds, *[seeds[0]] * num_missing][self.rank :: self.size]

    def join(self, parts: Sequence[Sequence[T]], num_seeds: int) -> list[T]:
        """What each process has of its ``share`` in the order of the seeds, without what was over."""
        return [parts[index % self.size][index // self.size] for index in range(num_seeds)]


def shares_model(strategy: Any) -> bool:
    """Whether a strategy cuts the model in slices, so that a forward pass needs all processes."""
    from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

    return isinstance(strategy, (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy))


class PlayerResult(NamedTuple):
    """How one player did.

    Attributes:
        name: The player.
        reading: How its moves were read.
        summaries: One for each game of all processes, in the order of the seeds.
        games: The games that this process played.
        num_ranks: Processes that shared the games.
    """

    name: str
    reading: str
    summaries: list[GameSummary]
    games: list[PlayedGame]
    num_ranks: int = 1

    def statistics(self) -> dict[str, float]:
        """See ``figures.figures``."""
        return compute_statistics(self.summaries, self.num_ranks)


def play_shared(policy: Policy, seeds: Sequence[int], ranks: Ranks, **settings: Any) -> PlayerResult:
    """Play a game of each seed, each in one of the processes; the summaries are the same for any number of them.

    Args:
        policy: The player.
        seeds: Seeds of the games, the same in every process.
        ranks: The processes.
        settings: Passed to ``play_games``.
    """
    games = play_games(policy, ranks.share(seeds), **settings)
    rows = ranks.gather_rows([GameSummary.of(game).to_row() for game in games])
    summaries = [GameSummary.from_row(row) for row in ranks.join(rows, len(seeds))]
    return PlayerResult(policy.name, policy.reading, summaries, games, ranks.size)
