"""Which GPUs, ports and NICs a registered PD test uses, why, and whether its runner has them; starts nothing."""

import json
import sys
from argparse import Namespace
from pathlib import Path

from pdkit.core import paths
from pdkit.core.command import Parser
from pdkit.core.errors import ExitCode, UsageError
from pdkit.core.numa import gpu_sockets, nic_sockets
from pdkit.preflight.contract import launches
from pdkit.preflight.plan import Runner, as_data, of_contract
from pdkit.runner.targets import TARGETS

EPILOG = "Exit codes: 0 it fits; 2 SGLang refuses a flag, or bad usage; 3 it does not fit, or SGLang is missing."
TAKE_FLAGS = ("--flags",)


def add_arguments(parser: Parser) -> None:
    launches.add_arguments(parser, default=paths.default_test(TARGETS[0].test_file))
    parser.add_argument("--sglang-wheel", type=Path, metavar="FILE", help="by a release that is not installed")
    parser.add_argument("--suite", metavar="NAME", help="instead of the suite that the test is registered in")


def main(args: Namespace) -> ExitCode:
    """Raises UsageError and NotReady."""
    if args.suite and Runner.of_suite(args.suite) is None:
        raise UsageError(
            f"--suite {args.suite}: its name says no number of GPUs; name one such as stage-c-test-8-gpu-h200"
        )
    with launches.release_of(args.sglang_wheel) as release:
        contract = launches.ask(release, args.test_file, args.flags, dict(args.env))
    plans = of_contract(contract, args.suite)
    if args.json:
        print(json.dumps([as_data(plan) for plan in plans], indent=2))
    else:
        from rich.console import Console

        from pdkit.preflight.plan_view import draw

        console, nics, gpus = Console(soft_wrap=True, highlight=False), nic_sockets(), gpu_sockets()
        for plan in plans:
            console.print(draw(plan, nics))
            for line in plan.warnings(nics, gpus):
                console.print(f"warning: {line}", markup=False)
    problems = [line for plan in plans for line in plan.problems()]
    for line in contract.errors + problems:
        print(f"pdkit plan: error: {line}", file=sys.stderr)
    if contract.errors:
        return ExitCode.BAD_USAGE
    return ExitCode.NOT_READY if problems else ExitCode.PASSED
