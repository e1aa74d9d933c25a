"""``merge``: an adapter and its base as one plain model directory."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from snake_lora_pl.cli.commands.light_parser import CommandParser, add_adapter_arguments
from snake_lora_pl.paths import display_path


def run(arguments: Sequence[str]) -> int:
    """Merge an adapter.

    Returns:
        The exit code.

    Raises:
        UserError: If the adapter or its base cannot be loaded, or the directory cannot be written.
    """
    options = build_parser().parse(arguments)
    from snake_lora_pl.adapters import store
    from snake_lora_pl.adapters.merge import merge
    from snake_lora_pl.console import configure_logging
    from snake_lora_pl.models import BaseModelSpec

    configure_logging()
    base_name = options.base_model or store.read_metadata(options.adapter).base_model_name
    base_model = BaseModelSpec(base_name, trust_remote_code=options.trust_remote_code)
    merged = merge(options.adapter, options.out, base_model=base_model, dtype=options.dtype)
    rounding = "" if merged.dtype == "float32" else " (rounding; --dtype float32 avoids it)"
    print(
        f"{display_path(merged.path)}: {merged.num_parameters:,} parameters in {merged.dtype}; its logits differ from "
        f"the adapter's by at most {merged.logit_difference:.2g} of their standard deviation{rounding}. "
        f"Serve it: vllm serve {shlex.quote(display_path(merged.path))}"
    )
    return 0


def build_parser() -> CommandParser:
    """Return the parser of this command."""
    parser = CommandParser(
        "merge", epilog="Takes 4 bytes of memory per parameter (float32), and twice that during the check."
    )
    add_adapter_arguments(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="directory to write; must not exist or be empty")
    parser.add_argument(
        "--dtype", default="auto", metavar="NAME", help="float32, bfloat16, float16, or auto for that of the base"
    )
    return parser
