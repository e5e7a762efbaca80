"""Draws the report of a run again from its directory: python3 -m pdkit.runner.report DIR"""

import sys
from pathlib import Path

from pdkit.core.command import Parser, run_command
from pdkit.core.errors import ExitCode
from pdkit.runner.report.write import write


def main(argv: list[str]) -> ExitCode:
    parser = Parser(prog="pdkit.runner.report", description=__doc__, allow_abbrev=False)
    parser.add_argument("directory", type=Path, metavar="DIR", help="what --report-dir was")
    print(*write(parser.parse_args(argv).directory), sep="\n")
    return ExitCode.PASSED


if __name__ == "__main__":
    sys.exit(run_command("pdkit.runner.report", main, sys.argv[1:]))
