"""What is in a file of rows, before anything is trained on it: games, duplicates, moves, truth and lengths in tokens.

Completions are checked against the board of their prompt. A board is known where the prompt tells the body's order, and
in drawings where it follows from the rows before.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from snake_lora_pl.data.encoding import Encoder, Example
from snake_lora_pl.data.example_cache import GameCounter
from snake_lora_pl.data.jsonl import Complaints, Row, expand_paths, read_rows
from snake_lora_pl.errors import UserError
from snake_lora_pl.game import Board, BoardReader, Move, check_claims, read_grid_size, read_move, shortest_moves

NO_MOVE = "none"

_NUM_BINS = 10
_NUM_NAMED = 5
# No row is longer: what a row's length is must not depend on where it would be cut.
_NO_LIMIT = 2**31


@dataclass
class MoveReport:
    """What the completions conclude with.

    Attributes:
        counts: Rows by move; ``none`` for those that conclude with no move.
        num_boards: Rows whose board is known, which the rest is out of.
        num_illegal: Rows whose move the rules do not allow.
        num_shortest: Rows whose move is the first of a shortest path to the apple.
        num_without_path: Rows of positions without any such path.
        illegal_rows: The first of the illegal ones, as ``path:line``.
    """

    counts: dict[str, int] = field(default_factory=dict)
    num_boards: int = 0
    num_illegal: int = 0
    num_shortest: int = 0
    num_without_path: int = 0
    illegal_rows: list[str] = field(default_factory=list)


@dataclass
class ClaimReport:
    """One thing that completions speak of.

    Attributes:
        num_said: Rows that speak of it and whose board is known.
        num_false: Those of them in which it is not so.
        false_rows: The first of these, as ``path:line``.
    """

    num_said: int = 0
    num_false: int = 0
    false_rows: list[str] = field(default_factory=list)


@dataclass
class ShownRow:
    """A row as the model sees it.

    Attributes:
        source: Where it stands.
        num_tokens: Its length.
        prompt: What it is given.
        trained_on: What it is to learn, EOS included.
    """

    source: str
    num_tokens: int
    prompt: str
    trained_on: str


@dataclass
class TokenReport:
    """Rows in tokens, template and EOS included.

    Attributes:
        tokenizer: Whose tokens.
        template: How prompt and completion became one text.
        max_length: The limit they are held against.
        num_over_max_length: Rows that exceed it.
        min_tokens: The shortest row.
        median_tokens: The middle one.
        max_tokens: The longest one.
        mean_trained_tokens: Tokens of a row that are trained on, on average.
        histogram: First length, last length and rows of each bin.
        num_refused: Rows that cannot be encoded, whatever their length.
        examples: Rows decoded: the first, and the longest one.
    """

    tokenizer: str
    template: str
    max_length: int
    num_over_max_length: int = 0
    min_tokens: int = 0
    median_tokens: float = 0
    max_tokens: int = 0
    mean_trained_tokens: float = 0
    histogram: list[tuple[int, int, int]] = field(default_factory=list)
    num_refused: int = 0
    examples: list[ShownRow] = field(default_factory=list)


@dataclass
class Audit:
    """What was found.

    Attributes:
        paths: The files.
        num_rows: Rows that can be used.
        bad_rows: Rows that cannot, by reason.
        num_games: Games found. The symmetries of one game count as one.
        grid_sizes: Rows by cells along one side; those of unknown prompts are not in it.
        num_duplicates: Rows that repeat prompt and completion of an earlier one.
        num_conflicts: Rows that repeat the prompt of an earlier one but conclude with another move.
        moves: What is concluded with.
        claims: What is said beside, by field of ``game.Claims``.
        tokens: Lengths; None without a tokenizer.
    """

    paths: list[str]
    num_rows: int = 0
    bad_rows: dict[str, int] = field(default_factory=dict)
    num_games: int = 0
    grid_sizes: dict[int, int] = field(default_factory=dict)
    num_duplicates: int = 0
    num_conflicts: int = 0
    moves: MoveReport = field(default_factory=MoveReport)
    claims: dict[str, ClaimReport] = field(default_factory=dict)
    tokens: TokenReport | None = None


def audit_rows(spec: str | Sequence[str], encoder: Encoder | None = None, max_rows: int | None = None) -> Audit:
    """Look through files of rows.

    Args:
        spec: A path, a glob or several, as ``expand_paths`` takes them.
        encoder: What makes tokens of rows; its ``max_length`` is the limit they are held against.
        max_rows: Rows to read from the beginning of each file; None reads all.

    Raises:
        UserError: If a file cannot be read, or no row in any can be used.
    """
    paths = expand_paths(spec)
    complaints = Complaints()
    rows = [row for path in paths for row in islice(read_rows([path], "skip", complaints=complaints), max_rows)]
    if not rows:
        raise UserError(f"{paths[0]}: no row can be used: {complaints}" if complaints else f"{paths[0]}: holds no row")
    audit = Audit([str(path) for path in paths], len(rows), dict(complaints.counts))
    _count_games(rows, audit)
    _find_duplicates(rows, audit)
    _check_completions(rows, audit)
    if encoder is not None:
        audit.tokens = _measure_tokens(rows, encoder)
    return audit


def _count_games(rows: list[Row], audit: Audit) -> None:
    counters: dict[str, GameCounter] = {}
    for row in rows:
        counters.setdefault(row.path, GameCounter()).game_of(row)
    audit.num_games = sum(counter.num_games for counter in counters.values())
    sizes = Counter(read_grid_size(row.prompt) for row in rows)
    audit.grid_sizes = {size: count for size, count in sizes.most_common() if size is not None}


def _find_duplicates(rows: list[Row], audit: Audit) -> None:
    seen: dict[str, tuple[set[str], set[Move | None]]] = {}
    for row in rows:
        move = read_move(row.completion)
        completions, moves = seen.setdefault(row.prompt, (set(), set()))
        audit.num_duplicates += row.completion in completions
        audit.num_conflicts += bool(moves) and move not in moves
        completions.add(row.completion)
        moves.add(move)


def _check_completions(rows: list[Row], audit: Audit) -> None:
    report = audit.moves
    counts: Counter[str] = Counter()
    for row, board in zip(rows, _read_boards(rows), strict=True):
        move = read_move(row.completion)
        counts[NO_MOVE if move is None else move.name] += 1
        if board is None or board.apple is None:
            continue
        report.num_boards += 1
        if move not in board.legal_moves():
            report.num_illegal += 1
            _name(row, report.illegal_rows)
        shortest = shortest_moves(board)
        report.num_shortest += move in shortest
        report.num_without_path += not shortest
        for name, is_true in check_claims(board, move, row.completion).items():
            claim = audit.claims.setdefault(name, ClaimReport())
            claim.num_said += 1
            if not is_true:
                claim.num_false += 1
                _name(row, claim.false_rows)
    report.counts = dict(counts.most_common())


def _read_boards(rows: Iterable[Row]) -> list[Board | None]:
    readers: dict[str, BoardReader] = {}
    return [readers.setdefault(row.path, BoardReader()).read(row.prompt) for row in rows]


def _name(row: Row, named: list[str]) -> None:
    if len(named) < _NUM_NAMED:
        named.append(row.source)


def _measure_tokens(rows: list[Row], encoder: Encoder) -> TokenReport:
    measure = Encoder(encoder.tokenizer, encoder.template, _NO_LIMIT, encoder.on_overflow)
    examples = {
        row: example for row, example in zip(rows, measure.encode(rows), strict=True) if isinstance(example, Example)
    }
    name = Path(str(encoder.tokenizer.name_or_path)).name
    report = TokenReport(name, encoder.template, encoder.max_length, num_refused=len(rows) - len(examples))
    if not examples:
        return report
    lengths = [len(example.input_ids) for example in examples.values()]
    report.num_over_max_length = sum(length > encoder.max_length for length in lengths)
    report.min_tokens, report.max_tokens = min(lengths), max(lengths)
    report.median_tokens = statistics.median(lengths)
    report.mean_trained_tokens = statistics.fmean(
        len(example.input_ids) - example.num_prompt for example in examples.values()
    )
    report.histogram = _histogram(lengths)
    longest = max(examples, key=lambda row: len(examples[row].input_ids))
    shown = list(dict.fromkeys([next(iter(examples)), longest]))
    report.examples = [_show(row, encoder) for row in shown]
    return report


def _histogram(lengths: list[int]) -> list[tuple[int, int, int]]:
    first = min(lengths)
    width = -(-(max(lengths) - first + 1) // _NUM_BINS)
    counts = Counter((length - first) // width for length in lengths)
    return [(first + i * width, first + (i + 1) * width - 1, counts[i]) for i in range(max(counts) + 1)]


def _show(row: Row, encoder: Encoder) -> ShownRow:
    """A row as training sees it: shortened or refused where it is too long."""
    (example,) = encoder.encode([row])
    if not isinstance(example, Example):
        return ShownRow(row.source, 0, "", f"nothing: {example.message}")
    ids = list(example.input_ids)
    decode = encoder.tokenizer.decode
    return ShownRow(row.source, len(ids), decode(ids[: example.num_prompt]), decode(ids[example.num_prompt :]))
