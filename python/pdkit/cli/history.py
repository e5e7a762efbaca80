"""What earlier runs left: score, phases and acceptance length over time, and better time estimates.
Each run of a suite or of the main job appends a record to the history; runs of single files do not.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pdkit.core import paths
from pdkit.core.command import Parser, count, seconds
from pdkit.core.errors import ExitCode, UsageError
from pdkit.runner.options import HISTORY_VARIABLE, default_history

if TYPE_CHECKING:
    from pdkit.runner.history.record import Record


def _figure(text: str) -> Path:
    path = Path(text)
    if path.suffix not in (".svg", ".png", ".pdf") or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: name an .svg, .png or .pdf file in a directory that exists")
    return path


def add_arguments(parser: Parser) -> None:
    default = default_history()
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help=f"histories, together (default: {default})")
    parser.add_argument("--out", type=_figure, metavar="FIGURE", help="draw it into this .svg, .png or .pdf, too")
    parser.add_argument("--json", action="store_true", help="print the series as JSON")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--est-time", action="store_true", help="print new est_time literals as a patch for git apply")
    what.add_argument("--estimates", action="store_true", help="print file -> seconds for --partition-model-file")
    parser.add_argument(
        "--test-root", type=Path, default=paths.registered_tests(), metavar="DIR", help="tree to propose est_time for"
    )
    parser.add_argument("--last", type=count, default=20, metavar="N", help="runs of a file that its times are from")
    parser.add_argument("--min-runs", type=count, default=5, metavar="N", help="no est_time from fewer (%(default)s)")
    parser.add_argument("--tolerance", type=seconds, default=0.1, metavar="SHARE", help="leave est_time if as close")


def _propose(args: argparse.Namespace, records: "Sequence[Record]") -> ExitCode:
    from pdkit.core.registry import collect
    from pdkit.runner.history import est_time
    from pdkit.runner.history.series import seconds_of_files

    collection = collect(args.test_root)
    if collection.errors:
        raise UsageError("\n".join(collection.errors))
    root = args.test_root.absolute().parent
    times = seconds_of_files(records, args.last)
    proposals = est_time.propose(collection.registrations, times, root.name, args.min_runs, args.tolerance)
    for proposal in proposals:
        print(proposal, file=sys.stderr)
    if not proposals:
        print("est_time: no registration is further off than the tolerance, or has enough runs", file=sys.stderr)
    print(est_time.patch(proposals, root.parent), end="")
    return ExitCode.PASSED


def _show(args: argparse.Namespace, records: "Sequence[Record]") -> None:
    from pdkit.runner.history import drawing
    from pdkit.runner.history.series import main_job_series

    all_series = main_job_series(records)
    if args.json:
        print(json.dumps([drawing.as_dict(series) for series in all_series], indent=2))
    else:
        from rich.console import Console

        Console(width=None if sys.stdout.isatty() else 160).print(drawing.terminal(records, all_series))
    if args.out:
        if not all_series:
            raise UsageError(f"--out {args.out}: no run in the history measured a score or a phase")
        drawing.draw(all_series, args.out)
        print(f"drawn: {args.out}", file=sys.stderr)


def main(args: argparse.Namespace) -> ExitCode:
    """Raises UsageError."""
    from pdkit.runner.history import store

    if not args.files and default_history() is None:
        raise UsageError(f"no history: {HISTORY_VARIABLE} is empty; name a FILE")
    args.files = args.files or [default_history()]
    history = store.read(args.files)
    for line in history.skipped:
        print(f"pdkit history: {line}", file=sys.stderr)
    if not history.records:
        print(f"pdkit history: error: no run in {', '.join(map(str, args.files))}", file=sys.stderr)
        return ExitCode.NOTHING_RAN
    if args.est_time:
        return _propose(args, history.records)
    if args.estimates:
        from pdkit.runner.history.est_time import estimates
        from pdkit.runner.history.series import seconds_of_files

        print(json.dumps(estimates(seconds_of_files(history.records, args.last)), indent=2))
    else:
        _show(args, history.records)
    return ExitCode.PASSED
