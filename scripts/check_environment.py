#!/usr/bin/env python3
"""Says whether this machine can run a suite: what is missing, why it matters, and what to do. Starts nothing."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "python"))

from pdkit.core.command import Parser, run_command  # noqa: E402
from pdkit.core.errors import ExitCode, UsageError  # noqa: E402
from pdkit.core.registry import collect  # noqa: E402
from pdkit.preflight.environment import machine, needs  # noqa: E402
from pdkit.preflight.environment.check import check, of_machine  # noqa: E402
from pdkit.preflight.finding import Level  # noqa: E402
from pdkit.runner.options import Options  # noqa: E402
from pdkit.runner.select import select  # noqa: E402

REGISTERED = REPO / "test" / "registered"


def main(argv: list[str]) -> ExitCode:
    parser = Parser(prog="check_environment.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--hw", default="cuda", help="hardware of the suite (default: %(default)s)")
    parser.add_argument("--suite", default="stage-c-test-dsv4-8-gpu-h200", help="default: %(default)s")
    parser.add_argument("--test-root", type=Path, default=REGISTERED, metavar="DIR", help="tree of registered tests")
    parser.add_argument("--root", type=Path, default=Path("/"), metavar="DIR", help="where sys, proc and dev are")
    parser.add_argument("--machine", type=Path, metavar="FILE", help="check against a machine recorded with --record")
    parser.add_argument("--record", action="store_true", help="print this machine as JSON, and check nothing")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    if args.record:
        print(machine.observe(args.root).to_json())
        return ExitCode.PASSED
    recorded = machine.Machine.from_json(args.machine.read_text(errors="replace")) if args.machine else None
    collection = collect(args.test_root)
    if collection.errors:
        raise UsageError("\n".join(collection.errors))
    selection = select(collection, Options(args.test_root, hw=args.hw, suite=args.suite))
    if not selection.enabled:
        raise UsageError(f"suite {args.suite}: {selection.why_empty}")
    wanted = needs.of(selection.enabled, root=args.root)
    findings = list(of_machine(wanted, recorded)) if recorded else check(wanted, args.root)
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        width = max(len(level.value) for level in Level)
        print(*(f"{finding.level.value:<{width}}  {finding}" for finding in findings), sep="\n")
        if recorded:
            print(f"not checked with {args.machine}: software, ports, model and data")
    return ExitCode.NOT_READY if any(finding.level is Level.ERROR for finding in findings) else ExitCode.PASSED


if __name__ == "__main__":
    sys.exit(run_command("check_environment.py", main, sys.argv[1:]))
