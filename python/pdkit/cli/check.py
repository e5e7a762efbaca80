"""Checks a deployment that is already there: nothing is launched or ended."""

from argparse import Namespace
from pathlib import Path

from pdkit.core.command import Parser
from pdkit.core.errors import ExitCode
from pdkit.runner.options import add_history_options, add_verbose
from pdkit.runner.run import ATTACHED, run_attached

EPILOG = "A key that the deployment wants is read from SGLANG_PD_API_KEY."


def add_arguments(parser: Parser) -> None:
    parser.add_argument("base_url", nargs="?", metavar="URL", help=ATTACHED["base_url"][1])
    for name, (metavar, meaning) in ATTACHED.items():
        if name != "base_url":
            flag = "baseline" if name == "baseline_url" else name.replace("_", "-")
            parser.add_argument(f"--{flag}", dest=name, metavar=metavar, help=meaning)
    parser.add_argument("--report-dir", type=Path, metavar="DIR", help="for logs and results.json (default: a new one)")
    add_verbose(parser)
    add_history_options(parser)


def main(args: Namespace) -> ExitCode:
    """Raises UsageError and NotReady."""
    return run_attached(args)
