"""Which GPUs, ports and NICs a registered PD test uses, why, and whether its runner has them; starts nothing.

scripts/env.sh python3 scripts/gpu_plan.py [TEST_FILE]
"""

import json
import sys
from pathlib import Path

from pdkit.core.command import Parser, run_command
from pdkit.core.errors import ExitCode, UsageError
from pdkit.core.numa import gpu_sockets, nic_sockets
from pdkit.preflight.contract import launches
from pdkit.preflight.memory_estimate import UnknownModel, of_config
from pdkit.preflight.plan import as_data, of_contract
from pdkit.preflight.plan_view import draw, memory_problems
from pdkit.runner.targets import TARGETS
from rich.console import Console

TEST_FILE = Path(__file__).resolve().parents[1] / "test" / TARGETS[0].test_file


class BadConfig(UsageError):
    """No estimate from what the user named; the message is one line."""


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
    parser.add_argument("--config", type=Path, metavar="FILE", help="config.json of the model, to estimate its memory")
    return parser.parse_args(argv)


def model_of(plan, config):
    """The memory estimate: from the file named, else from the model if it is a directory here. Raises BadConfig."""
    paths = [Path(server.model, "config.json") for server in plan.servers if server.model]
    path = config or next((path for path in paths if path.is_file()), None)
    try:
        return of_config(json.loads(path.read_text())) if path else None
    except (OSError, ValueError) as error:
        raise BadConfig(f"{path}: {getattr(error, 'strerror', None) or 'not JSON'}") from None
    except UnknownModel as error:
        if config:
            raise BadConfig(f"{path}: {error}") from None
        return None


def main(argv):
    args = parse(argv)
    with launches.release_of(args.sglang_wheel) as release:
        contract = launches.ask(release, args.test_file, args.flags, dict(args.env))
    plans = of_contract(contract, args.suite)
    models = [model_of(plan, args.config) for plan in plans]
    problems, nics, gpus = [], nic_sockets(), gpu_sockets()
    for plan, model in zip(plans, models, strict=True):
        problems += plan.problems() + (memory_problems(plan, model) if model else [])
        if not args.json:
            console = Console(soft_wrap=True, highlight=False)
            console.print(draw(plan, model, nics))
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
