"""``audit``: statistics and problems of a data set."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import get_args

from snake_lora_pl.cli.commands.light_parser import CommandParser
from snake_lora_pl.constants import DEFAULT_BASE_MODEL
from snake_lora_pl.data.audit_checks import audit_rows
from snake_lora_pl.data.audit_text import format_audit
from snake_lora_pl.data.encoding import Encoder, TemplateName, check_choice
from snake_lora_pl.errors import UserError
from snake_lora_pl.paths import base_model_cache_dir
from snake_lora_pl.program import PROG


def run(arguments: Sequence[str]) -> int:
    """Audit a data set.

    Returns:
        The exit code.

    Raises:
        UserError: If an argument is invalid or a file cannot be read.
    """
    if "--memory" in arguments:
        raise UserError(f"audit has no --memory. Use: {PROG} memory --config balanced.yaml --data.train_path F.jsonl")
    options = build_parser().parse(arguments)
    check_choice("--template", options.template, TemplateName)
    audit = audit_rows(options.files, _encoder(options.base_model, options.template, options.max_length))
    print(json.dumps(asdict(audit), indent=2) if options.json else format_audit(audit))
    return 0


def build_parser() -> CommandParser:
    """Return the parser of this command."""
    parser = CommandParser("audit")
    parser.add_argument("files", nargs="+", metavar="F.jsonl", help="files or globs of rows")
    parser.add_argument(
        "--base_model",
        metavar="NAME",
        help=f"model whose tokens to count: a short name, a directory or a Hub id; without it {DEFAULT_BASE_MODEL}, "
        "if it is on this machine",
    )
    parser.add_argument("--max_length", type=int, default=512, metavar="N", help="maximum tokens of a row")
    parser.add_argument(
        "--template", default="instruction", metavar="NAME", help=f"one of {', '.join(get_args(TemplateName))}"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _encoder(base_model: str | None, template: TemplateName, max_length: int) -> Encoder | None:
    if base_model is None:
        # Counting tokens alone does not justify a download.
        if not base_model_cache_dir(DEFAULT_BASE_MODEL).is_dir():
            return None
        base_model = DEFAULT_BASE_MODEL
    from snake_lora_pl.models import load_tokenizer

    return Encoder(load_tokenizer(base_model), template, max_length)
