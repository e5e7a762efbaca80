#!/usr/bin/env python3
"""Runs the main job, or test files, again and again, and says how often that failed and how long it took.

Each run is a process of its own, with a directory of its own below --out. Runs that are finished there count: the same
command again goes on where it was stopped.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "python"))

from pdkit.core.command import (  # noqa: E402
    Parser,
    natural,
    run_command,  # noqa: E402
)
from pdkit.core.errors import ExitCode, UsageError  # noqa: E402
from pdkit.runner.targets import TARGETS  # noqa: E402

COMMAND = (sys.executable, "-m", "pdkit", "run")
WIDTH = 40


@dataclass(frozen=True)
class Run:
    """Run `number` ended with `exit_code` after `seconds`; `score` is None where it got that far not."""

    number: int
    exit_code: int
    seconds: float
    score: float | None

    @property
    def failed(self) -> bool:
        return self.exit_code != ExitCode.PASSED


class Soak:
    """The runs below one directory; `stop` makes the rest not begin."""

    def __init__(self, out: Path, rung: str, file: Path | None = None):
        self.out, self.rung, self.file = out, rung, file
        self.stop = threading.Event()
        self.processes: set[subprocess.Popen] = set()
        self._lock = threading.Lock()

    def finished(self, number: int) -> Run | None:
        try:
            return Run(**json.loads((self._directory(number) / "soak.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def run(self, number: int) -> Run | None:
        """The run of that number, done now unless it is there already; None where it was stopped."""
        if (done := self.finished(number)) or self.stop.is_set():
            return done
        directory = self._directory(number)
        directory.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        with (directory / "output.log").open("wb") as output:
            with self._lock:
                if self.stop.is_set():
                    return None
                process = subprocess.Popen(
                    self._command(directory), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env={**os.environ, "PYTHONPATH": str(REPO / "python"), "PDKIT_REPORT_DIR": str(directory)},
                )  # fmt: skip
                self.processes.add(process)
            code = process.wait()
        self.processes.discard(process)
        if self.stop.is_set():
            return None
        run = Run(number, code, round(time.monotonic() - began, 3), self._score(directory))
        draft = directory / "soak.json.part"
        draft.write_text(json.dumps(asdict(run)) + "\n")
        draft.rename(directory / "soak.json")
        return run

    def _command(self, directory: Path) -> list[str]:
        if self.file:
            return [sys.executable, str(self.file), "-f"]
        return [*COMMAND, "--on", self.rung, "--report-dir", str(directory), "--history", str(self._history)]

    def interrupt(self):
        """Tells what runs to end its servers, and waits for it."""
        with self._lock:
            self.stop.set()
            for process in list(self.processes):
                process.terminate()
        for process in list(self.processes):
            process.wait()

    def _directory(self, number: int) -> Path:
        return self.out / f"run-{number:03d}"

    @property
    def _history(self) -> Path:
        return self.out / "history.jsonl"

    def _score(self, directory: Path) -> float | None:
        from pdkit.core import events
        from pdkit.runner.report.facts import score_of

        found = [score_of(events.read(path)) for path in sorted(directory.rglob(events.FILE))]
        return next((score.value for score in reversed(found) if score), None)


def quantile(values: list[float], share: float) -> float:
    """The least value that at least that share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * round(share * 100) // 100) - 1)]


def summary(runs: list[Run], out: Path) -> str:
    """How many failed, which and why to look, how long they took, and a bar for each."""
    failures = [run for run in runs if run.failed]
    seconds = [run.seconds for run in runs]
    scores = [run.score for run in runs if run.score is not None]
    slowest = max(seconds)
    lines = [
        f"  {run.number:>3}  {'FAILED' if run.failed else 'passed'}  {run.seconds:6.1f} s  "
        f"{'-' if run.score is None else format(run.score, '.3f'):>5}  {'#' * round(WIDTH * run.seconds / (slowest or 1))}"
        for run in runs
    ]
    lines += [f"failed: run {run.number}, exit code {run.exit_code}: {out}/run-{run.number:03d}" for run in failures]
    lines.append(f"seconds: p50 {quantile(seconds, 0.5):.1f}, p90 {quantile(seconds, 0.9):.1f}, slowest {slowest:.1f}")
    if scores:
        lines.append(f"scores: {min(scores):.3f} to {max(scores):.3f}")
    upper = 1 - 0.05 ** (1 / len(runs)) if not failures else None
    lines.append(
        f"{len(runs)} runs, {len(failures)} failures"
        + (f"; a failure rate above {upper:.1%} is refuted at 95 %" if upper is not None else "")
    )
    return "\n".join(lines)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="soak.py", description=__doc__.strip(), allow_abbrev=False)
    parser.add_argument("--runs", type=natural, default=50, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument(
        "--jobs", type=natural, default=1, metavar="N", help="how many at a time (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where logs and results are kept")
    parser.add_argument("--rung", default="embedded", choices=[rung.name for rung in TARGETS], help="%(default)s")
    parser.add_argument("--file", type=Path, metavar="TEST_FILE", help="run this test file instead of the main job")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at the first failure")
    args = parser.parse_args(argv)
    if not args.runs or not args.jobs:
        raise UsageError("--runs and --jobs: at least 1")
    if args.file and not args.file.is_file():
        raise UsageError(f"--file {args.file}: no such file")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {args.out}: {error.strerror}") from None
    args.out = args.out.absolute()
    return args


def main(argv: list[str]) -> ExitCode:
    args = parse(argv)
    soak, runs = Soak(args.out, args.rung, args.file), []
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            for run in pool.map(soak.run, range(1, args.runs + 1)):
                if run is None:
                    continue
                runs.append(run)
                state = "FAILED" if run.failed else "passed"
                print(f"[{len(runs)}/{args.runs}] run {run.number} {state} in {run.seconds:.1f} s", flush=True)
                if run.failed and not args.keep_going:
                    soak.interrupt()
        except KeyboardInterrupt:
            soak.interrupt()
    if not runs:
        print("no run was finished", flush=True)
    else:
        print(summary(runs, args.out), flush=True)
    if any(run.failed for run in runs):
        return ExitCode.FAILED
    return ExitCode.PASSED if len(runs) == args.runs else ExitCode.INTERRUPTED


if __name__ == "__main__":
    import signal

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(run_command("soak.py", main, sys.argv[1:]))
