"""``push`` to a local server that implements the Hub's upload API."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest

from tests.fake_hub import TOKEN, FakeHub


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    server = FakeHub()
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def push(adapter_dir: Path, endpoint: str, home: Path, *arguments: str, token: str = TOKEN) -> tuple[int, str, str]:
    # In a new process, because the client of the Hub reads its environment at import.
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_TOKEN": token,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",  # the server supports LFS, but not Xet
    }
    command = [sys.executable, "-m", "snake_lora_pl", "push", "--adapter", str(adapter_dir), "--repo", "me/snake"]
    result = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert not token or token not in result.stdout + result.stderr
    return result.returncode, result.stdout, result.stderr


def test_hub_receives_every_file_unchanged(adapter_dir: Path, hub: FakeHub, tmp_path: Path) -> None:
    (adapter_dir / ".hidden").touch()
    code, out, err = push(adapter_dir, hub.url, tmp_path / "home", "--private")
    assert code == 0, err
    assert out.strip().endswith(f"{hub.url}/me/snake/commit/{'0' * 40}")
    expected = {path.name: path.read_bytes() for path in adapter_dir.iterdir() if path.name != ".hidden"}
    assert "adapter_model.safetensors" in expected
    assert hub.files == expected
    assert hub.visibility == "private"
    (warning,) = err.splitlines()
    assert "base model" in warning


def test_refused_token_is_not_printed(adapter_dir: Path, hub: FakeHub, tmp_path: Path) -> None:
    code, _, err = push(adapter_dir, hub.url, tmp_path / "home", token="hf_AnotherSecret")
    assert code == 2
    assert "`hf auth login`" in err
    assert "HF_TOKEN" in err
    assert "Traceback" not in err
    assert hub.files == {}


def test_refused_token_of_the_login_is_not_printed(adapter_dir: Path, hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text("hf_OfTheLogin")  # as `hf auth login` keeps it
    code, _, err = push(adapter_dir, hub.url, tmp_path / "home", token="")
    assert code == 2
    assert "bad token Bearer ***" in err


def test_unreachable_hub_is_one_line(adapter_dir: Path, tmp_path: Path) -> None:
    code, _, err = push(adapter_dir, "http://localhost:9", tmp_path / "home")
    assert code == 2
    assert "http://localhost:9" in err
    assert "Traceback" not in err


def test_damaged_adapter_is_not_uploaded(adapter_dir: Path, hub: FakeHub, tmp_path: Path) -> None:
    (adapter_dir / "adapter_model.safetensors").write_bytes(b"")
    code, _, err = push(adapter_dir, hub.url, tmp_path / "home")
    assert code == 2
    assert "adapter_model.safetensors" in err
    assert hub.visibility is None
