"""A trained module as a player. What it needs of the module and of the data is said here; neither room is imported."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import lightning.pytorch as pl

from snake_lora_pl.evaluation.language_model import LanguageModelPolicy
from snake_lora_pl.evaluation.settings import PlaySettings
from snake_lora_pl.game import STYLES, Style


class TrainedModule(Protocol):
    """What of a LightningModule playing needs."""

    model: Any
    tokenizer: Any
    max_new_tokens: int
    full_precision_base: bool

    @property
    def peft_model(self) -> Any:
        """The model with its adapter."""

    def configure_model(self) -> None:
        """Load it, once."""

    def compute_context(self) -> AbstractContextManager[None]:
        """The context that it computes in."""


class PromptEncoder(Protocol):
    """What of an encoder playing needs."""

    def encode_prompts(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of prompts, as in training."""


class PlayData(Protocol):
    """What of a DataModule playing needs."""

    trainer: Any
    template: Any

    @property
    def encoder(self) -> PromptEncoder:
        """What turns prompts into ids."""

    def encoder_of(self, template: Any) -> PromptEncoder:
        """What turns prompts into ids in another template."""

    @property
    def prompt_format(self) -> str:
        """Name of the style of the rows, or another word where it is not known."""

    @property
    def resolved_grid_size(self) -> int:
        """Cells along one side of the grid in the rows."""

    def prepare_data(self) -> None:
        """Fetch what has to be fetched, in one process."""

    def sample_rows(self, num_rows: int) -> list[Any]:
        """A few validation rows: ``prompt``, ``completion`` and ``source``, the same ones every time."""


def find_style(settings: PlaySettings, data: PlayData) -> Style | None:
    """The style that prompts are to be written in; None where the rows are of no known one."""
    return STYLES.get(settings.style or data.prompt_format)


def make_player(
    module: TrainedModule, encoder: PromptEncoder, style: Style, reading: str, name: str, *, legal_mask: bool = False
) -> LanguageModelPolicy:
    """A module's model, as it now is, as a player."""
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


@contextmanager
def shown_progress(trainer: pl.Trainer, player: str) -> Iterator[Callable[[int, int], None] | None]:
    """What takes the number of games over and of all, and shows it where the trainer's progress bar can."""
    open_stage = getattr(trainer.progress_bar_callback, "stage", None)
    if open_stage is None:
        yield None
        return
    with open_stage("play") as show:
        yield lambda num_over, num_games: show(num_over / num_games, f"{player}: {num_over} of {num_games} games over")
