"""Playing strength of the teachers, compared with published or independently measured values.

    python -m benchmarks.players --games 1000

Plays seeded games on 10x10 and prints apples, wins and steps of each teacher. The limit of steps without an apple
affects ``random_legal`` most: its mean is 4.4 apples with the default limit of 400 steps, and 6.1 without a limit.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from typing import NamedTuple

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.common import make_parser
from snake_lora_pl.game import TEACHERS, Game, get_teacher

GRID_SIZE = 10
UPSTREAM = " (upstream's rules)"

# Mean apples, and mean steps where known, of independent programs on 10x10. The limit of steps and the rules of the
# measurement for random_legal are unknown.
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
    """Outcomes of one teacher's games."""

    apples: list[int]
    steps: list[int]
    ends: Counter[str]
    cpu_s: float


def play(teacher: str, num_games: int, max_steps_without_apple: int, *, upstream_rules: bool = False) -> Result:
    """Play games with the seeds 0, 1, 2, ..."""
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
    parser = make_parser("players", __doc__)
    parser.add_argument("--games", type=int, default=1_000, help="games of each teacher (default: 1000)")
    parser.add_argument(
        "--starvation", type=int, default=400, help="steps without an apple that end a game (default: 400)"
    )
    options = parser.parse_args()
    num_games = options.games

    table = Table(
        title=f"{num_games:,} seeded games on {GRID_SIZE}x{GRID_SIZE}, "
        f"at most {options.starvation} steps without an apple"
    )
    table.add_column("teacher")
    for column in ("apples", "SD", "median", "reference", "ratio", "wins", "steps", "reference", "ratio", "CPU s"):
        table.add_column(column, justify="right")
    table.add_column("ends")
    for name in [*TEACHERS, f"bfs{UPSTREAM}"]:
        upstream_rules = name.endswith(UPSTREAM)
        result = play(name.removesuffix(UPSTREAM), num_games, options.starvation, upstream_rules=upstream_rules)
        apples, steps = statistics.fmean(result.apples), statistics.fmean(result.steps)
        table.add_row(
            name,
            f"{apples:.1f}",
            f"{statistics.pstdev(result.apples):.1f}",
            f"{statistics.median(result.apples):.0f}",
            *_reference_cells(apples, REFERENCE_APPLES.get(name)),
            f"{result.ends['WIN'] / num_games:.0%}",
            f"{steps:,.0f}",
            *_reference_cells(steps, REFERENCE_STEPS.get(name)),
            f"{result.cpu_s:.0f}",
            ", ".join(f"{end} {count}" for end, count in result.ends.most_common()),
        )
    Console(width=160).print(table)


def _reference_cells(measured: float, reference: float | None) -> tuple[str, str]:
    return ("", "") if reference is None else (f"{reference:,}", f"{measured / reference:.3f}")


if __name__ == "__main__":
    main()
