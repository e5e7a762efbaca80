"""The target `sglang-cpu`: what it must find before it runs, and which test files are its own."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from pdkit.core.errors import ExitCode
from pdkit.core.registry import collect
from pdkit.deployment.cpu import drift, plan, requirements, working_tree
from pdkit.runner.options import Options
from pdkit.runner.select import Selection

FILES = "test_disaggregation_sglang_cpu"
BUGS = "test_disaggregation_sglang_cpu_bugs.py"


def prepare(sglang_source: str | None = None) -> None:
    """Makes `sglang_source`, a checkout of SGLang or its python/, what is tested, and prints how it differs.

    Raises NotReady with one line for each thing that the machine lacks, or where the tree cannot be tested here.
    """
    if sglang_source:
        os.environ[plan.SOURCE_VARIABLE] = os.path.abspath(os.path.expanduser(sglang_source))
    requirements.require_machine()
    if tree := plan.source():
        found = working_tree.report(tree / "sglang", drift.installed_package())
        print(found or f"{tree} is as SGLang {drift.RELEASE}", flush=True)


def run_tests(options: Options, sglang_source: str | None = None) -> ExitCode:
    """Runs all files of the target one after the other, nightly ones among them. Raises NotReady as `prepare` does."""
    prepare(sglang_source)
    ours = [
        each
        for each in collect(options.test_root).registrations
        if Path(each.name).name.startswith(FILES)
        and (plan.source() is None or Path(each.name).name != BUGS)  # these are planted in the release
    ]
    from pdkit.runner.suite import run_suite

    enabled, disabled = (tuple(each for each in ours if each.is_enabled is on) for on in (True, False))
    return run_suite(Selection(enabled, disabled), replace(options, jobs=1))
