"""Callback that shows completions of the same validation rows at each validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import lightning.pytorch as pl
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

from snake_lora_pl.errors import UserError
from snake_lora_pl.evaluation.dashboard import dashboards
from snake_lora_pl.evaluation.language_model import in_eval_mode
from snake_lora_pl.evaluation.metrics import SnakeMoveMetrics
from snake_lora_pl.evaluation.player_factory import PlayData
from snake_lora_pl.evaluation.validations import JudgedRow, Validation


class CompletingModule(Protocol):
    """LightningModule that completes prompts."""

    text_metrics: Any

    def check_prompts(self, prompts: Mapping[str, Sequence[int]]) -> None:
        """Raise a UserError if the model cannot complete one of the prompts, given as token ids by source."""

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """Return the completions of a batch of prompts."""


class SampleRows(pl.Callback):
    """Completes a few validation prompts at each validation and passes the result to every ``Dashboard``.

    Unlike the metrics of the validation, which use teacher forcing, the completions are decoded freely. The weights and
    the random numbers of training do not change.

    Args:
        num_rows: Number of rows; with 0, dashboards get the confusion matrix only.

    Raises:
        UserError: If the number is negative.
    """

    def __init__(self, num_rows: int = 8) -> None:
        if num_rows < 0:
            raise UserError(f"num_sample_rows must be at least 0 (found: {num_rows}).")
        self.num_rows = num_rows
        self._rows: list[Any] | None = None

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Before training, because an error during the first validation would lose the steps before it.
        if not trainer.fast_dev_run and (batch := self._prompts(trainer)):  # type: ignore[attr-defined]
            prompts = dict(zip(batch["sources"], batch["input_ids"], strict=True))
            cast(CompletingModule, pl_module).check_prompts(prompts)

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # This hook runs before the module resets its metrics.
        if trainer.state.fn != "fit" or trainer.sanity_checking or bool(trainer.fast_dev_run):  # type: ignore[attr-defined]
            return
        module = cast(CompletingModule, pl_module)
        validation = Validation(
            trainer.global_step,
            trainer.current_epoch,
            self._complete(trainer, pl_module, module),
            _confusion_matrix(module.text_metrics),
        )
        for dashboard in dashboards(trainer):
            dashboard.show_validation(validation)

    def _complete(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, module: CompletingModule
    ) -> list[JudgedRow]:
        """Complete the rows, on every rank: if the ranks hold shards of one model, a forward pass needs all of them."""
        batch = self._prompts(trainer)
        if not batch or self._rows is None:
            return []
        with in_eval_mode(pl_module), isolate_rng():
            answers = module.predict_step(batch, 0)
        return [
            JudgedRow.of(row.source, row.prompt, row.completion, answer["completion"])
            for row, answer in zip(self._rows, answers, strict=True)
        ]

    def _prompts(self, trainer: pl.Trainer) -> dict[str, Any]:
        """Return the prompts as a batch; an empty dict without rows."""
        data: PlayData = trainer.datamodule  # type: ignore[attr-defined]
        if self._rows is None:
            self._rows = data.sample_rows(self.num_rows) if self.num_rows else []
        if not self._rows:
            return {}
        prompts = [row.prompt for row in self._rows]
        return {
            "input_ids": data.encoder.encode_prompts(prompts),
            "prompts": prompts,
            "sources": [row.source for row in self._rows],
        }


def _confusion_matrix(metrics: Any) -> list[list[int]] | None:
    """Return the confusion matrix of all ranks; None without move metrics."""
    if not isinstance(metrics, SnakeMoveMetrics):
        return None
    with metrics.sync_context():
        confusion_matrix: list[list[int]] = metrics.decisions.tolist()
        return confusion_matrix
