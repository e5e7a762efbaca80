"""Runs the tests of the target `sglang-cpu`: `python3 -m pdkit.runner.sglang_cpu [--sglang-source DIR] [--nightly] [NAME...]`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pdkit.core.command import Parser, run_command
from pdkit.core.errors import ExitCode, UsageError
from pdkit.core.registry import collect
from pdkit.deployment.cpu import drift, plan, requirements, working_tree
from pdkit.runner.options import Options
from pdkit.runner.select import Selection

TEST_ROOT = Path(__file__).resolve().parents[3] / "test" / "registered"
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


def _main(argv: Sequence[str]) -> ExitCode:
    """Raises UsageError, and NotReady with one line for each thing that the machine lacks."""
    parser = Parser(prog="sglang_cpu", description=__doc__.partition(":")[0], allow_abbrev=False)
    parser.add_argument("--sglang-source", metavar="DIR", help="a checkout of SGLang, or its python/: under test")
    parser.add_argument("--nightly", action="store_true", help="all files of the target, not only those of each push")
    parser.add_argument("--report-dir", type=Path, metavar="DIR", help="keep logs and results.json there")
    parser.add_argument("names", nargs="*", metavar="NAME", help="only files whose names contain one of these")
    args = parser.parse_args(argv)
    prepare(args.sglang_source)
    tree = plan.source()
    chosen = [
        each
        for each in collect(TEST_ROOT).registrations
        if Path(each.name).name.startswith(FILES)
        and (args.nightly or not each.nightly)
        and (tree is None or Path(each.name).name != BUGS)  # these are planted in the release
        and (not args.names or any(name in each.name for name in args.names))
    ]
    if not chosen:
        raise UsageError(f"no file of the target is called like {' or '.join(args.names)}")
    from pdkit.runner.suite import run_suite

    options = Options(TEST_ROOT, chosen[0].hw, chosen[0].suite, continue_on_error=True, report_dir=args.report_dir)
    return run_suite(Selection(enabled=tuple(chosen), disabled=(), partition={}), options)


if __name__ == "__main__":
    sys.exit(run_command("sglang-cpu", _main, sys.argv[1:]))
