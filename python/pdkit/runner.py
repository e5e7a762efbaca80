"""Runs selected test files one after the other, each in a process and session of its own."""

import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import pdkit
from pdkit import process_tree
from pdkit.exit_codes import ExitCode
from pdkit.options import Options, UsageError
from pdkit.outcome import FileState, Output, exit_code_of, read_output, tally
from pdkit.registry import Registration, Selection, syntax_errors

POLL_S = 0.25
DRAIN_S = 5.0
NO_TESTS_EXIT_CODE = 5
RULE = "=" * 60


class Console:
    """The output stream, shared by our lines and the bytes of the children; a reader that goes away stops nothing."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream
        self._lock = threading.Lock()
        self._at_margin = True
        self._is_open = True

    def write(self, data: bytes):
        with self._lock:
            if not (data and self._is_open):
                return
            try:
                self._stream.write(data)
                self._stream.flush()
            except OSError:
                self._is_open = False
            self._at_margin = data.endswith(b"\n")

    def line(self, text: str = ""):
        margin = "" if self._at_margin else "\n"
        self.write(f"{margin}{text}\n".encode())


class Interruption:
    """Remembers SIGINT and SIGTERM instead of raising, so that no child is lost between two statements."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.requested_by: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.requested_by is not None

    def _remember(self, number, _frame):
        self.requested_by = self.requested_by or signal.Signals(number)

    def __enter__(self):
        self._previous = {number: signal.signal(number, self._remember) for number in self.SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def sleep(self, seconds: float):
        """Sleeps, or returns early once interrupted."""
        deadline = time.monotonic() + seconds
        while not self and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(POLL_S, left))


@dataclass(frozen=True)
class Attempt:
    """One run of one file; `exit_code` is None where we ended it, `forced` then says why."""

    log: str
    seconds: float
    exit_code: int | None
    output: Output
    forced: FileState | None = None
    leftovers: tuple[str, ...] = ()

    @property
    def verdict(self) -> tuple[FileState, str]:
        """State of the file had this been the only attempt, and why it is not simply passed."""
        counts = self.output.counts
        if self.forced:
            return self.forced, f"after {self.seconds:.0f} s; its processes were ended"
        ran_none = counts is not None and not counts.executed and not counts.failed
        if self.exit_code and not (self.exit_code == NO_TESTS_EXIT_CODE and ran_none):
            return FileState.FAILED, _exit_reason(self.exit_code)
        if counts is None:
            return FileState.NOTHING_RAN, "no closing line of unittest or pytest in its output"
        if counts.failed:
            return FileState.FAILED, "exit code 0, but its closing line tells of failed tests"
        if ran_none:
            return (FileState.ALL_SKIPPED, "") if counts.skipped else (FileState.NOTHING_RAN, "it has no tests")
        if counts.retried:
            return FileState.PASSED_ON_RETRY, f"retries of test methods: {counts.retried}"
        return FileState.PASSED, ""

    @property
    def is_retriable(self) -> bool:
        state, _ = self.verdict
        return state is FileState.TIMED_OUT or (state is FileState.FAILED and self.output.is_retriable)


@dataclass(frozen=True)
class FileResult:
    """What became of one registration."""

    registration: Registration
    state: FileState
    reason: str = ""
    command: tuple[str, ...] = ()
    attempts: tuple[Attempt, ...] = ()

    @property
    def seconds(self) -> float:
        """Of the last attempt, as SGLang's timings have it."""
        return self.attempts[-1].seconds if self.attempts else 0.0

    def as_dict(self) -> dict:
        registration = self.registration
        last = self.attempts[-1] if self.attempts else None
        counts = last.output.counts if last else None
        return {
            "file": registration.name,
            "path": registration.filename,
            "hw": registration.hw,
            "suite": registration.suite,
            "est_time": registration.est_time,
            "state": self.state.value,
            "reason": self.reason,
            "seconds": round(self.seconds, 3),
            "exit_code": last.exit_code if last else None,
            "tests": asdict(counts) if counts else None,
            "command": list(self.command),
            "attempts": [
                {
                    "state": attempt.verdict[0].value,
                    "seconds": round(attempt.seconds, 3),
                    "exit_code": attempt.exit_code,
                    "log": attempt.log,
                    "leftovers": list(attempt.leftovers),
                }
                for attempt in self.attempts
            ],
        }

    def describe(self) -> str:
        """One line for people."""
        parts = [f"{self.state.value}: {self.registration.name}"]
        if self.attempts:
            parts.append(f"{self.seconds:.1f} s (estimated {self.registration.est_time:g} s)")
            if counts := self.attempts[-1].output.counts:
                parts.append(f"tests: {counts.executed} run, {counts.skipped} skipped, {counts.failed} failed")
        if len(self.attempts) > 1:
            parts.append(f"{len(self.attempts)} attempts")
        if self.reason:
            parts.append(self.reason)
        return "; ".join(parts)


