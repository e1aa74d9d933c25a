from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from snake_lora_pl import durable
from snake_lora_pl.durable import directory_durably, open_durably, recover_directory, remove_leftovers


def test_file_appears_whole_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    with open_durably(path, "w", encoding="utf-8") as file:
        file.write("content")
        assert not path.exists()
    assert path.read_text() == "content"
    assert names_in(path.parent) == ["file.txt"]


def test_exception_keeps_the_old_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(KeyError), open_durably(path, "w", encoding="utf-8") as file:
        file.write("half")
        raise KeyError
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["file.txt"]


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


def write_directory(path: Path, content: str) -> None:
    with directory_durably(path) as directory:
        (directory / content).write_text(content)


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_directory_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "directory"
    for content in ("first", "second"):
        write_directory(path, content)
        assert names_in(path) == [content]
        assert names_in(tmp_path) == ["directory"]


def test_exception_keeps_the_old_directory(tmp_path: Path) -> None:
    path = tmp_path / "directory"
    write_directory(path, "good")
    with pytest.raises(KeyError), directory_durably(path) as directory:
        (directory / "bad").write_text("")
        raise KeyError
    assert names_in(path) == ["good"]
    assert names_in(tmp_path) == ["directory"]


def replace_in_a_process_killed_before(step: int, path: Path) -> int:
    """Replace a directory in a child process that is killed before a rename or removal; return its exit code."""
    script = f"""
        import os, shutil, signal
        from pathlib import Path
        from snake_lora_pl.durable import directory_durably
        num_calls = 0
        def killing(function):
            def call(*args, **kwargs):
                global num_calls
                num_calls += 1
                if num_calls > {step}:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)
            return call
        os.rename, os.rmdir, os.unlink = map(killing, (os.rename, os.rmdir, os.unlink))
        with directory_durably({str(path)!r}) as directory:
            (directory / "new").write_text("new")
    """
    return subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False).returncode


@pytest.mark.parametrize("clean_up", [recover_directory, lambda path: remove_leftovers(path.parent, path.name)])
def test_kill_before_any_rename_or_removal_leaves_a_whole_directory(
    clean_up: Callable[[Path], Any], tmp_path: Path
) -> None:
    found = []
    for step in range(10):
        path = tmp_path / str(step) / "directory"
        write_directory(path, "old")
        if replace_in_a_process_killed_before(step, path) == 0:
            break
        clean_up(path)
        found += names_in(path)
        write_directory(path, "last")
        remove_leftovers(path.parent, path.name)
        assert names_in(path.parent) == ["directory"]
    # Killed before the renames of the old and the new directory, and before the clean-up.
    assert found == ["old", "old", "new", "new", "new"]


def test_reader_that_restores_the_old_directory_does_not_stop_the_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "directory"
    write_directory(path, "old")
    rename, num_calls = os.rename, 0

    def rename_after_a_reader(source: Path, target: Path) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 2:
            monkeypatch.setattr(durable.os, "rename", rename)
            recover_directory(path)
            assert names_in(path) == ["old"]
        rename(source, target)

    monkeypatch.setattr(durable.os, "rename", rename_after_a_reader)
    write_directory(path, "new")
    assert names_in(path) == ["new"]
    assert names_in(tmp_path) == ["directory"]


def test_kill_leaves_the_old_file_and_leftovers_that_can_be_removed(tmp_path: Path) -> None:
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
    assert len(names_in(tmp_path)) == 2
    remove_leftovers(tmp_path, "file")
    assert names_in(tmp_path) == ["file"]
