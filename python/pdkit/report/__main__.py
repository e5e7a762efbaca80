"""Draws the report of a run again from its directory: python3 -m pdkit.report DIR"""

import sys
from pathlib import Path

from pdkit.exit_codes import ExitCode
from pdkit.report.read import NoReport
from pdkit.report.write import write


def main(argv: list[str]) -> ExitCode:
    if len(argv) != 1 or argv[0].startswith("-"):
        print(__doc__ if argv in (["-h"], ["--help"]) else f"pdkit.report: error: one directory is needed. {__doc__}")
        return ExitCode.PASSED if argv in (["-h"], ["--help"]) else ExitCode.BAD_USAGE
    try:
        for line in write(Path(argv[0])):
            print(line)
    except (NoReport, OSError) as error:
        print(f"pdkit.report: error: {error}", file=sys.stderr)
        return ExitCode.BAD_USAGE
    return ExitCode.PASSED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
