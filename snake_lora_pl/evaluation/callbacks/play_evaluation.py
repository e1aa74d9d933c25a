"""Callback that evaluates a model in training by playing games."""

from __future__ import annotations

import logging
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

from snake_lora_pl.errors import UserError
from snake_lora_pl.evaluation.dashboard import dashboards
from snake_lora_pl.evaluation.distributed import Ranks, play_shared
from snake_lora_pl.evaluation.language_model import in_eval_mode
from snake_lora_pl.evaluation.player_factory import PlayData, TrainedModule, find_style, make_player, shown_progress
from snake_lora_pl.evaluation.settings import PlaySettings
from snake_lora_pl.game import Style
from snake_lora_pl.game.seeds import play_seeds

logger = logging.getLogger(__name__)

_PREFIX = "play/"


class PlayEvaluation(pl.Callback):
    """Plays seeded games during training and logs their statistics as ``play/*``.

    It plays at the first validation after every ``every_n_epochs`` epochs, at the last validation, and at the end of
    training if the weights changed since. Without validation it plays at the end of epochs. Playing does not change the
    weights or the random numbers of training.

    Validations without games have no ``play/*`` metrics, because the previous ones belong to other weights.
    ``AdapterCheckpoint`` then waits for the next games; ``EarlyStopping`` on such a metric needs ``strict: false``.

    Args:
        settings: Settings of the games, ``val_games`` of them.

    Raises:
        UserError: If ``val_games`` is 0.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> Trainer(callbacks=[PlayEvaluation(PlaySettings(val_games=16))])  # doctest: +SKIP
    """

    def __init__(self, settings: PlaySettings) -> None:
        if settings.val_games < 1:
            raise UserError(f"play.val_games must be at least 1 to play during training (found: {settings.val_games}).")
        self.settings = settings
        self._seeds = play_seeds(settings.val_games, settings.seed)
        self._style: Style | None = None
        self._num_periods = 0
        self._last_step = -1

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        style = find_style(self.settings, _data(trainer))
        # A dry run does not play.
        self._style = None if trainer.fast_dev_run else style  # type: ignore[attr-defined]
        if style is None:
            logger.warning(
                "no games during training, because the style of the training prompts is unknown. Set play.style, or "
                "play.val_games=0."
            )

    def waits_for(self, metric: str) -> bool:
        """Return whether a metric that is missing now is logged with the next games."""
        return self._style is not None and metric.startswith(_PREFIX)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"num_turns": self._num_periods, "last_step": self._last_step}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._num_periods, self._last_step = state_dict["num_turns"], state_dict["last_step"]

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # This hook runs before checkpoints compare metrics.
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._play_if_due(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.enable_validation or sum(trainer.num_val_batches) == 0:
            self._play_if_due(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._style is None or self._last_step == trainer.global_step:
            return
        values = self._play(trainer, pl_module, self._style)
        # LightningModule.log is not available in this hook.
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
        for run_logger in trainer.loggers:
            run_logger.log_metrics(values, step=trainer.global_step - 1)
            run_logger.save()

    def _play_if_due(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        num_periods = self._count_periods(trainer)
        is_due = num_periods > self._num_periods or _is_last(trainer)
        self._num_periods = num_periods
        if self._style is not None and is_due:
            values = self._play(trainer, pl_module, self._style)
            # As CPU tensors: the progress bar reads them at each step.
            pl_module.log_dict({name: torch.tensor(value) for name, value in values.items()}, batch_size=1)
            return
        for name in [name for name in trainer.callback_metrics if name.startswith(_PREFIX)]:
            del trainer.callback_metrics[name]

    def _count_periods(self, trainer: pl.Trainer) -> int:
        """Return the number of complete periods of ``every_n_epochs`` epochs, by batches if the epoch has a length."""
        progress, num_batches = trainer.fit_loop.epoch_loop.batch_progress, trainer.num_training_batches
        if num_batches == float("inf"):
            return (trainer.current_epoch + progress.is_last_batch) // self.settings.every_n_epochs
        return int(progress.total.completed // (num_batches * self.settings.every_n_epochs))

    def _play(self, trainer: pl.Trainer, pl_module: pl.LightningModule, style: Style) -> dict[str, float]:
        module, data = cast(TrainedModule, pl_module), _data(trainer)
        loop = self.settings.loop(self.settings.grid_size or data.resolved_grid_size)
        with in_eval_mode(pl_module), isolate_rng():
            policy = make_player(module, data.encoder, style, self.settings.reading, "model")
            with shown_progress(trainer, policy.name) as progress:
                result = play_shared(policy, self._seeds, Ranks.of(trainer), **loop, progress=progress)
        self._last_step = trainer.global_step
        for dashboard in dashboards(trainer):
            dashboard.show_games(result, trainer.global_step, is_final=False)
        statistics = result.statistics()
        if trainer.is_global_zero:
            logger.info(
                "step %d: %d games, %.1f apples (95%% interval %.1f to %.1f), fatal moves %.2f%%, unreadable answers "
                "%.2f%%",
                trainer.global_step,
                len(self._seeds),
                *(statistics[name] for name in ("apples_mean", "apples_low", "apples_high")),
                *(100 * statistics[name] for name in ("fatal_move_rate", "unparseable_rate")),
            )
        return {
            f"{_PREFIX}{name}": float(value)
            for name, value in statistics.items()
            if not name.startswith(("ends/", "num_"))
        }


def _data(trainer: pl.Trainer) -> PlayData:
    data: PlayData | None = trainer.datamodule  # type: ignore[attr-defined]
    if data is None:
        raise UserError("PlayEvaluation needs a data module with the prompt format. Pass one to the trainer.")
    return data


def _is_last(trainer: pl.Trainer) -> bool:
    """Return whether training ends after this validation, as far as is known before the validation ends."""
    is_last_batch = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
    is_last_epoch = is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
    return trainer.should_stop or is_last_epoch or trainer.global_step == trainer.max_steps
