"""Runs registered test files, each in a process of its own: ended with all that it started, if it takes too long."""

from argparse import Namespace

from pdkit.core import paths
from pdkit.core.command import Parser
from pdkit.core.errors import ExitCode
from pdkit.runner.options import add_running, add_selection, options_of
from pdkit.runner.registered import run_registered


def add_arguments(parser: Parser) -> None:
    add_selection(parser, paths.registered_tests())
    add_running(parser)
    parser.set_defaults(hw="cpu", suite="stage-a-test-cpu")


def main(args: Namespace) -> ExitCode:
    return run_registered(options_of(args, paths.registered_tests()))
