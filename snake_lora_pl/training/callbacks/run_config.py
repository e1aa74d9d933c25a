"""Callback that writes ``config.yaml`` of a run atomically, so that a killed run can be resumed from it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from lightning.pytorch.cli import SaveConfigCallback
from typing_extensions import override

from snake_lora_pl.durable import explain_failed_writes, open_durably
from snake_lora_pl.errors import UserError, one_line
from snake_lora_pl.paths import RunPaths
from snake_lora_pl.secrets import redact_config

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from jsonargparse import ArgumentParser, Namespace


def config_text(parser: ArgumentParser, config: Namespace) -> str:
    """Return a config as YAML that every command accepts: without ``ckpt_path``, and without API keys and tokens.

    Raises:
        UserError: If a value, such as an argument of a callback, cannot be written as YAML.
    """
    settings = config.clone()
    settings.pop("ckpt_path", None)
    try:
        text: str = parser.dump(settings, skip_unset=False)
    except (ValueError, yaml.YAMLError) as error:
        found = re.search(r"cannot represent an object\W+([\w.]+)", str(error))
        raise UserError(
            f"the config of the run cannot be written: {found[1] if found else one_line(error)} is not a value of "
            "YAML. Remove the callback or logger that has this argument, or set the argument to text or a number."
        ) from error
    values = yaml.safe_load(text)
    public = redact_config(values)
    return text if public == values else yaml.safe_dump(public, sort_keys=False)


class ResolvedConfig(SaveConfigCallback):
    """Writes the config to the directory of the first logger, with the values that the run chose.

    Lightning's callback does not write atomically: a kill during the write would lose the settings of the run.
    """

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            data = trainer.datamodule  # type: ignore[attr-defined]
            self.config.data.batch_size = data.batch_size
            self.config.data.template_date = data.encoder.template_date
        super().setup(trainer, pl_module, stage)

    @override
    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write the file, and log the config to every logger. Called on rank 0 only."""
        log_dir = trainer.logger.log_dir if trainer.logger is not None else None
        if log_dir is None:
            raise RuntimeError("ResolvedConfig needs a logger with a directory.")
        path = RunPaths(Path(log_dir)).config_path
        text = config_text(self.parser, self.config)
        with explain_failed_writes(path, "the config"), open_durably(path, "w", encoding="utf-8") as file:
            file.write(text)
        for run_logger in trainer.loggers:
            run_logger.log_hyperparams(yaml.safe_load(text))
