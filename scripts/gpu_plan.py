"""Which GPUs, ports and NICs a registered PD test uses, why, and whether its runner has them; starts nothing.

scripts/env.sh python3 scripts/gpu_plan.py [TEST_FILE]
"""

import json
import sys
from pathlib import Path

from pdkit.core.command import Parser, run_command
from pdkit.core.errors import ExitCode
from pdkit.core.numa import gpu_sockets, nic_sockets
from pdkit.preflight.contract import launches
from pdkit.preflight.plan import as_data, of_contract
from pdkit.preflight.plan_view import draw
from pdkit.runner.targets import TARGETS
from rich.console import Console

TEST_FILE = Path(__file__).resolve().parents[1] / "test" / TARGETS[0].test_file


def parse(argv):
    parser = Parser(
        prog="gpu_plan",
        description=__doc__.splitlines()[0],
        epilog="Exit codes: 0 it fits; 2 SGLang refuses a flag, or bad usage; 3 it does not fit, or SGLang is missing.",
        allow_abbrev=False,
    )
    launches.add_arguments(parser, default=TEST_FILE)
    parser.add_argument("--sglang-wheel", type=Path, metavar="FILE", help="by a release that is not installed")
    parser.add_argument("--suite", metavar="NAME", help="instead of the suite that the test is registered in")
    return parser.parse_args(argv)


def main(argv):
    args = parse(argv)
    with launches.release_of(args.sglang_wheel) as release:
        contract = launches.ask(release, args.test_file, args.flags, dict(args.env))
    plans = of_contract(contract, args.suite)
    problems, nics, gpus = [], nic_sockets(), gpu_sockets()
    for plan in plans:
        problems += plan.problems()
        if not args.json:
            console = Console(soft_wrap=True, highlight=False)
            console.print(draw(plan, nics))
            for line in plan.warnings(nics, gpus):
                console.print(f"warning: {line}", markup=False)
    if args.json:
        print(json.dumps([as_data(plan) for plan in plans], indent=2))
    for line in contract.errors + problems:
        print(f"gpu_plan: error: {line}", file=sys.stderr)
    if contract.errors:
        return ExitCode.BAD_USAGE
    return ExitCode.NOT_READY if problems else ExitCode.PASSED


if __name__ == "__main__":
    sys.exit(run_command("gpu_plan", main, sys.argv[1:]))
