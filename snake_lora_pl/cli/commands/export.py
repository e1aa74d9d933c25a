"""``export``: an adapter and its base as a GGUF file, for llama.cpp and Ollama."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import get_args

from snake_lora_pl.cli.commands.light_parser import CommandParser, add_adapter_arguments
from snake_lora_pl.errors import UserError
from snake_lora_pl.paths import display_path

FORMATS = ("gguf",)


def run(arguments: Sequence[str]) -> int:
    """Export an adapter.

    Returns:
        The exit code.

    Raises:
        UserError: If llama.cpp's converter is missing or fails, or the adapter or its base cannot be loaded.
    """
    options = build_parser().parse(arguments)
    if options.format not in FORMATS:
        raise UserError(f"--format must be one of {', '.join(FORMATS)} (found: {options.format})")
    from snake_lora_pl.adapters import store
    from snake_lora_pl.adapters.gguf import PROMPT, export_gguf, find_converter
    from snake_lora_pl.console import configure_logging
    from snake_lora_pl.data.encoding import Encoder, TemplateName, check_choice
    from snake_lora_pl.models import BaseModelSpec, load_tokenizer

    find_converter(options.converter)  # fails before anything is loaded
    metadata = store.verify(options.adapter)
    template = options.template or metadata.data.get("template")
    if template is None:
        raise UserError(
            f"--adapter {options.adapter}: its metadata has no template, which the Modelfile needs. Set --template to "
            f"{', '.join(get_args(TemplateName))}."
        )
    check_choice("--template", template, TemplateName)
    configure_logging()
    base_name = options.base_model or metadata.base_model_name
    base_model = store.base_spec(metadata, BaseModelSpec(base_name, trust_remote_code=options.trust_remote_code))
    tokenizer = load_tokenizer(base_model)
    encoder = Encoder(tokenizer, template, template_date=metadata.data.get("template_date"))
    exported = export_gguf(
        options.adapter,
        options.out,
        encoder.render_prompt_without_bos(PROMPT),
        stop=tokenizer.eos_token,
        adds_bos=encoder.adds_bos,
        converter=options.converter,
        outtype=options.outtype,
        base_model=base_model,
    )
    print(
        f"{display_path(exported.path)}: {exported.num_tensors} tensors, {exported.num_bytes / 1e6:,.1f} MB. "
        f"Next: ollama create snake -f {shlex.quote(display_path(exported.modelfile_path))} && ollama run snake"
    )
    return 0


def build_parser() -> CommandParser:
    """Return the parser of this command."""
    parser = CommandParser("export")
    add_adapter_arguments(parser)
    parser.add_argument("--format", default="gguf", metavar="NAME", help="gguf")
    parser.add_argument(
        "--out",
        required=True,
        metavar="PATH",
        help="a file that ends in .gguf, or a directory that gets model.gguf; the Modelfile is written next to it",
    )
    parser.add_argument(
        "--outtype", default="auto", metavar="NAME", help="type of the weights: auto, f32, f16, bf16 or q8_0"
    )
    parser.add_argument(
        "--template",
        metavar="NAME",
        help="template of the training text: instruction, chat or raw; without it, the one in the adapter's metadata",
    )
    parser.add_argument(
        "--converter",
        metavar="PATH",
        help="llama.cpp's convert_hf_to_gguf.py, or a checkout of llama.cpp; without it, the one installed",
    )
    return parser
