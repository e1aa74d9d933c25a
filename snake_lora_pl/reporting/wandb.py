"""A run on Weights & Biases: metrics, sample rows, confusion of moves, games, adapter and where it came from."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import psutil
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from snake_lora_pl.errors import UserError, one_line
from snake_lora_pl.evaluation.dashboard import RunOutcome, require_package
from snake_lora_pl.evaluation.distributed import PlayerResult
from snake_lora_pl.evaluation.game_loop import PlayedGame
from snake_lora_pl.evaluation.validations import MOVES, NO_MOVE, Validation
from snake_lora_pl.game.replay import render_gif, render_html
from snake_lora_pl.paths import RunPaths, display_path
from snake_lora_pl.reporting.games_file import best_median_worst
from snake_lora_pl.reporting.table import players_in, table_rows
from snake_lora_pl.secrets import mask_arguments

if TYPE_CHECKING:
    import wandb

logger = logging.getLogger(__name__)

STEP = "trainer/global_step"
"""The axis of everything."""

# What a run's row in the table of runs shows of each metric; of all others the last value.
SUMMARIES = {
    "train/loss": "min",
    "val/loss": "min",
    "val/perplexity": "min",
    "val/token_accuracy": "max",
    "val/exact_match": "max",
    "val/decision_accuracy": "max",
    "val/move_accuracy": "max",
    "val/legal_move_rate": "max",
    "play/apples_mean": "max",
    "play/apples_median": "max",
    "play/win_rate": "max",
    "play/fatal_move_rate": "min",
    "play/unparseable_rate": "min",
    "play/teacher_agreement": "max",
    "perf/tokens_per_second": "mean",
    "perf/target_tokens_per_second": "mean",
    "perf/peak_memory_gib": "max",
}

# Where W&B notes its own process, for those that this one starts.
_SERVICE_ENV = "WANDB_SERVICE"
_CONNECT_S = 3.0
_INIT_S = 60.0
# How long a run that is over waits for what is not yet sent. Where W&B is about to send a table or an artifact as the
# server stops answering, its own tries for that come first.
_SEND_S = 300.0


class RunWandbLogger(WandbLogger):
    """Lightning's ``WandbLogger``, which shows what a ``Dashboard`` is given and never waits for a person.

    Without a key, or without a way to the server, the run is kept on disk, and the log says how to send it later. A run
    that goes on from a checkpoint goes on there, too.

    Args:
        project: Project on the server.
        entity: User or team; None takes the key's own.
        name: Name of the run; None makes one of preset, base model, kind of adapter and time.
        group: Runs to show together.
        tags: Tags.
        mode: ``auto`` is online where there are a key and a server to reach, else offline; ``WANDB_MODE`` goes before.
        save_dir: Directory that ``wandb/`` lies in; None takes the run's.

    Raises:
        UserError: If wandb is not installed, or the server refuses.
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
        super().__init__(project=project, name=name, save_dir=save_dir or "", entity=entity, group=group, tags=tags)
        self.mode = mode
        del self._wandb_init["anonymous"]  # wandb warns of it, whatever its value
        self._owns_service = False

    def attach(self, paths: RunPaths, name: str) -> None:
        """Take what a run knows of itself where nothing else was given."""
        self._save_dir = self._wandb_init["dir"] = str(self._save_dir or paths.run_dir)
        self._name = self._wandb_init["name"] = self._name or name

    @property
    @rank_zero_experiment
    def experiment(self) -> wandb.Run:
        """The run, begun at its first use."""
        if self._experiment is None:
            self._begin()
        return self._experiment

    def _begin(self) -> None:
        import wandb

        self._owns_service = _SERVICE_ENV not in os.environ
        directory = Path(str(self._save_dir or "."))
        directory.mkdir(parents=True, exist_ok=True)
        self._wandb_init |= {
            "dir": str(directory),
            "id": self._own_id(directory),
            # Its capture of the terminal would break the progress bar, and its own lines say nothing ours do not.
            "settings": wandb.Settings(console="off", silent=True, init_timeout=_INIT_S),
        }
        self._id = self._wandb_init["id"]
        try:
            with _arguments_as_shown():
                self._wandb_init["mode"] = self._chosen_mode()
                run = WandbLogger.experiment.fget(self)  # type: ignore[attr-defined]
            if not (run.offline or run.disabled):
                # Before its first table or artifact W&B checks the key once more, and raises where the server is gone
                # by then. From here on such a table is kept on disk, and sent when the server is back.
                run._public_api()
        except (wandb.Error, TimeoutError) as error:
            self.finish()
            raise UserError(
                f"W&B did not begin a run: {one_line(error)}. Mend the key (wandb login), or keep the run "
                "on disk with WANDB_MODE=offline."
            ) from error
        for name, summary in SUMMARIES.items():
            run.define_metric(name, step_metric=STEP, summary=summary)

    def _own_id(self, directory: Path) -> str:
        """The run's id, the same one when it goes on."""
        path = directory / "wandb" / "run_id"
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            path.write_text(secrets.token_hex(4), encoding="utf-8")
        return path.read_text(encoding="utf-8").strip()

    def _chosen_mode(self) -> str | None:
        import wandb

        if os.environ.get("WANDB_MODE"):
            return None  # wandb reads it
        if self.mode != "auto":
            return self.mode
        wandb.setup(wandb.Settings(silent=True))  # else login asks the server for the name that it greets
        if not wandb.login(prompt=False, verify=False):
            logger.info("W&B: no API key, so the run is kept on disk (wandb login stores a key).")
            return "offline"
        host = urlsplit(wandb.setup().settings.base_url)
        try:
            port = host.port or (443 if host.scheme == "https" else 80)
            socket.create_connection((str(host.hostname), port), timeout=_CONNECT_S).close()
        except OSError as error:
            logger.info("W&B: %s cannot be reached (%s), so the run is kept on disk.", host.hostname, error)
            return "offline"
        return "online"

    @property
    def location(self) -> str:
        """The run's address, or the command that sends it."""
        run = self._experiment
        if run is None:
            return "no run was begun"
        # Of a run without an address W&B warns that it has none.
        address = None if run.offline else run.url
        return str(address) if address else _sync_command(run)

    def finish(self) -> None:
        """End the run, so that another one can begin in this process; a server that is lost is not waited for long."""
        gave_up = threading.Event()
        if self._experiment is not None:
            patience = threading.Timer(_SEND_S, self._give_up, [gave_up])
            patience.daemon = True
            patience.start()
            try:
                self._experiment.finish()
            except Exception:  # W&B has no public name for what it raises where its own process is gone
                if not gave_up.is_set():
                    raise
                command = _sync_command(self._experiment)
                logger.warning("W&B: the server did not take all of the run in %.0f s. Send it: %s", _SEND_S, command)
            finally:
                patience.cancel()
            self._experiment = None
        if self._owns_service:
            # W&B's own process closes the run's file when it ends; until then the last records may be missing there.
            import wandb

            try:
                wandb.teardown()
            except ConnectionError:
                if not gave_up.is_set():
                    raise
            self._owns_service = False

    def _give_up(self, gave_up: threading.Event) -> None:
        """End W&B's process, which goes on trying for a quarter of an hour; by now all of the run is in its file.

        Its ``finish_timeout`` (0.31) does not interrupt a request that it repeats.
        """
        if self._owns_service:
            gave_up.set()
            for process in psutil.Process().children(recursive=True):
                if process.name().startswith("wandb-core"):
                    process.kill()

    # ------------------------------------------------------------------ what it shows

    @rank_zero_only
    def show_validation(self, validation: Validation) -> None:
        """The sample rows as a table, and the confusion of moves."""
        import wandb

        columns = [
            "source",
            "prompt",
            "teacher's words",
            "model's words",
            "right",
            "legal",
            "claims right",
            "claims wrong",
        ]
        rows = [
            [
                row.source,
                row.prompt,
                row.teacher,
                row.words,
                _said(row.is_right),
                _said(row.is_legal),
                sum(row.claims.values()),
                ", ".join(name for name, is_true in row.claims.items() if not is_true),
            ]
            for row in validation.rows
        ]
        shown_now: dict[str, Any] = {"val/sample_rows": wandb.Table(columns=columns, data=rows)}
        if validation.decisions is not None:
            shown_now["val/moves"] = _confusion(validation.decisions, "Moves on validation rows")
        self._log(shown_now, validation.step)

    @rank_zero_only
    def show_games(self, result: PlayerResult, step: int, *, is_final: bool) -> None:
        """The best, the median and the worst game as a page to step through and as a video, and their moves."""
        import wandb

        prefix = "final_games" if is_final else "games"
        three = best_median_worst(result.games, lambda game: (game.num_apples, game.num_steps, game.seed))
        shown_now: dict[str, Any] = {f"{prefix}/moves": _confusion(_decisions(result.games), "Moves in games")}
        with tempfile.TemporaryDirectory() as directory:
            for which, game in three.items():
                path = Path(directory) / f"{which}.gif"
                path.write_bytes(render_gif(game.recording))
                shown_now[f"{prefix}/{which}"] = wandb.Html(render_html(game.recording), inject=False)
                shown_now[f"{prefix}/{which}_video"] = wandb.Video(str(path), format="gif")
            self._log(shown_now, step)

    @rank_zero_only
    def show_outcome(self, outcome: RunOutcome) -> None:
        """The table of players, and the adapter as an artifact made from that of its rows."""
        import wandb
        from wandb.sdk.lib.service.service_connection import WandbApiFailedError

        run, metadata = self.experiment, outcome.metadata
        if metadata["play"]:
            players = players_in(metadata["play"])
            rows = [[label.strip(), *cells] for label, cells in table_rows(list(players.values()))]
            self._log({"final_games/players": wandb.Table(columns=["", *players], data=rows)}, metadata["step"])
        if run.disabled:
            return
        data = wandb.Artifact(
            f"rows-{outcome.data_summary['data_hash'][:12]}", type="dataset", metadata=_plain(outcome.data_summary)
        )
        for path in outcome.data_paths:
            data.add_reference(path.absolute().as_uri(), name=path.name)  # its hash is noted; it is not sent
        adapter = wandb.Artifact(f"adapter-{run.id}", type="model", metadata=_plain(metadata))
        # `add_dir` writes to the terminal, whatever the settings say.
        for path in sorted(outcome.adapter_dir.rglob("*")):
            if path.is_file():
                adapter.add_file(str(path), name=path.relative_to(outcome.adapter_dir).as_posix())
        try:
            # What `use_artifact` does, which refuses offline.
            run._log_artifact(data, is_user_created=True, use_after_commit=True)
            run.log_artifact(adapter, aliases=["latest", "best"])
            if not run.offline:
                data.wait(timeout=_SEND_S)
                adapter.wait(timeout=_SEND_S)
        except (wandb.Error, WandbApiFailedError, ValueError) as error:
            logger.warning("W&B: the adapter did not arrive as an artifact of its rows: %s", one_line(error))

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        # Lightning counts the steps of its metrics from 0.
        self.experiment.log({**values, STEP: max(0, step - 1)})


