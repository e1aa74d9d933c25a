"""``push``: an adapter to the Hugging Face hub."""

from __future__ import annotations

import sys

from snake_lora_pl.cli.commands.parser import Parser, add_adapter_argument


def run(arguments: list[str]) -> int:
    """Send an adapter.

    Returns:
        The exit code.

    Raises:
        UserError: If the adapter is damaged, or the hub refuses or cannot be reached.
    """
    options = build_parser().parse(arguments)
    from huggingface_hub.utils import disable_progress_bars

    from snake_lora_pl.adapters.publish import push

    if not sys.stderr.isatty():
        disable_progress_bars()
    published = push(options.adapter, options.repo, private=options.private)
    print(f"{options.adapter} is at {published.url}")
    return 0


def build_parser() -> Parser:
    """The arguments of this verb."""
    parser = Parser("push", epilog="The token is the one of `hf auth login`, or HF_TOKEN; it is never printed.")
    add_adapter_argument(parser)
    parser.add_argument(
        "--repo", required=True, metavar="OWNER/NAME", help="model repository; created if there is none"
    )
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    return parser
