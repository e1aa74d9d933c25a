"""Creates players from trained modules; protocols state what a module and a data module must provide for that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, cast

import lightning.pytorch as pl
from typing_extensions import override

from snake_lora_pl.evaluation.language_model import LanguageModelPolicy
from snake_lora_pl.evaluation.settings import PlaySettings
from snake_lora_pl.game import STYLES, Style


class TrainedModule(Protocol):
    """LightningModule whose model can play."""

    model: Any
    tokenizer: Any
    max_new_tokens: int
    full_precision_base: bool

    @property
    def peft_model(self) -> Any:
        """Model with its adapter."""

    def configure_model(self) -> None:
        """Load the model, once."""

    def compute_context(self) -> AbstractContextManager[None]:
        """Return the context for forward passes, such as autocast."""


class PromptEncoder(Protocol):
    """Encoder of prompts."""

    def encode_prompts(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of prompts, encoded as in training."""


class PlayData(Protocol):
    """DataModule that provides the prompt format."""

    trainer: Any
    template: Any

    @property
    def encoder(self) -> PromptEncoder:
        """Encoder with the template of the rows."""

    def encoder_of(self, template: Any, template_date: str | None = None) -> PromptEncoder:
        """Return an encoder with another template and the date that it renders."""

    @property
    def prompt_format(self) -> str:
        """Name of the style of the rows, or another word if the style is unknown."""

    @property
    def resolved_grid_size(self) -> int:
        """Cells along one side of the board in the rows."""

    def prepare_data(self) -> None:
        """Download files, in one process."""

    def sample_rows(self, num_rows: int) -> list[Any]:
        """Return validation rows (``prompt``, ``completion``, ``source``), the same ones every time."""


def find_style(settings: PlaySettings, data: PlayData) -> Style | None:
    """Return the style for prompts, from the settings or the rows; None if the style of the rows is unknown."""
    return STYLES.get(settings.style or data.prompt_format)


def make_player(
    module: TrainedModule, encoder: PromptEncoder, style: Style, reading: str, name: str, *, legal_mask: bool = False
) -> LanguageModelPolicy:
    """Return the model of a module, with its current weights, as a player."""
    return LanguageModelPolicy(
        module.peft_model,
        module.tokenizer,
        encoder.encode_prompts,
        style,
        name=name,
        reading=reading,
        legal_mask=legal_mask,
        max_new_tokens=module.max_new_tokens,
        compute_context=module.compute_context,
    )


class GamePromptCheck(pl.Callback):
    """Checks before training that the model can read the prompts of the games that follow.

    Args:
        settings: Settings of the games.
    """

    def __init__(self, settings: PlaySettings) -> None:
        self.settings = settings

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the first prompts.

        Raises:
            UserError: If the model cannot read or complete them.
        """
        data: PlayData = trainer.datamodule  # type: ignore[attr-defined]
        style = find_style(self.settings, data)
        if style is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        player = make_player(cast(TrainedModule, pl_module), data.encoder, style, self.settings.reading, "adapter")
        player.check_prompts(self.settings.grid_size or data.resolved_grid_size)


@contextmanager
def shown_progress(trainer: pl.Trainer, player: str) -> Iterator[Callable[[int, int], None] | None]:
    """Yield the ``progress`` argument of ``play_games`` for the trainer's progress bar; None if it has no stages."""
    open_stage = getattr(trainer.progress_bar_callback, "stage", None)
    if open_stage is None:
        yield None
        return
    with open_stage("play") as show:
        yield lambda num_over, num_games: show(num_over / num_games, f"{player}: {num_over} of {num_games} games over")