def _sync_command(run: wandb.Run) -> str:
    # Of a run that began online W&B thinks that the server has it.
    option = "" if run.offline else "--include-online "
    return f"wandb sync {option}{display_path(Path(run.dir).parent)}"


def _said(value: bool | None) -> str:
    return "unknown" if value is None else "yes" if value else "no"


def _decisions(games: Sequence[PlayedGame]) -> list[list[int]]:
    counts = [[0] * (len(MOVES) + 1) for _ in MOVES]
    for game in games:
        for move, judgment in zip(game.moves, game.judgments, strict=True):
            said = len(MOVES) if move is None else MOVES.index(move.name)
            counts[MOVES.index(judgment.teacher_move.name)][said] += 1
    return counts


def _confusion(counts: Sequence[Sequence[int]], title: str) -> Any:
    """W&B's own chart of a confusion matrix, from counts instead of one entry a move."""
    import wandb

    names = [*MOVES, NO_MOVE]
    cells = [[actual, said, counts[i][j]] for i, actual in enumerate(MOVES) for j, said in enumerate(names)]
    return wandb.plot_table(
        vega_spec_name="wandb/confusion_matrix/v1",
        data_table=wandb.Table(columns=["Actual", "Predicted", "nPredictions"], data=cells),
        fields={"Actual": "Actual", "Predicted": "Predicted", "nPredictions": "nPredictions"},
        string_fields={"title": title},
    )


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON has it: tuples and numbers of NumPy are none of an artifact's metadata."""
    import json

    return json.loads(json.dumps(value, default=str))


@contextlib.contextmanager
def _arguments_as_shown() -> Iterator[None]:
    """The command line without keys and tokens while W&B notes it; started processes need it whole."""
    argv, sys.argv = sys.argv, mask_arguments(sys.argv)
    try:
        yield
    finally:
        sys.argv = argv
