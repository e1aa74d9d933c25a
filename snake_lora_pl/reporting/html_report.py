"""``report.html``: a self-contained HTML report of a run, made from the files in the run directory. Imports no torch.

The content is JSON in a ``<script>`` element. The report's script inserts it as text nodes only, so that a completion
cannot inject HTML.
"""

from __future__ import annotations

import csv
import html
import json
import math
import re
import shlex
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from snake_lora_pl.durable import explain_failed_writes, open_durably
from snake_lora_pl.errors import UserError
from snake_lora_pl.evaluation.validations import MOVES, NO_MOVE, read_validations
from snake_lora_pl.game.replay import board_script, json_for_script
from snake_lora_pl.paths import TIMESTAMP_FORMAT, RunPaths, display_path
from snake_lora_pl.program import PROG
from snake_lora_pl.reporting.games_file import best_median_worst
from snake_lora_pl.reporting.table import players_in, table_rows

# Longer series are averaged down to this many points.
_MAX_POINTS = 500
# Limit of validations in the report: the first, the last, and evenly spaced ones between them.
_MAX_VALIDATIONS = 24
_PLACEHOLDER = re.compile(r"__(TITLE|DATA|BOARD)__")

# Charts in order: title, unit, and label by metric. A metric that ends in "/" is a prefix of a group of metrics.
_CHARTS: list[tuple[str, str, dict[str, str]]] = [
    ("Loss", "nats per token", {"train/loss": "training", "val/loss": "validation"}),
    (
        "Accuracy on validation rows, teacher-forced",
        "%",
        {
            "val/decision_accuracy": "decision",
            "val/move_accuracy": "move",
            "val/legal_move_rate": "legal move",
            "val/trap_rate": "traps taken",
            "val/token_accuracy": "tokens",
            "val/exact_match": "exact match",
        },
    ),
    ("Apples per game during training", "apples", {"play/apples_mean": "mean"}),
    (
        "Moves in games during training",
        "%",
        {
            "play/fatal_move_rate": "fatal",
            "play/trap_rate": "traps taken",
            "play/unparseable_rate": "unreadable",
            "play/teacher_agreement": "teacher agreement",
        },
    ),
    ("Learning rate", "", {"train/learning_rate": "learning rate"}),
    ("Gradient norm", "", {"train/gradient_norm": "before clipping"}),
    (
        "Throughput",
        "tokens/s",
        {"perf/tokens_per_second": "all tokens", "perf/target_tokens_per_second": "target tokens"},
    ),
    ("Peak memory", "GiB", {"perf/peak_memory_gib": "peak"}),
    ("Weight norm of the adapter", "", {"adapter/weight_norm/": ""}),
    ("Update norm of the adapter", "", {"adapter/update_norm/": ""}),
    ("Rank budget (AdaLoRA)", "ranks", {"train/rank_budget": "ranks"}),
]


def write_report(paths: RunPaths) -> Path:
    """Write ``report.html`` into a run directory.

    Args:
        paths: Paths of the run directory.

    Returns:
        Path of the report.

    Raises:
        UserError: If the directory holds no run, a file of the run is damaged, or the report cannot be written.
    """
    report = render_report(paths)
    with explain_failed_writes(paths.report_path, "the report", then="write it with the command report"):
        with open_durably(paths.report_path, "w", encoding="utf-8") as file:
            file.write(report)
    return paths.report_path


def render_report(paths: RunPaths) -> str:
    """Return the HTML report of a run.

    Raises:
        UserError: If the directory holds no run, or a file of the run is damaged.
    """
    if not paths.config_path.is_file() and not paths.metrics_path.is_file():
        raise UserError(
            f"{display_path(paths.run_dir)}: not a run directory (config.yaml and metrics.csv are missing). Pass the "
            "directory that fit printed at its end."
        )
    try:
        data = _report_data(paths)
    # A damaged file can raise any of these, depending on the damage.
    except (OSError, ValueError, LookupError, TypeError, AttributeError, csv.Error, yaml.YAMLError) as error:
        raise UserError(f"{display_path(paths.run_dir)}: a file of the run is damaged ({error!r}).") from error
    template = resources.files(__package__).joinpath("html_report.html").read_text(encoding="utf-8")
    values = {
        "TITLE": html.escape(f"{data['title']}: report"),
        "DATA": json_for_script(data),
        "BOARD": board_script(),
    }
    # One pass over all placeholders: a completion that contains a placeholder must not be expanded.
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)


