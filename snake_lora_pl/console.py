"""Who may speak on the terminal: this package, and a library only where something is wrong."""

from __future__ import annotations

import logging
import sys


def quiet_libraries() -> None:
    """Let this package speak and the libraries only where something is wrong; for commands, not for Python callers."""
    import transformers

    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("snake_lora_pl").setLevel(logging.INFO)
    for name in ("lightning.pytorch", "lightning.fabric", "transformers", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # It warns at import that a kernel package for 4-bit inference is not installed, whether or not 4-bit is used.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
