"""Help of the training commands, cached because rendering it imports Lightning."""

from __future__ import annotations

from snake_lora_pl.cli.text_cache import cached_text


def help_text(command: str) -> str:
    """Return the help of a training command."""
    return cached_text(f"{command}-help", lambda: render_help(command))


def render_help(command: str) -> str:
    """Return the help of a training command as its parser prints it."""
    from snake_lora_pl.cli.commands.memory import training_parsers
    from snake_lora_pl.console import configure_logging

    configure_logging()
    return training_parsers()[command].format_help()
