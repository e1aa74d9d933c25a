"""Replay of a recorded game in a terminal."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from snake_lora_pl.game.board import Board
from snake_lora_pl.game.replay.recording import Recording

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

_EMPTY = "· "
_APPLE = "● "
_HEAD = "██"
_BODY = "▓▓"


def show(recording: Recording, console: Console | None = None, frames_per_second: float = 8.0) -> None:
    """Play a recording in a terminal, or print only its last position if the output is not a terminal.

    Args:
        recording: The game.
        console: Console to print to; standard output if None.
        frames_per_second: Playback speed.

    Raises:
        ValueError: If the speed is not positive.
    """
    from rich.console import Console
    from rich.live import Live

    if frames_per_second <= 0:
        raise ValueError(f"frames_per_second must be positive (found: {frames_per_second})")
    console = console or Console()
    last = len(recording.frames) - 1
    if not console.is_terminal:
        console.print(_render(recording, last))
        return
    with Live(console=console, auto_refresh=False) as live:
        for index in range(last + 1):
            live.update(_render(recording, index), refresh=True)
            if index < last:
                time.sleep(1 / frames_per_second)


def draw_grid(board: Board) -> Text:
    """Return a board as colored text, the top row first."""
    from rich.text import Text

    grid = Text(no_wrap=True)
    symbols = dict.fromkeys(board.body, (_BODY, "green")) | {board.head: (_HEAD, "bright_green")}
    if board.apple is not None:
        symbols[board.apple] = (_APPLE, "bright_red")
    for y in range(board.size - 1, -1, -1):
        for x in range(board.size):
            grid.append(*symbols.get((x, y), (_EMPTY, "dim")))
        if y:
            grid.append("\n")
    return grid


def _render(recording: Recording, index: int) -> RenderableType:
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    frame = recording.frames[index]
    last = len(recording.frames) - 1
    status = [f"step {index} of {last}", f"apples {recording.num_apples(index)}"]
    if frame.move is not None:
        status.append(frame.move.name)
    if index == last and recording.end is not None:
        status.append(recording.end.value)
    # Text objects, because Rich would parse markup in strings, and completions may contain it.
    picture = Group(Text(recording.title), Panel(draw_grid(frame.board), expand=False), Text(", ".join(status)))
    table = Table.grid(padding=(0, 2))
    table.add_row(picture, Text(frame.completion))
    return table
