from __future__ import annotations

import contextlib
import gzip
import json
import logging
import os
import re
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snake_lora_pl.data import jsonl
from snake_lora_pl.data.jsonl import Row, count_lines, peek_row, read_rows, read_rows_at
from snake_lora_pl.data.row_errors import RowErrors
from snake_lora_pl.errors import UserError

GOOD = b'{"prompt": "p", "completion": "c"}'


def read(path: Path, **kwargs) -> list[Row]:
    return list(read_rows([path], **kwargs))


@given(st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1)), max_size=8), st.booleans(), st.booleans())
def test_any_text_that_json_can_write_is_read_unchanged(tmp_path_factory, texts, crlf, escape):
    texts = [(p, c) for p, c in texts if p.strip() and c.strip()]
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    end = "\r\n" if crlf else "\n"
    lines = [json.dumps({"prompt": p, "completion": c}, ensure_ascii=escape) for p, c in texts]
    path.write_bytes(end.join(lines).encode())
    assert [(row.prompt, row.completion, row.line) for row in read(path)] == [
        (p, c, number) for number, (p, c) in enumerate(texts, start=1)
    ]


def test_byte_order_marks_crlf_blank_lines_and_a_missing_last_newline_are_accepted(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n   \n" + b"\xef\xbb\xbf" + GOOD + b"\n\xef\xbb\xbf")
    assert [row.line for row in read(path)] == [1, 4]


def test_other_keys_are_ignored_even_with_nan(write_rows):
    path = write_rows([b'{"prompt": "p", "completion": "c", "score": NaN, "deep": {"prompt": [1]}}'])
    assert read(path) == [Row("p", "c", None, str(path), 1)]


def test_equal_game_identifiers_are_equal_as_text(write_rows):
    named = [{"game": 3}, {"game": 3.0}, {"game": "3"}, {"game": 3, "seed": 7.0}, {"game": 3.0, "seed": 7}]
    games = [row.game for row in read(write_rows([{"prompt": "p", "completion": "c", **extra} for extra in named]))]
    assert games == ["None/3", "None/3", "None/3", "7/3", "7/3"]


@pytest.mark.parametrize("key", ["game", "seed"])
@pytest.mark.parametrize("value", [None, True, {"id": 3}, [3], float("nan"), float("inf")])
def test_game_identifier_of_another_type_is_an_invalid_row(write_rows, key, value):
    row = {"prompt": "p", "completion": "c", "game": 1}
    path = write_rows([row, {**row, key: value}])
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}:2: .*'{key}'"):
        read(path)
    assert len(read(path, on_bad_row="skip")) == 1


def test_game_identifier_of_a_prompt_without_completion_is_ignored(write_rows):
    path = write_rows([{"prompt": "p", "game": {"id": 3}}])
    assert [row.prompt for row in read_rows([Path(path)], require_completion=False)] == ["p"]


def test_game_identifier_includes_the_seed(write_rows):
    rows = [{"prompt": "p", "completion": "c", **extra} for extra in ({"game": 3, "seed": 7}, {"game": "a"}, {})]
    assert [row.game for row in read(write_rows(rows))] == ["7/3", "None/a", None]


def test_weight_is_one_unless_the_row_has_one(write_rows):
    rows = [{"prompt": "p", "completion": "c", **extra} for extra in ({}, {"weight": 2}, {"weight": 0.25})]
    assert [row.weight for row in read(write_rows(rows))] == [1, 2, 0.25]


def test_source_is_path_and_line(write_rows):
    path = write_rows([GOOD, GOOD])
    assert [row.source for row in read(path)] == [f"{path}:1", f"{path}:2"]


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.jsonl"])
def test_gzip_is_detected_whatever_the_file_name(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(GOOD + b"\n" + GOOD))
    assert len(read(path)) == 2


def test_empty_file_has_no_rows(write_rows):
    assert read(write_rows([])) == []


def test_completion_may_be_missing_if_it_is_not_required(write_rows):
    assert read(write_rows([{"prompt": "p"}]), require_completion=False)[0].completion == ""


def test_files_are_read_in_the_order_given(write_rows):
    second, first = write_rows([GOOD], "b.jsonl"), write_rows([GOOD], "a.jsonl")
    assert [row.path for row in read_rows([second, first])] == [str(second), str(first)]


