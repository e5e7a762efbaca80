"""Collecting what a run leaves behind, while it runs.

environment.json          command, machine, versions, environment without secrets
gpu_plan.json             who uses which GPUs and ports, for tests that need GPUs
results.json              what became of each file
001-test_x.1.log          output of a test file
001-test_x.1/             what that run of the file left: logs of its servers, transcript of its eval,
  events.jsonl              what happened in it (pdkit.core.events)
  metrics.PID.jsonl         what it gave to SGLang's dump_metric
"""

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pdkit.core.events import VARIABLE, append, spare_of
from pdkit.core.host import describe
from pdkit.core.registry import Registration
from pdkit.core.secrets import scrub, secret_values

ENVIRONMENT_FILE = "environment.json"
GPU_PLAN_FILE = "gpu_plan.json"
DRAWN_AT_THE_END = ("results.json", "report.html", "junit.xml", "summary.md")
LOG_DIR_VARIABLE = "SGLANG_PD_LOG_DIR"
METRICS_VARIABLE = "SGLANG_TEST_METRICS_OUTPUT"


def directory_of(log: Path) -> Path:
    """Where the run of a test file with this log leaves the rest."""
    return log.with_suffix("")


def begin(report_dir: Path, registrations: Iterable[Registration]) -> None:
    """Writes down what is known before the first file runs, and removes what an earlier run left there."""
    for path in (report_dir / name for name in (GPU_PLAN_FILE, *DRAWN_AT_THE_END)):
        if path.is_file():
            path.unlink()
    _write(report_dir / ENVIRONMENT_FILE, describe())
    on_gpus = [registration for registration in registrations if registration.hw == "cuda"]
    if on_gpus and (plans := _gpu_plans(on_gpus)):
        _write(report_dir / GPU_PLAN_FILE, plans)


def _write(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")


def _gpu_plans(registrations: Sequence[Registration]) -> list[dict[str, Any]]:
    from pdkit.preflight.contract.launches import Contract, ContractUnreadable, ask_each  # a tenth of a runner's start
    from pdkit.preflight.contract.release import ReleaseNotFound, installed
    from pdkit.preflight.plan import as_data, of_contract

    try:
        found = ask_each(installed(), [Path(registration.filename) for registration in registrations])
    except (ContractUnreadable, ReleaseNotFound):
        return []
    contracts = [
        (contract, each.suite) for contract, each in zip(found, registrations) if isinstance(contract, Contract)
    ]
    return [as_data(plan) for contract, suite in contracts for plan in of_contract(contract, suite) if plan.gpus]


def start(log: Path) -> None:
    """Before a run of a file: an empty directory for what it leaves, where its events begin. Raises OSError."""
    directory = directory_of(log)
    for each in (directory, spare_of(directory)):
        shutil.rmtree(each, ignore_errors=True)
    log.with_suffix(".hang.txt").unlink(missing_ok=True)
    directory.mkdir(exist_ok=True)
    append(directory, "started")


def environment(log: Path) -> dict[str, str]:
    """What names the directory of its events, and of all else that it leaves, to a test file.

    Where the user set SGLang's variables, logs and metrics go there.
    """
    directory = directory_of(log)
    ours = {LOG_DIR_VARIABLE: str(directory), METRICS_VARIABLE: str(directory / "metrics")}
    return {VARIABLE: str(directory)} | {name: value for name, value in ours.items() if not os.environ.get(name)}


def end(log: Path) -> None:
    """After a run of a file: no secret stays in what it left."""
    scrub(directory_of(log), secret_values(os.environ))
