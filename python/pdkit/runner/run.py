"""Runs the main job, `TestDisaggregationDSV4`, on the highest rung that this machine can run (`scripts/run.sh`)."""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pdkit.core import events
from pdkit.core.command import Parser, run_command
from pdkit.core.errors import ExitCode, NotReady, UsageError
from pdkit.core.events import Events
from pdkit.core.gpus import Gpu, found, visible_gpus
from pdkit.core.registry import Registration, collect
from pdkit.runner.options import Options, add_history_options, history_file
from pdkit.runner.report import facts
from pdkit.runner.report.evidence import directory_of
from pdkit.runner.report.model import UNFINISHED
from pdkit.runner.select import Selection
from pdkit.runner.targets import DISTRIBUTED, TARGETS, Target, choose, why

TEST_DIR = Path(__file__).resolve().parents[3] / "test"


ATTACHED = {
    "base_url": ("URL", "its load balancer, without /v1"),
    "baseline_url": ("URL", "a monolithic server of the same model: answers are compared with it"),
    "prefill_urls": ("URL,...", "its prefill servers, to read their counters; nobody else may use them meanwhile"),
    "decode_urls": ("URL,...", "its decode servers, likewise"),
    "model": ("NAME", "what it must serve (default: whatever it serves)"),
    "tokenizer": ("DIR", "config and tokenizer of its model, for the comparison (default: what it says it loaded)"),
}


class TestNotFound(NotReady):
    """The test of a rung is not in this tree; the message is one line that says where it was looked for."""


def verdict(code: ExitCode, happened: Events, rung: Target) -> ExitCode:
    """A run passes only if it was scored, and on the rung that was meant."""
    targets = {event.get("target") for event in facts.scores_of(happened)}
    return ExitCode.NOTHING_RAN if code is ExitCode.PASSED and rung.name not in targets else code


def summary(rung: Target, happened: Events, code: ExitCode, seconds: float) -> str:
    """The closing lines: verdict, rung, engine, score, gate, throughput, time of each phase and in all."""
    score, throughput = facts.score_of(happened), facts.throughput_of(happened)
    ended = [phase for phase in facts.phases_of(happened) if phase.state != UNFINISHED]
    rows = [("engine", score and score.engine or rung.engine)]
    rows += [
        (
            "score",
            f"{score.value:.3f} of {score.examples} examples ({score.gate})"
            if score
            else "none, the test did not get that far",
        )
    ]
    rows += [("throughput", f"{throughput:.0f} output tokens/s")] if throughput else []
    rows += [(phase.name, f"{phase.seconds:.1f} s{', FAILED' * phase.is_bad}") for phase in ended]
    rows += [("imports and the rest", f"{seconds - sum(phase.seconds for phase in ended):.1f} s")]
    rows += [("total", f"{seconds:.1f} s")]
    width = max(len(name) for name, _ in rows)
    head = f"main job on rung {rung.name}: {code.name.replace('_', ' ')}"
    return "\n".join([head, *(f"  {name:<{width}}  {value}" for name, value in rows)])


def ladder(gpus: Sequence[Gpu]) -> str:
    """One line per rung, highest first: what it needs, and whether this machine can run it."""
    rows = [(rung.name, rung.needs, "runs here" if rung.runs_on(gpus) else "not here") for rung in TARGETS]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, f"this machine has {found(gpus)}"])


def registration_of(rung: Target) -> Registration:
    """Raises TestNotFound, also where the package is installed without its tests."""
    path = TEST_DIR / rung.test_file
    for registration in collect(TEST_DIR / "registered").registrations:
        if Path(registration.filename) == path:
            return registration
    raise TestNotFound(f"no registered test at {path}; run scripts/run.sh of a clone of the repository")


def run(rung: Target, report_dir: Path | None, history: Path | None = None, environment_check: bool = True) -> ExitCode:
    """Runs the test of `rung` as `test/run_suite.py` would, and ends with the summary.

    Raises TestNotFound, and NotReady where this machine lacks what the test needs.
    """
    # psutil and more: --help and --ladder do without
    from pdkit.preflight.environment.require import require
    from pdkit.runner.orphans import end_earlier_runs

    registration = registration_of(rung)
    for line in end_earlier_runs():
        print(line, flush=True)
    if environment_check:
        require([registration])
    return _run(rung, registration, report_dir, history)


