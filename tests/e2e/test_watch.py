"""The command ``watch`` with an adapter on a tiny model, its page in a headless browser, and the script for a GIF."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from snake_lora_pl.__main__ import main
from tests.browser import CHROMIUM, Tab
from tests.documented import ROOT
from tests.test_player import save_adapter

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")


@pytest.fixture(scope="module")
def adapter_dir(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("watched") / "tiny_adapter"
    return save_adapter(directory, tiny_llama_dir, prompt_format="compact", template="raw")


@pytest.fixture(scope="module")
def server(adapter_dir: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start the command and return its process and the address that it prints."""
    command = [sys.executable, "-m", "snake_lora_pl", "watch", "--adapter", str(adapter_dir), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--grid_size", "6"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=adapter_dir
    )
    assert process.stdout is not None
    address = re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())
    try:
        assert address is not None
        yield process, address[0]
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_page_fits_the_window_and_shows_what_the_model_reads(
    server: tuple[subprocess.Popen[str], str], tab: Tab, width: int, scheme: str
) -> None:
    tab.open(server[1], width=width, scheme=scheme)
    tab.wait_for("state !== null && !isBusy")
    assert tab.run("document.documentElement.scrollWidth") <= width
    assert tab.run("document.getElementById('prompt').textContent").startswith("Snake6;")
    values = tab.run("[...document.querySelectorAll('#moves .value')].map((cell) => cell.textContent)")
    assert len(values) == 4
    assert all(value.endswith("%") for value in values)
    assert tab.run("document.querySelectorAll('#moves .tag.teacher').length") == 1
    pixel = "[...document.getElementById('board').getContext('2d').getImageData(3, 3, 1, 1).data].slice(0, 3)"
    assert (sum(tab.run(pixel)) > 600) == (scheme == "light")
    assert tab.problems == []


def test_arrow_key_moves_the_snake_and_a_teacher_plays_on(server: tuple[subprocess.Popen[str], str], tab: Tab) -> None:
    tab.open(server[1])
    tab.wait_for("state !== null && !isBusy")
    x, y = tab.run("state.frame.head")
    tab.press("ArrowRight")
    tab.wait_for("!isBusy && state.step === 1")
    assert tab.run("state.frame.head") == [x + 1, y]
    assert tab.run("isPlaying") is False

    tab.run("document.getElementById('player').value = 'teacher:bfs'")
    tab.run("document.getElementById('player').dispatchEvent(new Event('change'))")
    tab.wait_for("!isBusy && state.player === 'teacher:bfs'")
    assert tab.run("document.getElementById('texts').hidden") is True
    tab.press(".")
    tab.wait_for("!isBusy && state.step === 2")
    tab.run("document.getElementById('play').click()")
    tab.wait_for("state.step >= 5")
    assert tab.run("document.getElementById('play').textContent") == "Pause"
    tab.run("document.getElementById('play').click()")
    tab.wait_for("!isBusy")
    text = tab.run("fetch('game.jsonl').then((response) => response.text())")
    game = json.loads(text)
    assert game["player"] == "tiny_adapter + you + bfs"
    assert len(game["frames"]) == tab.run("state.step") + 1
    assert game["end"] is None
    assert tab.problems == []


def test_refused_setting_is_shown_and_the_game_stays(server: tuple[subprocess.Popen[str], str], tab: Tab) -> None:
    tab.open(server[1])
    tab.wait_for("state !== null && !isBusy")
    before = tab.run("state.game")
    tab.run("send('api/game', {grid_size: 1, seed: 0}, '')")
    tab.wait_for("!document.getElementById('error').hidden")
    assert tab.run("state.game") == before
    tab.run("document.getElementById('seed').value = 5; document.getElementById('settings').requestSubmit()")
    tab.wait_for("!isBusy && state.seed === 5")
    assert tab.run("document.getElementById('error').hidden") is True


def test_port_in_use_is_refused_in_one_line(
    server: tuple[subprocess.Popen[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    port = server[1].rstrip("/").rpartition(":")[2]
    assert main(["watch", "--port", port]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert port in line


def test_ctrl_c_ends_the_server_with_code_130(server: tuple[subprocess.Popen[str], str]) -> None:
    process, _ = server
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["watch"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "snake_lora_pl[watch]" in line


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt install chromium)")
def test_script_records_a_gif_of_the_page(tmp_path: Path) -> None:
    from PIL import Image

    out = tmp_path / "game.gif"
    command = [sys.executable, str(ROOT / "scripts" / "record_gif"), "--out", str(out), "--steps", "3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, "--width", "700", "--teacher", "bfs"], check=True, env=environment)
    with Image.open(out) as gif:
        assert (gif.n_frames, gif.width) == (4, 700)
