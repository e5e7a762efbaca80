"""Runs selected test files, several side by side where the machine has the cores, each in a session of its own."""

import contextlib
import json
import os
import platform
import shlex
import shutil
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import datetime, timezone
from pathlib import Path

from pdkit.core import source
from pdkit.core.console import Console
from pdkit.core.errors import ExitCode, UsageError
from pdkit.core.host import command_line
from pdkit.core.registry import Registration, syntax_errors
from pdkit.runner import narrow
from pdkit.runner.attempt import child_environment, python3_directory, run_attempt
from pdkit.runner.guardian import Popen
from pdkit.runner.history.record import of_run
from pdkit.runner.history.store import append
from pdkit.runner.interruption import Interruption
from pdkit.runner.options import Options
from pdkit.runner.outcome import FileState, exit_code_of, tally
from pdkit.runner.report import evidence, progress
from pdkit.runner.report.model import FileRun, Report
from pdkit.runner.report.progress import Board
from pdkit.runner.report.read import read_results
from pdkit.runner.report.terminal import cause, log_tails, not_exercised, rows
from pdkit.runner.results import Attempt, FileResult, all_passed
from pdkit.runner.select import Selection
from pdkit.runner.warm import Warm

RULE = "=" * 60
POLL_S = 0.1
REFRESH_S = 1.0
SIDE_BY_SIDE = {
    "OMP_NUM_THREADS": "1",  # threads of torch spin on cores which others need
    # Memory of a tensor is kept for the next one: its pages are not given back and mapped anew with each operation.
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),  # bytes, the most that glibc takes
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
}
LANES_AT_MOST = 4  # two more than cores: half of the time test files wait, for servers, deaths and timeouts

Numbered = tuple[int, Registration]


def lanes(files: Sequence[Registration], options: Options) -> list[tuple[list[Numbered], int]]:
    """The files in the order in which they are started, numbered from 1, in groups: (files, how many run side by side).

    Side by side the longest start first, so that all lanes end together. Without --jobs there are two lanes more than
    cores for files on CPU, and one for those that need GPUs: they share GPU memory, and some measure.
    """
    cores = len(os.sched_getaffinity(0))
    few = min(LANES_AT_MOST, cores + 2) if cores > 1 else 1
    is_alone = {each: each.hw != "cpu" and not options.jobs for each in files}
    jobs = options.jobs or (1 if options.verbose else few)
    together = [each for each in files if not is_alone[each]]
    if jobs > 1:
        together.sort(key=lambda each: -each.est_time)
    alone = [each for each in files if is_alone[each]]
    groups: list[tuple[list[Numbered], int]] = []
    count = 0
    for group, at_once in [(together, jobs), (alone, 1)] * options.repeat:
        if group:
            groups.append((list(enumerate(group, start=count + 1)), min(at_once, len(group))))
            count += len(group)
    return groups


