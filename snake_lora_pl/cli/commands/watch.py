"""``watch``: a local web page on which an adapter plays live."""

from __future__ import annotations

import importlib.util
import ipaddress
import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from snake_lora_pl.cli.commands.light_parser import CommandParser
from snake_lora_pl.constants import DEFAULT_GRID_SIZE
from snake_lora_pl.errors import UserError
from snake_lora_pl.paths import RunPaths

if TYPE_CHECKING:
    from snake_lora_pl.player import Player

logger = logging.getLogger(__name__)


def run(arguments: Sequence[str]) -> int:
    """Serve the page until Ctrl-C.

    Returns:
        The exit code.

    Raises:
        UserError: If an option is invalid, the extra is not installed, the port is busy or the adapter cannot be
            loaded.
        KeyboardInterrupt: On Ctrl-C.
    """
    options = build_parser().parse(arguments)
    if any(importlib.util.find_spec(package) is None for package in ("starlette", "uvicorn")):
        raise UserError("watch needs a web server: pip install 'snake_lora_pl[watch]'.")
    from snake_lora_pl.watch.players import PlayerChoices
    from snake_lora_pl.watch.server import open_socket, serve, url_of
    from snake_lora_pl.watch.session import WatchSession

    given = [Path(path) for path in options.adapter or []]
    found = [run.artifacts_dir for run in RunPaths.with_adapters(options.root)]
    directories = list({path.resolve(): path for path in reversed([*given, *found])}.values())[::-1]
    choices = PlayerChoices(directories, partial(_load_adapter, options.base_model, options.trust_remote_code))
    with open_socket(options.host, options.port) as listening:
        grid_size = options.grid_size
        if grid_size is None:
            grid_size = _trained_grid_size(given[0]) if given else DEFAULT_GRID_SIZE
        first = choices.ids[0] if given else f"teacher:{options.teacher}"
        session = WatchSession(choices, first, teacher=options.teacher, grid_size=grid_size, seed=options.seed)
        print(f"Watch at {url_of(listening, options.host)} (Ctrl-C ends)", flush=True)
        if not _is_loopback(listening.getsockname()[0]):
            logger.warning("--host %s: everyone who reaches this address can play.", options.host)
        serve(session, listening, options.host)
    return 0


def build_parser() -> CommandParser:
    """Return the parser of this command."""
    parser = CommandParser(
        "watch", epilog="The page offers --adapter, the adapters of the runs in --root, and teachers."
    )
    parser.add_argument(
        "--adapter",
        action="append",
        metavar="DIR",
        help="adapter directory: model_artifacts of a run; can be repeated, and the first one plays. Without it the "
        "teacher plays",
    )
    parser.add_argument(
        "--base_model",
        metavar="NAME",
        help="base model of all adapters: a short name, a directory or a Hub id; without it, the base that each was "
        "trained on",
    )
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="allow code that comes with the base model to run"
    )
    parser.add_argument("--root", default=".", metavar="DIR", help="directory whose logs/ holds the runs")
    parser.add_argument("--teacher", default="safe_greedy", metavar="NAME", help="teacher to compare moves with")
    parser.add_argument(
        "--grid_size", type=int, metavar="N", help="cells along one side of the board; without it that of the training"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the first game")
    parser.add_argument("--host", default="127.0.0.1", metavar="NAME", help="address to listen on")
    parser.add_argument("--port", type=int, default=8765, metavar="N", help="port to listen on; 0 for a free one")
    return parser


def _load_adapter(base_model: str | None, trust_remote_code: bool, adapter_dir: str | os.PathLike[str]) -> Player:
    from snake_lora_pl.console import configure_logging
    from snake_lora_pl.player import load_player

    configure_logging()
    return load_player(adapter_dir, base_model=base_model, trust_remote_code=trust_remote_code)


def _trained_grid_size(adapter_dir: Path) -> int:
    from snake_lora_pl.adapters.store import read_metadata

    return read_metadata(adapter_dir).grid_size or DEFAULT_GRID_SIZE


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback
