"""Interleaved measurement of contenders, each in its own process.

The speed of a machine drifts, so runs one after the other are not comparable. Here, every contender takes a turn in
each round while the others wait, and contenders are compared by the ratio of their speeds within a round.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, TypeVar

S = TypeVar("S")


@dataclass
class Turn:
    """Measurement of one turn.

    Attributes:
        duration_s: Wall-clock duration.
        num_units: Units of work done: tokens or moves.
        loss: Mean training loss; NaN if there is none.
        peak_memory_gib: Peak memory of the process so far.
        details: Other results to compare.
    """

    duration_s: float
    num_units: int
    loss: float
    peak_memory_gib: float
    details: Any = None

    @property
    def speed(self) -> float:
        """Units of work per second."""
        return self.num_units / self.duration_s


class TurnTimer:
    """The contender's end of the measurement: call ``start`` before and ``stop`` after the work of each turn."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._started = 0.0

    def start(self) -> None:
        """Wait for this contender's turn and start the clock."""
        self._pipe.send("ready")
        self._pipe.recv()
        self._started = time.perf_counter()

    def stop(self, num_units: int, loss: float, peak_memory_gib: float, details: Any = None) -> None:
        """Stop the clock and report the turn; see ``Turn``."""
        self._pipe.send(Turn(time.perf_counter() - self._started, num_units, loss, peak_memory_gib, details))


def run_interleaved(
    contenders: Mapping[str, Callable[[TurnTimer, S, int], None]], settings: S, num_rounds: int
) -> dict[str, list[Turn]]:
    """Let every contender take one turn per round.

    A first round warms up and is not counted. Contenders load their models one after the other.

    Args:
        contenders: Functions by name. Each is called as ``function(timer, settings, num_turns)`` in a separate process,
            and must take ``num_turns`` turns.
        settings: Settings shared by all contenders.
        num_rounds: Number of counted rounds.

    Returns:
        The counted turns of each contender.
    """
    context = multiprocessing.get_context("spawn")
    processes, pipes = {}, {}
    turns: dict[str, list[Turn]] = {name: [] for name in contenders}
    try:
        for name, function in contenders.items():
            pipes[name], child_pipe = context.Pipe()
            arguments = (function, child_pipe, settings, num_rounds + 1)
            processes[name] = context.Process(target=_run_contender, args=arguments)
            processes[name].start()
            child_pipe.close()
            _receive(name, pipes[name])  # "ready": the model is loaded
        for round_index in range(num_rounds + 1):
            order = list(contenders) if round_index % 2 else list(contenders)[::-1]
            for name in order:
                pipes[name].send("go")
                turns[name].append(_receive(name, pipes[name]))
                if round_index < num_rounds:
                    _receive(name, pipes[name])
    except SystemExit:
        for process in processes.values():
            process.kill()  # Lightning handles SIGTERM and would continue
        raise
    for process in processes.values():
        process.join()
    return {name: taken[1:] for name, taken in turns.items()}


@dataclass
class SpeedRatio:
    """Ratio of two contenders' speeds, over the rounds."""

    median: float
    min: float
    max: float


def speed_ratio(turns: list[Turn], baseline: list[Turn]) -> SpeedRatio:
    """Return the ratio of the speeds of two contenders, computed for each round."""
    ratios = [turn.speed / other.speed for turn, other in zip(turns, baseline, strict=True)]
    return SpeedRatio(statistics.median(ratios), min(ratios), max(ratios))


def _run_contender(
    function: Callable[[TurnTimer, S, int], None], pipe: Connection, settings: S, num_turns: int
) -> None:
    function(TurnTimer(pipe), settings, num_turns)


def _receive(name: str, pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        raise SystemExit(f"contender '{name}' exited early; see its output above") from None
