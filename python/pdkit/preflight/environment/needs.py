"""What the files of a suite need of a machine, taken from the tests themselves."""

import ast
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pdkit.core.numa import gpu_sockets, nic_sockets
from pdkit.core.registry import Registration
from pdkit.core.source import PACKAGE, UNKNOWN, TestClass, pd_classes, read
from pdkit.preflight.contract.launches import Contract, ContractUnreadable, ask_each
from pdkit.preflight.contract.release import ReleaseNotFound, installed
from pdkit.preflight.plan import Runner, Server, of_contract

_KINDS = {"h20": (9, 0), "h100": (9, 0), "h200": (9, 0), "b200": (10, 0), "gb200": (10, 0), "b300": (10, 3)}


@dataclass(frozen=True)
class Needs:
    """What the files of one suite need.

    hw            hardware that they are registered for
    gpu_count     GPUs that the suite's name speaks of, and their compute `capability`, where it names a kind
    embedded      a file launches prefill and decode of the embedded engine
    servers       those that the PD tests launch; `gpu_memory_gb` is what they ask of each of their GPUs, 0 for anything
    ports         those that their processes listen on, and who does for what
    data          GSM8K files that they score; None stands for SGLang's own, UNKNOWN for one that the source computes
    errors        one line for each thing that SGLang does not take, or file that cannot be read
    warnings      one line for each thing in the plan that may go wrong, what to do behind the last semicolon
    deprecations  one line for each thing that a later release of SGLang may not take
    """

    hw: str
    gpu_count: int = 0
    gpu_memory_gb: float = 0
    capability: tuple[int, int] | None = None
    embedded: bool = False
    servers: tuple[Server, ...] = ()
    ports: Mapping[int, str] = field(default_factory=dict)
    data: tuple[object, ...] = ()
    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    deprecations: tuple[str, ...] = ()


def of(registrations: Iterable[Registration], environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> Needs:
    """Needs of files that are registered for one suite; `root` has the sysfs by which NICs are told to be near or far.

    On CPU nothing of SGLang is executed.
    """
    registrations = list(registrations)
    hw, suite = registrations[0].hw, registrations[0].suite
    files = [Path(name) for name in dict.fromkeys(r.filename for r in registrations)]
    classes = [cls for path in files for cls in _pd_classes(path)]
    if hw != "cuda":
        return Needs(hw, embedded=hw == "cpu" and bool(classes))
    runner = Runner.of_suite(suite)
    memory = [value for cls in classes if isinstance(value := cls.value("gpu_memory_gb"), (int, float))]
    paths = list(dict.fromkeys(cls.source.path for cls in classes))
    found = [_launched(contract, suite, root / "sys") for contract in _contracts(paths)]
    return Needs(
        hw=hw,
        gpu_count=runner.gpus if runner else 1,
        gpu_memory_gb=max(memory, default=(runner and classes and runner.memory_gb) or 0),
        capability=next((_KINDS[word] for word in suite.split("-") if word in _KINDS), None),
        servers=tuple(server for launched in found for server in launched.servers),
        ports={port: user for launched in found for port, user in launched.ports.items()},
        data=tuple(dict.fromkeys(value for cls in classes for value in _data(cls, environ))),
        errors=merged(line for launched in found for line in launched.errors),
        warnings=merged(line for launched in found for line in launched.warnings),
        deprecations=merged(line for launched in found for line in launched.deprecations),
    )


def merged(lines: Iterable[str]) -> tuple[str, ...]:
    """Lines `TestA: ...`; those that are the same of several classes as one, `TestA, TestB: ...`."""
    classes: dict[str, list[str]] = {}
    for line in lines:
        name, _, what = line.partition(": ")
        classes.setdefault(what, []).append(name)
    return tuple(f"{', '.join(dict.fromkeys(names))}: {what}" for what, names in classes.items())


def _pd_classes(path: Path) -> list[TestClass]:
    try:
        return pd_classes(read(path))
    except (OSError, SyntaxError):
        return []


def _data(cls: TestClass, environ: Mapping[str, str]) -> list[object]:
    if cls.stands_on_sglang and environ.get("SGLANG_PD_GSM8K"):  # `pdkit.deployment.attach` has it scored instead
        return [environ["SGLANG_PD_GSM8K"]]
    if found := cls.attribute("gsm8k_data_path"):
        value = cls.value("gsm8k_data_path", environ)
        comes_with_us = value is UNKNOWN and PACKAGE in found[0].source.path.parents  # an asset
        return [] if comes_with_us else [value]
    constants = (n.value for c in cls.mro for n in ast.walk(c.node) if isinstance(n, ast.Constant))
    return [None] if any(value == "gsm8k" for value in constants) else []


def _contracts(paths: list[Path]) -> Sequence[Contract | ContractUnreadable | ReleaseNotFound]:
    try:
        return ask_each(installed(), paths)
    except (ContractUnreadable, ReleaseNotFound) as error:
        return [error]


def _launched(contract: Contract | ContractUnreadable | ReleaseNotFound, suite: str, sysfs: Path) -> Needs:
    """What one file launches, and what contract and plan say to it."""
    if not isinstance(contract, Contract):
        return Needs("cuda", errors=(str(contract),))
    plans = of_contract(contract, suite)
    sockets = nic_sockets(sysfs), gpu_sockets(sysfs)
    return Needs(
        "cuda",
        servers=tuple(server for plan in plans for server in plan.servers),
        ports={port: f"{name} {use}" for plan in plans for name, use, port in plan.ports},
        errors=(*contract.errors, *(line for plan in plans for line in plan.problems())),
        warnings=tuple(line for plan in plans for line in plan.warnings(*sockets)),
        deprecations=tuple(contract.warnings),
    )
