"""Whether SGLang takes what a PD test launches its servers with; starts nothing.
Asked is the installed release, one from its wheel, or, one row each, those of which there are wheels.
"""

import json
import sys
from argparse import Namespace
from pathlib import Path

from pdkit.core import paths
from pdkit.core.command import Parser
from pdkit.core.errors import ExitCode
from pdkit.preflight.contract import launches
from pdkit.runner.targets import TARGETS

EPILOG = "Exit codes: 0 it is all taken; 2 something is refused, or bad usage; 3 no SGLang to ask."
TAKE_FLAGS = ("--flags",)


def add_arguments(parser: Parser) -> None:
    launches.add_arguments(parser, default=paths.default_test(TARGETS[0].test_file))
    parser.add_argument(
        "--real-imports", action="store_true", help="import SGLang's dependencies too: slower, same answer"
    )
    parser.add_argument("--sglang-wheel", type=Path, metavar="FILE", help="ask this release, which is not installed")
    parser.add_argument("--releases", action="store_true", help="ask each release of which there is a wheel")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="... below DIR (default: the cache of this suite)")
    parser.add_argument("--download", action="store_true", help="... and what PyPI has beyond, from 0.5.12 on")
    parser.add_argument("--newest", action="store_true", help="... but only the newest")


def main(args: Namespace) -> ExitCode:
    """Raises UsageError and NotReady."""
    if args.releases or args.wheels or args.download or args.newest:
        return _ask_releases(args)
    with launches.release_of(args.sglang_wheel) as release:
        contract = launches.ask(release, args.test_file, args.flags, dict(args.env), args.real_imports)
    if args.json:
        print(json.dumps(launches.as_data(contract), indent=2))
    else:
        print(*launches.report(contract), sep="\n")
    return _refused([f"{line} (sglang {contract.release.version})" for line in contract.errors])


def _ask_releases(args: Namespace) -> ExitCode:
    from rich.console import Console

    from pdkit.preflight.contract import release, releases

    progress = Console(stderr=True)
    wheels = releases.wheels(args.wheels or paths.cache() / "wheels", args.download, args.newest, progress.print)
    contracts, broken = [], {}
    for version, wheel in wheels.items():
        with progress.status(f"asking sglang {version}"), release.unpacked(wheel) as unpacked:
            try:
                contracts.append(launches.ask(unpacked, args.test_file, args.flags, dict(args.env), args.real_imports))
            except launches.ContractUnreadable as error:
                broken[version] = str(error)
    if args.json:
        rows = [launches.as_data(contract) for contract in contracts]
        print(json.dumps({"releases": rows, "unreadable": broken}, indent=2))
    else:
        Console(soft_wrap=False).print(releases.table(contracts, broken))
        print("names that pdkit.deployment.attach replaces:", *releases.substituted(contracts), sep="\n")
    return _refused(
        [f"sglang {c.release.version}: {line}" for c in contracts for line in c.errors] + [*broken.values()]
    )


def _refused(lines: list[str]) -> ExitCode:
    for line in lines:
        print(f"pdkit contract: error: {line}", file=sys.stderr)
    return ExitCode.BAD_USAGE if lines else ExitCode.PASSED
