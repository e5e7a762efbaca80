"""Draws the report of a run again from its directory: report.html, junit.xml and summary.md.

With --compare two runs side by side; with --rejudge what this version's checkers say of it; with --issue a failure as Markdown to paste into an issue.
"""

from argparse import Namespace
from pathlib import Path

from pdkit.core.command import Parser
from pdkit.core.errors import ExitCode, UsageError


def add_arguments(parser: Parser) -> None:
    parser.add_argument("directory", nargs="?", type=Path, metavar="DIR", help="what --report-dir was")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="print two runs side by side")
    parser.add_argument(
        "--rejudge",
        action="store_true",
        help="judge the recorded run again by this version's checkers, and draw nothing",
    )
    parser.add_argument("--issue", action="store_true", help="print what failed as Markdown, and draw nothing")


def main(args: Namespace) -> ExitCode:
    """Raises UsageError where a directory is not that of a run."""
    from pdkit.runner.report.read import read_directory

    if (args.directory is None) == (args.compare is None) or args.issue + args.rejudge + bool(args.compare) > 1:
        raise UsageError("name one report directory, or two by --compare A B; --issue or --rejudge go with one")
    if args.compare:
        from pdkit.runner.report.compare import compared

        print(compared(*map(read_directory, args.compare)))
    elif args.rejudge:
        from pdkit.runner.report.rejudge import rejudged

        text, code = rejudged(read_directory(args.directory))
        print(text)
        return code
    elif args.issue:
        from pdkit.runner.report.issue import issue

        print(issue(read_directory(args.directory)), end="")
    else:
        from pdkit.runner.report.write import write

        print(*write(args.directory), sep="\n")
    return ExitCode.PASSED