def run_attached(args: argparse.Namespace) -> ExitCode:
    """Runs the checks that need no launch against a deployment that is already there.

    Raises UsageError and NotReady where it is not what it is said to be.
    """
    from pdkit.deployment import attached  # requests: only this way of running pays for it
    from pdkit.preflight.environment.dataset import check
    from pdkit.preflight.finding import Level

    for name in ATTACHED:
        if given := getattr(args, name):
            os.environ[attached.variable(name)] = given
    deployment = attached.Deployment.of()
    served = attached.probe(deployment)
    for finding in check(os.environ.get("SGLANG_PD_GSM8K") or None):
        if finding.level is Level.ERROR:
            raise NotReady(str(finding))
    print(f"main job on {deployment.base_url}, which serves {', '.join(served.names)}: nothing is launched", flush=True)
    rung = Target("attached", f"at {deployment.base_url}", DISTRIBUTED / "attached_deployment.py")
    name = str(rung.test_file)
    registration = Registration(str(TEST_DIR / rung.test_file), name, hw="cpu", suite="attached", est_time=600)
    return _run(rung, registration, args.report_dir, history_file(args, is_own_tree=True))


def _run(rung: Target, registration: Registration, report_dir: Path | None, history: Path | None) -> ExitCode:
    from pdkit.runner.suite import run_suite  # psutil, as above

    report_dir = report_dir or Path(tempfile.mkdtemp(prefix="main_job_"))
    options = Options(
        TEST_DIR / "registered",
        registration.hw,
        registration.suite,
        report_dir=report_dir,
        history=history,
        target=rung.name,
    )
    code = run_suite(Selection(enabled=(registration,), disabled=(), partition={}), options)
    results = json.loads((report_dir / "results.json").read_text())
    happened = Events()
    if attempts := results["files"][0]["attempts"]:
        happened = events.read(directory_of(report_dir / attempts[-1]["log"]))
    code = verdict(code, happened, rung)
    print("\n" + summary(rung, happened, code, results["seconds"]), flush=True)
    return code


def _main(argv: Sequence[str]) -> ExitCode:
    parser = Parser(prog="scripts/run.sh", description=__doc__.strip(), allow_abbrev=False)
    parser.add_argument("--rung", metavar="NAME", help=f"run this rung or fail: {', '.join(r.name for r in TARGETS)}")
    parser.add_argument("--ladder", action="store_true", help="print the rungs, and which of them run here")
    parser.add_argument(
        "--report-dir", type=Path, metavar="DIR", help="for log, server logs and results.json (default: a new one)"
    )
    parser.add_argument(
        "--skip-environment-check",
        dest="environment_check",
        action="store_false",
        help="start even if this machine lacks what the rung needs",
    )
    add_history_options(parser)
    there = parser.add_argument_group(
        "a deployment that is there", "nothing is launched or ended; a key that it wants is SGLANG_PD_API_KEY"
    )
    for name, (metavar, meaning) in ATTACHED.items():
        there.add_argument(f"--{name.replace('_', '-')}", metavar=metavar, help=meaning)
    args = parser.parse_args(argv)
    attaches = args.base_url or os.environ.get("SGLANG_PD_BASE_URL")
    if attaches and (args.rung or args.ladder):
        raise UsageError("--rung and --ladder launch servers, --base-url names some that are there: choose one")
    if not attaches and any(getattr(args, name) for name in ATTACHED):
        raise UsageError(f"--{', --'.join(n.replace('_', '-') for n in ATTACHED if n != 'base_url')} need --base-url")
    if attaches:
        return run_attached(args)
    gpus = visible_gpus()
    if args.ladder:
        print(ladder(gpus))
        return ExitCode.PASSED
    rung = choose(gpus, args.rung)
    print(f"main job on rung {rung.name}: {rung.engine}", *why(rung, gpus).splitlines(), sep="\n  ", flush=True)
    return run(rung, args.report_dir, history_file(args, is_own_tree=True), args.environment_check)


def main(argv: Sequence[str]) -> ExitCode:
    return run_command("run.sh", _main, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
