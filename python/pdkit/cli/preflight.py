"""Whether this machine can run a suite: what is missing, why it matters, and what to do. Starts nothing."""

import json
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

from pdkit.core import paths
from pdkit.core.command import Parser
from pdkit.core.console import columns
from pdkit.core.errors import ExitCode, UsageError

EPILOG = "Exit codes: 0 it can; 2 bad usage; 3 it lacks something."


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--hw", default="cuda", metavar="NAME", help="hardware of the suite (default: %(default)s)")
    parser.add_argument("--suite", default="stage-c-test-dsv4-8-gpu-h200", metavar="NAME", help="default: %(default)s")
    parser.add_argument(
        "--test-root",
        type=Path,
        default=paths.registered_tests(),
        metavar="DIR",
        help="tree of registered tests (default: this repository's)",
    )
    parser.add_argument("--root", type=Path, default=Path("/"), metavar="DIR", help="where sys, proc and dev are")
    parser.add_argument("--machine", type=Path, metavar="FILE", help="check against a machine recorded with --record")
    parser.add_argument("--record", action="store_true", help="print this machine as JSON, and check nothing")
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: Namespace) -> ExitCode:
    """Raises UsageError and NotReady."""
    from pdkit.core.registry import collect
    from pdkit.preflight.environment import machine, needs
    from pdkit.preflight.environment.check import check, of_machine
    from pdkit.preflight.finding import Level
    from pdkit.runner.options import Options
    from pdkit.runner.select import select

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
        print(columns([(finding.level.value, str(finding)) for finding in findings]))
        if recorded:
            print(f"not checked with {args.machine}: software, ports, model and data")
    return ExitCode.NOT_READY if any(finding.level is Level.ERROR for finding in findings) else ExitCode.PASSED
