"""What became of a test file: how many tests it says it ran, and the state that follows."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from pdkit.exit_codes import ExitCode

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_UNITTEST_RAN = re.compile(r"\bRan (\d+) tests? in [\d.]+s$")
_UNITTEST_VERDICT = re.compile(r"(OK|FAILED|NO TESTS RAN)(?: \(([^()]*)\))?")
_UNITTEST_PROGRESS = re.compile(r"[.sFExu]+")
_UNITTEST_RULE = re.compile(r"-{70}")
_PYTEST_COUNT = r"\d+ (?:passed|failed|errors?|skipped|xfailed|xpassed|warnings?|deselected|rerun|subtests passed)"
_PYTEST_CLOSING = re.compile(
    rf"=*\s*(no tests ran|{_PYTEST_COUNT}(?:, {_PYTEST_COUNT})*) in [\d.]+s(?: \([^()]*\))?\s*=*"
)
_METHOD_RETRY = re.compile(r"retry\(\) failed once \(\d+th try, maximum (\d+) retries\)")

_CODE_ERROR = re.compile(
    r"^(?:\w+\.)*(?:Syntax|Import|ModuleNotFound|Name|Type|Attribute|Runtime|FileNotFound|ConnectionRefused)Error\b"
    r"|\bOOM\b|\bCUDA out of memory\b|\bSegmentation fault\b|\bcore dumped\b",
    re.IGNORECASE,
)
_MISSED_MEASUREMENT = re.compile(
    r"\bAssertionError\b|\baccuracy\b|\bscore\b|\blatency\b|\bthroughput\b|\btimeout\b", re.IGNORECASE
)
_TRANSIENT = re.compile(r"\bUR_RESULT_ERROR_OUT_OF_RESOURCES\b|\bXPU out of memory\b|Server failed to start within")


@dataclass(frozen=True)
class TestCounts:
    """Numbers of tests by the closing line of a test program; `executed` are those that were not skipped."""

    executed: int = 0
    skipped: int = 0
    failed: int = 0
    retried: int = 0

    __test__ = False


@dataclass(frozen=True)
class Output:
    """What the output of one attempt tells; `counts` is None where no unittest or pytest closing line was found."""

    counts: TestCounts | None = None
    has_code_error: bool = False
    has_missed_measurement: bool = False
    is_transient: bool = False

    @property
    def is_retriable(self) -> bool:
        """May go away by itself: a device in trouble, or a missed measurement and no error in the code."""
        return self.is_transient or (self.has_missed_measurement and not self.has_code_error)


class FileState(Enum):
    """How one test file ended."""

    PASSED = "passed"
    PASSED_ON_RETRY = "passed on retry"
    FAILED = "failed"
    TIMED_OUT = "timed out"
    INTERRUPTED = "interrupted"
    ALL_SKIPPED = "all skipped"
    NOTHING_RAN = "nothing ran"
    DISABLED = "disabled"
    NOT_RUN = "not run"

    @property
    def is_pass(self) -> bool:
        return self in (FileState.PASSED, FileState.PASSED_ON_RETRY)

    @property
    def is_failure(self) -> bool:
        return self in (FileState.FAILED, FileState.TIMED_OUT, FileState.INTERRUPTED)

    @property
    def proves_nothing(self) -> bool:
        """The file was started and ended well, yet executed none of its tests."""
        return self in (FileState.ALL_SKIPPED, FileState.NOTHING_RAN)

    @property
    def was_started(self) -> bool:
        return self not in (FileState.DISABLED, FileState.NOT_RUN)


def exit_code_of(states: Iterable[FileState]) -> ExitCode:
    """The exit code of a suite, the worst of its files; disabled files count for nothing."""
    states = list(states)
    if FileState.INTERRUPTED in states:
        return ExitCode.INTERRUPTED
    if any(state.is_failure for state in states):
        return ExitCode.FAILED
    if any(state.proves_nothing for state in states) or not any(state.is_pass for state in states):
        return ExitCode.NOTHING_RAN
    return ExitCode.PASSED


def tally(states: Iterable[FileState]) -> str:
    """`N passed, N failed, N skipped`, counted in files; skipped are all that neither passed nor failed."""
    states = list(states)
    passed = sum(state.is_pass for state in states)
    failed = sum(state.is_failure for state in states)
    return f"{passed} passed, {failed} failed, {len(states) - passed - failed} skipped"


def _unittest_counts(ran: int, verdict: re.Match, progress: str) -> TestCounts:
    """Counts from `Ran N tests`, the verdict below it, and the line of dots above it.

    A class skipped as a whole counts as skipped without counting as run, so where N is no more than the number of
    skips, only the dots tell whether a test was executed.
    """
    named = {name.strip(): int(number) for name, _, number in (p.partition("=") for p in _parts(verdict[2])) if number}
    skipped = named.get("skipped", 0)
    failed = sum(named.get(name, 0) for name in ("failures", "errors", "unexpected successes"))
    executed = max(ran - skipped, 0)
    if not executed and _UNITTEST_PROGRESS.fullmatch(progress):
        dots = len(progress) - progress.count("s")
        executed = dots if dots <= ran and progress.count("s") == skipped else 0
    if verdict[1] == "FAILED":
        failed = max(failed, 1)
    return TestCounts(executed, skipped, failed)


def _parts(text: str | None) -> list[str]:
    return (text or "").split(", ")


def _pytest_counts(summary: str) -> TestCounts:
    named = {}
    for part in summary.split(", "):
        number, _, name = part.partition(" ")
        if number.isdigit():
            named[name] = named.get(name, 0) + int(number)
    failed = sum(named.get(name, 0) for name in ("failed", "error", "errors"))
    executed = failed + sum(named.get(name, 0) for name in ("passed", "xfailed", "xpassed"))
    return TestCounts(executed, named.get("skipped", 0), failed, named.get("rerun", 0))


def read_output(lines: Iterable[str], test_max_retry: int = 0) -> Output:
    """Reads the output of one attempt; of several closing lines the last counts.

    `test_max_retry` is what SGLANG_TEST_MAX_RETRY was: a retry with that maximum is one of a test method, others
    are a server's own affair.
    """
    counts, retried, ran, progress, previous = None, 0, None, "", ""
    code_error = missed_measurement = transient = False
    for line in lines:
        line = _ANSI.sub("", line).strip()
        code_error = code_error or bool(_CODE_ERROR.search(line))
        missed_measurement = missed_measurement or bool(_MISSED_MEASUREMENT.search(line))
        transient = transient or bool(_TRANSIENT.search(line))
        if not line:
            continue
        if retry := _METHOD_RETRY.search(line):
            retried += test_max_retry > 0 and int(retry[1]) == test_max_retry
        if _UNITTEST_RULE.fullmatch(line):
            progress = previous
        elif match := _UNITTEST_RAN.search(line):
            ran = int(match[1])
        elif ran is not None and (verdict := _UNITTEST_VERDICT.fullmatch(line)):
            counts, ran = _unittest_counts(ran, verdict, progress), None
        elif match := _PYTEST_CLOSING.fullmatch(line):
            counts = _pytest_counts(match[1])
        previous = line
    if counts and retried:
        counts = TestCounts(counts.executed, counts.skipped, counts.failed, counts.retried + retried)
    return Output(counts, code_error, missed_measurement, transient)
