from __future__ import annotations

import contextlib
import gzip
import json
import logging
import os
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snake_lora_pl.data import jsonl
from snake_lora_pl.data.jsonl import Complaints, Row, expand_paths, peek_grid_size, peek_row, read_rows
from snake_lora_pl.errors import UserError

GOOD = b'{"prompt": "p", "completion": "c"}'


def read(path: Path, **kwargs) -> list[Row]:
    return list(read_rows([path], **kwargs))


# What is fine


@given(st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1)), max_size=8), st.booleans(), st.booleans())
def test_every_text_that_json_can_write_is_read_back_unchanged(tmp_path_factory, texts, crlf, escape):
    texts = [(p, c) for p, c in texts if p.strip() and c.strip()]
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    end = "\r\n" if crlf else "\n"
    lines = [json.dumps({"prompt": p, "completion": c}, ensure_ascii=escape) for p, c in texts]
    path.write_bytes(end.join(lines).encode())
    assert [(row.prompt, row.completion, row.line) for row in read(path)] == [
        (p, c, number) for number, (p, c) in enumerate(texts, start=1)
    ]


def test_byte_order_marks_crlf_blank_lines_and_a_missing_last_newline_are_fine(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n   \n" + b"\xef\xbb\xbf" + GOOD + b"\n\xef\xbb\xbf")
    assert [row.line for row in read(path)] == [1, 4]


def test_other_keys_are_ignored_also_where_they_hold_nan(write_rows):
    path = write_rows([b'{"prompt": "p", "completion": "c", "score": NaN, "deep": {"prompt": [1]}}'])
    assert read(path) == [Row("p", "c", None, str(path), 1)]


def test_a_row_names_its_game_with_its_seed(write_rows):
    rows = [{"prompt": "p", "completion": "c", **extra} for extra in ({"game": 3, "seed": 7}, {"game": "a"}, {})]
    assert [row.game for row in read(write_rows(rows))] == ["7/3", "None/a", None]


def test_source_is_path_and_line(write_rows):
    path = write_rows([GOOD, GOOD])
    assert [row.source for row in read(path)] == [f"{path}:1", f"{path}:2"]


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.jsonl"])
def test_gzip_is_read_whatever_the_file_is_called(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(GOOD + b"\n" + GOOD))
    assert len(read(path)) == 2


def test_an_empty_file_has_no_rows(write_rows):
    assert read(write_rows([])) == []


def test_a_prompt_alone_is_enough_where_no_completion_is_required(write_rows):
    assert read(write_rows([{"prompt": "p"}]), require_completion=False)[0].completion == ""


def test_files_are_read_in_the_order_given(write_rows):
    second, first = write_rows([GOOD], "b.jsonl"), write_rows([GOOD], "a.jsonl")
    assert [row.path for row in read_rows([second, first])] == [str(second), str(first)]


# Bad rows

BAD_ROWS = {
    "truncated": (b'{"prompt": "p", "completion": "c', "bad JSON"),
    "not_json": (b"prompt,completion", "bad JSON"),
    "two_objects": (GOOD + GOOD, "bad JSON"),
    "single_quotes": (b"{'prompt': 'p', 'completion': 'c'}", "bad JSON"),
    "raw_newline_in_string": (b'{"prompt": "p\tq", "completion": "c"}', "bad JSON"),
    "deeply_nested": (b'{"a": ' + b"[" * 200_000, "nested too deeply"),
    "huge_integer": (b'{"a": ' + b"9" * 5000 + b"}", "bad JSON"),
    "list": (b"[1, 2]", "not a JSON object but a list"),
    "string": (b'"prompt"', "not a JSON object but a string"),
    "number": (b"3.5", "not a JSON object but a number"),
    "null": (b"null", "not a JSON object but null"),
    "no_completion": (
        b'{"prompt": "p", "response": "r"}',
        r"missing key 'completion' \(found: prompt, response\)\. Rename the key or set data\.on_bad_row=skip",
    ),
    "no_keys": (b"{}", r"missing key 'prompt' \(found: no keys\)"),
    "other_case": (b'{"Prompt": "p", "completion": "c"}', r"missing key 'prompt' \(found: Prompt, completion\)"),
    "empty": (b'{"prompt": "", "completion": "c"}', "key 'prompt' is empty"),
    "white_space": (b'{"prompt": "p", "completion": " \\n\\t "}', "key 'completion' is empty"),
    "number_for_text": (b'{"prompt": 1, "completion": "c"}', "key 'prompt' is a number, not a string"),
    "nan_for_text": (b'{"prompt": "p", "completion": NaN}', "key 'completion' is a number, not a string"),
    "null_for_text": (b'{"prompt": "p", "completion": null}', "key 'completion' is null, not a string"),
    "bool_for_text": (b'{"prompt": true, "completion": "c"}', "key 'prompt' is true or false, not a string"),
    "messages": (b'{"prompt": [{"role": "user"}], "completion": "c"}', "key 'prompt' is a list, not a string"),
    "duplicate_key": (b'{"prompt": "p", "prompt": "q", "completion": "c"}', "key 'prompt' stands twice"),
    "latin_1": (b'{"prompt": "\xe9", "completion": "c"}', "not UTF-8 .byte 0xe9 at 12"),
    "utf_16": ('{"prompt": "p"}'.encode("utf-16"), "not UTF-8"),
    "encoded_surrogate": (b'{"prompt": "\xed\xa0\x80", "completion": "c"}', "not UTF-8"),
    "lone_surrogate": (b'{"prompt": "\\ud83d", "completion": "c"}', r"holds half a character \(\\ud83d"),
    "control_characters_in_key": (b'{"\\u001b[31m": "p"}', r"found: \\u001b\[31m"),
    "surrogate_in_key": (b'{"\\udc00": "p"}', r"found: \\udc00"),
}


@pytest.mark.parametrize(("line", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_an_error_that_says_where_and_what_and_what_to_do(write_rows, line, message):
    path = write_rows([GOOD, line, GOOD])
    with pytest.raises(UserError, match=message) as caught:
        read(path)
    complaint = str(caught.value).splitlines()[1]
    assert complaint.startswith(f"{path}:2: ")
    assert "data.on_bad_row=skip" in complaint
    assert complaint.isprintable()


@pytest.mark.parametrize("line", [line for line, _ in BAD_ROWS.values()], ids=BAD_ROWS)
def test_a_bad_row_is_left_out_on_skip(write_rows, line):
    assert [row.line for row in read(write_rows([GOOD, line, GOOD]), on_bad_row="skip")] == [1, 3]


@given(st.binary(max_size=200))
def test_no_bytes_whatever_raise_anything_but_a_user_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_bytes(content)
    with contextlib.suppress(UserError):
        read(path)


def test_all_complaints_come_at_once_up_to_twenty_and_a_count(write_rows):
    path = write_rows([GOOD, *[b"{}"] * 50, *[b"nonsense"] * 7])
    with pytest.raises(UserError) as caught:
        read(path)
    first, *shown, last = str(caught.value).splitlines()
    assert first == "57 bad rows (50 missing key, 7 bad JSON)"
    assert [line.split(": ")[0] for line in shown] == [f"{path}:{number}" for number in range(2, 22)]
    assert last == "... and 37 more"


def test_complaints_of_all_files_come_together(write_rows):
    paths = [write_rows([b"{}"], "a.jsonl"), write_rows([GOOD], "b.jsonl"), write_rows([b"[]"], "c.jsonl")]
    with pytest.raises(UserError, match=r"2 bad rows") as caught:
        list(read_rows(paths))
    assert f"{paths[0]}:1: " in str(caught.value)
    assert f"{paths[2]}:1: " in str(caught.value)


def test_after_a_bad_row_no_row_is_yielded_since_nothing_will_come_of_it(write_rows):
    rows = read_rows([write_rows([GOOD, b"{}", GOOD])])
    assert next(rows).line == 1
    with pytest.raises(UserError, match="1 bad row "):
        next(rows)


def test_skip_logs_how_many_and_why(write_rows, caplog):
    with caplog.at_level(logging.WARNING):
        read(write_rows([GOOD, b"{}", b"{}", b"[]"]), on_bad_row="skip")
    assert "3 bad rows (2 missing key, 1 not an object)" in caplog.text


def test_given_a_collector_the_reader_leaves_raising_to_the_caller(write_rows):
    complaints = Complaints()
    assert read(write_rows([b"{}"]), complaints=complaints) == []
    with pytest.raises(UserError, match="1 bad row"):
        complaints.raise_if_any()


def test_a_row_of_exactly_the_limit_is_read_and_one_byte_more_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "MAX_ROW_BYTES", 100)
    path = tmp_path / "rows.jsonl"
    for end in (b"\n", b"\r\n", b""):
        for num_bytes, good in ((100, True), (101, False)):
            path.write_bytes(GOOD + b" " * (num_bytes - len(GOOD)) + end)
            assert bool(read(path, on_bad_row="skip")) is good, (end, num_bytes)


def test_a_line_past_the_limit_is_run_through_without_being_held(tmp_path):
    path = tmp_path / "rows.jsonl"
    with open(path, "wb") as file:
        file.truncate(100 * 2**20)  # A hole, read as 100 MiB of zeros on one line.
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


def test_a_gzip_bomb_of_one_line_is_run_through_without_being_held(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(100):
            file.write(bytes(2**20))
        file.write(b"\n" + GOOD)
    with pytest.raises(UserError, match=r"rows.jsonl.gz:1: a row of more than 10 MiB"):
        read(path)


def test_a_truncated_gzip_file_is_named(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD * 1000)[:-20])
    with pytest.raises(UserError, match=r"rows.jsonl.gz: cannot be decompressed"):
        read(path)


def test_a_file_that_is_only_called_gz_is_named(write_rows):
    with pytest.raises(UserError, match=r"rows.jsonl.gz: cannot be decompressed"):
        read(write_rows([GOOD], "rows.jsonl.gz"))


# Paths


def test_a_glob_gives_its_files_sorted(write_rows, tmp_path):
    paths = [write_rows([GOOD], name) for name in ("b.jsonl", "a.jsonl", "c.txt")]
    assert expand_paths(str(tmp_path / "*.jsonl")) == [paths[1], paths[0]]


def test_a_glob_passes_over_directories(write_rows, tmp_path):
    path = write_rows([GOOD])
    (tmp_path / "directory.jsonl").mkdir()
    assert expand_paths(str(tmp_path / "*.jsonl")) == [path]


def test_a_list_may_hold_paths_and_globs(write_rows, tmp_path):
    a, b, c = (write_rows([GOOD], f"{name}.jsonl") for name in "abc")
    assert expand_paths([str(c), str(tmp_path / "[ab].jsonl")]) == [c, a, b]


def test_a_file_whose_name_looks_like_a_glob_is_found(write_rows):
    path = write_rows([GOOD], "rows[1].jsonl")
    assert expand_paths(str(path)) == [path]


def test_home_is_expanded(write_rows, tmp_path, monkeypatch):
    path = write_rows([GOOD])
    with monkeypatch.context() as patch:
        patch.setenv("HOME", str(tmp_path))
        assert expand_paths("~/rows.jsonl") == [path]


def test_a_file_named_twice_counts_once_and_is_logged(write_rows, tmp_path, caplog):
    path = write_rows([GOOD])
    (tmp_path / "link.jsonl").symlink_to(path)
    assert expand_paths([str(path), str(tmp_path / "*.jsonl")]) == [path]
    assert "is the same file as" in caplog.text


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{tmp}/nothing/rows.jsonl", "no such file .* The directory .* is not there either"),
        ("{tmp}/row.jsonl", r"no such file .* Did you mean .*rows.jsonl\?"),
        ("{tmp}", r"is a directory\. Name the files in it, for example '.*/\*\.jsonl'"),
        ("{tmp}/*.json", "no file matches"),
        ("{tmp}/pipe", "is no regular file"),
        ("/dev/null", "is no regular file"),
        ("{tmp}/loop", "cannot be read"),
        ("{tmp}/a\0b", "cannot be read"),
        ("", "an empty path"),
        ("  ", "an empty path"),
        ([], "no data files were named"),
        (["{tmp}/rows.jsonl", "{tmp}/other.csv"], "other.csv: no such file"),
    ],
)
def test_a_path_that_leads_to_no_file_is_an_error_that_says_what_to_do(write_rows, tmp_path, spec, message):
    write_rows([GOOD])
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    spec = spec.format(tmp=tmp_path) if isinstance(spec, str) else [one.format(tmp=tmp_path) for one in spec]
    with pytest.raises(UserError, match=message):
        expand_paths(spec)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_an_error(write_rows):
    path = write_rows([GOOD])
    path.chmod(0)
    with pytest.raises(UserError, match="cannot be read .Permission denied"):
        read(path)


def test_a_file_that_fails_while_it_is_read_is_an_error(write_rows, monkeypatch):
    path = write_rows([GOOD])

    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", fail)
    with pytest.raises(UserError, match="cannot be read .Permission denied"):
        read(path)


# A look at the first row


def test_the_grid_size_is_read_from_the_first_row_alone(write_rows, bfs512_sample_path):
    first = bfs512_sample_path.read_bytes().splitlines()[0]
    assert peek_grid_size(str(write_rows([first, b"nonsense"]))) == 10


def test_the_grid_size_of_an_unknown_prompt_is_none(write_rows):
    assert peek_grid_size(str(write_rows([GOOD]))) is None


def test_the_first_row_of_nothing_is_none(write_rows):
    assert peek_row(str(write_rows([]))) is None
