"""Games distributed over ranks, with threads as ranks; ``test_play_cli`` runs real processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from snake_lora_pl.evaluation.distributed import PlayerResult, Ranks, play_shared, shares_model
from snake_lora_pl.evaluation.policy import TeacherPolicy
from snake_lora_pl.game.seeds import play_seeds


def in_step(size: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """Run ``work`` in threads that gather values like ranks; a missing thread is a deadlock."""
    barrier = threading.Barrier(size, timeout=10)
    slots: list[Any] = [None] * size

    def gather(rank: int, value: Any) -> list[Any]:
        slots[rank] = value
        barrier.wait()
        gathered = list(slots)
        barrier.wait()
        return gathered

    def start(rank: int) -> Any:
        return work(Ranks(rank, size, gather_rows=lambda rows: gather(rank, rows)))

    with ThreadPoolExecutor(size) as executor:
        return list(executor.map(start, range(size)))


def untimed(result: PlayerResult) -> tuple[list, dict[str, float]]:
    statistics = result.statistics()
    statistics.pop("moves_per_second")
    return [summary._replace(answer_us=0) for summary in result.summaries], statistics


@pytest.mark.parametrize("num_games", [1, 4, 5])
@pytest.mark.parametrize("size", [2, 3])
def test_statistics_do_not_depend_on_the_number_of_ranks(size: int, num_games: int) -> None:
    seeds = play_seeds(num_games)

    def play(ranks: Ranks) -> PlayerResult:
        return play_shared(TeacherPolicy("random_legal"), seeds, ranks, grid_size=5)

    alone = play(Ranks())
    for shared in in_step(size, play):
        assert untimed(shared) == untimed(alone)
        assert shared.num_ranks == size


def test_ranks_play_equally_many_games_and_together_every_seed() -> None:
    seeds = play_seeds(7)
    shares = [Ranks(rank, 3).share(seeds) for rank in range(3)]
    assert [len(share) for share in shares] == [3, 3, 3]
    assert {seed for share in shares for seed in share} == set(seeds)
    assert Ranks(0, 3).join(shares, len(seeds)) == seeds


def test_joined_games_are_in_the_order_of_the_seeds() -> None:
    seeds = play_seeds(5)
    parts = in_step(2, lambda ranks: play_shared(TeacherPolicy("bfs"), seeds, ranks, grid_size=5).games)
    assert [game.seed for game in Ranks(0, 2).join(parts, len(seeds))] == seeds


def test_sharded_model_is_recognized_by_its_strategy() -> None:
    assert shares_model(ModelParallelStrategy())
    assert not shares_model(DDPStrategy())
