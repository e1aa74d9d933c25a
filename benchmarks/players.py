"""How well the teachers play, beside the figures measured elsewhere: ``python -m benchmarks.players [--games 1000]``.

A game ends with STARVED where the player walks in circles. The limit matters to ``random_legal`` most of all: 4.4
apples with the default of 400 steps without an apple, 6.1 without a limit.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from typing import NamedTuple

from rich.console import Console
from rich.progress import track
from rich.table import Table

from snake_lora_pl.game import TEACHERS, Game, get_teacher

GRID_SIZE = 10
UPSTREAM = " (upstream's rules)"

# Mean apples and, where known, mean steps of independent programs on 10x10. What limit or rules the 4.6 of random_legal
# were measured under is not known.
REFERENCE_APPLES = {
    "random_legal": 4.6,
    f"bfs{UPSTREAM}": 19.6,
    "bfs": 28.6,
    "safe_greedy": 98.0,
    "hamiltonian": 99.0,
    "hamiltonian_shortcuts": 99.0,
}
REFERENCE_STEPS = {"hamiltonian": 2518, "hamiltonian_shortcuts": 1476}


class Result(NamedTuple):
    """What one player did."""

    apples: list[int]
    steps: list[int]
    ends: Counter[str]
    cpu_s: float


def play(teacher: str, num_games: int, max_steps_without_apple: int, *, upstream_rules: bool = False) -> Result:
    """Play seeded games, the seeds counted from 0."""
    start = time.process_time()
    games = []
    console = Console(stderr=True)
    seeds = track(range(num_games), teacher, console=console, transient=True, disable=not console.is_terminal)
    for seed in seeds:
        game = Game(GRID_SIZE, seed, max_steps_without_apple=max_steps_without_apple, upstream_rules=upstream_rules)
        player = get_teacher(teacher, seed)
        while game.end is None:
            game.play(player(game.board) or game.board.fallback_move())
        games.append(game)
    return Result(
        [game.num_apples for game in games],
        [game.num_steps for game in games],
        Counter(game.end.value for game in games if game.end is not None),
        time.process_time() - start,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.players", description=__doc__)
    parser.add_argument("--games", type=int, default=1_000, help="games of each player (default: 1000)")
    parser.add_argument("--starvation", type=int, default=400, help="steps without an apple that end a game")
    arguments = parser.parse_args()
    num_games = arguments.games

    table = Table(
        title=f"{num_games:,} seeded games on {GRID_SIZE}x{GRID_SIZE}, "
        f"at most {arguments.starvation} steps without an apple"
    )
    table.add_column("player")
    for column in ("apples", "SD", "median", "reference", "ratio", "wins", "steps", "reference", "ratio", "CPU s"):
        table.add_column(column, justify="right")
    table.add_column("ends")
    for name in [*TEACHERS, f"bfs{UPSTREAM}"]:
        result = play(
            name.removesuffix(UPSTREAM), num_games, arguments.starvation, upstream_rules=name.endswith(UPSTREAM)
        )
        apples, steps = statistics.fmean(result.apples), statistics.fmean(result.steps)
        ends = result.ends
        table.add_row(
            name,
            f"{apples:.1f}",
            f"{statistics.pstdev(result.apples):.1f}",
            f"{statistics.median(result.apples):.0f}",
            *_against(apples, REFERENCE_APPLES.get(name)),
            f"{ends['WIN'] / num_games:.0%}",
            f"{steps:,.0f}",
            *_against(steps, REFERENCE_STEPS.get(name)),
            f"{result.cpu_s:.0f}",
            ", ".join(f"{end} {count}" for end, count in ends.most_common()),
        )
    Console(width=160).print(table)


def _against(measured: float, reference: float | None) -> tuple[str, str]:
    return ("", "") if reference is None else (f"{reference:,}", f"{measured / reference:.3f}")


if __name__ == "__main__":
    main()
