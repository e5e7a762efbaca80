"""What the files of a suite need of a machine, taken from the tests themselves."""

import ast
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pdkit.registry import Registration
from pdkit.sources import UNKNOWN, TestClass, pd_classes, read

_GPUS_IN_SUITE = re.compile(r"\b(\d+)-gpu\b")
_KINDS = {"h20": (9, 0), "h100": (9, 0), "h200": (9, 0), "b200": (10, 0), "gb200": (10, 0), "b300": (10, 3)}
_WEIGHTLESS = ("dummy", "--load-format=dummy")


@dataclass(frozen=True)
class Process:
    """One process that a PD test launches.

    gpus   indices among the visible ones, and `memory_fraction`, the share of their memory that it takes
    model  what it loads (draft model included), a directory or a repository; `weights` False for dummy ones
    a2a    its MoE all-to-all backend; `backend` what transfers the state; `nics` the RDMA devices it is given
    ports  those it listens on, by what they are for
    """

    test: str
    name: str
    gpus: tuple[int, ...] = ()
    memory_fraction: float = 0.0
    models: tuple[str, ...] = ()
    weights: bool = True
    a2a: str | None = None
    backend: str | None = None
    nics: tuple[str, ...] = ()
    ports: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Needs:
    """What the files of one suite need.

    hw            hardware that they are registered for
    gpu_count     GPUs that the suite's name speaks of, and their compute `capability`, where it names a kind
    embedded      a file launches prefill and decode of the embedded engine
    processes     what the PD tests launch; `gpu_memory_gb` is what they ask of each of their GPUs, 0 for anything
    data          GSM8K files that they score; None stands for SGLang's own
    errors        one line for each thing that SGLang does not take, or file that cannot be read; `warnings` likewise
    """

    hw: str
    gpu_count: int = 0
    gpu_memory_gb: float = 0
    capability: tuple[int, int] | None = None
    embedded: bool = False
    processes: tuple[Process, ...] = ()
    data: tuple[str | None, ...] = ()
    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def of(registrations: Iterable[Registration], environ: Mapping[str, str] = os.environ) -> Needs:
    """Needs of files that are registered for one suite. On CPU nothing of SGLang is executed."""
    registrations = list(registrations)
    hw = registrations[0].hw
    files = [Path(name) for name in dict.fromkeys(r.filename for r in registrations)]
    classes = [cls for path in files for cls in _pd_classes(path)]
    if hw != "cuda":
        return Needs(hw, embedded=hw == "cpu" and bool(classes))
    counts = [int(match[1]) for r in registrations if (match := _GPUS_IN_SUITE.search(r.suite))]
    kinds = [kind for r in registrations for word in r.suite.split("-") if (kind := _KINDS.get(word))]
    memory = [value for cls in classes if isinstance(value := cls.value("gpu_memory_gb"), (int, float))]
    found = [_launched(path) for path in dict.fromkeys(cls.source.path for cls in classes)]
    return Needs(
        hw=hw,
        gpu_count=max(counts, default=1),
        gpu_memory_gb=max(memory, default=0),
        capability=kinds[0] if kinds else None,
        processes=tuple(process for processes, _, _ in found for process in processes),
        data=tuple(dict.fromkeys(value for cls in classes for value in _data(cls, environ))),
        errors=tuple(line for _, errors, _ in found for line in errors),
        warnings=tuple(line for _, _, warnings in found for line in warnings),
    )


def _pd_classes(path: Path) -> list[TestClass]:
    try:
        return pd_classes(read(path))
    except (OSError, SyntaxError):
        return []


def _data(cls: TestClass, environ: Mapping[str, str]) -> list[str | None]:
    if cls.attribute("gsm8k_data_path"):
        value = cls.value("gsm8k_data_path", environ)
        return [] if value is UNKNOWN else [value]
    constants = (n.value for c in cls.mro for n in ast.walk(c.node) if isinstance(n, ast.Constant))
    return [None] if any(value == "gsm8k" for value in constants) else []


def _launched(path: Path) -> tuple[list[Process], list[str], list[str]]:
    """Processes, errors and warnings of one file, by the launch contract of the installed SGLang."""
    from pdkit.contract.release import ReleaseNotFound, installed
    from pdkit.launch_contract import ContractUnreadable, ask

    try:
        contract = ask(installed(), path)
    except (ContractUnreadable, ReleaseNotFound) as error:
        return [], [str(error)], []
    processes = [_process(test.test, process) for test in contract.tests for process in test.processes]
    return processes, contract.errors, contract.warnings


def _process(test: str, process) -> Process:
    settings = process.settings
    if settings is None:
        return Process(test, process.name, ports=process.ports)
    argv = process.argv
    values = dict(zip(argv, argv[1:], strict=False))
    models = [values.get(flag) for flag in ("--model-path", "--speculative-draft-model-path")]
    return Process(
        test=test,
        name=process.name,
        gpus=_gpus(settings),
        memory_fraction=settings["mem_fraction_static"] or 0.0,
        models=tuple(dict.fromkeys(filter(None, models))),
        weights=not set(_WEIGHTLESS) & set(argv),
        a2a=settings["moe_a2a_backend"],
        backend=settings["disaggregation_transfer_backend"],
        nics=tuple(filter(None, (settings["disaggregation_ib_device"] or "").split(","))),
        ports=process.ports,
    )


def _gpus(settings: Mapping) -> tuple[int, ...]:
    count = settings["tp_size"] * settings["pp_size"] * settings["replicas"] // settings["nnodes"]
    return tuple(settings["base_gpu_id"] + i * settings["gpu_id_step"] for i in range(count))
