"""Several releases of SGLang side by side: which take what a PD test launches its servers with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from pdkit.core.errors import NotReady
from pdkit.preflight.contract import index, release
from pdkit.preflight.contract.launches import Contract


class NothingToAsk(NotReady):
    """No wheel; the message is one line that says what to do."""


def wheels(folder: Path, download: bool, newest: bool, say: Callable[[str], None]) -> dict[str, Path]:
    """Wheel by version, oldest first; with `download` those that PyPI has beyond. Raises NothingToAsk."""
    folder = folder.expanduser()
    found = {release.version_of_wheel(path): path for path in sorted(folder.glob("sglang-*.whl"))}
    if download:
        folder.mkdir(parents=True, exist_ok=True)
        versions = index.releases()
        for version in versions[-1:] if newest else versions:
            if version not in found:
                say(f"fetching sglang {version}")
                index.fetch(version, folder)
        found |= {release.version_of_wheel(path): path for path in sorted(folder.glob("sglang-*.whl"))}
    if not found:
        raise NothingToAsk(f"no wheel of sglang in {folder}; --download fetches it")
    ordered = sorted(found, key=index.sort_key)
    return {version: found[version] for version in (ordered[-1:] if newest else ordered)}


def flags_used(contract: Contract) -> set[str]:
    """Flags of all servers of a contract."""
    processes = [process for test in contract.tests for process in test.processes if process.settings]
    return {word for process in processes for word in process.argv if word.startswith("--")}


def differing(contract: Contract, common: set[str]) -> Iterator[str]:
    """Flags that this release does not share with all, and those that it deprecates."""
    for flag in sorted(flags_used(contract)):
        if contract.flags.get(flag, {}).get("deprecated"):
            yield f"{flag} (deprecated)"
        elif flag not in common:
            yield flag


def table(contracts: Sequence[Contract], broken: Mapping[str, str]) -> Table:
    """One row per release: what it has, which flags of the plan not all have, and whether it takes the plan."""
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


def substituted(contracts: Sequence[Contract]) -> Iterator[str]:
    """Lines: which names `pdkit.deployment.attach` replaces in all these releases, and in which only."""
    releases: dict[str, list[str]] = {}
    for contract in contracts:
        for module, names in contract.substituted.items():
            for name in names:
                releases.setdefault(f"{module}.{name}", []).append(contract.release.version)
    for name, versions in releases.items():
        yield f"  {name}" + (f" (from {versions[0]} on)" if len(versions) < len(contracts) else "")
