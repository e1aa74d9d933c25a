"""MkDocs hook: pages that are made of the program itself, its help and its shipped configs."""

from __future__ import annotations

import contextlib
import io

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from snake_lora_pl.__main__ import main
from snake_lora_pl.paths import shipped_configs
from snake_lora_pl.program import LIGHT_VERBS, LIGHTNING_VERBS, PROG


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    verbs = [f"## {verb}\n\n```text\n{_help(verb)}```\n" for verb in [*LIGHTNING_VERBS, *LIGHT_VERBS]]
    intro = f"`snake-lora VERB` is `{PROG} VERB`.\n"
    configs = [f"## {name}\n\n```yaml\n{path.read_text()}```\n" for name, path in shipped_configs().items()]
    for uri, title, parts in (
        ("reference/cli.md", "Command line", [intro, *verbs]),
        ("reference/configs.md", "Shipped configs", configs),
    ):
        files.append(File.generated(config, uri, content="\n".join([f"# {title}\n", *parts])))
    return files


def _help(verb: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        main([verb, "--help"])
    return text.getvalue().replace(" \b", "")  # jsonargparse takes back a space on a terminal
