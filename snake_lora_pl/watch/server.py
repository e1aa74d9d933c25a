"""HTTP server of the page: static files, the state of the session, and requests that change it.

The server answers requests of the page that it serves only. The ``Host`` header must be an IP address, ``localhost`` or
the name given with ``--host``: a web page of another site that points its name at this machine (DNS rebinding) sends
that name. The ``Origin`` header, which browsers add to each POST, must be that of the page.
"""

from __future__ import annotations

import ipaddress
import json
import socket
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from snake_lora_pl.errors import UserError
from snake_lora_pl.game import Move
from snake_lora_pl.game.replay import render_html
from snake_lora_pl.game.replay.html import board_script
from snake_lora_pl.watch.session import WatchSession

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
_STATIC_FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
_MAX_BODY_BYTES = 4096
# Integers that JavaScript represents exactly.
_MAX_SEED = 2**53 - 1
_SHUTDOWN_S = 2


def build_app(session: WatchSession, host: str) -> Starlette:
    """Return the web application of a session.

    Args:
        session: The session.
        host: Name or address that the server listens on.
    """

    async def read_state(request: Request) -> Response:
        return JSONResponse(session.state)

    async def make_move(request: Request) -> Response:
        def advance(values: dict[str, Any]) -> dict[str, Any]:
            move = _value(values, "move", str, optional=True)
            if move is not None and move not in Move.__members__:
                raise UserError(f"move must be one of {', '.join(Move.__members__)} (found: {move})")
            game, step = _value(values, "game", int), _value(values, "step", int)
            return session.advance(game, step, None if move is None else Move[move])

        return await _change(request, advance)

    async def start_game(request: Request) -> Response:
        def start(values: dict[str, Any]) -> dict[str, Any]:
            seed = _value(values, "seed", int)
            if not 0 <= seed <= _MAX_SEED:
                raise UserError(f"seed must be between 0 and {_MAX_SEED:,} (found: {seed})")
            return session.new_game(_value(values, "grid_size", int), seed)

        return await _change(request, start)

    async def choose(request: Request) -> Response:
        return await _change(
            request,
            lambda values: session.choose(
                _value(values, "player", str, optional=True), _value(values, "teacher", str, optional=True)
            ),
        )

    async def download_game(request: Request) -> Response:
        content = await run_in_threadpool(session.game_line)
        return _download(content, "application/x-ndjson", f"snake_game_{session.state['seed']}.jsonl")

    async def download_replay(request: Request) -> Response:
        content = render_html(await run_in_threadpool(session.recording))
        return _download(content, "text/html", f"snake_game_{session.state['seed']}.html")

    routes = [Route(path, _static(name, media_type)) for path, (name, media_type) in _STATIC_FILES.items()]
    routes += [
        Route("/board.js", _content(board_script(), "text/javascript")),
        Route("/api/state", read_state),
        Route("/api/move", make_move, methods=["POST"]),
        Route("/api/game", start_game, methods=["POST"]),
        Route("/api/players", choose, methods=["POST"]),
        Route("/game.jsonl", download_game),
        Route("/game.html", download_replay),
    ]
    return Starlette(routes=routes, middleware=[Middleware(_OwnPageOnly, host=host)])


class _OwnPageOnly(BaseHTTPMiddleware):
    """Refuses requests of other sites' pages, and adds the security headers."""

    def __init__(self, app: Any, host: str) -> None:
        super().__init__(app)
        self._host = host

    async def dispatch(self, request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        own = request.headers.get("host", "")
        origin = request.headers.get("origin")
        if not _is_trusted_host(own, self._host):
            response: Response = PlainTextResponse("unknown Host header: use the printed address", 421)
        elif origin is not None and urlsplit(origin).netloc != own:
            response = PlainTextResponse("requests of other sites are refused", 403)
        else:
            response = await call_next(request)
        response.headers.update(_HEADERS)
        return response


def _is_trusted_host(header: str, host: str) -> bool:
    try:
        name = urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return False
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name in ("localhost", host.lower())
    return True


async def _change(request: Request, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Response:
    """Apply a change to the session in a thread, and return the new state or the error."""
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        return JSONResponse({"error": "send JSON"}, 415)
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_BODY_BYTES:
            return JSONResponse({"error": "the request is too long"}, 413)
    try:
        values = json.loads(body)
        if not isinstance(values, dict):
            raise UserError("send a JSON object")
        return JSONResponse(await run_in_threadpool(change, values))
    except (ValueError, RecursionError) as error:  # a UserError, or invalid JSON
        return JSONResponse({"error": str(error)}, 400)


def _value(values: dict[str, Any], name: str, of_type: type, *, optional: bool = False) -> Any:
    value = values.get(name)
    if (value is None and optional) or type(value) is of_type:
        return value
    raise UserError(f"{name} must be of type {of_type.__name__} (found: {value!r:.40})")


def _static(name: str, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    return _content(resources.files(__package__).joinpath(name).read_text(encoding="utf-8"), media_type)


def _content(text: str, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    async def respond(request: Request) -> Response:
        return Response(text, media_type=media_type)

    return respond


def _download(content: str, media_type: str, name: str) -> Response:
    return Response(content, media_type=media_type, headers={"Content-Disposition": f'attachment; filename="{name}"'})


def open_socket(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address.

    Args:
        host: Name or address.
        port: Port; 0 for any free one.

    Raises:
        UserError: If the address cannot be used, such as a port that another program uses.
    """
    if not 0 <= port < 2**16:
        raise UserError(f"--port must be between 0 and {2**16 - 1} (found: {port})")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(
            f"--host {host} --port {port}: cannot be used ({reason}). Choose another port, or 0 for a free one."
        ) from error


def url_of(listening: socket.socket, host: str) -> str:
    """Return the address of the page."""
    return f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}/"


def serve(session: WatchSession, listening: socket.socket, host: str) -> None:
    """Serve the page until the process is interrupted.

    Raises:
        KeyboardInterrupt: On Ctrl-C.
    """
    config = uvicorn.Config(
        build_app(session, host),
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        http="h11",
        server_header=False,
        timeout_graceful_shutdown=_SHUTDOWN_S,
    )
    uvicorn.Server(config).run(sockets=[listening])
