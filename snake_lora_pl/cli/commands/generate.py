"""``generate``: seeded games to JSONL."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from snake_lora_pl.cli.commands.light_parser import CommandParser
from snake_lora_pl.data.generated_rows import write_dataset
from snake_lora_pl.errors import UserError
from snake_lora_pl.game import STYLES, TEACHERS


def run(arguments: Sequence[str]) -> int:
    """Generate a data set.

    Returns:
        The exit code.

    Raises:
        UserError: If an argument is invalid or the file cannot be written.
    """
    options = build_parser().parse(arguments)
    path = Path(options.out)
    if path.exists() and not path.is_dir() and not options.overwrite:
        raise UserError(f"--out {path}: the file exists. Choose another name, or add --overwrite to replace it.")
    start = time.perf_counter()
    try:
        with _progress_bar() as progress:
            num_rows = write_dataset(
                path,
                options.games,
                options.grid_size,
                options.teacher,
                options.style,
                options.seed,
                noise=options.noise,
                noise_moves=options.noise_moves,
                augment=options.augment,
                upstream_rules=options.upstream_rules,
                num_workers=options.workers,
                progress=progress,
            )
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror}). Choose another path.") from error
    duration_s = time.perf_counter() - start
    print(f"{path}: {num_rows:,} rows of {options.games:,} games in {duration_s:.1f} s")
    return 0


def build_parser() -> CommandParser:
    """Return the parser of this command."""
    parser = CommandParser("generate", epilog="The same arguments give the same bytes, whatever the number of workers.")
    parser.add_argument("--out", required=True, metavar="F.jsonl", help="file to write")
    parser.add_argument("--games", type=int, default=100, metavar="N", help="games to play")
    parser.add_argument("--grid_size", type=int, default=10, metavar="N", help="cells along one side of the board")
    parser.add_argument(
        "--teacher", default="bfs", metavar="NAME", help=f"policy that plays: {', '.join(sorted(TEACHERS))}"
    )
    parser.add_argument("--style", default="bfs-512", metavar="NAME", help=f"format of the text: {', '.join(STYLES)}")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the data set")
    parser.add_argument(
        "--upstream_rules",
        action="store_true",
        help="stop where no path leads to the apple and omit each game's last move, as heuristics-v0.04 does",
    )
    parser.add_argument(
        "--noise",
        type=float,
        default=0.0,
        metavar="P",
        help="play a random move with this probability, but write the teacher's move",
    )
    parser.add_argument(
        "--noise_moves",
        default="legal",
        metavar="SET",
        help="draw random moves from: legal (any legal move), safe (those after which the tail is reachable), mixed "
        "(one of the two, with equal probability)",
    )
    parser.add_argument(
        "--augment",
        nargs="?",
        const="all",
        default="none",
        metavar="SET",
        help="write positions in symmetries of the board, each with the teacher's move: all (the default with this "
        "option: each game in all 8), random (each position in one of them), none",
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that play")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    return parser


@contextlib.contextmanager
def _progress_bar() -> Iterator[Callable[[int, int], None] | None]:
    """Show a progress bar on a terminal; elsewhere yield None."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("games"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("games", total=None)
        yield lambda num_played, num_games: bar.update(task, completed=num_played, total=num_games)
