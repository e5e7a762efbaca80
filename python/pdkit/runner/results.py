"""What became of a test file: its attempts, its state, and what is written of them."""

import signal
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from pdkit.core.registry import Registration
from pdkit.runner.outcome import FileState, Output

NO_TESTS_EXIT_CODE = 5


@dataclass(frozen=True)
class Attempt:
    """One run of one file; `exit_code` is None where we ended it, `forced` then says why.

    `hung_in` is the phase in which it ran out of time, `leftovers` the processes that it left behind, `unreleased` the
    processes, ports and GPU memory that were there even after those were ended.
    """

    log: str
    seconds: float
    exit_code: int | None
    output: Output
    forced: FileState | None = None
    hung_in: str | None = None
    leftovers: tuple[str, ...] = ()
    unreleased: tuple[str, ...] = ()
    cpu_seconds: float = 0.0  # of all its processes

    @property
    def verdict(self) -> tuple[FileState, str]:
        """State of the file had this been the only attempt, and why it is not simply passed."""
        counts = self.output.counts
        if self.forced:
            where = f" in phase {self.hung_in}" if self.hung_in else ""
            return self.forced, f"after {self.seconds:.0f} s{where}; its processes were ended"
        ran_none = counts is not None and not counts.executed and not counts.failed
        if self.exit_code and not (self.exit_code == NO_TESTS_EXIT_CODE and ran_none):
            return FileState.FAILED, _exit_reason(self.exit_code)
        if self.output.death:
            return FileState.FAILED, f"exit code 0, but {self.output.death}"
        if self.output.unmet:
            return FileState.FAILED, f"exit code 0, but harm had no effect: {', '.join(self.output.unmet)}"
        if counts is None:
            return FileState.NOTHING_RAN, "no event of unittest, and no closing line of pytest in its output"
        if counts.failed:
            return FileState.FAILED, "exit code 0, but tests of it failed"
        if not self.output.is_whole:
            return FileState.FAILED, "exit code 0, but it ended before unittest did"
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

    def as_dict(self) -> dict[str, Any]:
        last = self.attempts[-1] if self.attempts else None
        counts = last.output.counts if last else None
        return {
            **self.registration.as_dict(),
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
                    "cpu_seconds": round(attempt.cpu_seconds, 3),
                    "exit_code": attempt.exit_code,
                    "log": attempt.log,
                    "hung_in": attempt.hung_in,
                    "leftovers": list(attempt.leftovers),
                    "unreleased": list(attempt.unreleased),
                }
                for attempt in self.attempts
            ],
        }

    def describe(self) -> str:
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


def all_passed(results: Iterable[FileResult]) -> bool:
    """Whether each file that was started passed: then nobody needs its logs."""
    return all(result.state.is_pass for result in results if result.attempts)
