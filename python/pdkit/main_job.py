"""Runs the main job, `TestDisaggregationDSV4`, on the highest rung that this machine can run (`scripts/run.sh`)."""

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pdkit.command import run_command
from pdkit.exit_codes import ExitCode, NotReady
from pdkit.options import Options, Parser, UsageError, add_history_options, history_file
from pdkit.registry import Registration, Selection, collect
from pdkit.rung import DISTRIBUTED, LADDER, Gpu, Rung, choose, found, visible_gpus, why

TEST_DIR = Path(__file__).resolve().parents[2] / "test"


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


_PHASE = re.compile(r"\[phase\] (?P<name>.+?)(?P<failed> failed)?: (?P<seconds>\d+\.?\d*) s")
_RESULT = re.compile(
    r"rung=(?P<rung>\S+) engine=(?P<engine>.+) "
    r"gsm8k=(?P<score>\d+\.?\d*) examples=(?P<examples>\d+) gate=(?P<gate>\S+)"
)
_THROUGHPUT = re.compile(r"Output throughput: (?P<tokens_per_s>\d+\.?\d*) token/s")
_ACCEPTANCE = re.compile(
    r"acceptance length: (?:PASS|FAIL), (?P<lowest>\d+\.?\d*).*"
    r"|Speculative accept length .*: n=\d+ mean=(?P<mean>\d+\.?\d*) .*"
)


@dataclass(frozen=True)
class Result:
    """What the test says that it measured, and on what; `score` is the share of right answers, rounded."""

    rung: str
    engine: str
    score: float
    examples: int
    gate: str

    @property
    def correct(self) -> int:
        return round(self.score * self.examples)


@dataclass(frozen=True)
class Report:
    """What a run printed: phases as (name, seconds) in order, which failed, the result, output tokens/s of the eval.

    acceptance_length  tokens per verification step where the engine speculates, as the eval or its gate says
    """

    phases: tuple[tuple[str, float], ...] = ()
    failed_phases: tuple[str, ...] = ()
    result: Result | None = None
    throughput: float | None = None
    acceptance_length: float | None = None


def read_report(lines: Iterable[str]) -> Report:
    """Finds phases, result and speeds among the lines that the test and its `run_eval` printed."""
    phases, failed, result, throughput, acceptance = [], [], None, None, None
    for line in lines:
        if match := _PHASE.fullmatch(line.strip()):
            phases.append((match["name"], float(match["seconds"])))
            failed += [match["name"]] if match["failed"] else []
        elif match := _RESULT.fullmatch(line.strip()):
            result = Result(
                match["rung"], match["engine"], float(match["score"]), int(match["examples"]), match["gate"]
            )
        elif match := _THROUGHPUT.fullmatch(line.strip()):
            throughput = float(match["tokens_per_s"])
        elif match := _ACCEPTANCE.fullmatch(line.strip()):
            acceptance = float(match["lowest"] or match["mean"])
    return Report(tuple(phases), tuple(failed), result, throughput, acceptance)


def verdict(code: ExitCode, report: Report, rung: Rung) -> ExitCode:
    """A run passes only where it was scored, and on the rung that was meant."""
    if code is ExitCode.PASSED and (report.result is None or report.result.rung != rung.name):
        return ExitCode.NOTHING_RAN
    return code


def summary(rung: Rung, report: Report, code: ExitCode, seconds: float) -> str:
    """The closing lines: verdict, rung, engine, score, gate, throughput, time of each phase and in all."""
    result = report.result
    head = f"main job on rung {rung.name}: {code.name.replace('_', ' ')}"
    rows = [("engine", result.engine if result else rung.engine)]
    rows += [
        (
            "score",
            f"{result.score:.3f} of {result.examples} examples (gate {result.gate})"
            if result
            else "none, the test did not get that far",
        )
    ]
    rows += [("throughput", f"{report.throughput:.0f} output tokens/s")] if report.throughput else []
    rows += [(name, f"{took:.1f} s{', FAILED' * (name in report.failed_phases)}") for name, took in report.phases]
    rows += [("imports and the rest", f"{seconds - sum(took for _, took in report.phases):.1f} s")]
    rows += [("total", f"{seconds:.1f} s")]
    width = max(len(name) for name, _ in rows)
    return "\n".join([head, *(f"  {name:<{width}}  {value}" for name, value in rows)])


def ladder(gpus: Sequence[Gpu]) -> str:
    """One line per rung, highest first: what it needs, and whether this machine can run it."""
    rows = [(rung.name, rung.needs, "runs here" if rung.runs_on(gpus) else "not here") for rung in LADDER]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, f"this machine has {found(gpus)}"])


def registration_of(rung: Rung) -> Registration:
    """Raises TestNotFound, also where the package is installed without its tests."""
    path = TEST_DIR / rung.test_file
    for registration in collect(TEST_DIR / "registered").registrations:
        if Path(registration.filename) == path:
            return registration
    raise TestNotFound(f"no registered test at {path}; run scripts/run.sh of a clone of the repository")


def run(rung: Rung, report_dir: Path | None, history: Path | None = None, environment_check: bool = True) -> ExitCode:
    """Runs the test of `rung` as `test/run_suite.py` would, and ends with the summary.

    Raises TestNotFound, and NotReady where this machine lacks what the test needs.
    """
    from pdkit.environment_check.require import require
    from pdkit.leftovers import end_earlier_runs

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
    from pdkit import attached
    from pdkit.environment_check.dataset import check
    from pdkit.environment_check.finding import Level

    for name in ATTACHED:
        if given := getattr(args, name):
            os.environ[attached.variable(name)] = given
    deployment = attached.Deployment.of()
    served = attached.probe(deployment)
    for finding in check(os.environ.get("SGLANG_PD_GSM8K") or None):
        if finding.level is Level.ERROR:
            raise NotReady(str(finding))
    print(f"main job on {deployment.base_url}, which serves {', '.join(served.names)}: nothing is launched", flush=True)
    rung = Rung("attached", f"at {deployment.base_url}", DISTRIBUTED / "attached_deployment.py")
    name = str(rung.test_file)
    registration = Registration(str(TEST_DIR / rung.test_file), name, hw="cpu", suite="attached", est_time=600)
    return _run(rung, registration, args.report_dir, history_file(args, is_own_tree=True))


def _run(rung: Rung, registration: Registration, report_dir: Path | None, history: Path | None) -> ExitCode:
    from pdkit.runner import run_suite

    report_dir = report_dir or Path(tempfile.mkdtemp(prefix="main_job_"))
    options = Options(
        TEST_DIR / "registered", registration.hw, registration.suite, report_dir=report_dir, history=history
    )
    code = run_suite(Selection(enabled=(registration,), disabled=(), partition={}), options)
    results = json.loads((report_dir / "results.json").read_text())
    report = Report()
    if attempts := results["files"][0]["attempts"]:
        with open(report_dir / attempts[-1]["log"], errors="replace") as log:
            report = read_report(log)
    code = verdict(code, report, rung)
    print("\n" + summary(rung, report, code, results["seconds"]), flush=True)
    return code


def _main(argv: Sequence[str]) -> ExitCode:
    parser = Parser(prog="scripts/run.sh", description=__doc__.strip(), allow_abbrev=False)
    parser.add_argument("--rung", metavar="NAME", help=f"run this rung or fail: {', '.join(r.name for r in LADDER)}")
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
