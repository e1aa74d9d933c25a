from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from snake_lora_pl import durable
from snake_lora_pl.durable import directory_durably, open_durably, recover_directory, remove_leftovers


def test_a_file_appears_whole_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    with open_durably(path, "w", encoding="utf-8") as file:
        file.write("content")
        assert not path.exists()
    assert path.read_text() == "content"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_an_exception_keeps_the_old_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(KeyError), open_durably(path, "w", encoding="utf-8") as file:
        file.write("half")
        raise KeyError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with open_durably(tmp_path / "file"):
            pass
        with directory_durably(tmp_path / "directory") as directory:
            (directory / "inside").touch(mode=0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "directory").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "directory" / "inside").stat().st_mode & 0o777 == 0o640


@pytest.fixture(params=["one step", "two renames"])
def _exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "two renames":
        monkeypatch.setattr(sys, "platform", "elsewhere")


@pytest.mark.usefixtures("_exchange")
def test_a_directory_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "directory"
    for content in ("first", "second"):
        with directory_durably(path) as directory:
            (directory / content).write_text(content)
    assert [p.name for p in path.iterdir()] == ["second"]
    assert [p.name for p in tmp_path.iterdir()] == ["directory"]


@pytest.mark.usefixtures("_exchange")
def test_an_exception_keeps_the_old_directory(tmp_path: Path) -> None:
    path = tmp_path / "directory"
    with directory_durably(path) as directory:
        (directory / "good").write_text("")
    with pytest.raises(KeyError), directory_durably(path) as directory:
        (directory / "bad").write_text("")
        raise KeyError
    assert [p.name for p in path.iterdir()] == ["good"]
    assert [p.name for p in tmp_path.iterdir()] == ["directory"]


def test_a_directory_killed_between_two_renames_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "directory"
    with directory_durably(path) as directory:
        (directory / "good").write_text("")
    monkeypatch.setattr(sys, "platform", "elsewhere")
    rename, calls = os.rename, []

    def die_at_the_second(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise SystemExit
        rename(source, target)

    monkeypatch.setattr(durable.os, "rename", die_at_the_second)
    with pytest.raises(SystemExit), directory_durably(path) as directory:
        (directory / "new").write_text("")
    monkeypatch.setattr(durable.os, "rename", rename)
    assert not path.exists()
    recover_directory(path)
    assert [p.name for p in path.iterdir()] == ["good"]


def test_a_kill_leaves_the_old_content_and_leftovers_that_can_be_removed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    script = f"""
        import os, signal
        from snake_lora_pl.durable import open_durably
        with open_durably({str(path)!r}, "w") as file:
            file.write("half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert result.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    remove_leftovers(tmp_path, "file")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
