"""Runs the main job, `TestDisaggregationDSV4`, on the highest target that this machine can run."""

import signal
import tempfile
from argparse import Namespace
from pathlib import Path

from pdkit.core.command import Parser, count
from pdkit.core.errors import ExitCode, UsageError
from pdkit.core.gpus import visible_gpus
from pdkit.runner import run
from pdkit.runner.options import add_common, history_file
from pdkit.runner.targets import TARGETS, choose, why


def add_arguments(parser: Parser) -> None:
    names = ", ".join(target.name for target in TARGETS)
    parser.add_argument("--on", metavar="TARGET", help=f"run it on this target or fail: {names}")
    parser.add_argument("--repeat", type=count, metavar="N", help="run it N times, a table at the end; resumable")
    parser.add_argument("--file", type=Path, metavar="TEST_FILE", help="... this test file instead of the main job")
    parser.add_argument("--jobs", type=count, default=1, metavar="N", help="... N at a time (default: 1)")
    parser.add_argument("--keep-going", action="store_true", help="... in spite of a failure")
    parser.add_argument(
        "--sglang-source", metavar="DIR", help="test this checkout of SGLang, or its python/, in place of the release"
    )
    add_common(parser)


def main(args: Namespace) -> ExitCode:
    """Raises UsageError and NotReady."""
    if args.repeat is None and (args.file or args.keep_going or args.jobs != 1):
        raise UsageError("--file, --jobs and --keep-going need --repeat N; pdkit test runs a file once")
    gpus = visible_gpus()
    target = choose(gpus, args.on)
    print(f"main job on {target.name}: {target.engine}", *why(target, gpus).splitlines(), sep="\n  ", flush=True)
    if args.repeat is not None:
        from pdkit.runner.repeat import repeat

        signal.signal(signal.SIGTERM, signal.default_int_handler)
        out = args.report_dir or Path(tempfile.mkdtemp(prefix="repeat_"))
        return repeat(out, target.name, args.repeat, args.jobs, args.keep_going, args.file)
    history = history_file(args, is_own_tree=True)
    return run.run(target, args.report_dir, history, args.environment_check, args.sglang_source, args.verbose)
