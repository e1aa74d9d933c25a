"""SampleRows: a few validation rows, the same ones each time, in the model's own words."""

from __future__ import annotations

from typing import Any, Protocol, cast

import lightning.pytorch as pl
from lightning.pytorch.utilities.seed import isolate_rng

from snake_lora_pl.errors import UserError
from snake_lora_pl.evaluation.dashboard import dashboards
from snake_lora_pl.evaluation.language_model import in_eval_mode
from snake_lora_pl.evaluation.metrics import SnakeMoveMetrics
from snake_lora_pl.evaluation.player_factory import PlayData
from snake_lora_pl.evaluation.validations import JudgedRow, Validation


class CompletingModule(Protocol):
    """What of a LightningModule sample rows need."""

    text_metrics: Any

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """Completions of a batch of prompts."""


class SampleRows(pl.Callback):
    """At each validation, lets the model complete some prompts and hands what came out to every ``Dashboard``.

    The model writes freely: unlike the metrics of the validation, it sees nothing of the teacher's words. Neither
    weights nor the random numbers of training change.

    Args:
        num_rows: How many rows; 0 hands out the confusion of moves alone.

    Raises:
        UserError: If the number is negative.
    """

    def __init__(self, num_rows: int = 8) -> None:
        if num_rows < 0:
            raise UserError(f"num_sample_rows must be at least 0 (found: {num_rows}).")
        self.num_rows = num_rows
        self._rows: list[Any] | None = None

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show, before the module clears what it counted."""
        if trainer.state.fn != "fit" or trainer.sanity_checking or bool(trainer.fast_dev_run):  # type: ignore[attr-defined]
            return
        module = cast(CompletingModule, pl_module)
        validation = Validation(
            trainer.global_step,
            trainer.current_epoch,
            self._complete(trainer, pl_module, module),
            _decisions(module.text_metrics),
        )
        for dashboard in dashboards(trainer):
            dashboard.show_validation(validation)

    def _complete(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, module: CompletingModule
    ) -> list[JudgedRow]:
        """The rows completed. Every process does it: where they share one model in slices, all are needed."""
        data: PlayData = trainer.datamodule  # type: ignore[attr-defined]
        if self._rows is None:
            self._rows = data.sample_rows(self.num_rows) if self.num_rows else []
        if not self._rows:
            return []
        prompts = [row.prompt for row in self._rows]
        batch = {
            "input_ids": data.encoder.encode_prompts(prompts),
            "prompts": prompts,
            "sources": [row.source for row in self._rows],
        }
        with in_eval_mode(pl_module), isolate_rng():
            answers = module.predict_step(batch, 0)
        return [
            JudgedRow.of(row.source, row.prompt, row.completion, answer["completion"])
            for row, answer in zip(self._rows, answers, strict=True)
        ]


def _decisions(metrics: Any) -> list[list[int]] | None:
    """What all processes counted."""
    if not isinstance(metrics, SnakeMoveMetrics):
        return None
    with metrics.sync_context():
        return metrics.decisions.tolist()
