"""Runs registered test files, each in a process that is ended with all that it started."""

from argparse import Namespace

from pdkit.core import paths
from pdkit.core.command import Parser
from pdkit.core.errors import ExitCode, UsageError
from pdkit.runner.options import add_running, options_of
from pdkit.runner.registered import run_registered


def add_arguments(parser: Parser) -> None:
    parser.usage = "pdkit test [OPTION...] [FILE...]"
    add_running(parser, paths.registered_tests())
    parser.add_argument("--on", choices=["sglang-cpu"], help="all files of this target, also nightly ones")
    parser.add_argument(
        "--sglang-source", metavar="DIR", help="with --on: a checkout of SGLang in place of the release"
    )


def main(args: Namespace) -> ExitCode:
    """Raises UsageError and NotReady."""
    if not (args.hw or args.suite or args.files or args.last_failed):
        args.hw, args.suite = "cpu", "stage-a-test-cpu"
    options = options_of(args, paths.registered_tests())
    if args.on:
        from pdkit.runner import sglang_cpu

        return sglang_cpu.run_tests(options, args.sglang_source)
    if args.sglang_source:
        raise UsageError("--sglang-source goes with --on sglang-cpu")
    return run_registered(options)
