"""Runs registered test files, each in a process of its own: ended with all that it started, if it takes too long."""

from argparse import Namespace

from pdkit.core import paths
from pdkit.core.command import Parser
from pdkit.core.errors import ExitCode
from pdkit.runner.options import add_running, options_of
from pdkit.runner.registered import run_registered


def add_arguments(parser: Parser) -> None:
    parser.usage = "pdkit test [OPTION...] [FILE...]"
    add_running(parser, paths.registered_tests())


def main(args: Namespace) -> ExitCode:
    if not (args.hw or args.suite or args.files or args.last_failed):
        args.hw, args.suite = "cpu", "stage-a-test-cpu"
    return run_registered(options_of(args, paths.registered_tests()))
