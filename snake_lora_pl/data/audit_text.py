"""Text of the results of the checks of rows."""

from __future__ import annotations

from snake_lora_pl.data.audit_checks import Audit, TokenReport
from snake_lora_pl.data.row_errors import format_counts

_BAR_WIDTH = 40


def format_audit(audit: Audit) -> str:
    """Return the results as lines of text."""
    moves = audit.moves
    sizes = ", ".join(f"{count:,} on {size}x{size}" for size, count in audit.grid_sizes.items())
    lines = [
        ", ".join(audit.paths),
        _item("rows", f"{audit.num_rows:,}" + (f" ({sizes})" if sizes else "")),
        *([_item("invalid rows", format_counts(audit.bad_rows))] if audit.bad_rows else []),
        _item("games", f"{audit.num_games:,}"),
        _item("duplicates", f"{audit.num_duplicates:,}"),
        _item("conflicts", f"{audit.num_conflicts:,} rows repeat a prompt with another move"),
        _item("moves", ", ".join(f"{move} {count / audit.num_rows:.1%}" for move, count in moves.counts.items())),
        _item("known boards", f"{moves.num_boards:,}"),
    ]
    if moves.num_known:
        traps = f"{moves.num_decisive:,} rows with a trap and a safe move; {moves.num_traps:,} take the trap"
        lines += [
            _item("illegal moves", _with_rows(moves.num_illegal, moves.illegal_rows)),
            _item("decisive", traps),
        ]
    if moves.num_boards:
        with_path = moves.num_boards - moves.num_without_path
        lines += [
            _item("shortest", f"{moves.num_shortest:,} of {with_path:,} moves in positions with a path to the apple"),
            *(
                _item(f"claim: {name}", f"{claim.num_said:,}, false: {_with_rows(claim.num_false, claim.false_rows)}")
                for name, claim in audit.claims.items()
            ),
        ]
    if audit.tokens is None:
        lines.append(_item("tokens", "not counted; set --base_model"))
    else:
        lines += _format_tokens(audit.tokens)
    return "\n".join(lines)


def _format_tokens(tokens: TokenReport) -> list[str]:
    lines = [
        _item("tokens", f"{tokens.tokenizer}, template {tokens.template}"),
        _item("length", f"{tokens.min_tokens:,} to {tokens.max_tokens:,}, median {tokens.median_tokens:,.0f}"),
        _item("trained on", f"{tokens.mean_trained_tokens:,.1f} per row"),
        _item("too long", f"{tokens.num_over_max_length:,} rows over {tokens.max_length:,} tokens"),
    ]
    if tokens.num_refused:
        lines.append(_item("rejected", f"{tokens.num_refused:,} rows cannot be encoded"))
    most = max((count for *_, count in tokens.histogram), default=1)
    lines += [
        f"  {first:>6,} - {last:<6,} {'#' * round(_BAR_WIDTH * count / most):<{_BAR_WIDTH}} {count:,}"
        for first, last, count in tokens.histogram
    ]
    for row in tokens.examples:
        lines += ["", f"{row.source}, {row.num_tokens:,} tokens; the part in [[ ]] is trained on"]
        lines.append(f"{row.prompt}[[{row.trained_on}]]")
    return lines


def _item(name: str, text: str) -> str:
    return f"  {name:<24} {text}"


def _with_rows(count: int, rows: list[str]) -> str:
    return f"{count:,}" + (f" ({', '.join(rows)}{', ...' if count > len(rows) else ''})" if rows else "")
