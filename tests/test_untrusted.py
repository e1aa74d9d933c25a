"""Small files from strangers, and what is said of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from jsonargparse import get_loader

from snake_lora_pl.paths import shipped_configs
from snake_lora_pl.untrusted import MAX_BYTES, check_yaml, load_yaml, printable, read_json_object, read_text


def test_what_would_steer_a_terminal_is_escaped_and_lines_stay() -> None:
    assert printable("é\n\x1b[2J\u202e\ud800\r") == "é\n\\x1b[2J\\u202e\\ud800\\r"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\xff", "not UTF-8 .byte 0xff at 0"),
        (bytes(MAX_BYTES + 1), "larger than 16 MiB"),
        (b"[" * 99_999, "nested too deep"),
        (b"[]", "no JSON object"),
        (b"{", "Expecting property name"),
    ],
)
def test_a_bad_json_file_is_refused_with_the_cause(content: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=problem):
        read_json_object(path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="no regular file"):
        read_text(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb: {c: 1, d: 2, c: 3}\n", "line 2: the key c stands twice"),
        ("a: &a [*a]", r"\*a stands for nothing"),
        ("a: *b", r"\*b stands for nothing"),
        ("[" * 101, "nested more than 100 deep"),
        ("a: &a [" + "x," * 1000 + "]\nb: [" + "*a," * 200 + "]", "line 2: stands for more than 100,000 values"),
        ("a: 0b_", "a value that cannot be read"),
        ("a: \ud800", "a value that cannot be read"),
        ("a: " + "9" * 5000, "a value that cannot be read"),
        ("a: !!python/object/apply:os.mkdir [canary]", "could not determine a constructor"),
    ],
)
def test_yaml_that_readers_take_too_literally_is_refused(text: str, problem: str) -> None:
    with pytest.raises(yaml.YAMLError, match=problem):
        load_yaml(text, get_loader("yaml"))


def test_ordinary_yaml_passes_aliases_and_merges_included() -> None:
    text = "base: &base {a: 1, b: [2, 3]}\nown: {<<: *base, a: 4}\nlist: [*base, {a: 1}]\na: {a: {a: a}}\n"
    assert load_yaml(text, get_loader("yaml"))["own"] == {"a": 4, "b": [2, 3]}
    for path in shipped_configs().values():
        check_yaml(read_text(path))