def _exit_reason(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def python3_directory(executable: str, scratch: Path) -> str:
    """A directory whose `python3` is `executable`: its own, or `scratch` with a wrapper written into it."""
    own = Path(executable).parent
    try:
        if os.path.samefile(own / "python3", executable):
            return str(own)
    except OSError:
        pass
    wrapper = scratch / "python3"
    wrapper.write_text(f'#!/bin/sh\nexec {shlex.quote(executable)} "$@"\n')
    wrapper.chmod(0o755)
    return str(scratch)


def child_environment(options: Options, python3_from: str) -> dict[str, str]:
    """Ours, but that children find this interpreter as `python3`, this package, and the retries that were asked for."""
    environment = dict(os.environ)
    package_root = str(Path(pdkit.__path__[0]).parent)
    for name, first in (("PATH", python3_from), ("PYTHONPATH", package_root)):
        rest = environment.get(name)
        environment[name] = os.pathsep.join([first, rest] if rest else [first])
    environment["PYTHONUNBUFFERED"] = "1"
    environment["SGLANG_TEST_MAX_RETRY"] = str(options.test_max_retry)
    return environment


def _pump(source, log: Path, console: Console):
    with log.open("wb") as file:
        while chunk := os.read(source.fileno(), 65536):
            file.write(chunk)
            file.flush()
            console.write(chunk)


def _wait(process: subprocess.Popen, timeout: float, interruption: Interruption) -> FileState | None:
    """Why the process has to be ended, or None once it ended by itself."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            process.wait(max(0.0, min(POLL_S, deadline - time.monotonic())))
            return None
        except subprocess.TimeoutExpired:
            if interruption:
                return FileState.INTERRUPTED
            if time.monotonic() >= deadline:
                return FileState.TIMED_OUT


def run_attempt(
    command: tuple[str, ...],
    environment: dict[str, str],
    log: Path,
    timeout: float,
    console: Console,
    interruption: Interruption,
    test_max_retry: int = 0,
) -> Attempt:
    """Runs `command` in a new session for at most `timeout` seconds; whatever it started is gone afterwards."""
    token = process_tree.new_token(environment)
    started, tic = time.time(), time.monotonic()
    process = subprocess.Popen(
        command,
        env=environment | {process_tree.TOKEN_VARIABLE: token},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    pump = threading.Thread(target=_pump, args=(process.stdout, log, console), daemon=True)
    pump.start()
    forced = _wait(process, timeout, interruption)
    seconds = time.monotonic() - tic
    ended = process_tree.end(process.pid, started, token)
    process.wait()
    pump.join(DRAIN_S)
    if not pump.is_alive():
        process.stdout.close()
    with log.open(errors="replace") as lines:
        output = read_output(lines, test_max_retry)
    return Attempt(
        log=log.name,
        seconds=seconds,
        exit_code=None if forced else process.returncode,
        output=output,
        forced=forced,
        leftovers=() if forced else tuple(ended),
    )


class SuiteRun:
    """The files of one selection, run in order; `results` grows by one per file."""

    def __init__(self, selection: Selection, options: Options, logs: Path, scratch: Path, interruption: Interruption):
        self.selection = selection
        self.options = options
        self.logs = logs
        self.interruption = interruption
        self.console = Console(sys.stdout.buffer)
        self.environment = child_environment(options, python3_directory(sys.executable, scratch))
        self.results: list[FileResult] = []
        self.tic = time.monotonic()

    def run(self) -> ExitCode:
        self._print_header()
        total = len(self.selection.enabled)
        for number, registration in enumerate(self.selection.enabled, start=1):
            if self.interruption or (self._has_failed and not self.options.continue_on_error):
                self._add(FileResult(registration, FileState.NOT_RUN))
                continue
            result = self._run_file(registration, number, f"[{number}/{total}]")
            self._add(result)
            self.console.line(f"[{number}/{total}] {result.describe()}")
            self._append_metrics(result)
        for registration in self.selection.disabled:
            self._add(FileResult(registration, FileState.DISABLED, registration.disabled or "no reason given"))
        self._write_results(finished=True)
        self._print_summary()
        return self.exit_code

    @property
    def states(self) -> list[FileState]:
        return [result.state for result in self.results]

    @property
    def exit_code(self) -> ExitCode:
        return ExitCode.INTERRUPTED if self.interruption else exit_code_of(self.states)

    @property
    def _has_failed(self) -> bool:
        return any(state.is_failure for state in self.states)

    def _add(self, result: FileResult):
        self.results.append(result)
        if result.state.was_started:
            self._write_results()

    def _run_file(self, registration: Registration, number: int, label: str) -> FileResult:
        options = self.options
        timeout = options.timeout(registration.est_time)
        command = (sys.executable, registration.filename) + (("-f",) if options.failfast else ())
        attempts = []
        for count in range(1, options.attempts + 1):
            again = f", attempt {count} of {options.attempts}" if count > 1 else ""
            plan = f"estimated {registration.est_time:g} s, limit {timeout:g} s{again}"
            self.console.line(f"{label} {registration.name} ({plan})")
            self.console.line(f"$ {shlex.join(command)}")
            log = self.logs / f"{number:03d}-{Path(registration.filename).stem}.{count}.log"
            attempt = run_attempt(
                command, self.environment, log, timeout, self.console, self.interruption, options.test_max_retry
            )
            attempts.append(attempt)
            for leftover in attempt.leftovers:
                self.console.line(f"{label} it left a process behind, ended now: {leftover}")
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

    def _print_header(self):
        options, selection = self.options, self.selection
        nightly = ", nightly" if options.nightly else ""
        part = f", partition {options.partition_id} of {options.partition_size}" if options.partition_size else ""
        count = len(selection.enabled)
        self.console.line(
            f"suite {options.suite} on {options.hw}{nightly}{part}: {count} file{'s' * (count != 1)}, "
            f"estimated {selection.est_time:g} s, Python {platform.python_version()} ({sys.executable})"
        )
        given = os.environ.get("SGLANG_TEST_MAX_RETRY")
        if given not in (None, str(options.test_max_retry)):
            self.console.line(
                f"SGLANG_TEST_MAX_RETRY={given} of the environment is ignored: "
                f"{options.test_max_retry} retries per method (--test-max-retry)"
            )
        for registration in selection.disabled:
            self.console.line(f"disabled: {registration.name}; {registration.disabled or 'no reason given'}")

    def _print_summary(self):
        line = self.console.line
        line(RULE)
        for result in self.results:
            line(result.describe())
        if self.selection.why_empty:
            line(f"nothing ran: {self.selection.why_empty}")
        if self.interruption:
            line(f"interrupted by {self.interruption.requested_by.name}")
        elif self.exit_code is ExitCode.NOTHING_RAN and self.selection.enabled:
            line("a file that runs none of its tests proves nothing: this is not a pass")
        line("========== TIMINGS BEGIN ==========")
        for result in self.results:
            if result.state.was_started:
                path = os.path.join(self.options.test_root.absolute().parent.name, result.registration.name)
                line(json.dumps({"file": path, "passed": result.state.is_pass, "elapsed": round(result.seconds)}))
        line("========== TIMINGS END ==========")
        if self.options.report_dir:
            line(f"logs and results.json: {self.logs}")
        line(f"{self.exit_code.name.lower().replace('_', ' ')} in {time.monotonic() - self.tic:.1f} s")
        line(tally(self.states))

    def _write_results(self, finished: bool = False):
        if not self.options.report_dir:
            return
        document = {
            "command": [sys.executable, *sys.argv],
            "hw": self.options.hw,
            "suite": self.options.suite,
            "nightly": self.options.nightly,
            "partition_id": self.options.partition_id,
            "partition_size": self.options.partition_size,
            "test_max_retry": self.options.test_max_retry,
            "python": platform.python_version(),
            "seconds": round(time.monotonic() - self.tic, 3),
            "finished": finished,
            "exit_code": int(self.exit_code) if finished else None,
            "result": self.exit_code.name.lower() if finished else None,
            "files": [result.as_dict() for result in self.results],
        }
        path = self.logs / "results.json"
        draft = path.with_suffix(".json.part")
        draft.write_text(json.dumps(document, indent=2) + "\n")
        draft.replace(path)

    def _append_metrics(self, result: FileResult):
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
        try:
            with open(path, "a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            self.console.line(f"SGLANG_TEST_METRICS_FILE {path}: {error.strerror}")


def run_suite(selection: Selection, options: Options) -> ExitCode:
    """Runs the enabled files of `selection` and prints what became of them.

    Raises UsageError, before anything ran, where a file is not Python or the report directory cannot be made.
    """
    if errors := syntax_errors(selection.enabled):
        raise UsageError("\n".join(errors))
    with tempfile.TemporaryDirectory(prefix="run_suite_") as scratch, Interruption() as interruption:
        logs = options.report_dir.absolute() if options.report_dir else Path(scratch)
        try:
            logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--report-dir {logs}: {error.strerror}") from None
        return SuiteRun(selection, options, logs, Path(scratch), interruption).run()
