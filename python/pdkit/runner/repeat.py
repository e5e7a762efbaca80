"""Runs the main job, or a test file, again and again: how often it failed, and how long it took.

Each run is a process of its own, with a directory of its own. Runs that are finished there count: the same command again
goes on where it was stopped.
"""

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from pdkit.core.errors import ExitCode, UsageError
from pdkit.core.quantile import quantile

COMMAND = (sys.executable, "-m", "pdkit", "run")
PYTHONPATH = str(Path(__file__).resolve().parents[2])
WIDTH = 40


@dataclass(frozen=True)
class Repeat:
    """Run `number` ended with `exit_code` after `seconds`; `score` is None where it did not get that far."""

    number: int
    exit_code: int
    seconds: float
    score: float | None

    @property
    def failed(self) -> bool:
        return self.exit_code != ExitCode.PASSED


class Repetition:
    """The runs below one directory; `stop` makes the rest not begin."""

    def __init__(self, out: Path, target: str, file: Path | None = None):
        self.out, self.target, self.file = out, target, file
        self.stop = threading.Event()
        self.processes: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()

    def finished(self, number: int) -> Repeat | None:
        try:
            return Repeat(**json.loads((self._directory(number) / "run.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def run(self, number: int) -> Repeat | None:
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
                    env={**os.environ, "PYTHONPATH": PYTHONPATH, "PDKIT_REPORT_DIR": str(directory)},
                )  # fmt: skip
                self.processes.add(process)
            code = process.wait()
        self.processes.discard(process)
        if self.stop.is_set():
            return None
        run = Repeat(number, code, round(time.monotonic() - began, 3), self._score(directory))
        draft = directory / "run.json.part"
        draft.write_text(json.dumps(asdict(run)) + "\n")
        draft.rename(directory / "run.json")
        return run

    def _command(self, directory: Path) -> list[str]:
        if self.file:
            return [sys.executable, str(self.file), "-f"]
        return [*COMMAND, "--on", self.target, "--report-dir", str(directory), "--history", str(self._history)]

    def interrupt(self) -> None:
        """Asks what runs to end its servers, and waits for it."""
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


def summary(runs: list[Repeat], out: Path) -> str:
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


def repeat(
    out: Path, target: str, times: int, jobs: int = 1, keep_going: bool = False, file: Path | None = None
) -> ExitCode:
    """Runs `target`, or `file`, `times` times, `jobs` at once, until one fails or in spite of it; prints a table.

    Raises UsageError where `out` cannot be a directory.
    """
    if file and not file.is_file():
        raise UsageError(f"--file {file}: no such file")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--report-dir {out}: {error.strerror}") from None
    repetition, runs = Repetition(out.absolute(), target, file), []
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for run in pool.map(repetition.run, range(1, times + 1)):
                if run is None:
                    continue
                runs.append(run)
                state = "FAILED" if run.failed else "passed"
                print(f"[{len(runs)}/{times}] run {run.number} {state} in {run.seconds:.1f} s", flush=True)
                if run.failed and not keep_going:
                    repetition.interrupt()
        except KeyboardInterrupt:
            repetition.interrupt()
    print(summary(runs, out.absolute()) if runs else "no run was finished", flush=True)
    if any(run.failed for run in runs):
        return ExitCode.FAILED
    return ExitCode.PASSED if len(runs) == times else ExitCode.INTERRUPTED
