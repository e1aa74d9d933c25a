"""MkDocs hook: pages generated from the program (help texts, shipped configs) and from CONTRIBUTING.md."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from snake_lora_pl.__main__ import main
from snake_lora_pl.paths import shipped_configs
from snake_lora_pl.program import LIGHT_COMMANDS, LIGHTNING_COMMANDS, PROG

ROOT = Path(__file__).parent.parent


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    commands = [f"## {command}\n\n```text\n{_help(command)}```\n" for command in [*LIGHTNING_COMMANDS, *LIGHT_COMMANDS]]
    configs = [f"## {name}\n\n```yaml\n{path.read_text()}```\n" for name, path in shipped_configs().items()]
    pages = {
        "reference/cli.md": "\n".join(
            [f"# Commands and options\n\n`snake-lora COMMAND` is short for `{PROG} COMMAND`.\n", *commands]
        ),
        "reference/configs.md": "\n".join(["# Shipped configs\n", *configs]),
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text().replace("(docs/", "("),
    }
    for uri, content in pages.items():
        files.append(File.generated(config, uri, content=content))
    return files


def _help(command: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        main([command, "--help"])
    return text.getvalue().replace(" \b", "")  # jsonargparse backspaces over a space on a terminal
