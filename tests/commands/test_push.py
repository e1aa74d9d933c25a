"""``push`` against a hub of our own on this machine, which really receives the files."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

TOKEN = "hf_NobodyMayReadThis"


class FakeHub(ThreadingHTTPServer):
    """What the hub's client asks of the hub when it sends a folder, and the files that arrive.

    Attributes:
        files: Content of each file of the repository, by path, once a commit has named it.
        visibility: What the repository was created as.
    """

    def __init__(self) -> None:
        super().__init__(("localhost", 0), _Handler)
        self.url = f"http://localhost:{self.server_port}"
        self.blobs: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        self.visibility: str | None = None


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *args: Any) -> None:
        pass

    def _answer(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_PUT(self) -> None:
        content = self._body()
        assert self.path == f"/blobs/{hashlib.sha256(content).hexdigest()}"
        self.server.blobs[self.path.rsplit("/", 1)[1]] = content
        self._answer({})

    def do_POST(self) -> None:
        body = self._body()
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self._answer({"error": f"bad token {self.headers['Authorization']}"}, 401)
        if self.path == "/api/repos/create":
            self.server.visibility = json.loads(body)["visibility"]
            return self._answer({"url": f"{self.server.url}/me/snake"})
        if self.path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if self.path == "/api/models/me/snake/preupload/main":
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self._answer({"files": files})
        if self.path == "/me/snake.git/info/lfs/objects/batch":
            objects = [
                {**item, "actions": {"upload": {"href": f"{self.server.url}/blobs/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            return self._answer({"transfer": "basic", "objects": objects})
        if self.path == "/api/models/me/snake/commit/main":
            commit = f"{self.server.url}/me/snake/commit/{'0' * 40}"
            for line in body.splitlines():
                item = json.loads(line)
                value = item["value"]
                if item["key"] == "file":
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
                elif item["key"] == "lfsFile":
                    self.server.files[value["path"]] = self.server.blobs[value["oid"]]
            return self._answer({"success": True, "commitOid": "0" * 40, "commitUrl": commit})
        return self._answer({"error": f"nothing at {self.path}"}, 404)


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
    # In a process of its own: the hub's client reads its environment when it is imported.
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_TOKEN": token,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",  # large files go by LFS, which a hub of sixty lines can speak
    }
    command = [sys.executable, "-m", "snake_lora_pl", "push", "--adapter", str(adapter_dir), "--repo", "me/snake"]
    result = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert token not in result.stdout + result.stderr
    return result.returncode, result.stdout, result.stderr


def test_the_hub_receives_every_file_as_it_is(adapter_dir: Path, hub: FakeHub, tmp_path: Path) -> None:
    (adapter_dir / ".hidden").touch()
    code, out, err = push(adapter_dir, hub.url, tmp_path / "home", "--private")
    assert code == 0, err
    assert out.strip().endswith(f"is at {hub.url}/me/snake/commit/{'0' * 40}")
    sent = {path.name: path.read_bytes() for path in adapter_dir.iterdir() if path.name != ".hidden"}
    assert "adapter_model.safetensors" in sent
    assert hub.files == sent
    assert hub.visibility == "private"
    (warning,) = err.splitlines()
    assert "names its base model by a directory of this machine" in warning


def test_a_refused_token_is_not_printed(adapter_dir: Path, hub: FakeHub, tmp_path: Path) -> None:
    code, _, err = push(adapter_dir, hub.url, tmp_path / "home", token="hf_AnotherSecret")
    assert code == 2
    assert "not published" in err
    assert "Log in with `hf auth login`, or set HF_TOKEN" in err
    assert "Traceback" not in err
    assert hub.files == {}


def test_a_hub_that_cannot_be_reached_is_one_line(adapter_dir: Path, tmp_path: Path) -> None:
    code, _, err = push(adapter_dir, "http://localhost:9", tmp_path / "home")
    assert code == 2
    assert "not published at http://localhost:9" in err
    assert "Traceback" not in err


def test_a_damaged_adapter_is_not_sent(adapter_dir: Path, hub: FakeHub, tmp_path: Path) -> None:
    (adapter_dir / "adapter_model.safetensors").write_bytes(b"")
    code, _, err = push(adapter_dir, hub.url, tmp_path / "home")
    assert code == 2
    assert "truncated or changed" in err
    assert hub.visibility is None
