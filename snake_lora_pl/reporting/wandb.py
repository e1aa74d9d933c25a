"""Logging of a run to Weights & Biases: metrics, sample rows, confusion matrices, games, and artifacts."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shlex
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast
from urllib.parse import urlsplit

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger
from lightning_utilities.core.rank_zero import rank_zero_only
from typing_extensions import override

from snake_lora_pl.errors import UserError, one_line
from snake_lora_pl.evaluation.dashboard import RunOutcome, require_package
from snake_lora_pl.evaluation.distributed import PlayerResult
from snake_lora_pl.evaluation.game_loop import PlayedGame
from snake_lora_pl.evaluation.validations import MOVES, NO_MOVE, Validation
from snake_lora_pl.game.replay import render_gif, render_html
from snake_lora_pl.paths import RunPaths, display_path
from snake_lora_pl.reporting.games_file import best_median_worst
from snake_lora_pl.reporting.table import format_bool, players_in, table_rows
from snake_lora_pl.reporting.wandb_internals import api_errors, check_api_key, declare_input_artifact
from snake_lora_pl.secrets import mask_arguments

if TYPE_CHECKING:
    import wandb

logger = logging.getLogger(__name__)

STEP = "trainer/global_step"
"""The x-axis of every metric."""

# Summary of each metric in W&B's table of runs; the last value for all other metrics.
SUMMARIES = {
    "train/loss": "min",
    "val/loss": "min",
    "val/perplexity": "min",
    "val/token_accuracy": "max",
    "val/exact_match": "max",
    "val/decision_accuracy": "max",
    "val/move_accuracy": "max",
    "val/legal_move_rate": "max",
    "val/trap_rate": "min",
    "play/apples_mean": "max",
    "play/apples_median": "max",
    "play/win_rate": "max",
    "play/fatal_move_rate": "min",
    "play/trap_rate": "min",
    "play/unparseable_rate": "min",
    "play/teacher_agreement": "max",
    "perf/tokens_per_second": "mean",
    "perf/target_tokens_per_second": "mean",
    "perf/peak_memory_gib": "max",
}

_CONNECT_TIMEOUT_S = 3.0
_INIT_TIMEOUT_S = 60.0
# Limit for sending the remaining data at the end of a run.
_FINISH_TIMEOUT_S = 300.0
# About five minutes. A request that is being retried outlasts the limit above; W&B's default is about 15 minutes.
_GRAPHQL_RETRIES = 9


class RunWandbLogger(WandbLogger):
    """Lightning's ``WandbLogger`` that is also a ``Dashboard``, and never prompts.

    Without an API key, or if the server is unreachable, the run is stored on disk and the log names the command that
    sends it later. A run resumed from a checkpoint continues the same W&B run.

    Args:
        project: W&B project.
        entity: User or team; None uses the default entity of the API key.
        name: Run name; None builds one from the preset, base model, adapter type and start time.
        group: Group of the run.
        tags: Tags.
        mode: ``auto`` is online if there is an API key and the server is reachable, else offline. ``WANDB_MODE``
            overrides it.
        save_dir: Parent directory of ``wandb/``; None uses the run directory.

    Raises:
        UserError: If wandb is not installed, or if the server rejects the run.
    """

    label = "W&B"
    package = "wandb"

    def __init__(
        self,
        project: str = "snake_lora_pl",
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
        mode: Literal["auto", "online", "offline"] = "auto",
        save_dir: str | None = None,
    ) -> None:
        require_package(self.package)
        super().__init__(project=project)
        self.mode = mode
        self._init_arguments: dict[str, Any] = {
            "project": project,
            "entity": entity,
            "name": name,
            "group": group,
            "tags": tags,
            "dir": save_dir,
        }
        self._run: wandb.Run | None = None
        self._owns_service = False

    def attach(self, paths: RunPaths, name: str) -> None:
        """Set the directory and the name of the run, unless the constructor was given some."""
        self._init_arguments["dir"] = self._init_arguments["dir"] or str(paths.run_dir)
        self._init_arguments["name"] = self._init_arguments["name"] or name
        super().__init__(project=self._init_arguments["project"], save_dir=self._init_arguments["dir"])

    @property
    @override
    @rank_zero_experiment
    def experiment(self) -> wandb.Run:
        if self._run is not None:
            return self._run
        run = self._start()
        # The base class logs to the run it is constructed with.
        super().__init__(project=self._init_arguments["project"], save_dir=self._init_arguments["dir"], experiment=run)
        return run

    def _start(self) -> wandb.Run:
        import wandb
        from wandb.env import SERVICE

        self._owns_service = SERVICE not in os.environ
        directory = Path(self._init_arguments["dir"] or ".")
        directory.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(
            # W&B's capture of the terminal breaks the progress bar.
            console="off",
            silent=True,
            init_timeout=_INIT_TIMEOUT_S,
            finish_timeout=_FINISH_TIMEOUT_S,
            finish_timeout_raises=True,
            x_graphql_retry_max=_GRAPHQL_RETRIES,
        )
        try:
            with _masked_arguments():
                mode = cast(Any, self._choose_mode())
                arguments = self._init_arguments | {"dir": str(directory), "id": _run_id(directory)}
                self._run = run = wandb.init(**arguments, mode=mode, resume="allow", settings=settings)
            if not (run.offline or run.disabled):
                check_api_key(run)
        except (wandb.Error, TimeoutError) as error:
            self.finish()
            raise UserError(
                f"W&B did not start the run: {one_line(error)}. Log in again (wandb login), or store the run on disk "
                "with WANDB_MODE=offline."
            ) from error
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP, step_sync=True)
        for name, summary in SUMMARIES.items():
            run.define_metric(name, step_metric=STEP, summary=summary)
        return run

    def _choose_mode(self) -> str | None:
        """Return the mode for ``wandb.init``; None lets W&B read ``WANDB_MODE``."""
        import wandb

        if os.environ.get("WANDB_MODE"):
            return None
        if self.mode != "auto":
            return self.mode
        # Without `silent`, login asks the server for the user's name.
        wandb.setup(wandb.Settings(silent=True))
        if not wandb.login(prompt=False, verify=False):
            logger.info("W&B: no API key found (wandb login stores one). Storing the run on disk.")
            return "offline"
        host = urlsplit(wandb.setup().settings.base_url)
        try:
            port = host.port or (443 if host.scheme == "https" else 80)
            socket.create_connection((str(host.hostname), port), timeout=_CONNECT_TIMEOUT_S).close()
        except OSError as error:
            logger.info("W&B: %s is unreachable (%s). Storing the run on disk.", host.hostname, error)
            return "offline"
        return "online"

    @property
    def location(self) -> str:
        """URL of the run, or the command that sends it."""
        if self._run is None:
            return "no run was started"
        # W&B warns if an offline run is asked for its URL.
        url = None if self._run.offline else self._run.url
        return str(url) if url else _sync_command(self._run)

    def finish(self) -> None:
        """End the run, so that this process can start another one. Waits a limited time for the upload."""
        import wandb

        if self._run is not None:
            try:
                self._run.finish()
            except TimeoutError:
                logger.warning(
                    "W&B: the upload did not finish within %.0f s. Send the run with: %s",
                    _FINISH_TIMEOUT_S,
                    _sync_command(self._run),
                )
            self._run = None
        if self._owns_service:
            # W&B's service closes the run's file only when it exits; before that, the last records may be missing.
            wandb.teardown()
            self._owns_service = False

    @rank_zero_only
    def show_validation(self, validation: Validation) -> None:
        """Log the sample rows as a table, and the confusion matrix of moves."""
        import wandb

        columns = [
            "source",
            "prompt",
            "teacher's completion",
            "model's completion",
            "right move",
            "legal move",
            "claims right",
            "claims wrong",
        ]
        rows = [
            [
                row.source,
                row.prompt,
                row.target,
                row.completion,
                format_bool(row.is_right),
                format_bool(row.is_legal),
                sum(row.claims.values()),
                ", ".join(name for name, is_true in row.claims.items() if not is_true),
            ]
            for row in validation.rows
        ]
        values: dict[str, Any] = {"val/sample_rows": wandb.Table(columns=columns, data=rows)}
        if validation.decisions is not None:
            values["val/moves"] = _confusion_matrix(validation.decisions, "Moves on validation rows")
        self._log(values, validation.step)

    @rank_zero_only
    def show_games(self, result: PlayerResult, step: int, *, is_final: bool) -> None:
        """Log the best, median and worst game as an HTML replay and a video, and the confusion matrix of moves."""
        import wandb

        prefix = "final_games" if is_final else "games"
        games = best_median_worst(result.games, lambda game: (game.num_apples, game.num_steps, game.seed))
        values: dict[str, Any] = {f"{prefix}/moves": _confusion_matrix(_decisions(result.games), "Moves in games")}
        with tempfile.TemporaryDirectory() as directory:
            for which, game in games.items():
                path = Path(directory) / f"{which}.gif"
                path.write_bytes(render_gif(game.recording))
                values[f"{prefix}/{which}"] = wandb.Html(render_html(game.recording), inject=False)
                values[f"{prefix}/{which}_video"] = wandb.Video(str(path), format="gif")
            self._log(values, step)

    @rank_zero_only
    def show_outcome(self, outcome: RunOutcome) -> None:
        """Log the table of players, and the adapter as an artifact with the data as its input."""
        import wandb

        run, metadata = self.experiment, outcome.metadata
        if metadata["play"]:
            players = players_in(metadata["play"])
            rows = [[label.strip(), *cells] for label, cells in table_rows(list(players.values()))]
            self._log({"final_games/players": wandb.Table(columns=["", *players], data=rows)}, metadata["step"])
        if run.disabled:
            return
        data = wandb.Artifact(
            f"rows-{outcome.data_summary['data_hash'][:12]}", type="dataset", metadata=_to_json(outcome.data_summary)
        )
        for path in outcome.data_paths:
            data.add_reference(path.absolute().as_uri(), name=path.name)  # records the hash; uploads nothing
        adapter = wandb.Artifact(f"adapter-{run.id}", type="model", metadata=_to_json(metadata))
        # Artifact.add_dir prints to the terminal even if W&B is silenced.
        for path in sorted(outcome.adapter_dir.rglob("*")):
            if path.is_file():
                adapter.add_file(str(path), name=path.relative_to(outcome.adapter_dir).as_posix())
        try:
            declare_input_artifact(run, data)
            run.log_artifact(adapter, aliases=["latest", "best"])
            if not run.offline:
                data.wait(timeout=int(_FINISH_TIMEOUT_S))
                adapter.wait(timeout=int(_FINISH_TIMEOUT_S))
        except api_errors() as error:
            logger.warning("W&B: the adapter artifact was not uploaded: %s", one_line(error))

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        # Lightning counts steps from 0 when it logs metrics.
        self.experiment.log({**values, STEP: max(0, step - 1)})


def _run_id(directory: Path) -> str:
    """Return the W&B run id stored in the run directory; create one for a new run."""
    path = directory / "wandb" / "run_id"
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        path.write_text(secrets.token_hex(4), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def _sync_command(run: wandb.Run) -> str:
    # `wandb sync` skips runs that started online, because it assumes the server has them.
    option = "" if run.offline else "--include-online "
    return f"wandb sync {option}{shlex.quote(display_path(Path(run.dir).parent))}"


def _decisions(games: Sequence[PlayedGame]) -> list[list[int]]:
    """Count the moves of games: ``counts[teacher's move][player's move]``, with ``NO_MOVE`` in the last column."""
    counts = [[0] * (len(MOVES) + 1) for _ in MOVES]
    for game in games:
        for move, judgment in zip(game.moves, game.judgments, strict=True):
            column = len(MOVES) if move is None else MOVES.index(move.name)
            counts[MOVES.index(judgment.teacher_move.name)][column] += 1
    return counts


def _confusion_matrix(counts: Sequence[Sequence[int]], title: str) -> Any:
    """Return W&B's confusion matrix chart, made from counts instead of one entry per move."""
    import wandb

    names = [*MOVES, NO_MOVE]
    cells = [[actual, predicted, counts[i][j]] for i, actual in enumerate(MOVES) for j, predicted in enumerate(names)]
    return wandb.plot_table(
        vega_spec_name="wandb/confusion_matrix/v1",
        data_table=wandb.Table(columns=["Actual", "Predicted", "nPredictions"], data=cells),
        fields={"Actual": "Actual", "Predicted": "Predicted", "nPredictions": "nPredictions"},
        string_fields={"title": title},
    )


def _to_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """Convert tuples and NumPy numbers, which artifact metadata cannot hold, to JSON types."""
    return cast(dict[str, Any], json.loads(json.dumps(value, default=str)))


@contextlib.contextmanager
def _masked_arguments() -> Iterator[None]:
    """Mask keys and tokens in ``sys.argv`` while W&B records it. Launched processes need the original."""
    argv, sys.argv = sys.argv, mask_arguments(sys.argv)
    try:
        yield
    finally:
        sys.argv = argv
