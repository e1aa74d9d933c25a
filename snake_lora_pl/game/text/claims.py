"""What a completion claims about its position, and whether it is so: a move may be right for wrong reasons.

The meaning of each claim is that of the ``heuristics-v0.04`` files (see ``metrics``), in whichever style it is written.
A bare move claims nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from snake_lora_pl.game.board import Board, Cell, Move
from snake_lora_pl.game.search import apple_distance
from snake_lora_pl.game.text.metrics import Danger, measure
from snake_lora_pl.game.text.reading import read_move
from snake_lora_pl.game.text.style import NUMBER

_NAMES = {move.name: move for move in Move} | {move.name.lower(): move for move in Move}
_MOVING_PATTERN = re.compile(
    rf"^Moving (UP|RIGHT|DOWN|LEFT) from \[({NUMBER}), ({NUMBER})\][ \t\r]*$", re.MULTILINE | re.ASCII
)
_MOVING_START_PATTERN = re.compile(r"^Moving\b", re.MULTILINE)
# A bound on a name's length: from every letter of a word of millions the search would run to its end.
_PAIR_PATTERN = re.compile(rf"['\"]?(\w{{1,20}})['\"]?\s*[:=]\s*({NUMBER})", re.ASCII)
_NAME_PATTERN = re.compile(r"['\"](\w+)['\"]", re.ASCII)


@dataclass(frozen=True)
class Claims:
    """What a completion says; None for what it does not speak of, or not so that it could be understood.

    Attributes:
        moving: The move it announces before its reasons.
        head: Where it says that the head is.
        valid_moves: See ``Metrics``.
        manhattan_distance: See ``Metrics``.
        apple_direction: See ``Metrics``.
        danger: See ``Metrics``; relative to the move announced.
        free_space: See ``Metrics``.
        path_length: Steps of the path it says it found; 0 for none.
        distance: The Manhattan distance under the name that drawn styles give it beside the free cells.
        free_cells: Cells without snake.
        garbled: Names of the fields that it speaks of, yet not so that it could be understood.
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
    garbled: frozenset[str] = field(default=frozenset())


CLAIM_NAMES = (*(claim.name for claim in fields(Claims) if claim.name != "garbled"), "conclusion")
"""Everything that ``check_claims`` can judge."""


def read_claims(completion: str) -> Claims:
    """Everything that a completion claims, whatever its style."""
    said: dict[str, Any] = {}
    garbled = set()
    if match := _MOVING_PATTERN.search(completion):
        said["moving"] = Move[match[1]]
        said["head"] = (int(match[2]), int(match[3]))
    elif _MOVING_START_PATTERN.search(completion):
        garbled |= {"moving", "head"}
    for name, (pattern, read) in _READERS.items():
        if match := pattern.search(completion):
            try:
                said[name] = read(match[1].strip())
            except (ValueError, KeyError):
                garbled.add(name)
    return Claims(**said, garbled=frozenset(garbled))


def check_claims(board: Board, move: Move | None, completion: str) -> dict[str, bool]:
    """Whether each thing that a completion claims is so.

    Args:
        board: The position it speaks of.
        move: The move it concludes with, as ``read_move`` reads it; None where it concludes with none.
        completion: What was said.

    Returns:
        For each field of ``Claims`` that is spoken of: whether it is true. ``moving`` is true where the move announced
        is the one concluded with. ``conclusion``, where valid moves are spoken of, is true if the conclusion is among
        them.

    Raises:
        ValueError: If the board has no apple.
    """
    claims = read_claims(completion)
    chosen = claims.moving or move
    truth: dict[str, Any] = {
        "moving": move,
        "head": board.head,
        "path_length": apple_distance(board) or 0,
        "free_cells": board.size**2 - board.length,
    }
    # What is dangerous depends on the move; the rest does not.
    truth |= measure(board, chosen or Move.UP)._asdict()
    truth["valid_moves"] = frozenset(truth["valid_moves"])
    truth["distance"] = truth["manhattan_distance"]
    checked = {}
    for claim in fields(Claims):
        said = getattr(claims, claim.name)
        if claim.name in claims.garbled:
            checked[claim.name] = False
        elif claim.name in truth and said is not None:
            checked[claim.name] = said == truth[claim.name] and (claim.name != "danger" or chosen is not None)
    if claims.valid_moves is not None:
        checked["conclusion"] = move in claims.valid_moves
    return checked


def check_completion(board: Board, completion: str) -> dict[str, bool]:
    """``check_claims`` of the move that the completion itself concludes with."""
    return check_claims(board, read_move(completion), completion)


def _line(label: str) -> re.Pattern[str]:
    return re.compile(rf"^(?:- )?{label}: (.*)$", re.MULTILINE)


def _read_number(text: str) -> int:
    if not re.fullmatch(NUMBER, text, re.ASCII):
        raise ValueError(text)
    return int(text)


def _read_moves(text: str) -> frozenset[Move]:
    if not (text.startswith("[") and text.endswith("]")):
        raise ValueError(text)
    return frozenset(_NAMES[name] for name in _NAME_PATTERN.findall(text))


def _read_pairs(text: str) -> dict[str, int]:
    pairs = {name: int(number) for name, number in _PAIR_PATTERN.findall(text)}
    if len(pairs) < 3:
        raise ValueError(text)
    return pairs


def _read_directions(text: str) -> frozenset[Move]:
    return frozenset(_NAMES[name] for name, lies_there in _read_pairs(text).items() if lies_there)


def _read_danger(text: str) -> Danger:
    pairs = _read_pairs(text)
    return Danger(*(bool(pairs[side]) for side in Danger._fields))


def _read_free_space(text: str) -> dict[Move, int]:
    return {_NAMES[name]: number for name, number in _read_pairs(text).items()}


def _read_path_length(text: str) -> int:
    match = re.search(rf"\(({NUMBER}) steps\)", text, re.ASCII)
    if match is None and not text.startswith("no "):
        raise ValueError(text)
    return 0 if match is None else int(match[1])


_READERS: dict[str, tuple[re.Pattern[str], Callable[[str], Any]]] = {
    "valid_moves": (_line("Valid moves"), _read_moves),
    "manhattan_distance": (_line("Manhattan distance(?: to apple)?"), _read_number),
    "apple_direction": (_line("Apple direction"), _read_directions),
    "danger": (_line("Danger assessment"), _read_danger),
    "free_space": (_line("Free space"), _read_free_space),
    "distance": (re.compile(r"^Distance: ([^,\n]*)", re.MULTILINE), _read_number),
    "path_length": (re.compile(r"^[A-Z-]+: Found (.*)$", re.MULTILINE), _read_path_length),
    "free_cells": (re.compile(r"\bFree cells: (.*)$", re.MULTILINE), _read_number),
}
