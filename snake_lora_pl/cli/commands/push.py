"""``push``: upload of an adapter to the Hugging Face Hub."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from snake_lora_pl.cli.commands.light_parser import CommandParser, add_adapter_argument


def run(arguments: Sequence[str]) -> int:
    """Upload an adapter.

    Returns:
        The exit code.

    Raises:
        UserError: If the adapter is damaged, or the Hub refuses it or cannot be reached.
    """
    options = build_parser().parse(arguments)
    from huggingface_hub.utils.tqdm import disable_progress_bars

    from snake_lora_pl.adapters.publish import push

    if not sys.stderr.isatty():
        disable_progress_bars()
    published = push(options.adapter, options.repo, private=options.private)
    print(f"{options.adapter} uploaded to {published.url}")
    return 0


def build_parser() -> CommandParser:
    """Return the parser of this command."""
    parser = CommandParser("push", epilog="Uses the token of `hf auth login` or HF_TOKEN, and never prints it.")
    add_adapter_argument(parser)
    parser.add_argument(
        "--repo", required=True, metavar="OWNER/NAME", help="model repository; created if it does not exist"
    )
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    return parser
