import json
from itertools import pairwise
from pathlib import Path

import pytest

from snake_lora_pl.data.audit_checks import ClaimReport, audit_rows
from snake_lora_pl.data.encoding import Encoder
from snake_lora_pl.data.generated_rows import write_dataset
from snake_lora_pl.errors import UserError
from snake_lora_pl.game import Board, Move, get_style

BFS_512 = get_style("bfs-512")
BOARD = Board(4, ((1, 1), (1, 2), (2, 2)), (3, 0))
PROMPT = BFS_512.write_prompt(BOARD)


def completion_for(move: Move) -> str:
    return BFS_512.write_completion(BOARD, move)


def write(path: Path, *rows: tuple[str, str] | str) -> str:
    lines = [row if isinstance(row, str) else json.dumps({"prompt": row[0], "completion": row[1]}) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_real_rows_have_no_findings(bfs512_sample_path):
    audit = audit_rows(str(bfs512_sample_path))
    assert (audit.num_rows, audit.num_games, audit.grid_sizes) == (354, 4, {10: 354})
    assert audit.moves.num_boards == audit.moves.num_shortest == 354
    assert audit.moves.num_illegal == 0
    assert sum(audit.moves.counts.values()) == 354
    assert {claim.num_false for claim in audit.claims.values()} == {0}
    assert audit.tokens is None


def test_drawn_boards_are_derived_from_previous_rows(bfs512_sample_path):
    pattern = str(bfs512_sample_path.parents[1] / "*4096" / "*.jsonl")
    audit = audit_rows(pattern)
    assert len(audit.paths) == 2
    assert audit.moves.num_boards == audit.num_rows
    assert set(audit.claims) >= {"path_length", "free_cells", "danger"}
    assert {claim.num_false for claim in audit.claims.values()} == {0}


def test_symmetries_of_a_game_count_as_one_game(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_dataset(path, 3, 5, augment="all")
    assert audit_rows(str(path)).num_games == 3


def test_findings_are_counted_with_the_source_of_the_first_rows(tmp_path):
    false_claim = completion_for(Move.DOWN).replace("to apple: 3", "to apple: 7")
    path = write(
        tmp_path / "rows.jsonl",
        (PROMPT, completion_for(Move.DOWN)),
        (PROMPT, completion_for(Move.DOWN)),
        (PROMPT, completion_for(Move.UP)),
        (PROMPT, false_claim),
        (PROMPT, "I do not know."),
        ("Who are you?", "Conclusion: LEFT"),
        "no JSON",
    )
    audit = audit_rows(path)
    assert audit.num_rows == 6
    assert audit.bad_rows == {"bad JSON": 1}
    # The second row repeats the first; the third and fifth have another move.
    assert (audit.num_duplicates, audit.num_conflicts) == (1, 2)
    assert audit.moves.counts == {"DOWN": 3, "UP": 1, "none": 1, "LEFT": 1}
    assert audit.moves.num_boards == 5
    # A missing move counts as illegal.
    assert (audit.moves.num_illegal, audit.moves.illegal_rows) == (2, [f"{path}:3", f"{path}:5"])
    assert audit.moves.num_shortest == 3
    assert audit.claims["manhattan_distance"] == ClaimReport(4, 1, [f"{path}:4"])
    assert audit.claims["conclusion"] == ClaimReport(4, 1, [f"{path}:3"])
    assert audit.claims["head"] == ClaimReport(4, 0, [])


@pytest.mark.parametrize("style", ["features", "cycle", "compact"])
def test_legality_and_traps_are_counted_whether_or_not_the_prompt_contains_the_board(tmp_path, style):
    # LEFT is a trap, RIGHT the only safe move, UP and DOWN are not legal.
    board = Board(4, ((1, 0), (1, 1), (0, 1), (0, 2), (1, 2), (2, 2), (3, 2)), (0, 0))
    prompt = get_style(style).write_prompt(board)
    path = write(tmp_path / "rows.jsonl", (prompt, "RIGHT"), (prompt, "LEFT"), (prompt, "UP"), ("Hello", "UP"))
    audit = audit_rows(path)
    moves = audit.moves
    assert (moves.num_known, moves.num_decisive, moves.num_traps) == (3, 3, 1)
    assert (moves.num_illegal, moves.illegal_rows) == (1, [f"{path}:3"])
    assert moves.num_boards == (3 if style == "compact" else 0)
    assert audit.grid_sizes == {4: 3}


def test_lengths_equal_those_of_training_before_shortening(bfs512_sample_path, tiny_tokenizer):
    encoder = Encoder(tiny_tokenizer, max_length=700)
    audit = audit_rows(str(bfs512_sample_path), encoder)
    tokens = audit.tokens
    assert sum(count for *_, count in tokens.histogram) == audit.num_rows
    assert tokens.histogram[0][0] == tokens.min_tokens
    assert tokens.histogram[-1][0] <= tokens.max_tokens <= tokens.histogram[-1][1]
    assert tokens.min_tokens <= tokens.median_tokens <= tokens.max_tokens
    assert all(last + 1 == first for (_, last, _), (first, *_) in pairwise(tokens.histogram))
    short = audit_rows(str(bfs512_sample_path), Encoder(tiny_tokenizer, max_length=tokens.max_tokens - 1)).tokens
    assert 0 < short.num_over_max_length < 20
    assert short.histogram == tokens.histogram


def test_shown_rows_separate_prompt_and_trained_text(bfs512_sample_path, tiny_tokenizer):
    first = json.loads(bfs512_sample_path.read_text().splitlines()[0])
    tokens = audit_rows(str(bfs512_sample_path), Encoder(tiny_tokenizer, max_length=4096)).tokens
    shown, longest = tokens.examples
    assert shown.source == f"{bfs512_sample_path}:1"
    assert shown.prompt == f"### Instruction:\n{first['prompt']}\n\n### Response:\n"
    assert shown.trained_on == first["completion"] + tiny_tokenizer.eos_token
    assert longest.num_tokens == tokens.max_tokens


def test_overlong_row_is_shown_as_training_shortens_it(bfs512_sample_path, tiny_tokenizer):
    longest = audit_rows(str(bfs512_sample_path), Encoder(tiny_tokenizer, max_length=4096)).tokens.max_tokens
    shown = audit_rows(str(bfs512_sample_path), Encoder(tiny_tokenizer, max_length=longest - 1)).tokens.examples[1]
    assert shown.num_tokens < longest
    assert shown.trained_on.startswith("Moving")
    assert "Conclusion: The move is: " in shown.trained_on
    tight = audit_rows(str(bfs512_sample_path), Encoder(tiny_tokenizer, max_length=10)).tokens
    assert tight.num_over_max_length == 354
    assert "data.max_length=10" in tight.examples[0].trained_on


def test_rows_that_cannot_be_encoded_are_counted(tmp_path, tiny_tokenizer):
    path = write(tmp_path / "rows.jsonl", (PROMPT, "Conclusion: UP"), (f"{PROMPT}<|im_end|>", "Conclusion: UP"))
    assert audit_rows(path, Encoder(tiny_tokenizer, "chat", 4096)).tokens.num_refused == 1
    only_bad = write(tmp_path / "bad.jsonl", ("<|im_end|>", "Conclusion: UP"))
    assert audit_rows(only_bad, Encoder(tiny_tokenizer, "chat", 4096)).tokens.histogram == []


def test_file_without_a_valid_row_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"rows\.jsonl: (?s:.*)1 missing key"):
        audit_rows(write(tmp_path / "rows.jsonl", "{}"))
    with pytest.raises(UserError, match=r"rows\.jsonl: "):
        audit_rows(write(tmp_path / "rows.jsonl", ""))
