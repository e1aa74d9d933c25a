"""Requests to the server of the live page, without a network."""

from __future__ import annotations

import json
import socket

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from starlette.testclient import TestClient

from snake_lora_pl.errors import UserError
from snake_lora_pl.watch.server import build_app, open_socket, url_of
from snake_lora_pl.watch.session import WatchSession

URL = "http://127.0.0.1:8765"


@pytest.fixture
def client(session: WatchSession) -> TestClient:
    return TestClient(build_app(session, "127.0.0.1"), base_url=URL)


def test_requests_change_the_session(client: TestClient, session: WatchSession) -> None:
    state = client.get("/api/state").json()
    assert client.post("/api/move", json={"game": state["game"], "step": 0}).json()["step"] == 1
    moved = client.post("/api/move", json={"game": state["game"], "step": 1, "move": "RIGHT"}).json()
    assert moved["frame"]["head"] == [4, 4]
    assert client.post("/api/players", json={"player": "teacher:bfs"}).json()["player"] == "teacher:bfs"
    assert client.post("/api/game", json={"grid_size": 8, "seed": 3}).json()["size"] == 8
    assert client.get("/game.jsonl").text == session.game_line()
    assert "snake_game_3.html" in client.get("/game.html").headers["content-disposition"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/move", {"game": 1, "step": 0, "move": "NORTH"}),
        ("/api/move", {"game": 1}),
        ("/api/move", {"game": True, "step": 0}),
        ("/api/move", [1]),
        ("/api/game", {"grid_size": 8, "seed": 2**53}),
        ("/api/game", {"grid_size": 1e999, "seed": 1}),
        ("/api/game", {"grid_size": 8, "seed": None}),
        ("/api/players", {"player": 3}),
        ("/api/players", {"teacher": "x"}),
    ],
)
def test_invalid_value_is_an_error_that_changes_nothing(
    client: TestClient, session: WatchSession, path: str, body: object
) -> None:
    before = session.state
    response = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]
    assert session.state == before


@pytest.mark.parametrize("body", ["", "{", "[" * 4000, "\xff"])
def test_body_that_is_not_json_is_refused(client: TestClient, body: str) -> None:
    response = client.post("/api/move", content=body.encode("latin-1"), headers={"Content-Type": "application/json"})
    assert response.status_code == 400


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 421),
        ({"Host": "127.0.0.1.evil.example:8765"}, 421),
        ({"Host": ""}, 421),
        ({"Host": "[::1"}, 421),
        ({"Host": "[::1]:8765"}, 200),
        ({"Host": "192.168.1.7:8765"}, 200),
        ({"Host": "localhost:9000"}, 200),
        ({"Origin": URL}, 200),
        ({"Origin": "http://127.0.0.1:8000"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Content-Type": "text/plain"}, 415),
    ],
)
def test_only_the_own_page_may_change_the_game(
    client: TestClient, session: WatchSession, headers: dict[str, str], status: int
) -> None:
    headers = {"Content-Type": "application/json", **headers}
    assert client.post("/api/move", content='{"game": 1, "step": 0}', headers=headers).status_code == status
    assert session.state["step"] == (1 if status == 200 else 0)


def test_long_body_is_refused(client: TestClient) -> None:
    body = '{"game": 1, "step": 0, "x": "' + "x" * 5000 + '"}'
    assert client.post("/api/move", content=body, headers={"Content-Type": "application/json"}).status_code == 413


def test_every_response_forbids_other_sources_and_inline_scripts(client: TestClient) -> None:
    for path in ("/", "/page.js", "/page.css", "/board.js", "/icon.svg", "/api/state", "/nothing"):
        policy = client.get(path).headers["content-security-policy"]
        assert policy.startswith("default-src 'none';")
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy


def test_busy_port_is_a_user_error() -> None:
    with open_socket("127.0.0.1", 0) as busy:
        port = busy.getsockname()[1]
        assert url_of(busy, "127.0.0.1") == f"http://127.0.0.1:{port}/"
        with pytest.raises(UserError, match=str(port)):
            open_socket("127.0.0.1", port)


def test_address_of_ipv6_has_brackets() -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6")
    try:
        listening = open_socket("::1", 0)
    except UserError:
        pytest.skip("no IPv6 loopback")
    with listening:
        assert url_of(listening, "::1").startswith("http://[::1]:")
