"""Draws the report of a run again from its directory: report.html, junit.xml and summary.md."""

from argparse import Namespace
from pathlib import Path

from pdkit.core.command import Parser
from pdkit.core.errors import ExitCode


def add_arguments(parser: Parser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR", help="what --report-dir was")


def main(args: Namespace) -> ExitCode:
    """Raises UsageError where `args.directory` is not that of a run."""
    from pdkit.runner.report.write import write

    print(*write(args.directory), sep="\n")
    return ExitCode.PASSED
