"""Claims of a completion about its position, and whether they are true: a move can be right for wrong reasons.

The meaning of each claim is that of the ``heuristics-v0.04`` files (see ``metrics``), whatever the completion's style.
A bare move claims nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from snake_lora_pl.game.board import Board, Cell, Move
from snake_lora_pl.game.search import apple_distance
from snake_lora_pl.game.text.metrics import Danger, measure
from snake_lora_pl.game.text.parsing import read_move
from snake_lora_pl.game.text.style import NUMBER

_MOVE_BY_NAME = {move.name: move for move in Move} | {move.name.lower(): move for move in Move}
_MOVING_PATTERN = re.compile(
    rf"^Moving (UP|RIGHT|DOWN|LEFT) from \[({NUMBER}), ({NUMBER})\][ \t\r]*$", re.MULTILINE | re.ASCII
)
_MOVING_START_PATTERN = re.compile(r"^Moving\b", re.MULTILINE)
# The name's length is bounded, because an unbounded search restarts at every letter of a word of millions.
_PAIR_PATTERN = re.compile(rf"['\"]?(\w{{1,20}})['\"]?\s*[:=]\s*({NUMBER})", re.ASCII)
_NAME_PATTERN = re.compile(r"['\"](\w+)['\"]", re.ASCII)


@dataclass(frozen=True)
class Claims:
    """Claims of a completion; None for a claim that is absent or malformed.

    Attributes:
        moving: The move announced before the rationale.
        head: The head's cell.
        valid_moves: See ``Metrics``.
        manhattan_distance: See ``Metrics``.
        apple_direction: See ``Metrics``.
        danger: See ``Metrics``; relative to the announced move.
        free_space: See ``Metrics``.
        path_length: Steps of the path found; 0 for no path.
        distance: The Manhattan distance, under its label in ASCII board styles.
        free_cells: Number of cells without snake.
        malformed: Names of the claims that are present but cannot be parsed.
    """

    moving: Move | None = None
    head: Cell | None = None
    valid_moves: frozenset[Move] | None = None
    manhattan_distance: int | None = None
    apple_direction: frozenset[Move] | None = None
    danger: Danger | None = None
    free_space: dict[Move, int] | None = None
    path_length: int | None = None
    distance: int | None = None
    free_cells: int | None = None
    malformed: frozenset[str] = frozenset()


CLAIM_NAMES = (*(claim.name for claim in fields(Claims) if claim.name != "malformed"), "conclusion")
"""Names of the results of ``check_claims``."""


def read_claims(completion: str) -> Claims:
    """Return the claims of a completion, whatever its style."""
    values: dict[str, Any] = {}
    malformed = set()
    if match := _MOVING_PATTERN.search(completion):
        values["moving"] = Move[match[1]]
        values["head"] = (int(match[2]), int(match[3]))
    elif _MOVING_START_PATTERN.search(completion):
        malformed |= {"moving", "head"}
    for name, (pattern, read) in _READERS.items():
        if match := pattern.search(completion):
            try:
                values[name] = read(match[1].strip())
            except (ValueError, KeyError):
                malformed.add(name)
    return Claims(**values, malformed=frozenset(malformed))


def check_claims(board: Board, move: Move | None, completion: str) -> dict[str, bool]:
    """Return whether each claim of a completion is true.

    Args:
        board: The position.
        move: The move that the completion concludes with, as returned by ``read_move``.
        completion: The completion.

    Returns:
        For each claim that is present: whether it is true; a malformed one is not. ``moving`` is true if the announced
        move is the concluded one. ``conclusion``, present if valid moves are claimed, is true if the concluded move is
        one of them.

    Raises:
        ValueError: If the board has no apple.
    """
    claims = read_claims(completion)
    chosen = claims.moving or move
    # Only danger depends on the move; without a move, it counts as false below.
    metrics = measure(board, chosen or Move.UP)
    truth: dict[str, Any] = metrics._asdict() | {
        "moving": move,
        "head": board.head,
        "valid_moves": frozenset(metrics.valid_moves),
        "path_length": apple_distance(board) or 0,
        "distance": metrics.manhattan_distance,
        "free_cells": board.size**2 - board.length,
    }
    checked = {}
    for claim in fields(Claims):
        value = getattr(claims, claim.name)
        if claim.name in claims.malformed:
            checked[claim.name] = False
        elif claim.name in truth and value is not None:
            checked[claim.name] = value == truth[claim.name] and (claim.name != "danger" or chosen is not None)
    if claims.valid_moves is not None:
        checked["conclusion"] = move in claims.valid_moves
    return checked


def check_completion(board: Board, completion: str) -> dict[str, bool]:
    """Return ``check_claims`` for the move that the completion concludes with."""
    return check_claims(board, read_move(completion), completion)


def _line_pattern(label: str) -> re.Pattern[str]:
    return re.compile(rf"^(?:- )?{label}: (.*)$", re.MULTILINE)


def _read_number(text: str) -> int:
    if not re.fullmatch(NUMBER, text, re.ASCII):
        raise ValueError(text)
    return int(text)


def _read_moves(text: str) -> frozenset[Move]:
    if not (text.startswith("[") and text.endswith("]")):
        raise ValueError(text)
    return frozenset(_MOVE_BY_NAME[name] for name in _NAME_PATTERN.findall(text))


def _read_pairs(text: str) -> dict[str, int]:
    pairs = {name: int(number) for name, number in _PAIR_PATTERN.findall(text)}
    if len(pairs) < 3:
        raise ValueError(text)
    return pairs


def _read_directions(text: str) -> frozenset[Move]:
    return frozenset(_MOVE_BY_NAME[name] for name, is_toward in _read_pairs(text).items() if is_toward)


def _read_danger(text: str) -> Danger:
    pairs = _read_pairs(text)
    return Danger(*(bool(pairs[side]) for side in Danger._fields))


def _read_free_space(text: str) -> dict[Move, int]:
    return {_MOVE_BY_NAME[name]: number for name, number in _read_pairs(text).items()}


def _read_path_length(text: str) -> int:
    match = re.search(rf"\(({NUMBER}) steps\)", text, re.ASCII)
    if match is None and not text.startswith("no "):
        raise ValueError(text)
    return 0 if match is None else int(match[1])


_READERS: dict[str, tuple[re.Pattern[str], Callable[[str], Any]]] = {
    "valid_moves": (_line_pattern("Valid moves"), _read_moves),
    "manhattan_distance": (_line_pattern("Manhattan distance(?: to apple)?"), _read_number),
    "apple_direction": (_line_pattern("Apple direction"), _read_directions),
    "danger": (_line_pattern("Danger assessment"), _read_danger),
    "free_space": (_line_pattern("Free space"), _read_free_space),
    "distance": (re.compile(r"^Distance: ([^,\n]*)", re.MULTILINE), _read_number),
    "path_length": (re.compile(r"^[A-Z-]+: Found (.*)$", re.MULTILINE), _read_path_length),
    "free_cells": (re.compile(r"\bFree cells: (.*)$", re.MULTILINE), _read_number),
}
