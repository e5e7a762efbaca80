"""What is registered, in which suite, how long it takes and why it is disabled; with --targets, what can run here."""

from argparse import Namespace

from pdkit.core import paths
from pdkit.core.command import Parser
from pdkit.core.errors import ExitCode


def add_arguments(parser: Parser) -> None:
    from pdkit.runner.options import add_selection

    add_selection(parser, paths.registered_tests())
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="print JSON")
    shown.add_argument("--targets", action="store_true", help="print on what the main job can run, and what runs here")


def main(args: Namespace) -> ExitCode:
    if args.targets:
        from pdkit.core.gpus import visible_gpus
        from pdkit.runner.targets import overview

        print(overview(visible_gpus()))
        return ExitCode.PASSED
    from pdkit.runner.options import options_of
    from pdkit.runner.registered import run_registered

    args.list_only = True
    return run_registered(options_of(args, paths.registered_tests()))
