from __future__ import annotations

import os
from pathlib import Path

import pytest

from snake_lora_pl.cli import text_cache
from snake_lora_pl.cli.text_cache import cached_text
from snake_lora_pl.paths import cache_dir


class CountedText:
    def __init__(self) -> None:
        self.num_renders = 0

    def __call__(self) -> str:
        self.num_renders += 1
        return f"text {self.num_renders}"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "module.py").write_text("x = 1")
    monkeypatch.setattr(text_cache, "_PACKAGE_DIR", tmp_path)
    return tmp_path


def test_text_is_rendered_once(package: Path) -> None:
    render = CountedText()
    assert [cached_text("fit", render) for _ in range(3)] == ["text 1"] * 3
    assert cached_text("test", render) == "text 2"


@pytest.mark.parametrize("change", ["size", "time", "new file"])
def test_changed_package_invalidates_the_cache(package: Path, change: str) -> None:
    render = CountedText()
    cached_text("fit", render)
    if change == "size":
        (package / "module.py").write_text("x = 10")
    elif change == "time":
        os.utime(package / "module.py", ns=(1, 1))
    else:
        (package / "other.py").touch()
    assert cached_text("fit", render) == "text 2"
    assert len(list((cache_dir() / "help").glob("fit-*"))) == 1, "the outdated text stays in the cache"


def test_unusable_cache_is_not_an_error(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNAKE_LORA_PL_CACHE", str(package / "module.py"))
    render = CountedText()
    assert [cached_text("fit", render), cached_text("fit", render)] == ["text 1", "text 2"]


def test_undecodable_cache_is_rendered_again(package: Path) -> None:
    cached_text("fit", lambda: "text")
    (path,) = (cache_dir() / "help").iterdir()
    path.write_bytes(b"\xff")
    assert cached_text("fit", lambda: "again") == "again"
    assert path.read_text() == "again"
