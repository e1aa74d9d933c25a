"""``config.yaml`` of a run: whole or absent, so that a run that was killed can go on with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from lightning.pytorch.cli import SaveConfigCallback

from snake_lora_pl.durable import explain_failed_writes, open_durably
from snake_lora_pl.paths import RunPaths
from snake_lora_pl.secrets import redact_config

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from jsonargparse import ArgumentParser, Namespace


def config_text(parser: ArgumentParser, config: Namespace) -> str:
    """A config as YAML that serves every verb: without the checkpoint that a run went on from.

    Without keys and tokens, too: the logger that was given one takes it from its environment as well.
    """
    settings = config.clone()
    settings.pop("ckpt_path", None)
    text = parser.dump(settings, skip_unset=False)
    values = yaml.safe_load(text)
    public = redact_config(values)
    return text if public == values else yaml.safe_dump(public, sort_keys=False)


class ResolvedConfig(SaveConfigCallback):
    """Writes the run's config where its first logger writes, with the batch size that was found for ``auto``.

    Lightning's own callback writes in place: a resumed run that is killed at that moment has lost its settings.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write; the callback that finds the batch size has run."""
        if stage == "fit":
            self.config.data.batch_size = trainer.datamodule.batch_size  # type: ignore[attr-defined]
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write the file, and tell every logger; in the first process only."""
        assert trainer.logger is not None
        assert trainer.logger.log_dir is not None
        path = RunPaths(Path(trainer.logger.log_dir)).config_path
        text = config_text(self.parser, self.config)
        with explain_failed_writes(path, "the config"), open_durably(path, "w", encoding="utf-8") as file:
            file.write(text)
        for run_logger in trainer.loggers:
            run_logger.log_hyperparams(yaml.safe_load(text))
