"""Checks of rows before training: games, duplicates, moves, claims of completions, and lengths in tokens.

Completions are checked against the board of their prompt. The board is known if the prompt contains the body in order,
or, for drawn boards, if it follows from the previous rows. Prompts that state what each move is instead of the board
are checked as far as that goes.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from snake_lora_pl.data.data_files import PathSpec, expand_paths
from snake_lora_pl.data.encoding import Encoder, Example
from snake_lora_pl.data.game_counter import GameCounter
from snake_lora_pl.data.jsonl import Row, read_rows
from snake_lora_pl.data.row_errors import RowErrors
from snake_lora_pl.errors import UserError
from snake_lora_pl.game import (
    Board,
    BoardReader,
    Move,
    PromptMoves,
    check_claims,
    read_grid_size,
    read_move,
    read_moves,
    shortest_moves,
)

NO_MOVE = "none"

_NUM_BINS = 10
_MAX_SOURCES = 5
# Lengths are measured before rows are shortened.
_UNLIMITED_TOKENS = 2**31


@dataclass
class MoveReport:
    """Moves of the completions.

    Attributes:
        counts: Rows by move; ``none`` for rows without a move.
        num_known: Rows whose legal moves are known, from the board or stated by the prompt.
        num_illegal: Rows among these with an illegal move.
        illegal_rows: ``path:line`` of the first rows with an illegal move.
        num_decisive: Rows among these with both a trap and a safe move.
        num_traps: Rows among the decisive ones whose move is a trap.
        num_boards: Rows with a known board; the following counts are among these.
        num_shortest: Rows whose move is the first of a shortest path to the apple.
        num_without_path: Rows of positions without a path to the apple.
    """

    counts: dict[str, int] = field(default_factory=dict)
    num_known: int = 0
    num_illegal: int = 0
    illegal_rows: list[str] = field(default_factory=list)
    num_decisive: int = 0
    num_traps: int = 0
    num_boards: int = 0
    num_shortest: int = 0
    num_without_path: int = 0


@dataclass
class ClaimReport:
    """A claim of completions about the board or the move.

    Attributes:
        num_said: Rows that make the claim and whose board is known.
        num_false: Rows in which the claim is false.
        false_rows: ``path:line`` of the first rows in which it is false.
    """

    num_said: int = 0
    num_false: int = 0
    false_rows: list[str] = field(default_factory=list)


@dataclass
class ShownRow:
    """A row as the model is trained on it.

    Attributes:
        source: ``path:line``.
        num_tokens: Length.
        prompt: Decoded prompt.
        trained_on: Decoded completion, EOS included.
    """

    source: str
    num_tokens: int
    prompt: str
    trained_on: str


@dataclass
class TokenReport:
    """Lengths of rows in tokens, template and EOS included.

    Attributes:
        tokenizer: Name of the tokenizer.
        template: Template of prompt and completion.
        max_length: Limit that the lengths are compared with.
        num_over_max_length: Rows longer than the limit.
        min_tokens: Length of the shortest row.
        median_tokens: Median length.
        max_tokens: Length of the longest row.
        mean_trained_tokens: Mean number of tokens per row that are trained on.
        histogram: First length, last length and number of rows of each bin.
        num_refused: Rows that cannot be encoded, whatever their length.
        examples: The first and the longest row, decoded.
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
    """Results of the checks.

    Attributes:
        paths: The files.
        num_rows: Valid rows.
        bad_rows: Invalid rows by reason.
        num_games: Games. All symmetries of a game count as one.
        grid_sizes: Rows by grid size, without rows whose prompt has an unknown format.
        num_duplicates: Rows that repeat prompt and completion of an earlier row.
        num_conflicts: Rows that repeat the prompt of an earlier row with another move.
        moves: Moves of the completions.
        claims: Claims of the completions, by field of ``game.Claims``.
        tokens: Lengths in tokens; None without a tokenizer.
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


def audit_rows(spec: PathSpec, encoder: Encoder | None = None, max_rows: int | None = None) -> Audit:
    """Check the rows of files.

    Args:
        spec: A path, a glob or a list of them, as in ``expand_paths``.
        encoder: Encoder to measure lengths with; its ``max_length`` is the limit they are compared with.
        max_rows: Number of rows to read from the beginning of each file; None reads all.

    Raises:
        UserError: If a file cannot be read, or if there is no valid row.
    """
    paths = expand_paths(spec)
    errors = RowErrors()
    rows = [row for path in paths for row in islice(read_rows([path], "skip", errors=errors), max_rows)]
    if not rows:
        found = str(errors) if errors else "the file has no rows"
        raise UserError(f"{paths[0]}: no valid row: {found}")
    audit = Audit([str(path) for path in paths], len(rows), dict(errors.counts))
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
        known = read_moves(row.prompt) if board is None else PromptMoves.of(board)
        if known is None:
            continue
        report.num_known += 1
        if move not in known.legal:
            report.num_illegal += 1
            _add_source(row, report.illegal_rows)
        report.num_decisive += known.is_decisive
        report.num_traps += known.is_decisive and move in known.traps
        if board is None or board.apple is None:
            continue
        report.num_boards += 1
        shortest = shortest_moves(board)
        report.num_shortest += move in shortest
        report.num_without_path += not shortest
        for name, is_true in check_claims(board, move, row.completion).items():
            claim = audit.claims.setdefault(name, ClaimReport())
            claim.num_said += 1
            if not is_true:
                claim.num_false += 1
                _add_source(row, claim.false_rows)
    report.counts = dict(counts.most_common())


def _read_boards(rows: Iterable[Row]) -> list[Board | None]:
    readers: dict[str, BoardReader] = {}
    return [readers.setdefault(row.path, BoardReader()).read(row.prompt) for row in rows]


def _add_source(row: Row, sources: list[str]) -> None:
    if len(sources) < _MAX_SOURCES:
        sources.append(row.source)


def _measure_tokens(rows: list[Row], encoder: Encoder) -> TokenReport:
    measure = Encoder(encoder.tokenizer, encoder.template, _UNLIMITED_TOKENS, encoder.on_overflow)
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
    """Return a row as training encodes it, shortened or rejected if it is too long."""
    (example,) = encoder.encode([row])
    if not isinstance(example, Example):
        return ShownRow(row.source, 0, "", f"nothing: {example.message}")
    ids = list(example.input_ids)
    decode = encoder.tokenizer.decode
    return ShownRow(row.source, len(ids), decode(ids[: example.num_prompt]), decode(ids[example.num_prompt :]))
