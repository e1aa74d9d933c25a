"""``audit``: what is in a data set, or what memory training on it takes."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import get_args

from snake_lora_pl.cli.commands.parser import Parser
from snake_lora_pl.constants import DEFAULT_BASE_MODEL
from snake_lora_pl.data.audit_checks import audit_rows
from snake_lora_pl.data.audit_text import describe
from snake_lora_pl.data.encoding import Encoder, TemplateName, check_choice
from snake_lora_pl.paths import base_model_cache_dir


def run(arguments: list[str]) -> int:
    """Audit a data set, or estimate the memory of a ``fit``.

    Returns:
        The exit code.

    Raises:
        UserError: If an argument cannot be used or the file cannot be read.
    """
    if "--memory" in arguments and not {"-h", "--help"} & set(arguments):
        from snake_lora_pl.cli.commands import memory

        others = [argument for argument in arguments if argument not in ("--memory", "--json")]
        return memory.run(others, as_json="--json" in arguments)
    options = build_parser().parse(arguments)
    check_choice("--template", options.template, TemplateName)
    audit = audit_rows(options.files, _encoder(options.base_model, options.template, options.max_length))
    print(json.dumps(asdict(audit), indent=2) if options.json else describe(audit))
    return 0


def build_parser() -> Parser:
    """The arguments of this verb."""
    parser = Parser("audit")
    parser.add_argument("files", nargs="+", metavar="F.jsonl", help="files or globs of rows")
    parser.add_argument(
        "--base_model",
        metavar="NAME",
        help=f"whose tokens to count: a short name, a directory or a hub id; without it {DEFAULT_BASE_MODEL}, "
        "if it is on this machine",
    )
    parser.add_argument("--max_length", type=int, default=512, metavar="N", help="most tokens that a row should have")
    parser.add_argument(
        "--template", default="instruction", metavar="NAME", help=f"one of {', '.join(get_args(TemplateName))}"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--memory",
        action="store_true",
        help="instead of all this, estimate the peak memory of fit; beside it stand any options of fit, such as "
        "--config balanced.yaml --data.batch_size 16, and no file needs to be given",
    )
    return parser


def _encoder(base_model: str | None, template: TemplateName, max_length: int) -> Encoder | None:
    if base_model is None:
        # Not worth a download that nobody asked for.
        if not base_model_cache_dir(DEFAULT_BASE_MODEL).is_dir():
            return None
        base_model = DEFAULT_BASE_MODEL
    from snake_lora_pl.models import load_tokenizer

    return Encoder(load_tokenizer(base_model), template, max_length)
