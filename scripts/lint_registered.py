#!/usr/bin/env python3
"""Checks registered tests against SGLang's rules and those that PD tests broke before.

A line that is right all the same says why: `# lint: allow RULE: reason`, behind it or on the line above.
"""

import os
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "python"))

from pdkit.core.command import Parser, run_command  # noqa: E402
from pdkit.core.errors import ExitCode  # noqa: E402
from pdkit.preflight.lint.check import RULES, lint  # noqa: E402

REGISTERED = REPO / "test" / "registered"


def main(argv: list[str]) -> ExitCode:
    parser = Parser(prog="lint_registered.py", description=__doc__.strip(), allow_abbrev=False)
    parser.add_argument("paths", nargs="*", type=Path, default=[REGISTERED], help=f"files or trees ({REGISTERED})")
    parser.add_argument("--rules", action="store_true", help="print the rules")
    args = parser.parse_args(argv)
    if args.rules:
        width = max(map(len, RULES))
        print(*(f"{name:<{width}}  {check.__doc__.splitlines()[0]}" for name, check in RULES.items()), sep="\n")
        return ExitCode.PASSED
    findings = lint(args.paths)
    for finding in findings:
        path = finding.path
        shown = os.path.relpath(path) if path.is_relative_to(Path.cwd()) else path
        print(str(finding).replace(str(path), str(shown), 1))
    return ExitCode.FAILED if findings else ExitCode.PASSED


if __name__ == "__main__":
    sys.exit(run_command("lint_registered.py", main, sys.argv[1:]))
