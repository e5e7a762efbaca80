"""Shows the table that a recovery test left in its log directory, or puts it into a document between its markers.

Result: the two tables of docs/recovery.md.

scripts/env.sh python3 studies/recovery_table.py FILE [--into docs/recovery.md]
"""

import sys
from pathlib import Path

from pdkit.checks.recovery import table
from pdkit.core.command import Parser, run_command
from pdkit.core.errors import ExitCode, UsageError


def parse(argv):
    parser = Parser(prog="recovery_table", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("file", type=Path, metavar="FILE", help=f"{table.FILE_NAME} of a run; it says where")
    parser.add_argument("--into", type=Path, metavar="DOCUMENT", help="replace what stands there between the markers")
    return parser.parse_args(argv)


def main(argv):
    args = parse(argv)
    try:
        about, rows = table.load(args.file)
        shown = table.markdown(rows)
        if args.into:
            args.into.write_text(table.insert(args.into.read_text(), shown))
    except ValueError as error:
        raise UsageError(error) from None
    print(shown, *(f"{name}: {value}" for name, value in about.items()), sep="\n")
    return ExitCode.PASSED


if __name__ == "__main__":
    sys.exit(run_command("recovery_table", main, sys.argv[1:]))
