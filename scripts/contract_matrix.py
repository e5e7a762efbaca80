"""Which releases of SGLang take what a PD test launches its servers with: one row per release.

    scripts/env.sh python3 scripts/contract_matrix.py --download

Each release is asked by its own parser, environment registry and fixture, from its wheel, without being installed.
"""

import json
import os
import sys
from pathlib import Path

from pdkit.core.command import Parser, run_command
from pdkit.core.errors import ExitCode, NotReady
from pdkit.preflight.contract import index, launches, release
from pdkit.runner.targets import TARGETS
from rich import box
from rich.console import Console
from rich.table import Table

TEST_FILE = Path(__file__).resolve().parents[1] / "test" / TARGETS[0].test_file
CACHE = Path(os.getenv("PDKIT_CACHE_DIR") or Path(os.getenv("XDG_CACHE_HOME") or "~/.cache", "sglang-pd-suite"))


class NothingToAsk(NotReady):
    """No wheel; the message is one line that says what to do."""


def parse(argv):
    parser = Parser(
        prog="contract_matrix",
        description=__doc__.splitlines()[0],
        epilog="Exit codes: 0 every release takes the plan; 2 one refuses it, or bad usage; 3 no wheel could be had.",
        allow_abbrev=False,
    )
    launches.add_arguments(parser, default=TEST_FILE)
    parser.add_argument(
        "--wheels", type=Path, default=CACHE / "wheels", metavar="DIR", help="wheels of sglang (default: %(default)s)"
    )
    parser.add_argument("--download", action="store_true", help="fetch what PyPI has beyond those, from 0.5.12 on")
    parser.add_argument("--newest", action="store_true", help="ask the newest release only")
    return parser.parse_args(argv)


def wheels(args, say):
    """Wheel by version, oldest first."""
    folder = args.wheels.expanduser()
    found = {release.version_of_wheel(path): path for path in sorted(folder.glob("sglang-*.whl"))}
    if args.download:
        folder.mkdir(parents=True, exist_ok=True)
        versions = index.releases()
        for version in versions[-1:] if args.newest else versions:
            if version not in found:
                say(f"fetching sglang {version}")
                index.fetch(version, folder)
        found |= {release.version_of_wheel(path): path for path in sorted(folder.glob("sglang-*.whl"))}
    if not found:
        raise NothingToAsk(f"no wheel of sglang in {folder}; --download fetches it")
    ordered = sorted(found, key=index.sort_key)
    return {version: found[version] for version in (ordered[-1:] if args.newest else ordered)}


def flags_used(contract):
    """Flags of all servers of a contract."""
    processes = [process for test in contract.tests for process in test.processes if process.settings]
    return {word for process in processes for word in process.argv if word.startswith("--")}


def differing(contract, common):
    """Flags that this release does not share with all, and those that it deprecates."""
    for flag in sorted(flags_used(contract)):
        if contract.flags.get(flag, {}).get("deprecated"):
            yield f"{flag} (deprecated)"
        elif flag not in common:
            yield flag


def table(contracts, broken):
    common = set.intersection(*map(flags_used, contracts)) if contracts else set()
    facts = list(contracts[0].fixture) if contracts else []
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ["release", "flags", "variables", "names", *facts]:
        grid.add_column(column, justify="right" if column in ("flags", "variables", "names") else "left")
    grid.add_column("differing flags of the plan", no_wrap=True)
    grid.add_column("plan")
    for contract in contracts:
        grid.add_row(
            contract.release.version,
            str(len(contract.flags)),
            str(len(contract.variables)),
            str(sum(map(len, contract.substituted.values()))),
            *("yes" if value else "no" for value in contract.fixture.values()),
            "\n".join(differing(contract, common)),
            f"[red]{len(contract.errors)} refused[/]" if contract.errors else "[green]taken[/]",
        )
    for version in broken:
        grid.add_row(version, *[""] * (len(facts) + 4), "[red]cannot be read[/]")
    return grid


def substituted(contracts):
    """Lines: which names `pdkit.deployment.attach` replaces in all these releases, and in which only."""
    releases: dict[str, list[str]] = {}
    for contract in contracts:
        for module, names in contract.substituted.items():
            for name in names:
                releases.setdefault(f"{module}.{name}", []).append(contract.release.version)
    for name, versions in releases.items():
        yield f"  {name}" + (f" (from {versions[0]} on)" if len(versions) < len(contracts) else "")


def main(argv):
    args = parse(argv)
    console, progress = Console(soft_wrap=False), Console(stderr=True)
    contracts, broken = [], {}
    for version, wheel in wheels(args, progress.print).items():
        with progress.status(f"asking sglang {version}"), release.unpacked(wheel) as unpacked:
            try:
                contracts.append(launches.ask(unpacked, args.test_file, args.flags, dict(args.env)))
            except launches.ContractUnreadable as error:
                broken[version] = str(error)
    if args.json:
        rows = [launches.as_data(contract) for contract in contracts]
        print(json.dumps({"releases": rows, "unreadable": broken}, indent=2))
    else:
        console.print(table(contracts, broken))
        print("names that pdkit.deployment.attach replaces:", *substituted(contracts), sep="\n")
    lines = [f"sglang {c.release.version}: {line}" for c in contracts for line in c.errors] + list(broken.values())
    for line in lines:
        print(f"contract_matrix: error: {line}", file=sys.stderr)
    return ExitCode.BAD_USAGE if lines else ExitCode.PASSED


if __name__ == "__main__":
    sys.exit(run_command("contract_matrix", main, sys.argv[1:]))