def _report_data(paths: RunPaths) -> dict[str, Any]:
    config_text = paths.config_path.read_text(encoding="utf-8") if paths.config_path.is_file() else ""
    config = yaml.safe_load(config_text) or {}
    metadata_path = paths.artifacts_dir / "adapter_metadata.json"
    metadata = json.loads(metadata_path.read_text(encoding="utf-8")) if metadata_path.is_file() else {}
    series = _read_series(paths.metrics_path) if paths.metrics_path.is_file() else {}
    validations = list(read_validations(paths.validations_path)) if paths.validations_path.is_file() else []
    table = _read_table(paths)
    players = list(table.get("adapters") or {}) or list(table.get("players") or {})[:1]
    games = _Games(paths.games.games_path if table else paths.val_games_path, players)
    return {
        "title": paths.run_dir.name,
        "subtitle": _subtitle(paths, config, metadata),
        "facts": _facts(config, metadata, series),
        "tiles": _tiles(table, players, series),
        "charts": list(_charts(series)),
        "play": _play(table),
        "games": games.data(is_final=bool(table)),
        "validations": _select_validations(validations),
        "moves": [*MOVES, NO_MOVE],
        "config": config_text,
        "files": _files(paths),
        "versions": metadata.get("packages", {}),
        "commands": _commands(paths, metadata),
    }


def _subtitle(paths: RunPaths, config: Mapping[str, Any], metadata: Mapping[str, Any]) -> str:
    base = metadata.get("base_model_name") or config.get("model", {}).get("base_model", "")
    adapter_type = metadata.get("adapter_type") or config.get("model", {}).get("adapter_type", "")
    stamp = paths.run_dir.absolute().parent.name[-len("YYYYmmdd_HHMMSS") :]
    try:
        started = datetime.strptime(stamp, TIMESTAMP_FORMAT).strftime("%d %B %Y, %H:%M")
    except ValueError:  # a renamed directory
        started = ""
    return " · ".join(part for part in (Path(str(base)).name, adapter_type, started) if part)


def _facts(config: Mapping[str, Any], metadata: Mapping[str, Any], series: Mapping[str, Any]) -> list[list[str]]:
    lora, data = metadata.get("peft_config", {}), metadata.get("data", {})
    steps = max((points[-1][0] for points in series.values() if points), default=None)
    facts = {
        "optimizer steps": _number(steps),
        "step of the best adapter": _number(metadata.get("step")),
        "rank": _number(lora.get("r")),
        "trainable parameters": _number(metadata.get("trainable_parameters")),
        "training rows": _number(data.get("num_train_rows")),
        "validation rows": _number(data.get("num_val_rows")),
        "prompt format": data.get("prompt_format"),
        "grid": f"{data['grid_size']}×{data['grid_size']}" if data.get("grid_size") else None,  # noqa: RUF001
        "seed": _number(config.get("seed_everything")),
    }
    if "grid_size" not in data and metadata.get("grid_size"):
        facts["grid"] = f"{metadata['grid_size']}×{metadata['grid_size']}"  # noqa: RUF001
    return [[name, value] for name, value in facts.items() if value]