BAD_ROWS = {
    "truncated": (b'{"prompt": "p", "completion": "c', "bad JSON"),
    "not_json": (b"prompt,completion", "bad JSON"),
    "two_objects": (GOOD + GOOD, "bad JSON"),
    "single_quotes": (b"{'prompt': 'p', 'completion': 'c'}", "bad JSON"),
    "raw_newline_in_string": (b'{"prompt": "p\tq", "completion": "c"}', "bad JSON"),
    "deeply_nested": (b'{"a": ' + b"[" * 200_000, "bad JSON"),
    "huge_integer": (b'{"a": ' + b"9" * 5000 + b"}", "bad JSON"),
    "list": (b"[1, 2]", "not an object"),
    "string": (b'"prompt"', "not an object"),
    "number": (b"3.5", "not an object"),
    "null": (b"null", "not an object"),
    "no_completion": (
        b'{"prompt": "p", "response": "r"}',
        r"missing key.*'completion'.*prompt, response",
    ),
    "no_keys": (b"{}", "missing key.*'prompt'"),
    "other_case": (b'{"Prompt": "p", "completion": "c"}', "missing key.*'prompt'.*Prompt, completion"),
    "empty": (b'{"prompt": "", "completion": "c"}', "empty.*'prompt'"),
    "white_space": (b'{"prompt": "p", "completion": " \\n\\t "}', "empty.*'completion'"),
    "number_for_text": (b'{"prompt": 1, "completion": "c"}', "not a string.*'prompt'.*number"),
    "nan_for_text": (b'{"prompt": "p", "completion": NaN}', "not a string.*'completion'.*number"),
    "null_for_text": (b'{"prompt": "p", "completion": null}', "not a string.*'completion'.*null"),
    "bool_for_text": (b'{"prompt": true, "completion": "c"}', "not a string.*'prompt'.*true or false"),
    "messages": (b'{"prompt": [{"role": "user"}], "completion": "c"}', "not a string.*'prompt'.*list"),
    "duplicate_key": (b'{"prompt": "p", "prompt": "q", "completion": "c"}', "duplicate key.*'prompt'"),
    "latin_1": (b'{"prompt": "\xe9", "completion": "c"}', "not UTF-8.*0xe9.*12"),
    "utf_16": ('{"prompt": "p"}'.encode("utf-16"), "not UTF-8"),
    "encoded_surrogate": (b'{"prompt": "\xed\xa0\x80", "completion": "c"}', "not UTF-8"),
    "lone_surrogate": (b'{"prompt": "\\ud83d", "completion": "c"}', r"lone surrogate.*'prompt'.*\\ud83d"),
    "weight_of_zero": (b'{"prompt": "p", "completion": "c", "weight": 0}', "invalid weight.*'weight' is 0"),
    "negative_weight": (b'{"prompt": "p", "completion": "c", "weight": -1.5}', "invalid weight.*'weight' is -1.5"),
    "weight_nan": (b'{"prompt": "p", "completion": "c", "weight": NaN}', "invalid weight.*'weight' is nan"),
    "infinite_weight": (b'{"prompt": "p", "completion": "c", "weight": 1e999}', "invalid weight.*'weight' is inf"),
    "huge_weight": (b'{"prompt": "p", "completion": "c", "weight": 1' + b"0" * 400 + b"}", "invalid weight.*1000"),
    "weight_as_text": (b'{"prompt": "p", "completion": "c", "weight": "2"}', "invalid weight.*'weight'.*string"),
    "weight_true": (b'{"prompt": "p", "completion": "c", "weight": true}', "invalid weight.*'weight'.*true or false"),
    "weight_null": (b'{"prompt": "p", "completion": "c", "weight": null}', "invalid weight.*'weight'.*null"),
    "control_characters_in_key": (b'{"\\u001b[31m": "p"}', r"missing key.*\\u001b\[31m"),
    "surrogate_in_key": (b'{"\\udc00": "p"}', r"missing key.*\\udc00"),
}


@pytest.mark.parametrize(("line", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_error_of_an_invalid_row_names_its_line_and_the_way_to_skip_it(write_rows, line, message):
    path = write_rows([GOOD, line, GOOD])
    with pytest.raises(UserError, match=f"(?s){message}") as caught:
        read(path)
    error = str(caught.value).splitlines()[1]
    assert error.startswith(f"{path}:2: ")
    assert "data.on_bad_row=skip" in error
    assert error.isprintable()


@pytest.mark.parametrize("line", [line for line, _ in BAD_ROWS.values()], ids=BAD_ROWS)
def test_invalid_row_is_skipped_on_request(write_rows, line):
    assert [row.line for row in read(write_rows([GOOD, line, GOOD]), on_bad_row="skip")] == [1, 3]


@given(st.binary(max_size=200))
def test_any_bytes_raise_at_most_a_user_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_bytes(content)
    with contextlib.suppress(UserError):
        read(path)


def test_error_lists_the_first_twenty_rows_and_counts_the_others(write_rows):
    path = write_rows([GOOD, *[b"{}"] * 50, *[b"nonsense"] * 7])
    with pytest.raises(UserError) as caught:
        read(path)
    first, *shown, last = str(caught.value).splitlines()
    assert first.startswith("57 ")
    assert "50 missing key, 7 bad JSON" in first
    assert [line.split(": ")[0] for line in shown] == [f"{path}:{number}" for number in range(2, 22)]
    assert "37" in last


def test_error_lists_the_rows_of_all_files(write_rows):
    paths = [write_rows([b"{}"], "a.jsonl"), write_rows([GOOD], "b.jsonl"), write_rows([b"[]"], "c.jsonl")]
    with pytest.raises(UserError, match="1 missing key, 1 not an object") as caught:
        list(read_rows(paths))
    assert f"{paths[0]}:1: " in str(caught.value)
    assert f"{paths[2]}:1: " in str(caught.value)


def test_no_row_is_yielded_after_an_invalid_one(write_rows):
    rows = read_rows([write_rows([GOOD, b"{}", GOOD])])
    assert next(rows).line == 1
    with pytest.raises(UserError, match="1 missing key"):
        next(rows)


def test_skipped_rows_are_logged_by_reason(write_rows, caplog):
    with caplog.at_level(logging.WARNING):
        read(write_rows([GOOD, b"{}", b"{}", b"[]"]), on_bad_row="skip")
    assert "2 missing key, 1 not an object" in caplog.text


def test_reader_does_not_raise_if_the_caller_collects_the_errors(write_rows):
    errors = RowErrors()
    assert read(write_rows([b"{}"]), errors=errors) == []
    assert errors.counts == {"missing key": 1}
    with pytest.raises(UserError, match=r"rows\.jsonl:1"):
        errors.raise_if_any()


def test_row_of_exactly_the_size_limit_is_read_and_a_longer_one_is_invalid(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "MAX_ROW_BYTES", 100)
    path = tmp_path / "rows.jsonl"
    for end in (b"\n", b"\r\n", b""):
        for num_bytes, good in ((100, True), (101, False)):
            path.write_bytes(GOOD + b" " * (num_bytes - len(GOOD)) + end)
            assert bool(read(path, on_bad_row="skip")) is good, (end, num_bytes)


def test_line_over_the_size_limit_is_not_kept_in_memory(tmp_path):
    path = tmp_path / "rows.jsonl"
    with open(path, "wb") as file:
        file.truncate(100 * 2**20)  # a hole, read as 100 MiB of zeros on one line
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + GOOD)
    tracemalloc.start()
    try:
        rows = read(path, on_bad_row="skip")
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [row.line for row in rows] == [2]
    assert peak_bytes < 4 * jsonl.MAX_ROW_BYTES


def test_gzip_bomb_of_one_line_is_an_invalid_row(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(100):
            file.write(bytes(2**20))
        file.write(b"\n" + GOOD)
    with pytest.raises(UserError, match=r"rows\.jsonl\.gz:1: .*10 MiB"):
        read(path)


def test_error_of_a_truncated_gzip_file_names_it(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD * 1000)[:-20])
    with pytest.raises(UserError, match=r"rows\.jsonl\.gz: "):
        read(path)


def test_error_of_an_uncompressed_gz_file_names_it(write_rows):
    with pytest.raises(UserError, match=r"rows\.jsonl\.gz: "):
        read(write_rows([GOOD], "rows.jsonl.gz"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_file_without_permission_is_an_error(write_rows):
    path = write_rows([GOOD])
    path.chmod(0)
    with pytest.raises(UserError, match=r"rows\.jsonl: .*Permission denied"):
        read(path)


def test_error_of_reading_names_the_file_and_the_reason(write_rows, monkeypatch):
    path = write_rows([GOOD])

    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", fail)
    with pytest.raises(UserError, match=r"rows\.jsonl: .*Permission denied"):
        read(path)


def test_peek_reads_no_further_than_the_first_valid_row(write_rows):
    path = write_rows([b"{}", GOOD, b"nonsense"])
    assert peek_row(str(path)) == Row("p", "c", None, str(path), 2)
    assert peek_row(str(write_rows([]))) is None


def test_rows_at_some_lines_are_read_without_parsing_the_others(write_rows):
    path = write_rows([b"nonsense", GOOD, b"nonsense", GOOD, b"nonsense"])
    assert [row.line for row in read_rows_at(path, [4, 2])] == [2, 4]


def test_blank_lines_are_not_counted(write_rows):
    assert count_lines([write_rows([GOOD, b"", b"nonsense", b"  "])]) == 2
