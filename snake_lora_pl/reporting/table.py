"""Table of the play statistics of several players, as text and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from snake_lora_pl.evaluation.distributed import PlayerResult
from snake_lora_pl.evaluation.statistics import paired_difference

if TYPE_CHECKING:
    from rich.table import Table

# The only statistic that differs between identical runs; stored apart from the others.
_SPEED = "moves_per_second"

_Statistics: TypeAlias = Mapping[str, float]
_CLAIM, _END = "claims/", "ends/"
_ROWS: list[tuple[str, Callable[[_Statistics], str]]] = [
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
    ("traps taken", lambda f: _format_known(f, "trap_rate", ".2%")),
    ("games ended trapped", lambda f: f"{f['trapped_rate']:.0%}"),
    ("teacher agreement", lambda f: f"{f['teacher_agreement']:.1%}"),
    ("moves on a shortest path", lambda f: _format_known(f, "optimal_agreement", ".1%")),
    ("extra steps per apple", lambda f: _format_known(f, "path_gap", ".1f")),
    ("moves per second", lambda f: _format_known(f, _SPEED, ",.0f")),
]


def render_table(results: Sequence[PlayerResult]) -> Table:
    """Render one column per player and one row per statistic.

    Args:
        results: Results of all players on the same games.
    """
    from rich import box
    from rich.table import Table

    # Minimal padding: four players fit into 80 columns.
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column("")
    for result in results:
        table.add_column(result.name, justify="right")
    for label, cells in table_rows([(result.reading, result.statistics()) for result in results]):
        table.add_row(label, *cells)
    return table


def table_rows(players: Sequence[tuple[str, Mapping[str, float]]]) -> Iterator[tuple[str, list[str]]]:
    """Yield the label and the cells of each row. The label of a sub-row is indented.

    Args:
        players: Reading of the moves and statistics of each player.
    """
    by_player = [statistics for _, statistics in players]
    yield "moves read by", [reading for reading, _ in players]
    for label, format_value in _ROWS:
        yield label, [format_value(statistics) for statistics in by_player]
    for name in _names(by_player, _END):
        if any(statistics[name] for statistics in by_player):
            yield f"ended {name.removeprefix(_END)}", [f"{statistics[name]:.0f}" for statistics in by_player]
    for name in _names(by_player, _CLAIM):
        yield f"true: {name.removeprefix(_CLAIM)}", [_format_known(s, name, ".1%") for s in by_player]


def players_in(table: Mapping[str, Any]) -> dict[str, tuple[str, dict[str, float]]]:
    """Return reading and statistics by player from the output of ``table_json``."""
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
    """Return the table as JSON values.

    Args:
        results: Results of all players on the same games.
        settings: Settings that determine the games.
        adapters: Description of each player that is an adapter, by name.

    Returns:
        ``settings`` and ``adapters`` as given; ``players``: ``reading`` and statistics by name, without the speed, so
        that identical runs give identical values; ``differences``: apples of the first player minus apples of each
        other player; ``moves_per_second`` by name.
    """
    players: dict[str, Any] = {}
    speeds: dict[str, float] = {}
    for result in results:
        statistics = result.statistics()
        if _SPEED in statistics:
            speeds[result.name] = statistics.pop(_SPEED)
        players[result.name] = {"reading": result.reading, **statistics}
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


def difference_lines(results: Sequence[PlayerResult]) -> list[str]:
    """Describe the difference in apples between the first player and each other player, one line each."""
    first, *others = results
    lines = []
    for other in others:
        difference = paired_difference(first.summaries, other.summaries)
        lines.append(
            f"{first.name} - {other.name}: {difference.mean:+.1f} apples on the same games "
            f"(95%: {difference.low:+.1f} to {difference.high:+.1f})"
        )
    return lines


def format_bool(value: bool | None) -> str:
    """Return ``yes``, ``no``, or ``unknown`` for None."""
    return "unknown" if value is None else "yes" if value else "no"


def _names(by_player: Sequence[_Statistics], prefix: str) -> list[str]:
    """Return the names with a prefix that any player has, in order of appearance."""
    return list(dict.fromkeys(name for statistics in by_player for name in statistics if name.startswith(prefix)))


def _format_known(statistics: _Statistics, name: str, format_spec: str) -> str:
    return format(statistics[name], format_spec) if name in statistics else "-"
