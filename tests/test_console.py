from __future__ import annotations

import sys

import pytest

from snake_lora_pl.__main__ import main
from snake_lora_pl.console import wrap_for_terminal

PATH = "directory/" * 12


def test_lines_break_between_words_on_a_terminal_and_paths_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"{'some words ' * 12}and {PATH} below\n  an indented line"
    assert wrap_for_terminal(text) == text
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    lines = wrap_for_terminal(text).splitlines()
    assert PATH in lines
    assert lines[-1] == "  an indented line"
    assert all(len(line) <= 60 for line in lines if line != PATH)
    assert " ".join(lines).split() == text.split()


def test_error_is_one_line_except_on_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fitt"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["fitt"]) == 2
    narrow = capsys.readouterr().err
    assert narrow.split() == line.split()
    assert max(map(len, narrow.splitlines())) <= 60
