"""Runs the main job, or a test file, again and again: how often it failed, and how long it took.

Each run is a process of its own, with a directory of its own. Runs that are finished there count: the same command again
goes on where it was stopped.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from dataclasses import asdict, dataclass
from pathlib import Path

from pdkit.core import events
from pdkit.core.errors import ExitCode, UsageError
from pdkit.core.quantile import quantile
from pdkit.runner.report.facts import score_of

COMMAND = (sys.executable, "-m", "pdkit", "run")
PYTHONPATH = str(Path(__file__).resolve().parents[2])
WIDTH = 40
AGAIN_S = 5.0  # until what was started meanwhile is asked to end, too


@dataclass(frozen=True)
class Repeat:
    """Run `number` ended with `exit_code` after `seconds`; `score` is None where it did not get that far."""

    number: int
    exit_code: int
    seconds: float
    score: float | None

    @property
    def state(self) -> str:
        return "passed" if self.exit_code == ExitCode.PASSED else "FAILED"


class Repetition:
    """The runs below one directory, and the processes of those that are running."""

    def __init__(self, out: Path, target: str, file: Path | None = None):
        self.out, self.target, self.file = out, target, file
        self.processes: set[subprocess.Popen[bytes]] = set()

    def directory(self, number: int) -> Path:
        return self.out / f"run-{number:03d}"

    def run(self, number: int) -> Repeat:
        """The run of that number, done now unless it was kept before."""
        directory = self.directory(number)
        try:
            return Repeat(**json.loads((directory / "run.json").read_text()))
        except (OSError, ValueError, TypeError):
            directory.mkdir(parents=True, exist_ok=True)
        history = str(self.out / "history.jsonl")
        command = [*COMMAND, "--on", self.target, "--report-dir", str(directory), "--history", history]
        if self.file:
            command = [sys.executable, str(self.file), "-f"]
        environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "PDKIT_REPORT_DIR": str(directory)}
        began = time.monotonic()
        with (directory / "output.log").open("wb") as output:
            nothing, both = subprocess.DEVNULL, subprocess.STDOUT
            process = subprocess.Popen(
                command, env=environment, stdin=nothing, stdout=output, stderr=both, start_new_session=True
            )
            self.processes.add(process)
            code = process.wait()
        self.processes.discard(process)
        found = [score_of(events.read(path)) for path in sorted(directory.rglob(events.FILE))]
        score = next((score.value for score in reversed(found) if score), None)
        return Repeat(number, code, round(time.monotonic() - began, 3), score)

    def keep(self, run: Repeat) -> None:
        path = self.directory(run.number) / "run.json"
        draft = path.with_suffix(".json.part")
        draft.write_text(json.dumps(asdict(run)) + "\n")
        draft.rename(path)


def summary(runs: list[Repeat], out: Path) -> str:
    """How many failed, which and why to look, how long they took, and a bar for each."""
    failures = [run for run in runs if run.exit_code]
    seconds = [run.seconds for run in runs]
    scores = [run.score for run in runs if run.score is not None]
    slowest = max(seconds)
    lines = [
        f"  {run.number:>3}  {run.state}  {run.seconds:6.1f} s  "
        f"{'-' if run.score is None else format(run.score, '.3f'):>5}  {'#' * round(WIDTH * run.seconds / (slowest or 1))}"
        for run in runs
    ]
    lines += [f"failed: run {run.number}, exit code {run.exit_code}: {out}/run-{run.number:03d}" for run in failures]
    lines.append(f"seconds: p50 {quantile(seconds, 0.5):.1f}, p90 {quantile(seconds, 0.9):.1f}, slowest {slowest:.1f}")
    if scores:
        lines.append(f"scores: {min(scores):.3f} to {max(scores):.3f}")
    refuted = f"; a failure rate above {1 - 0.05 ** (1 / len(runs)):.1%} is refuted at 95 %"
    return "\n".join([*lines, f"{len(runs)} runs, {len(failures)} failures{'' if failures else refuted}"])


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
        futures = [pool.submit(repetition.run, number) for number in range(1, times + 1)]
        try:
            for future in as_completed(futures):
                run = future.result()
                repetition.keep(run)
                runs.append(run)
                print(f"[{len(runs)}/{times}] run {run.number} {run.state} in {run.seconds:.1f} s", flush=True)
                if run.exit_code and not keep_going:
                    break
        except KeyboardInterrupt:
            pass
        pool.shutdown(wait=False, cancel_futures=True)
        asked: set[subprocess.Popen[bytes]] = set()
        while running := [future for future in futures if not future.done()]:
            for process in set(repetition.processes) - asked:  # once: a second signal means to drop everything
                process.terminate()
                asked.add(process)
            wait(running, AGAIN_S)
    runs.sort(key=lambda run: run.number)
    print(summary(runs, out.absolute()) if runs else "no run was finished", flush=True)
    if any(run.exit_code for run in runs):
        return ExitCode.FAILED
    return ExitCode.PASSED if len(runs) == times else ExitCode.INTERRUPTED
