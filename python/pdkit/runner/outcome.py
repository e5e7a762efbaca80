"""What became of a test file: how many tests it ran, and the state that follows."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum

from pdkit.core.errors import ExitCode
from pdkit.core.events import BAD, SKIPPED, Events, unmet_harm

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
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
    """Numbers of tests; `executed` are those that were not skipped, `failed` also counts sub-tests and class set-ups."""

    executed: int = 0
    skipped: int = 0
    failed: int = 0
    retried: int = 0

    __test__ = False


@dataclass(frozen=True)
class Output:
    """What one attempt left to judge it by.

    counts    None if there is neither an event of unittest nor a closing line of pytest
    is_whole  False where unittest began, but did not come to its end
    is_retriable  it may go away by itself: a device in trouble, or a missed measurement and no error in the code
    death     the cause of the first death of a server that a test did not expect
    unmet     kills, freezes and faults that took no effect: what passed beside them proves nothing
    """

    counts: TestCounts | None = None
    is_whole: bool = True
    is_retriable: bool = False
    death: str | None = None
    unmet: tuple[str, ...] = ()


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


def unittest_counts(events: Events) -> TestCounts | None:
    """Counts from the events of tests; None if there are none.

    Sub-tests belong to the method that they are part of. What was never started, such as the set-up of a class, is
    not a test that ran, though it may fail.
    """
    tests, runs = events.of("test"), events.of("run")
    if not tests and not runs:
        return None
    executed = {
        test.get("method") or test["id"]
        for test in tests
        if test["state"] != SKIPPED and test.get("seconds") is not None
    }
    failed = sum(test["state"] in BAD for test in tests)
    if not all(run["successful"] for run in runs):
        failed = max(failed, 1)
    return TestCounts(len(executed), sum(test["state"] == SKIPPED for test in tests), failed)


def _pytest_counts(summary: str) -> TestCounts:
    named: dict[str, int] = {}
    for part in summary.split(", "):
        number, _, name = part.partition(" ")
        if number.isdigit():
            named[name] = named.get(name, 0) + int(number)
    failed = sum(named.get(name, 0) for name in ("failed", "error", "errors"))
    executed = failed + sum(named.get(name, 0) for name in ("passed", "xfailed", "xpassed"))
    return TestCounts(executed, named.get("skipped", 0), failed, named.get("rerun", 0))


def read_output(lines: Iterable[str], events: Events | None = None, test_max_retry: int = 0) -> Output:
    """Judges one attempt by its events, and by what pytest and SGLang print; of several closing lines the last counts.

    `test_max_retry` is what SGLANG_TEST_MAX_RETRY was: a retry with that maximum is one of a test method, others
    are a server's own affair.
    """
    events = events or Events()
    counts, retried = None, 0
    code_error = missed_measurement = transient = False
    for line in lines:
        line = _ANSI.sub("", line).strip()
        code_error = code_error or bool(_CODE_ERROR.search(line))
        missed_measurement = missed_measurement or bool(_MISSED_MEASUREMENT.search(line))
        transient = transient or bool(_TRANSIENT.search(line))
        if retry := _METHOD_RETRY.search(line):
            retried += test_max_retry > 0 and int(retry[1]) == test_max_retry
        elif match := _PYTEST_CLOSING.fullmatch(line):
            counts = _pytest_counts(match[1])
    counts = unittest_counts(events) or counts
    if counts and retried:
        counts = replace(counts, retried=counts.retried + retried)
    is_whole = not events.of("test") or bool(events.of("run"))
    death = next((event["cause"] for event in events.of("death")), None)
    is_retriable = not death and (transient or (missed_measurement and not code_error))
    return Output(counts, is_whole, is_retriable, death, tuple(unmet_harm(events)))