class SuiteRun:
    """The files of one selection, run side by side or in order; `results` grows by one per file."""

    def __init__(self, selection: Selection, options: Options, logs: Path, scratch: Path, interruption: Interruption):
        self.selection = selection
        self.options = options
        self.logs = logs
        self.interruption = interruption
        self.console = Console(sys.stdout.buffer)
        self._board = Board(self.console)
        self.environment = child_environment(options, python3_directory(sys.executable, scratch))
        self._parts = lanes(selection.enabled, options)
        if any(jobs > 1 for _, jobs in self._parts):
            self.environment = SIDE_BY_SIDE | self.environment
        self._warm = Warm(selection.enabled, self.environment, logs, self.console, interruption, options.warm)
        self._total = sum(len(files) for files, _ in self._parts)
        self._results: dict[int, FileResult] = {}
        self._lock = threading.Lock()
        self.began, self.tic = datetime.now(timezone.utc), time.monotonic()

    def run(self) -> ExitCode:
        self._print_header()
        with contextlib.closing(self._warm):
            self._warm.begin()
            for files, jobs in self._parts:
                self._run_lanes(files, jobs)
        for number, registration in enumerate(self.selection.disabled, start=self._total + 1):
            self._results[number] = FileResult(
                registration, FileState.DISABLED, registration.disabled or "no reason given"
            )
        self._write_results(finished=True)
        self._append_history()
        self._keep_failed()
        self._print_summary()
        return self.exit_code

    def _run_lanes(self, files: list[Numbered], jobs: int) -> None:
        """Runs files in `jobs` threads, while this one is free to see signals. What breaks a lane ends the run."""
        waiting, shown_at = deque(files), time.monotonic()
        with ThreadPoolExecutor(jobs) as pool:
            running = started = {pool.submit(self._lane, waiting, jobs) for _ in range(jobs)}
            while running:  # never one long wait: a signal that arrives just before it would be seen only after it
                _, running = wait(running, POLL_S)
                if time.monotonic() - shown_at >= REFRESH_S:
                    shown_at = time.monotonic()
                    self._board.tick()
        for lane in started:
            lane.result()

    def _lane(self, waiting: "deque[Numbered]", jobs: int) -> None:
        try:
            while True:
                with self._lock:
                    if not waiting:
                        return
                    place = self._warm.next_of([registration for _, registration in waiting]) if jobs > 1 else 0
                    number, registration = waiting[place]
                    del waiting[place]
                    starts = not self.interruption and (self.options.continue_on_error or not self._has_failed)
                if starts:
                    result = self._run_file(registration, number, f"[{number}/{self._total}]", jobs)
                else:
                    result = FileResult(registration, FileState.NOT_RUN)
                with self._lock:
                    self._add(number, result)
        except BaseException:
            with self._lock:
                waiting.clear()
            raise

    def _draw_report(self) -> None:
        """Draws what was kept; a report that cannot be drawn is no failure of what was tested."""
        from pdkit.runner.report.write import write  # jinja2: only a run with a report pays for it

        try:
            for line in write(self.logs):
                self.console.line(line)
        except Exception as error:
            self.console.line(f"no report could be drawn from {self.logs}: {type(error).__name__}: {error}")

    @property
    def results(self) -> list[FileResult]:
        return [result for _, result in sorted(self._results.items())]

    @property
    def states(self) -> list[FileState]:
        return [result.state for result in self.results]

    @property
    def exit_code(self) -> ExitCode:
        return ExitCode.INTERRUPTED if self.interruption else exit_code_of(self.states)

    @property
    def _has_failed(self) -> bool:
        return any(state.is_failure for state in self.states)

    def _add(self, number: int, result: FileResult) -> None:
        self._results[number] = result
        if result.state.was_started:
            self._write_results()
            self.console.line(f"[{number}/{self._total}] {result.describe()}")
            self._append_metrics(result)

    def _run_file(self, registration: Registration, number: int, label: str, jobs: int) -> FileResult:
        options = self.options
        timeout = options.timeout(registration.est_time)
        command: tuple[str, ...] = (sys.executable, "-m", _program(Path(registration.filename)), registration.filename)
        command += ("-f",) if options.failfast else ()
        if options.only and not narrow.is_file_named(registration, options.only):
            command += ("-k", options.only)
        attempts = []
        for count in range(1, options.attempts + 1):
            again = f", attempt {count} of {options.attempts}" if count > 1 else ""
            plan = f"estimated {registration.est_time:g} s, limit {timeout:g} s{again}"
            if self.options.verbose or not self.console.is_terminal:
                self.console.line(f"{label} {registration.name} ({plan})")
            if self.options.verbose:
                self.console.line(f"$ {shlex.join(command)}")
            log = self.logs / f"{number:03d}-{Path(registration.filename).stem}.{count}.log"
            popen = self._warm.popen_for(registration.filename)
            attempt = self._attempt(command, log, timeout, jobs, f"{label} {registration.name}", popen)
            attempts.append(attempt)
            for leftover in attempt.leftovers:
                self.console.line(f"{label} it left a process behind, ended now: {leftover}")
            for line in attempt.unreleased:
                self.console.line(f"{label} {line}")
            if count == options.attempts or not attempt.is_retriable or self.interruption:
                break
            self.console.line(
                f"{label} {attempt.verdict[0].value}, {attempt.verdict[1]}; again in {options.retry_wait_seconds:g} s"
            )
            self.interruption.sleep(options.retry_wait_seconds)
            if self.interruption:
                break
        state, reason = attempts[-1].verdict
        if state.is_pass and len(attempts) > 1:
            state, reason = FileState.PASSED_ON_RETRY, f"first attempt: {attempts[0].verdict[0].value}"
        return FileResult(registration, state, reason, command, tuple(attempts))

    def _attempt(
        self, command: tuple[str, ...], log: Path, timeout: float, jobs: int, name: str, popen: Popen
    ) -> Attempt:
        directory, retries = evidence.directory_of(log), self.options.test_max_retry
        environment = self.environment | progress.environment(self.console.is_terminal) | evidence.environment(log)
        with self.console.keeping(directory):
            evidence.start(log)
        is_shown = self.options.verbose and jobs == 1
        self._board.begins(name, directory)
        try:
            attempt = run_attempt(
                command, environment, log, timeout, self.console, self.interruption, retries, is_shown, popen
            )
        finally:
            self._board.ends(directory)
        if self.options.verbose and not is_shown:
            with self.console.keeping(log):
                self.console.write(log.read_bytes())
        with self.console.keeping(directory):
            evidence.end(log)
        return attempt

    def _print_header(self) -> None:
        options, selection = self.options, self.selection
        nightly = ", nightly" if options.nightly else ""
        part = f", partition {options.partition_id} of {options.partition_size}" if options.partition_size else ""
        count = len(selection.enabled)
        where = f"suite {options.suite} on {options.hw}{nightly}{part}: " if options.suite else ""
        again = f", {options.repeat} times" if options.repeat > 1 else ""
        self.console.line(
            f"{where}{count} file{'s' * (count != 1)}{again}, "
            f"estimated {selection.est_time * options.repeat:g} s, Python {platform.python_version()} ({sys.executable})"
        )
        given = os.environ.get("SGLANG_TEST_MAX_RETRY")
        if given not in (None, str(options.test_max_retry)):
            self.console.line(
                f"SGLANG_TEST_MAX_RETRY={given} of the environment is ignored: "
                f"{options.test_max_retry} retries per method (--test-max-retry)"
            )
        if selection.measured:
            self.console.line(selection.measured)
        if not options.report_dir and selection.enabled:
            self.console.line(f"logs: {self.logs}, kept if a file does not pass (--report-dir DIR)")
        for registration in selection.disabled:
            self.console.line(f"disabled: {registration.name}; {registration.disabled or 'no reason given'}")

    def _print_summary(self) -> None:
        """What a reader of the last lines wants to know comes last: the causes of failures, and one line of numbers."""
        line = self.console.line
        if self.options.timings:
            self._print_timings()
        line(RULE)
        not_run = [result for result in self.results if result.state is FileState.NOT_RUN]
        if not_run:
            why = "" if self.interruption else ", for a file before failed (--continue-on-error runs them)"
            line(f"not run: {len(not_run)} file{'s' * (len(not_run) != 1)}{why}")
        if self.selection.why_empty:
            line(f"nothing ran: {self.selection.why_empty}")
        if self.options.repeat > 1:
            for registration in self.selection.enabled:
                runs = [result for result in self.results if result.registration == registration and result.attempts]
                passed = sum(result.state.is_pass for result in runs)
                line(f"{registration.name}: {passed} of {len(runs)} runs passed")
        if self.options.report_dir:
            line(f"logs and results.json: {self.logs}")
            self._draw_report()
        self._print_files()
        unmet = [f"{result.registration.name}: {what}" for result in self.results if result.attempts
                 for what in result.attempts[-1].output.unmet]  # fmt: skip
        if unmet:
            line(f"harm that never took effect: {'; '.join(unmet)}")
        if self.console.lost:
            line(f"report incomplete: {self.console.lost}; what passed and failed is right all the same")
        if by := self.interruption.requested_by:
            line(f"interrupted by {by.name}")
        elif self.exit_code is ExitCode.NOTHING_RAN and self.selection.enabled:
            line("a file that runs none of its tests proves nothing: this is not a pass")
        line(f"{self.exit_code.name.lower().replace('_', ' ')} in {time.monotonic() - self.tic:.1f} s")
        line(tally(self.states))

    def _print_timings(self) -> None:
        """The lines that SGLang's CI reads."""
        self.console.line("========== TIMINGS BEGIN ==========")
        for result in self.results:
            if result.state.was_started:
                path = os.path.join(self.options.test_root.absolute().parent.name, result.registration.name)
                timing = {"file": path, "passed": result.state.is_pass, "elapsed": round(result.seconds)}
                self.console.line(json.dumps(timing))
        self.console.line("========== TIMINGS END ==========")

    def _print_files(self) -> None:
        """Of one file a line per check and what its target leaves out; of several what did not pass in those that failed.

        Then the logs of each file that did not pass and, once more and together, the cause of each.
        """
        started = [result for result in self.results if result.attempts]
        is_one = len(started) == 1
        shown = [result for result in started if is_one or not result.state.is_pass]
        report = self._read(shown)
        runs: Sequence[FileRun | None] = report.files if report else [None] * len(shown)
        for run in filter(None, runs):
            if lines := rows(run, is_one):
                self.console.line("\n".join(lines if is_one else [f"{run.file}:", *lines]))
        if is_one and report and not self.options.target and (lines := not_exercised(report)):
            self.console.line("\n".join(lines))
        bad = [(result, run) for result, run in zip(shown, runs, strict=True) if not result.state.is_pass]
        for run in (run for _, run in bad if run and not self.options.verbose):
            with self.console.keeping(self.logs):
                is_grouped = os.environ.get("GITHUB_ACTIONS") == "true"
                self.console.line("\n".join(log_tails(run, self.logs, is_grouped)))
        for result, known in bad:
            why = cause(known) if known else ()
            lines = [result.describe(), *why, f"  log: {self.logs / result.attempts[-1].log}"]
            self.console.line("\n".join(lines))

    def _read(self, results: list[FileResult]) -> Report | None:
        """What is known of them, None where that cannot be read: it changes nothing but what is shown."""
        try:
            return read_results(self.logs, {"files": [result.as_dict() for result in results]})
        except Exception as error:
            self.console.line(f"the logs in {self.logs} cannot be read: {type(error).__name__}: {error}")
            return None

    def _write_results(self, finished: bool = False) -> None:
        if not self.options.report_dir:
            return
        asked = ("hw", "target", "suite", "nightly", "partition_id", "partition_size", "test_max_retry")
        document = {
            "command": command_line(),
            **{name: getattr(self.options, name) for name in asked},
            "python": platform.python_version(),
            "seconds": round(time.monotonic() - self.tic, 3),
            "finished": finished,
            "exit_code": int(self.exit_code) if finished else None,
            "result": self.exit_code.name.lower() if finished else None,
            "files": [result.as_dict() for result in self.results],
        }
        path = self.logs / "results.json"
        draft = path.with_suffix(".json.part")
        with self.console.keeping(path):
            draft.write_text(json.dumps(document, indent=2) + "\n")
            draft.replace(path)

    def _append_metrics(self, result: FileResult) -> None:
        """One record per file where SGLang's CI asks for them with SGLANG_TEST_METRICS_FILE."""
        path = os.environ.get("SGLANG_TEST_METRICS_FILE")
        if not path:
            return
        record = {
            "kind": "file",
            "test_file": Path(result.registration.filename).name,
            "status": "pass" if result.state.is_pass else "fail",
            "duration": round(result.seconds, 2),
        }
        if not result.state.is_pass:
            record["error"] = f"{result.state.value}: {result.reason}"
        with self.console.keeping(Path(path)), open(path, "a") as file:
            file.write(json.dumps(record) + "\n")

    def _append_history(self) -> None:
        path = self.options.history
        if not path or not any(result.attempts for result in self.results):
            return
        seconds = time.monotonic() - self.tic
        with self.console.keeping(path, " (--history FILE, or --no-history)"):
            done = of_run(self.options, self.results, self.logs, self.exit_code, self.began, seconds)
            append(path, done)

    def _keep_failed(self) -> None:
        """Notes for --last-failed; who ran a part of the tests of a file does not know that it passes."""
        path = self.options.last_failed_file
        if not path or not any(result.attempts for result in self.results):
            return
        failed = [r.registration.filename for r in self.results if r.state in (FileState.FAILED, FileState.TIMED_OUT)]
        passed = [] if self.options.only else [r.registration.filename for r in self.results if r.state.is_pass]
        with self.console.keeping(path):
            narrow.keep(path, failed, passed)


