"""Runs the main job, `TestDisaggregationDSV4`, on one target: `pdkit run`."""

import tempfile
import time
from pathlib import Path

from pdkit.core import events, paths
from pdkit.core.console import columns
from pdkit.core.errors import ExitCode, NotReady
from pdkit.core.events import Events
from pdkit.core.registry import collect
from pdkit.runner.options import Options
from pdkit.runner.report import facts
from pdkit.runner.report.evidence import directory_of
from pdkit.runner.report.model import FAIL, UNFINISHED
from pdkit.runner.report.rows import hint_of, rows_of
from pdkit.runner.select import Selection
from pdkit.runner.targets import Target, left_out

TEST_DIR = paths.TEST


def verdict(code: ExitCode, happened: Events, target: Target) -> ExitCode:
    """A run passes only if it was scored, and on the target that was meant."""
    targets = {event.get("target") for event in facts.scores_of(happened)}
    return ExitCode.NOTHING_RAN if code is ExitCode.PASSED and target.name not in targets else code


def summary(target: Target, happened: Events, code: ExitCode, seconds: float) -> str:
    """The closing lines: verdict, why it failed and where to look, engine, score, gate, time of each phase and in all."""
    score = facts.score_of(happened)
    ended = [phase for phase in facts.phases_of(happened) if phase.state != UNFINISHED]
    failed = next((row for row in rows_of(happened) if row.state == FAIL), None)
    rows = [("failed", f"{failed.name}: {failed.sentence}")] if failed else []
    rows += [("hint", where)] if (where := hint_of(happened)) else []
    rows += [("engine", score and score.engine or target.engine)]
    scored = score and f"{score.value:.3f} of {score.examples} examples ({score.gate})"
    rows += [("score", scored or "none, the test did not get that far")]
    rows += [("throughput", f"{score.throughput:.0f} output tokens/s")] if score and score.throughput else []
    rows += [(phase.name, f"{phase.seconds:.1f} s{', FAILED' * phase.is_bad}") for phase in ended]
    rows += [("imports and the rest", f"{seconds - sum(phase.seconds for phase in ended):.1f} s")]
    rows += [("total", f"{seconds:.1f} s")]
    head = f"main job on {target.name}: {code.name.replace('_', ' ')}"
    return f"{head}\n{columns(rows, indent='  ')}"


def run(
    target: Target,
    report_dir: Path | None,
    history: Path | None = None,
    environment_check: bool = True,
    sglang_source: str | None = None,
    verbose: bool = False,
) -> ExitCode:
    """Runs the test of `target` as `test/run_suite.py` would, and ends with the summary.

    Raises NotReady where this machine lacks what the test needs, or an installed package its tests; UsageError where the
    target takes no `sglang_source`.
    """
    # psutil and more: listing the targets does without
    from pdkit.preflight.environment.require import require
    from pdkit.runner.orphans import end_earlier_runs
    from pdkit.runner.suite import run_suite

    path = TEST_DIR / target.test_file
    registrations = collect(TEST_DIR / "registered").registrations
    registration = next((each for each in registrations if each.filename == str(path)), None)
    if registration is None:
        raise NotReady(f"no registered test at {path}; run it in a clone of the repository")
    target.prepare(sglang_source)
    for line in end_earlier_runs():
        print(line, flush=True)
    if environment_check:
        require([registration])
    began = time.monotonic()
    report_dir = report_dir or Path(tempfile.mkdtemp(prefix="main_job_"))
    options = Options(
        TEST_DIR / "registered",
        registration.hw,
        registration.suite,
        report_dir=report_dir,
        history=history,
        target=target.name,
        verbose=verbose,
    )
    code = run_suite(Selection((registration,)), options)
    happened = Events()
    for log in sorted(report_dir.glob(f"001-{target.test_file.stem}.*.log")):  # also without a results.json
        happened = events.read(directory_of(log))
    code = verdict(code, happened, target)
    print("\n" + summary(target, happened, code, time.monotonic() - began), flush=True)
    if code is ExitCode.PASSED:
        print(f"not exercised on {target.name}:", *left_out(target.name), sep="\n  ", flush=True)
    return code
