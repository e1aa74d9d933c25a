"""PlayEvaluation: a model in training is judged by the games it plays."""

from __future__ import annotations

import logging
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng

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
    """Plays seeded games while a model is fitted and logs the figures as ``play/*``.

    It plays at the first validation after every ``every_n_epochs`` epochs, at the last validation, and once more at the
    end where training stopped after that. A run without validation plays at the ends of epochs. Playing changes neither
    the weights nor any random number that training draws.

    At validations without games no ``play/*`` metric is there, for the last ones were those of other weights.
    ``AdapterCheckpoint`` then waits for the next games; ``EarlyStopping`` on such a metric needs ``strict: false``.

    Args:
        settings: How games are played; ``val_games`` of them.

    Raises:
        UserError: If there is no game to play.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> Trainer(callbacks=[PlayEvaluation(PlaySettings(val_games=16))])  # doctest: +SKIP
    """

    def __init__(self, settings: PlaySettings) -> None:
        if settings.val_games < 1:
            raise UserError("play.val_games must be at least 1 for games to be played while fitting.")
        self.settings = settings
        self._seeds = play_seeds(settings.val_games, settings.seed)
        self._style: Style | None = None
        self._num_turns = 0
        self._last_step = -1

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find out how the prompts of these rows are written."""
        if stage != "fit":
            return
        self._style = find_style(self.settings, _data(trainer))
        if self._style is None:
            logger.warning(
                "no games will be played while fitting: the prompts of the training rows are of no known style. Set "
                "play.style, or play.val_games=0."
            )

    def waits_for(self, metric: str) -> bool:
        """Whether a metric that is not there now will come with the next games."""
        return self._style is not None and metric.startswith(_PREFIX)

    def state_dict(self) -> dict[str, Any]:
        """Which turns have been taken, so that a resumed run plays the next one."""
        return {"num_turns": self._num_turns, "last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._num_turns, self._last_step = state_dict["num_turns"], state_dict["last_step"]

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Play where it is time to, before checkpoints are judged."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._take_turn(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Play where it is time to and no validation does."""
        if not trainer.enable_validation or sum(trainer.num_val_batches) == 0:
            self._take_turn(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Play with the last weights, unless they have played."""
        if self._style is None or self._last_step == trainer.global_step or _is_rehearsal(trainer):
            return
        values = self._play(trainer, pl_module, self._style)
        # Lightning takes no more metrics at this point; the loggers do.
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
        for run_logger in trainer.loggers:
            run_logger.log_metrics(values, step=trainer.fit_loop.epoch_loop._batches_that_stepped - 1)
            run_logger.save()

    def _take_turn(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        num_turns = self._count_turns(trainer)
        is_due = num_turns > self._num_turns or _is_last(trainer)
        self._num_turns = num_turns
        if self._style is not None and is_due and not _is_rehearsal(trainer):
            pl_module.log_dict(self._play(trainer, pl_module, self._style), batch_size=1)
            return
        for name in [name for name in trainer.callback_metrics if name.startswith(_PREFIX)]:
            del trainer.callback_metrics[name]

    def _count_turns(self, trainer: pl.Trainer) -> int:
        """Times ``every_n_epochs`` epochs that training has behind it, whatever part of an epoch lies between."""
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
        figures = result.statistics()
        if trainer.is_global_zero:
            logger.info(
                "step %d: %d games, %.1f apples (95%%: %.1f to %.1f), fatal moves %.2f%%, unreadable answers %.2f%%",
                trainer.global_step,
                len(self._seeds),
                *(figures[name] for name in ("apples_mean", "apples_low", "apples_high")),
                *(100 * figures[name] for name in ("fatal_move_rate", "unparseable_rate")),
            )
        return {
            f"{_PREFIX}{name}": float(value)
            for name, value in figures.items()
            if not name.startswith(("ends/", "num_"))
        }


def _data(trainer: pl.Trainer) -> PlayData:
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    if data is None:
        raise UserError("PlayEvaluation needs a data module that says how prompts are written and encoded.")
    return data


def _is_last(trainer: pl.Trainer) -> bool:
    """Whether training is about to end, as far as can be known before the validation is over."""
    is_last_batch = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
    ends_epochs = is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
    return trainer.should_stop or ends_epochs or trainer.global_step == trainer.max_steps


def _is_rehearsal(trainer: pl.Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