def _program(test: Path) -> str:
    """What runs a test file: PD tests that stand on SGLang's own fixture are supervised, all are recorded."""
    try:
        attaches = any(cls.stands_on_sglang for cls in source.read(test).classes.values())
    except (OSError, SyntaxError):  # of a file that was changed since the run began: running it says what is wrong
        attaches = False
    return "pdkit.deployment.attach" if attaches else "pdkit.core.recording"


def run_suite(selection: Selection, options: Options) -> ExitCode:
    """Runs the enabled files of `selection` and prints what became of them.

    Raises UsageError, before anything ran, where a file is not Python or the report directory cannot be written.
    """
    if errors := syntax_errors(selection.enabled):
        raise UsageError("\n".join(errors))
    with tempfile.TemporaryDirectory(prefix="run_suite_") as scratch, Interruption() as interruption:
        logs = options.report_dir.absolute() if options.report_dir else Path(tempfile.mkdtemp(prefix="pdkit-logs-"))
        try:
            logs.mkdir(parents=True, exist_ok=True)
            if options.report_dir:
                evidence.begin(logs, selection.enabled)
        except OSError as error:
            raise UsageError(f"--report-dir {error.filename}: {error.strerror}") from None
        run = SuiteRun(selection, options, logs, Path(scratch), interruption)
        code = run.run()
        if not options.report_dir and all_passed(run.results):
            shutil.rmtree(logs, ignore_errors=True)
        return code