def _tiles(
    table: Mapping[str, Any], players: Sequence[str], series: Mapping[str, list[list[float]]]
) -> list[dict[str, str]]:
    """Return the headline metrics."""
    tiles = []
    if table:
        own = table["players"][players[0]]
        others = [
            f"{name} {player['apples_mean']:.1f}" for name, player in table["players"].items() if name != players[0]
        ]
        interval = f"95%: {own['apples_low']:.1f} to {own['apples_high']:.1f}"
        tiles.append(_tile("Apples per game", f"{own['apples_mean']:.1f}", interval, ", ".join(others)))
        tiles.append(_tile("Fatal moves", f"{own['fatal_move_rate']:.2%}", f"in {own['num_games']:.0f} games"))
    elif "play/apples_mean" in series:
        tiles.append(_tile("Apples per game", f"{series['play/apples_mean'][-1][1]:.1f}", "last games during training"))
    if "val/loss" in series:
        step, lowest = min(series["val/loss"], key=lambda point: point[1])
        tiles.append(_tile("Validation loss", f"{lowest:.3f}", f"lowest, at step {step:,.0f}"))
    elif "train/loss" in series:
        tiles.append(_tile("Training loss", f"{series['train/loss'][-1][1]:.3f}", "last step"))
    if "val/decision_accuracy" in series:
        accuracy = series["val/decision_accuracy"][-1][1]
        tiles.append(_tile("Decision accuracy", f"{accuracy:.1%}", "teacher-forced, last validation"))
    if "perf/tokens_per_second" in series:
        memory = series.get("perf/peak_memory_gib")
        note = f"peak memory {memory[-1][1]:.1f} GiB" if memory else ""
        tiles.append(_tile("Tokens per second", f"{series['perf/tokens_per_second'][-1][1]:,.0f}", note))
    return tiles


def _tile(label: str, value: str, note: str = "", more: str = "") -> dict[str, str]:
    return {"label": label, "value": value, "note": note, "more": more}


def _number(value: Any) -> str | None:
    return f"{value:,.0f}" if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _read_series(path: Path) -> dict[str, list[list[float]]]:
    """Return (optimizer step, value) pairs by metric. Steps count from 1 here and from 0 in ``metrics.csv``."""
    series: dict[str, list[list[float]]] = defaultdict(list)
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if not row.get("step"):
                continue
            step = int(float(row["step"])) + 1
            for name, text in row.items():
                if text and name not in ("step", "epoch") and math.isfinite(value := float(text)):
                    points = series[name]
                    if points and points[-1][0] == step:
                        points[-1][1] = value
                    else:
                        points.append([step, value])
    return dict(series)


def _charts(series: Mapping[str, list[list[float]]]) -> Iterator[dict[str, Any]]:
    for title, unit, names in _CHARTS:
        lines = []
        for name, label in names.items():
            if name.endswith("/"):
                group = sorted(found for found in series if found.startswith(name))
                lines += [(found.removeprefix(name).replace("_", " "), series[found]) for found in group]
            elif name in series:
                lines.append((label, series[name]))
        if lines:
            yield {
                "title": title,
                "unit": unit,
                "series": [{"name": label, "points": _downsample(points)} for label, points in lines],
            }


