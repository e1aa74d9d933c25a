"""Logging and warning filters for the command line."""

from __future__ import annotations

import contextlib
import logging
import shutil
import sys
import textwrap
import warnings
from collections.abc import Iterator

from typing_extensions import override

# Lowest level at which each library logs.
_LIBRARY_LEVELS = {
    "lightning.pytorch": logging.WARNING,
    "lightning.fabric": logging.WARNING,
    "transformers": logging.WARNING,
    "httpx": logging.WARNING,
    # Warns at import that a kernel package for 4-bit inference is missing, whether or not 4-bit is used.
    "bitsandbytes": logging.ERROR,
    # Warns about the dtype that `dequantize` was asked for.
    "transformers.integrations.bitsandbytes": logging.ERROR,
}


def wrap_for_terminal(text: str) -> str:
    """Break lines between words to the terminal's width if stderr is a terminal.

    A word longer than a line, such as a path, stays whole so that it can be copied.
    """
    if not sys.stderr.isatty():
        return text
    width = shutil.get_terminal_size().columns
    wrapper = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False)
    return "\n".join(line if len(line) <= width else wrapper.fill(line) for line in text.split("\n"))


class StderrHandler(logging.Handler):
    """Handler that looks up ``sys.stderr`` for each record, because a progress bar replaces it while it is drawn."""

    @override
    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(wrap_for_terminal(self.format(record)), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


def configure_logging(*, is_rank_zero: bool = True) -> None:
    """Log this package's messages and the libraries' warnings to stderr; for commands, not for Python callers.

    Args:
        is_rank_zero: Whether this process logs progress. Other ranks log warnings and errors only.
    """
    import transformers

    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[StderrHandler()])
    logging.getLogger("snake_lora_pl").setLevel(logging.INFO if is_rank_zero else logging.WARNING)
    _set_library_levels(_LIBRARY_LEVELS)
    transformers.utils.logging.disable_progress_bar()


@contextlib.contextmanager
def suppress_library_output() -> Iterator[None]:
    """Silence progress bars, known warnings and info messages of libraries, and restore the caller's settings."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled
    from transformers.utils import logging as transformers_logging

    levels = {name: logging.getLogger(name).level for name in _LIBRARY_LEVELS}
    # One switch controls the progress bars of both libraries.
    has_bars = transformers_logging.is_progress_bar_enabled() and not are_progress_bars_disabled()
    _set_library_levels(_LIBRARY_LEVELS)
    if has_bars:
        transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            ignore_known_warnings()
            yield
    finally:
        _set_library_levels(levels)
        if has_bars:
            transformers_logging.enable_progress_bar()


def ignore_known_warnings() -> None:
    """Filter library warnings that do not apply to this package."""
    for message in (
        ".*does not have many workers.*",  # memory-mapped rows need no workers
        ".*your dataloader is not resumable.*",  # the sampler seeks to the exact row
        ".*overridden `on_before_batch_transfer` in `LightningModule`.*",  # packing belongs to the model
        "Checkpoint directory .* exists and is not empty.*",  # of the run that is resumed
        ".*is_gradient_checkpointing.*",  # PEFT 0.21 uses a name that transformers 5.23 deprecates
        ".*LeafSpec.*",  # Lightning 2.6 uses a name that torch 2.13 deprecates
        ".*sync_dist=True.*",  # torchmetrics already reduces over ranks
        ".*functional.all_gather is deprecated.*",  # Lightning 2.6 uses a name that torch 2.13 deprecates
    ):
        warnings.filterwarnings("ignore", message=message)


def _set_library_levels(levels: dict[str, int]) -> None:
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
