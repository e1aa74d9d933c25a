"""Alternating contenders: each lives in a process of its own and works only while it is its turn.

Machines drift; two runs one after the other compare the machine with itself. Here every round gives each contender the
same batches in turn, and what counts is the ratio within a round.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any


@dataclass
class Turn:
    """What a contender reports of one turn."""

    seconds: float
    tokens: int
    loss: float
    peak_memory_gib: float
    report: Any = None


class Referee:
    """A contender's side: ``start_turn`` waits for the turn, ``end_turn`` reports it."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._started = 0.0

    def start_turn(self) -> None:
        """Wait until it is this contender's turn."""
        self._pipe.send("ready")
        self._pipe.recv()
        self._started = time.perf_counter()

    def end_turn(self, tokens: int, loss: float, peak_memory_gib: float, report: Any = None) -> None:
        """Report the turn that ``start_turn`` began, and whatever else there is to compare."""
        self._pipe.send(Turn(time.perf_counter() - self._started, tokens, loss, peak_memory_gib, report))


def run_contest(
    contenders: dict[str, Callable[..., None]], rounds: int, arguments: dict[str, Any]
) -> dict[str, list[Turn]]:
    """Let each contender take ``rounds`` turns, in alternation; a first turn warms up and is not counted.

    Args:
        contenders: Name to a function that takes a ``Referee`` and ``arguments``, and takes ``rounds + 1`` turns.
        rounds: Counted turns of each.
        arguments: Passed on, with ``rounds`` counting the warm-up.

    Returns:
        The counted turns of each contender.
    """
    context = multiprocessing.get_context("spawn")
    processes, pipes = {}, {}
    for name, function in contenders.items():
        ours, theirs = context.Pipe()
        processes[name] = context.Process(target=_enter, args=(function, theirs, {**arguments, "rounds": rounds + 1}))
        processes[name].start()
        theirs.close()
        pipes[name] = ours
        _receive(name, ours)  # one loads its model while no other works
    turns: dict[str, list[Turn]] = {name: [] for name in contenders}
    for round_index in range(rounds + 1):
        order = list(contenders) if round_index % 2 else list(contenders)[::-1]
        for name in order:
            pipes[name].send("go")
            turns[name].append(_receive(name, pipes[name]))
            if round_index < rounds:
                _receive(name, pipes[name])
    for process in processes.values():
        process.join()
    return {name: done[1:] for name, done in turns.items()}


def ratio(turns: list[Turn], other: list[Turn]) -> tuple[float, float, float]:
    """Median, least and greatest of the ratio of tokens per second, round by round."""
    ratios = [(a.tokens / a.seconds) / (b.tokens / b.seconds) for a, b in zip(turns, other, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def _enter(function: Callable[..., None], pipe: Connection, arguments: dict[str, Any]) -> None:
    function(Referee(pipe), **arguments)


def _receive(name: str, pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        raise SystemExit(f"contender '{name}' died; its own message stands above") from None
