from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from snake_lora_pl.errors import UserError
from snake_lora_pl.models import BaseModelSpec, hub, load_base_model, load_tokenizer, prepare_base_model
from snake_lora_pl.models.transformers_internals import commit_hash

COMMIT = "c" * 40


@dataclass
class FakeHub:
    """A local model hub with one repository, ``owner/tiny``."""

    files: dict[str, bytes]
    url: str = ""
    error: tuple[int, str] | None = None
    """Status and error code of every response, if set."""
    delay_s: float = 0.0
    downloaded: list[str] = field(default_factory=list)

    def answer(self, method: str, path: str) -> tuple[int, dict[str, str], bytes]:
        time.sleep(self.delay_s)
        if self.error is not None:
            return self.error[0], {"X-Error-Code": self.error[1]}, b"{}"
        path = path.partition("?")[0]
        if path in ("/api/models/owner/tiny", "/api/models/owner/tiny/revision/main"):
            siblings = [{"rfilename": name} for name in self.files]
            return 200, {}, json.dumps({"id": "owner/tiny", "sha": COMMIT, "siblings": siblings}).encode()
        if path == f"/api/models/owner/tiny/tree/{COMMIT}":
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.files.items()
            ]
            return 200, {}, json.dumps(tree).encode()
        prefix = f"/owner/tiny/resolve/{COMMIT}/"
        name = path.removeprefix(prefix)
        if path.startswith(prefix) and name in self.files:
            content = self.files[name]
            if method == "GET":
                self.downloaded.append(name)
            return 200, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}, content
        return 404, {"X-Error-Code": "EntryNotFound" if path.startswith(prefix) else "RepoNotFound"}, b"{}"


@pytest.fixture
def fake_hub(tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Serve the tiny Llama as a hub does, with an empty local cache."""
    from huggingface_hub import constants

    state = FakeHub({path.name: path.read_bytes() for path in tiny_llama_dir.iterdir()})
    state.files["onnx/model.safetensors"] = state.files["pytorch_model.bin"] = b"never downloaded"

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = state.answer(self.command, self.path)
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                with contextlib.suppress(ConnectionError):  # The client timed out and disconnected.
                    self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    _point_to(state.url, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "PROBE_TIMEOUT_S", 1.0)
    yield state
    server.shutdown()
    server.server_close()


def _point_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def test_hub_model_is_downloaded_once_and_loads_without_the_hub(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = prepare_base_model("owner/tiny")
    assert (source.origin, source.canonical_id, source.revision) == ("hub", "owner/tiny", COMMIT)
    assert "model.safetensors" in fake_hub.downloaded
    assert not {"pytorch_model.bin", "onnx/model.safetensors"} & set(fake_hub.downloaded)

    num_downloads = len(fake_hub.downloaded)
    assert prepare_base_model("owner/tiny") == source
    assert len(fake_hub.downloaded) == num_downloads

    _point_to("http://127.0.0.1:9", monkeypatch)
    model = load_base_model("owner/tiny", dtype="float32")
    assert (model.name_or_path, commit_hash(model)) == ("owner/tiny", COMMIT)
    assert load_tokenizer("owner/tiny").eos_token == "<|im_end|>"
    assert COMMIT in caplog.text


def test_tokenizer_is_downloaded_without_the_weights(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_tokenizer("owner/tiny").name_or_path == "owner/tiny"
    assert "tokenizer.json" in fake_hub.downloaded
    assert "model.safetensors" not in fake_hub.downloaded

    _point_to("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(UserError, match="owner/tiny.*cannot be downloaded"):
        load_base_model("owner/tiny")


@pytest.fixture
def snapshot_calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """``local_files_only`` of each request for a snapshot; False is a download, which retries for minutes."""
    calls: list[bool] = []
    snapshot = hub._snapshot

    def record(*args: Any, local_files_only: bool, **options: Any) -> Path:
        calls.append(local_files_only)
        return snapshot(*args, local_files_only=local_files_only, **options)

    monkeypatch.setattr(hub, "_snapshot", record)
    return calls


@pytest.mark.usefixtures("fake_hub")
def test_unreachable_hub_is_reported_at_once_with_alternatives(
    snapshot_calls: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    _point_to("http://127.0.0.1:9", monkeypatch)

    with pytest.raises(UserError, match="ConnectError.* smollm2-135m .*directory"):
        load_base_model("owner/tiny")
    assert snapshot_calls == [True]


def test_unresponsive_hub_is_reported_after_one_short_request(fake_hub: FakeHub, snapshot_calls: list[bool]) -> None:
    fake_hub.delay_s = 8

    with pytest.raises(UserError, match="[Tt]ime.* smollm2-135m"):
        load_base_model("owner/tiny")
    assert snapshot_calls == [True]


def test_offline_mode_is_reported_as_the_cause(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    with pytest.raises(UserError, match="HF_HUB_OFFLINE.*smollm2-135m"):
        load_base_model("owner/tiny")


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "RepoNotFound", "directory.*hub.*private.*`hf auth login`"),
        (403, "GatedRepo", r"gated.*https://huggingface\.co/owner/tiny .*`hf auth login`"),
        (404, "RevisionNotFound", r"'main'.*model\.revision"),
        (403, "", "403.*`hf auth login`"),
        (500, "", "cannot be downloaded.*500"),
    ],
)
def test_each_hub_error_has_its_own_message(fake_hub: FakeHub, status: int, code: str, message: str) -> None:
    fake_hub.error = (status, code)

    with pytest.raises(UserError, match=message) as raised:
        prepare_base_model(BaseModelSpec("owner/tiny", "main"))
    assert "\n" not in str(raised.value)


def test_repository_without_safetensors_is_rejected_before_download(fake_hub: FakeHub) -> None:
    del fake_hub.files["model.safetensors"]

    with pytest.raises(UserError, match="safetensors.*model.revision"):
        prepare_base_model("owner/tiny")
    assert fake_hub.downloaded == []
