from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from jsonargparse import get_loader

from snake_lora_pl.paths import shipped_configs
from snake_lora_pl.untrusted import MAX_BYTES, check_yaml, load_yaml, printable, read_json_object, read_text


def test_control_characters_are_escaped_and_line_breaks_stay() -> None:
    assert printable("é\n\x1b[2J\u202e\ud800\r") == "é\n\\x1b[2J\\u202e\\ud800\\r"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\xff", "UTF-8.*0xff at 0"),
        (bytes(MAX_BYTES + 1), "16 MiB"),
        (b"[" * 99_999, "nested"),
        (b"[]", "JSON object"),
        (b"{", "Expecting property name"),
    ],
)
def test_invalid_json_file_is_rejected_with_the_cause(content: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=problem):
        read_json_object(path)


def test_pipe_is_rejected_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="regular file"):
        read_text(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb: {c: 1, d: 2, c: 3}\n", r"line 2: .*key c\b"),
        ("a: &a [*a]", r"line 1: .*\*a\b"),
        ("a: *b", r"line 1: .*\*b\b"),
        ("[" * 101, "line 1: .*nested.*100"),
        ("a: &a [" + "x," * 1000 + "]\nb: [" + "*a," * 200 + "]", "line 2: .*100,000 values"),
        ("a: 0b_", "cannot be read"),
        ("a: \ud800", "cannot be read"),
        ("a: " + "9" * 5000, "cannot be read"),
        ("a: !!python/object/apply:os.mkdir [canary]", "could not determine a constructor"),
    ],
)
def test_yaml_that_would_mislead_or_exhaust_a_loader_is_rejected(text: str, problem: str) -> None:
    with pytest.raises(yaml.YAMLError, match=problem):
        load_yaml(text, get_loader("yaml"))


def test_ordinary_yaml_with_aliases_and_merges_is_accepted() -> None:
    text = "base: &base {a: 1, b: [2, 3]}\nown: {<<: *base, a: 4}\nlist: [*base, {a: 1}]\na: {a: {a: a}}\n"
    assert load_yaml(text, get_loader("yaml"))["own"] == {"a": 4, "b": [2, 3]}
    for path in shipped_configs().values():
        check_yaml(read_text(path))
