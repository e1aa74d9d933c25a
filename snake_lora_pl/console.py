"""Who may speak on the terminal: this package, and a library only where something is wrong."""

from __future__ import annotations

import contextlib
import logging
import shutil
import sys
import textwrap
import warnings
from collections.abc import Iterator

# From which level on a library is heard.
_LEVELS = {
    "lightning.pytorch": logging.WARNING,
    "lightning.fabric": logging.WARNING,
    "transformers": logging.WARNING,
    "httpx": logging.WARNING,
    # It warns at import that a kernel package for 4-bit inference is not installed, whether or not 4-bit is used.
    "bitsandbytes": logging.ERROR,
    # Of the type that `dequantize` was asked for.
    "transformers.integrations.bitsandbytes": logging.ERROR,
}


def wrap_for_terminal(text: str) -> str:
    """A text for stderr: in a terminal broken between words, elsewhere as it is.

    A word that is longer than a line, a path say, stays whole for the terminal to break, so that it can be copied.
    """
    if not sys.stderr.isatty():
        return text
    width = shutil.get_terminal_size().columns
    wrapper = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False)
    return "\n".join(line if len(line) <= width else wrapper.fill(line) for line in text.split("\n"))


class StderrHandler(logging.Handler):
    """Writes to what stderr is at the time: while a progress bar is drawn, to what puts lines above it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message."""
        try:
            print(wrap_for_terminal(self.format(record)), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


def configure_logging(*, is_rank_zero: bool = True) -> None:
    """Let this package speak and the libraries only where something is wrong; for commands, not for Python callers.

    Args:
        is_rank_zero: Of the further processes of a run one hears only where something is wrong: what goes on the
            first one has said.
    """
    import transformers

    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[StderrHandler()])
    logging.getLogger("snake_lora_pl").setLevel(logging.INFO if is_rank_zero else logging.WARNING)
    for name, level in _LEVELS.items():
        logging.getLogger(name).setLevel(level)
    transformers.utils.logging.disable_progress_bar()


@contextlib.contextmanager
def suppress_library_output() -> Iterator[None]:
    """Let libraries speak only where something is wrong, and leave logging and warnings as the caller had them."""
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging as transformers_logging

    levels = {name: logging.getLogger(name).level for name in _LEVELS}
    # One switch turns both off, and both on again.
    has_bars = transformers_logging.is_progress_bar_enabled() and not are_progress_bars_disabled()
    for name, level in _LEVELS.items():
        logging.getLogger(name).setLevel(level)
    if has_bars:
        transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            ignore_known_warnings()
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if has_bars:
            transformers_logging.enable_progress_bar()


def ignore_known_warnings() -> None:
    """Silence what libraries warn of though all is as it should be."""
    for message in (
        ".*does not have many workers.*",  # memory-mapped rows need none; Lightning cannot know
        ".*your dataloader is not resumable.*",  # the sampler seeks to the exact row; Lightning cannot know
        ".*overridden `on_before_batch_transfer` in `LightningModule`.*",  # packing is the model's affair
        "Checkpoint directory .* exists and is not empty.*",  # that of the run that is gone on with
        ".*is_gradient_checkpointing.*",  # PEFT 0.21 asks transformers 5.23 by the old name
        ".*LeafSpec.*",  # Lightning 2.6 asks torch 2.13 by the old name
        ".*sync_dist=True.*",  # torchmetrics has summed over the processes; Lightning cannot know
        ".*functional.all_gather is deprecated.*",  # again Lightning 2.6 and torch 2.13
    ):
        warnings.filterwarnings("ignore", message=message)
