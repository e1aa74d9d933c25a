"""Several players' figures as one table: to read, and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from snake_lora_pl.evaluation.distributed import PlayerResult
from snake_lora_pl.evaluation.statistics import paired_difference

if TYPE_CHECKING:
    from rich.table import Table

# How fast a player is differs from run to run, so it stands apart from what does not.
_SPEED = "moves_per_second"

_Figures: TypeAlias = Mapping[str, float]
_CLAIM, _END = "claims/", "ends/"
_ROWS: list[tuple[str, Callable[[_Figures], str]]] = [
    ("apples, mean", lambda f: f"{f['apples_mean']:.1f}"),
    ("  95% interval", lambda f: f"{f['apples_low']:.1f} to {f['apples_high']:.1f}"),
    ("apples, median", lambda f: f"{f['apples_median']:.0f}"),
    ("  5% to 95% of games", lambda f: f"{f['apples_p5']:.0f} to {f['apples_p95']:.0f}"),
    ("board filled", lambda f: f"{f['fill_mean']:.0%}"),
    ("games won", lambda f: f"{f['win_rate']:.0%}"),
    ("  95% interval", lambda f: f"{f['win_low']:.0%} to {f['win_high']:.0%}"),
    ("steps, mean", lambda f: f"{f['steps_mean']:,.0f}"),
    ("fatal moves", lambda f: f"{f['fatal_move_rate']:.2%}"),
    ("unreadable answers", lambda f: f"{f['unparseable_rate']:.2%}"),
    ("games that ended trapped", lambda f: f"{f['trapped_rate']:.0%}"),
    ("moves as the teacher's", lambda f: f"{f['teacher_agreement']:.1%}"),
    ("moves on a shortest path", lambda f: _known(f, "optimal_agreement", ".1%")),
    ("steps beyond it, an apple", lambda f: _known(f, "path_gap", ".1f")),
    ("moves per second", lambda f: _known(f, _SPEED, ",.0f")),
]


def render_table(results: Sequence[PlayerResult]) -> Table:
    """One column for each player, one row for each figure.

    Args:
        results: The players, having played the same games.
    """
    from rich import box
    from rich.table import Table

    # No wider than needed: four players fit into 80 columns.
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column("")
    for result in results:
        table.add_column(result.name, justify="right")
    for label, cells in table_rows([(result.reading, result.statistics()) for result in results]):
        table.add_row(label, *cells)
    return table


def table_rows(players: Sequence[tuple[str, Mapping[str, float]]]) -> Iterator[tuple[str, list[str]]]:
    """The table, a row at a time: its label, which is indented where it goes on with the one above, and its cells.

    Args:
        players: How each player's moves were read, and its figures.
    """
    by_player = [figures for _, figures in players]
    yield "moves read by", [reading for reading, _ in players]
    for label, show in _ROWS:
        yield label, [show(figures) for figures in by_player]
    for name in _names(by_player, _END):
        if any(figures[name] for figures in by_player):
            yield f"ended {name.removeprefix(_END)}", [f"{figures[name]:.0f}" for figures in by_player]
    for name in _names(by_player, _CLAIM):
        yield f"true: {name.removeprefix(_CLAIM)}", [_known(figures, name, ".1%") for figures in by_player]


def players_in(table: Mapping[str, Any]) -> dict[str, tuple[str, dict[str, float]]]:
    """From what ``table_json`` made: how each player's moves were read, and its figures, by its name."""
    speeds = table.get(_SPEED, {})
    return {
        name: (
            player["reading"],
            {key: value for key, value in player.items() if key != "reading"}
            | ({_SPEED: speeds[name]} if name in speeds else {}),
        )
        for name, player in table["players"].items()
    }


def table_json(
    results: Sequence[PlayerResult], settings: Mapping[str, Any], adapters: Mapping[str, Any]
) -> dict[str, Any]:
    """The same as plain JSON.

    Args:
        results: The players, having played the same games.
        settings: What the games follow from.
        adapters: What to say of each player that is an adapter, by its name.

    Returns:
        ``settings`` and ``adapters`` as given; ``players``: name -> ``reading`` and every figure but the speed, equal
        from run to run; ``differences``: what the first player is ahead of each other one, in apples;
        ``moves_per_second``.
    """
    players: dict[str, Any] = {}
    speeds: dict[str, float] = {}
    for result in results:
        figures = result.statistics()
        if _SPEED in figures:
            speeds[result.name] = figures.pop(_SPEED)
        players[result.name] = {"reading": result.reading, **figures}
    first, *others = results
    differences = {
        f"{first.name} - {other.name}": paired_difference(first.summaries, other.summaries)._asdict()
        for other in others
    }
    return {
        "settings": dict(settings),
        "adapters": dict(adapters),
        "players": players,
        "differences": differences,
        _SPEED: speeds,
    }


def differences_in_words(results: Sequence[PlayerResult]) -> list[str]:
    """What the first player is ahead of each other one, a line each."""
    first, *others = results
    lines = []
    for other in others:
        difference = paired_difference(first.summaries, other.summaries)
        lines.append(
            f"{first.name} - {other.name}: {difference.mean:+.1f} apples on the same games "
            f"(95%: {difference.low:+.1f} to {difference.high:+.1f})"
        )
    return lines


def _names(by_player: Sequence[_Figures], prefix: str) -> list[str]:
    """Names of the figures of a kind that any player has, in their order."""
    return list(dict.fromkeys(name for figures in by_player for name in figures if name.startswith(prefix)))


def _known(figures: _Figures, name: str, form: str) -> str:
    return format(figures[name], form) if name in figures else "-"
