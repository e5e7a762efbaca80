"""Does a release of SGLang take what a registered PD test launches it with? `pdkit contract TEST_FILE`.

The test itself says what it launches: it is imported and launches its processes in a process of its own, where nothing
is started but written down. The release need not be installed: its own parser and registry of variables are executed
with stand-ins for the packages that it depends on (`pdkit.preflight.contract.stand_ins`).
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pdkit
from pdkit.core.errors import UsageError
from pdkit.preflight.contract.release import Release, installed, unpacked
from pdkit.preflight.finding import Finding, Level

TIMEOUT_S = 120.0
INHERITED = ("SGLANG_PD_", "SGLANG_TEST_", "SGLANG_CI_", "SGLANG_IS_IN_CI")  # what a test may look at


class ContractUnreadable(UsageError):
    """Release or test file cannot be asked; the message is one line."""


@dataclass(frozen=True)
class ProcessContract:
    """One process that a test launches: command line, added environment, and what the release says to both.

    `settings` is what `pdkit.preflight.contract.settings.of_server` makes of the accepted flags of a server, None for another
    process; `ports` maps what for to which. Flags of a process that is not `checked` were not looked at.
    """

    module: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    checked: bool
    findings: tuple[Finding, ...]
    settings: Mapping[str, Any] | None
    ports: Mapping[str, int]

    @property
    def name(self) -> str:
        """`prefill`, `decode`, `load balancer`, or else the module."""
        if self.settings:
            mode: str = self.settings["disaggregation_mode"]
            return mode if mode in ("prefill", "decode") else "server"
        return "load balancer" if self.module.startswith("sglang_router") else self.module


@dataclass(frozen=True)
class TestContract:
    """What one test class launches; `problem` is one line where it did not launch all."""

    test: str
    problem: str | None
    processes: tuple[ProcessContract, ...]

    def lines(self, level: str) -> list[str]:
        """One line for each distinct finding of that level, led by the processes that it is about."""
        names: dict[str, list[str]] = {}
        for process in self.processes:
            for finding in process.findings:
                if finding.level == level:
                    names.setdefault(str(finding), []).append(process.name)
        lines = [f"{self.test}: {', '.join(dict.fromkeys(who))}: {text}" for text, who in names.items()]
        return [f"{self.test}: {self.problem}"] * (level == "error" and self.problem is not None) + lines


@dataclass(frozen=True)
class Contract:
    """All that a release said. `fixture` maps what the PD fixture does to whether it does; `assumed` modules to why
    they could not be executed; `flags` is `pdkit.preflight.contract.flags.describe` of the server's parser;
    `substituted` are the names, by module, that `pdkit.deployment.attach` replaces in it."""

    release: Release
    test_file: Path | None
    flags: Mapping[str, Mapping[str, Any]]
    variables: tuple[str, ...]
    fixture: Mapping[str, bool]
    assumed: Mapping[str, str]
    substituted: Mapping[str, Sequence[str]]
    suites: tuple[str, ...] = ()
    tests: tuple[TestContract, ...] = ()

    @property
    def errors(self) -> list[str]:
        if self.test_file and not self.tests:
            return [f"{self.test_file.name} has no test class on top of SGLang's PDDisaggregationServerBase"]
        return [line for test in self.tests for line in test.lines("error")]

    @property
    def warnings(self) -> list[str]:
        return [line for test in self.tests for line in test.lines("warning")]


def _child_environment(folder: str, writes_bytecode: bool) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SGLANG_", "SGL_")) or k.startswith(INHERITED)}
    paths = [str(Path(pdkit.__file__).parents[1]), *filter(None, [os.getenv("PYTHONPATH")])]
    kept |= {"PYTHONPATH": os.pathsep.join(paths), "TMPDIR": folder, "SGLANG_PD_LOG_DIR": folder}
    return kept if writes_bytecode else kept | {"PYTHONDONTWRITEBYTECODE": "1"}


def ask(
    release: Release,
    test_file: Path | None = None,
    extra_argv: Sequence[str] = (),
    extra_env: Mapping[str, str] | None = None,
    real_imports: bool = False,
) -> Contract:
    """What `release` says to the PD tests in `test_file`, as if their servers got `extra_argv` and `extra_env` too.

    `real_imports` imports the dependencies of the release, which must be installed, instead of standing in for them.
    Raises ContractUnreadable.
    """
    (found,) = ask_each(release, [test_file], extra_argv, extra_env, real_imports)
    if isinstance(found, ContractUnreadable):
        raise found
    return found


def ask_each(
    release: Release,
    test_files: Sequence[Path | None],
    extra_argv: Sequence[str] = (),
    extra_env: Mapping[str, str] | None = None,
    real_imports: bool = False,
) -> list[Contract | ContractUnreadable]:
    """The same for many test files, each forked from one process that has executed the release."""
    if not test_files:
        return []
    for test_file in test_files:
        if test_file is not None and not test_file.is_file():
            raise ContractUnreadable(f"{test_file}: no such file; name a test file")
    request = {
        "root": str(release.root),
        "version": release.version,
        "tests": [str(test_file.absolute()) if test_file else None for test_file in test_files],
        "extra_argv": list(extra_argv),
        "extra_env": dict(extra_env or {}),
        "real_imports": real_imports,
    }
    with tempfile.TemporaryDirectory(prefix="contract-") as folder:
        question, answers = Path(folder, "request.json"), [Path(folder, f"{n}.json") for n in range(len(test_files))]
        question.write_text(json.dumps(request))
        command = [sys.executable, "-m", "pdkit.preflight.contract.probe", str(question), *map(str, answers)]
        environment = _child_environment(folder, writes_bytecode=release.origin.endswith("(installed)"))
        try:
            run = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S * len(test_files)
            )
        except subprocess.TimeoutExpired:
            raise ContractUnreadable(
                f"{release.origin}: no answer within {TIMEOUT_S * len(test_files):.0f} s"
            ) from None
        last = (run.stderr.strip().splitlines() or ["no output"])[-1]
        found = [
            json.loads(answer.read_text())
            if answer.exists()
            else {"failed": f"{release.origin} cannot be read: {last}"}
            for answer in answers
        ]
    return [_contract(release, *each) for each in zip(test_files, found, strict=True)]


def _contract(release: Release, test_file: Path | None, found: Mapping[str, Any]) -> Contract | ContractUnreadable:
    if "failed" in found:
        return ContractUnreadable(found["failed"])
    if "unreadable" in found:
        return ContractUnreadable(f"{release.origin}: {found['unreadable']}")
    return Contract(
        release=release,
        test_file=test_file,
        flags=found["flags"],
        variables=tuple(found["variables"]),
        fixture=found["fixture"],
        assumed=found["assumed"],
        substituted=found["substituted"],
        suites=tuple(r["suite"] for r in found.get("registrations", ())),
        tests=tuple(_test_contract(plan) for plan in found.get("plans", ())),
    )


def _test_contract(plan: Mapping[str, Any]) -> TestContract:
    processes = []
    for process in plan["processes"]:
        findings = (Finding(Level(f["level"]), f["subject"], f["message"]) for f in process["findings"])
        processes.append(ProcessContract(**process | {"argv": tuple(process["argv"]), "findings": tuple(findings)}))
    return TestContract(plan["test"], plan["problem"], tuple(processes))


def release_of(wheel: Path | None) -> AbstractContextManager[Release]:
    """A context manager that gives the installed release, or the one in `wheel`. Raises ReleaseNotFound, or BadWheel."""
    return unpacked(wheel) if wheel else nullcontext(installed())


def remark_as_data(finding: Finding) -> dict[str, str]:
    """What a release says to a flag or variable, as plain data."""
    return {"level": finding.level.value, "subject": finding.subject, "message": finding.what}


def as_data(contract: Contract) -> dict[str, Any]:
    """The contract as what json.dumps takes."""
    return {
        "release": contract.release.version,
        "test_file": str(contract.test_file) if contract.test_file else None,
        "suites": contract.suites,
        "fixture": contract.fixture,
        "substituted": contract.substituted,
        "flags_known": len(contract.flags),
        "variables_known": len(contract.variables),
        "errors": contract.errors,
        "warnings": contract.warnings,
        "tests": [
            {
                "test": test.test,
                "problem": test.problem,
                "processes": [
                    {
                        "name": process.name,
                        **{name: getattr(process, name) for name in ("module", "argv", "env", "checked", "ports")},
                        "findings": [remark_as_data(finding) for finding in process.findings],
                    }
                    for process in test.processes
                ],
            }
            for test in contract.tests
        ],
    }


def add_arguments(parser: argparse.ArgumentParser, default: Path | None = None) -> None:
    """The arguments that say which test and what more its servers get; without `default` the test must be named."""
    how: dict[str, Any] = {"nargs": "?", "default": default} if default else {}
    parser.add_argument("test_file", type=Path, metavar="TEST_FILE", help="a registered PD test", **how)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--flags", type=shlex.split, default=[], metavar="'F ...'", help="as if the servers got these flags too"
    )
    parser.add_argument(
        "--env", type=_assignment, action="append", default=[], metavar="NAME=VALUE", help="... or this variable"
    )


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=VALUE")
    return name, value


def report(contract: Contract) -> Iterable[str]:
    """Lines for people: what each process gets, then what the release says to it."""
    for test in contract.tests:
        yield f"{contract.release.origin}: {test.test}"
        for process in test.processes:
            variables = [name for name in process.env if name.startswith("SGLANG_")]
            count = sum(word.startswith("--") for word in process.argv)
            refused = sum(finding.level == "error" for finding in process.findings)
            verdict = f"{refused} refused" if process.checked else f"flags not checked: no parser of {process.module}"
            yield f"  {process.name:<14}{count:>3} flags, {len(variables)} variables, {verdict}"
    yield from (f"warning: {line}" for line in contract.warnings)