def _downsample(points: Sequence[Sequence[float]]) -> list[list[float]]:
    """Average neighboring points so that at most ``_MAX_POINTS`` remain."""
    size = -(-len(points) // _MAX_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [[group[-1][0], float(f"{sum(value for _, value in group) / len(group):.6g}")] for group in groups]


def _select_validations(validations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if len(validations) <= _MAX_VALIDATIONS:
        return validations
    last = len(validations) - 1
    indices = dict.fromkeys(round(i * last / (_MAX_VALIDATIONS - 1)) for i in range(_MAX_VALIDATIONS))
    return [validations[index] for index in indices]


def _read_table(paths: RunPaths) -> dict[str, Any]:
    path = paths.games.table_path
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _play(table: Mapping[str, Any]) -> dict[str, Any] | None:
    if not table:
        return None
    players = table["players"]
    settings = table["settings"]
    num_games, size = settings["num_games"], settings["grid_size"]
    limit = f", {settings['max_steps']:,} in all" if settings.get("max_steps") else ""
    return {
        "players": list(players),
        "rows": list(table_rows(list(players_in(table).values()))),
        "apples": [
            [name, *(player[key] for key in ("apples_mean", "apples_low", "apples_high"))]
            for name, player in players.items()
        ],
        "differences": [[name, *values.values()] for name, values in table.get("differences", {}).items()],
        "caption": (
            f"{num_games:,} game{'' if num_games == 1 else 's'} on {size}×{size}, equal for all players. Limit: "  # noqa: RUF001
            f"{settings['max_steps_without_apple']:,} steps without an apple{limit}. Teacher: {settings['teacher']}."
        ),
    }


class _Games:
    """Move and claim counts of one player's games, and three replays, read one game at a time.

    Args:
        path: Output of ``write_games``; it may be missing.
        players: Player names, of which the first one's games are read; if empty, the games of all players.
    """

    def __init__(self, path: Path, players: Sequence[str]) -> None:
        self._decisions = [[0] * (len(MOVES) + 1) for _ in MOVES]
        self._claims: dict[str, list[int]] = {}
        # Apples, steps, seed and file offset of each game: whole games may not fit in memory.
        self._games: list[tuple[int, int, int, int]] = []
        self._path = path
        if path.is_file():
            with open(path, "rb") as file:
                for line in iter(file.readline, b""):
                    game = json.loads(line)
                    if not players or game["player"] == players[0]:
                        self._count(game)
                        offset = file.tell() - len(line)
                        self._games.append((game["apples"], game["steps"], game["seed"], offset))

    def _count(self, game: Mapping[str, Any]) -> None:
        for frame in game["frames"]:
            if "teacher" not in frame:
                continue
            column = len(MOVES) if frame["move"] is None else MOVES.index(frame["move"])
            self._decisions[MOVES.index(frame["teacher"])][column] += 1
            for name, is_true in frame["claims"].items():
                counts = self._claims.setdefault(name, [0, 0])
                counts[0] += is_true
                counts[1] += 1

    def data(self, *, is_final: bool) -> dict[str, Any] | None:
        """Return the data of the report's sections on games; None without games."""
        if not self._games:
            return None
        selected = best_median_worst(self._games, lambda game: game[:3])
        with open(self._path, "rb") as file:
            replays = {which: _read_replay(file, game[3]) for which, game in selected.items()}
        return {
            "isFinal": is_final,
            "numGames": len(self._games),
            "replays": replays,
            "decisions": self._decisions,
            "claims": [[name, *counts] for name, counts in sorted(self._claims.items())],
        }


def _read_replay(file: BinaryIO, offset: int) -> dict[str, Any]:
    file.seek(offset)
    game = json.loads(file.readline())
    frames = [
        {key: frame[key] for key in ("head", "trail", "apple", "move", "words", "teacher") if key in frame}
        for frame in game["frames"]
    ]
    facts = {key: game[key] for key in ("player", "seed", "end", "apples", "steps")}
    return {**facts, "size": game["grid_size"], "frames": frames}


def _files(paths: RunPaths) -> list[list[str]]:
    """Return label and relative link of each existing file."""
    files = {
        "Adapter": paths.artifacts_dir,
        "Model card": paths.artifacts_dir / "README.md",
        "Config": paths.config_path,
        "Metrics": paths.metrics_path,
        "Validations": paths.validations_path,
        "Games": paths.games.games_path,
        "Games during training": paths.val_games_path,
        "Table of games": paths.games.table_path,
        "Checkpoints": paths.checkpoints_dir,
    }
    links = {label: path.relative_to(paths.run_dir).as_posix() for label, path in files.items() if path.exists()}
    return [[label, link] for label, link in links.items()]


def _commands(paths: RunPaths, metadata: Mapping[str, Any]) -> list[list[str]]:
    commands = [
        ["Repeat this run", f"fit --config {shlex.quote(display_path(paths.config_path))}"],
        ["Write this report again", f"report {shlex.quote(display_path(paths.run_dir))}"],
    ]
    if metadata:
        adapter = f"--adapter {shlex.quote(display_path(paths.artifacts_dir))}"
        base = f"--model.base_model {shlex.quote(metadata['base_model_name'])}"
        commands = [
            ["Play more games", f"test {base} {adapter} --games 100"],
            *commands,
            ["Merge the adapter into the base model", f"merge {adapter} --out merged_model"],
        ]
    return [[label, f"{PROG} {command}"] for label, command in commands]
