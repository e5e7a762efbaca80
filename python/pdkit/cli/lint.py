"""Checks registered tests against SGLang's rules and those that PD tests broke before.
A line that is right all the same gives the reason: `# lint: allow RULE: reason`, behind it or on the line above.
"""

import os
from argparse import Namespace
from pathlib import Path

from pdkit.core import paths
from pdkit.core.command import Parser
from pdkit.core.console import columns
from pdkit.core.errors import ExitCode

EPILOG = "Exit codes: 0 nothing is found; 1 something is; 2 bad usage."


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "paths",
        nargs="*",
        type=Path,
        default=[paths.registered_tests()],
        metavar="PATH",
        help="files or trees (default: this repository's registered tests)",
    )
    parser.add_argument("--rules", action="store_true", help="print the rules")


def main(args: Namespace) -> ExitCode:
    from pdkit.preflight.lint.check import RULES, lint

    if args.rules:
        print(columns([(name, (check.__doc__ or "").partition("\n")[0]) for name, check in RULES.items()]))
        return ExitCode.PASSED
    findings = lint(args.paths)
    for finding in findings:
        path = finding.path or Path()
        shown = os.path.relpath(path) if path.is_relative_to(Path.cwd()) else path
        print(str(finding).replace(str(path), str(shown), 1))
    return ExitCode.FAILED if findings else ExitCode.PASSED
