"""``report``: the page of a run, from the files in its directory."""

from __future__ import annotations

from snake_lora_pl.cli.commands.parser import Parser
from snake_lora_pl.paths import RunPaths, display_path


def run(arguments: list[str]) -> int:
    """Write the page of a run.

    Returns:
        The exit code.

    Raises:
        UserError: If no run lies there, one of its files cannot be read, or the page cannot be written.
    """
    options = build_parser().parse(arguments)
    from snake_lora_pl.reporting.html_report import write_report

    print(f"Report written to {display_path(write_report(RunPaths.of_directory(options.run)))}")
    return 0


def build_parser() -> Parser:
    """The arguments of this verb."""
    parser = Parser("report", epilog="fit and test write it too. It opens from disk and loads nothing.")
    parser.add_argument("run", metavar="RUN_DIR", help="directory of a run, or of its adapter")
    return parser
