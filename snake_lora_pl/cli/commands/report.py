"""``report``: the HTML report of a run, from the files in its directory."""

from __future__ import annotations

from collections.abc import Sequence

from snake_lora_pl.cli.commands.light_parser import CommandParser
from snake_lora_pl.paths import RunPaths, display_path


def run(arguments: Sequence[str]) -> int:
    """Write the report of a run.

    Returns:
        The exit code.

    Raises:
        UserError: If the directory is not a run's, one of its files cannot be read, or the report cannot be written.
    """
    options = build_parser().parse(arguments)
    from snake_lora_pl.reporting.html_report import write_report

    print(f"Report written to {display_path(write_report(RunPaths.of_directory(options.run)))}")
    return 0


def build_parser() -> CommandParser:
    """Return the parser of this command."""
    parser = CommandParser("report", epilog="fit and test write the report too. It is one self-contained file.")
    parser.add_argument("run", metavar="RUN_DIR", help="directory of a run, or of its adapter")
    return parser
