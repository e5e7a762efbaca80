"""Acceptance tests of SGLang's prefill/decode disaggregation: what to run, what it would need, what it found."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec

from pdkit.core.command import Parser, run_command
from pdkit.core.errors import ExitCode, NotReady, not_installed

COMMANDS = {
    "run": "the main job, on the highest target that this machine can run",
    "check": "a deployment that is already there: is it right?",
    "test": "registered test files, supervised",
    "list": "what is registered, and on what the main job can run",
    "plan": "which GPUs, ports and NICs a test would use, and whether they are there",
    "preflight": "what this machine lacks for a suite",
    "contract": "whether a release of SGLang takes what a test launches",
    "lint": "rules for registered tests that a file breaks",
    "new": "the next registered PD test, written and checked",
    "matrix": "each fault of the library against each check: what is seen",
    "report": "the report of a run, drawn again from its directory",
    "history": "what earlier runs left: scores and phases over time, time estimates",
    "model": "the small models and their data, made again",
}
EPILOG = "pdkit COMMAND --help lists the options of one.\nExit codes: " + ", ".join(
    f"{code:d} {code.name.lower().replace('_', ' ')}" for code in ExitCode
)


def _parser(command: str | None) -> Parser:
    """The parser of `pdkit`, with the options of `command` alone: no other sub-command is imported."""
    parser = Parser(prog="pdkit", description=__doc__, epilog=EPILOG)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name, summary in COMMANDS.items():
        if name != command:
            commands.add_parser(name, help=summary, add_help=False)
            continue
        module = import_module(f"pdkit.cli.{name}")
        chosen = commands.add_parser(
            name, help=summary, description=module.__doc__, epilog=getattr(module, "EPILOG", None)
        )
        module.add_arguments(chosen)
    return parser


def _chosen(words: Sequence[str]) -> str | None:
    """The sub-command that a command line names, if it is one."""
    return next((word for word in words if not word.startswith("-")), None)


def _joined(words: Sequence[str], options: Sequence[str]) -> list[str]:
    """`--flags --x` as `--flags=--x`: argparse takes a word that begins with a dash for the next option."""
    rest = iter(words)
    return [f"{word}={next(rest, '')}" if word in options else word for word in rest]


def _main(command: str | None, argv: Sequence[str]) -> ExitCode:
    parser = _parser(command)
    if not argv:
        parser.print_help()
        return ExitCode.BAD_USAGE
    if command not in COMMANDS:
        parser.parse_args(argv)  # leaves for --help, and raises where no command is named or none has that name
    assert command, "the parser has refused it"
    module = import_module(f"pdkit.cli.{command}")
    args: Namespace = parser.parse_args(_joined(argv, getattr(module, "TAKE_FLAGS", ())))
    try:
        return module.main(args)
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if not name or find_spec(name):
            raise
        raise NotReady(not_installed(name)) from None


def _complete() -> None:
    """Prints what a shell asks for; `eval "$(register-python-argcomplete pdkit)"` makes it ask."""
    import argcomplete

    words = os.environ.get("COMP_LINE", "")[: int(os.environ.get("COMP_POINT", "0"))].split()[1:]
    argcomplete.autocomplete(_parser(_chosen(words)))


def main(argv: Sequence[str] | None = None) -> ExitCode:
    """Runs one sub-command; what it expects to go wrong becomes lines on standard error and an exit code."""
    if "_ARGCOMPLETE" in os.environ:
        _complete()
    argv = sys.argv[1:] if argv is None else argv
    command = _chosen(argv)
    name = f"pdkit {command}" if command in COMMANDS else "pdkit"
    return run_command(name, partial(_main, command), argv)
