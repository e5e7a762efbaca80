"""Runs a unittest program so that each of its tests becomes an event, as `coverage run FILE` runs one.

python3 -m pdkit.core.recording FILE [ARGS]
"""

import atexit
import os
import re
import runpy
import sys
import time
import unittest
import unittest.util
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any

from pdkit.core import events
from pdkit.core.events import (
    ERROR,
    EXPECTED_FAILURE,
    FAILED,
    PASSED,
    SKIPPED,
    UNEXPECTED_SUCCESS,
    VARIABLE,
    emit_into,
)

RECORDER_VARIABLE = "PDKIT_RECORDER"  # the directory whose events an ancestor records, or this process
MESSAGE_LINES = 10
DETAILS_CHARACTERS = 64 * 1024
_NUMPY = re.compile(r"\bnp\.(?:float\d+|u?int\d+|bool_?)\(([^()]*)\)")

_loaded: list[str] = []  # ids of the tests of this process, in order

_Error = tuple[type[BaseException], BaseException, TracebackType] | tuple[None, None, None]


class RecordingResult(unittest.TextTestResult):
    """Prints as its base does, and emits a `test` event per test and a `run` event at the end.

    Sub-tests that fail, and classes and modules that fail or are skipped as a whole, are events of their own. A run
    within a run, as tests of test machinery have, is not recorded.
    """

    _outermost: "RecordingResult | None" = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._began: dict[str, float] = {}
        self._directory: str | None = None
        self._handled: BaseException | None = None
        self._named: set[str] = set()

    def startTestRun(self) -> None:
        super().startTestRun()
        if RecordingResult._outermost is None:
            RecordingResult._outermost = self
            self._directory = os.environ.get(VARIABLE)  # now: a test may turn its own events elsewhere
            self._handled = sys.exc_info()[1]

    def stopTestRun(self) -> None:
        super().stopTestRun()
        if RecordingResult._outermost is self:
            RecordingResult._outermost = None
            was_left = sys.exc_info()[1] is not self._handled  # by KeyboardInterrupt, say: not all tests ran
            left = [name for name in _loaded if name not in self._named] if self.shouldStop or was_left else []
            successful = self.wasSuccessful() and not was_left
            emit_into(self._directory, "run", tests=self.testsRun, successful=successful, left=left)

    def startTest(self, test: unittest.TestCase) -> None:
        self._began[test.id()] = time.monotonic()
        super().startTest(test)

    def _exc_info_to_string(self, err: _Error, test: unittest.TestCase) -> str:
        """The traceback of what went wrong itself: without retries around it, and from the test's own method on."""
        error = unwrapped(err[1]) if err[1] is not None else None
        if error is not None:
            err = (type(error), error, _from_method(error.__traceback__))  # type: ignore[assignment]
        return without_numpy(super()._exc_info_to_string(err, test))  # type: ignore[misc]

    def addSuccess(self, test: unittest.TestCase) -> None:
        super().addSuccess(test)
        self._emit(test, PASSED)

    def addFailure(self, test: unittest.TestCase, err: _Error) -> None:
        super().addFailure(test, err)
        self._emit_bad(test, err[1], self.failures[-1][1])

    def addError(self, test: unittest.TestCase, err: _Error) -> None:
        super().addError(test, err)
        self._emit_bad(test, err[1], self.errors[-1][1])

    def addSubTest(self, test: unittest.TestCase, subtest: unittest.TestCase, err: _Error | None) -> None:
        super().addSubTest(test, subtest, err)
        if err is not None and err[0] is not None:
            details = (self.failures if issubclass(err[0], test.failureException) else self.errors)[-1][1]
            self._emit_bad(subtest, err[1], details, of=test)

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        super().addSkip(test, reason)
        self._emit(test, SKIPPED, str(reason))

    def addExpectedFailure(self, test: unittest.TestCase, err: _Error) -> None:
        super().addExpectedFailure(test, err)
        self._emit(test, EXPECTED_FAILURE, _message(err[1]), self.expectedFailures[-1][1])

    def addUnexpectedSuccess(self, test: unittest.TestCase) -> None:
        super().addUnexpectedSuccess(test)
        self._emit(test, UNEXPECTED_SUCCESS, "it passed, though it is marked as an expected failure")

    def _emit_bad(
        self, test: unittest.TestCase, error: BaseException | None, details: str, of: unittest.TestCase | None = None
    ) -> None:
        """unittest calls a failure an error where it comes from the set-up of a class, or wrapped by a retry."""
        state = FAILED if error is not None and isinstance(unwrapped(error), AssertionError) else ERROR
        self._emit(test, state, _message(error), details, of)

    def _emit(
        self,
        test: unittest.TestCase,
        state: str,
        message: str = "",
        details: str = "",
        of: unittest.TestCase | None = None,
    ) -> None:
        if RecordingResult._outermost is not self:
            return
        method = (of or test).id()
        self._named.add(method)
        began = self._began.get(method)
        seconds = None if began is None else round(time.monotonic() - began, 3)
        details = details if len(details) <= DETAILS_CHARACTERS else f"...\n{details[-DETAILS_CHARACTERS:]}"
        what = (of or test).shortDescription() or ""
        fields = {"id": test.id(), "method": method, "state": state, "seconds": seconds, "what": what}
        emit_into(self._directory, "test", **fields, message=message, details=details)


def _message(error: BaseException | None) -> str:
    """`TypeError: ...`; an assertion without its class: its first lines say what is wrong."""
    if error is None:
        return ""
    error = unwrapped(error)
    try:
        text = without_numpy(str(error).strip())
    except Exception as unprintable:
        text = f"(its text raises {type(unprintable).__name__})"
    name = "" if isinstance(error, AssertionError) and text else type(error).__name__
    lines = ": ".join(filter(None, [name, text])).splitlines()
    return "\n".join(lines[:MESSAGE_LINES] + ["..."] * (len(lines) > MESSAGE_LINES))


def without_numpy(text: str) -> str:
    """`0.935` for `np.float64(0.935)`."""
    return _NUMPY.sub(r"\1", text)


def _from_method(traceback: TracebackType | None) -> TracebackType | None:
    """Without the frames of those that called the test method."""
    found = here = traceback
    while here is not None:
        if here.tb_frame.f_code.co_name == "_callTestMethod":
            found = here.tb_next
        here = here.tb_next
    return found or traceback


def unwrapped(error: BaseException) -> BaseException:
    """What SGLang's retry of test methods wrapped in an Exception of its own."""
    while type(error) is Exception and error.__context__ is not None:
        error = error.__context__
    return error


def install() -> None:
    """From now on unittest's text runners record, unless they are given a result class of their own.

    Test methods with the attribute `goes_first` come first in their class.

    Tests that a test runs in processes of its own are not tests of its file: where an ancestor records into the same
    directory, this does nothing.
    """
    directory = os.environ.get(VARIABLE, "")
    if not directory or os.environ.get(RECORDER_VARIABLE) != directory:
        os.environ[RECORDER_VARIABLE] = directory
        unittest.TextTestRunner.resultclass = RecordingResult
        unittest.defaultTestLoader.getTestCaseNames = partial(  # type: ignore[method-assign]
            _names_in_order, unittest.defaultTestLoader.getTestCaseNames
        )


def _names_in_order(names_of: Callable[[type], Sequence[str]], cls: type[unittest.TestCase]) -> list[str]:
    """The names of the tests of `cls`; remembers them as loaded."""
    names = sorted(names_of(cls), key=lambda name: not getattr(getattr(cls, name), "goes_first", False))
    _loaded.extend(f"{unittest.util.strclass(cls)}.{name}" for name in names)
    return names


def run_file(path: str, argv: Sequence[str] = ()) -> None:
    """Runs the program at `path` as `python3 PATH ARGV` would; whatever it raises, SystemExit too, is raised.

    After the death of a server the process ends with the program: threads that ask it in vain may never end.
    """
    sys.argv = [path, *argv]
    sys.path[0] = os.path.dirname(os.path.realpath(path))
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as exit:
        if events.deaths:
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(exit.code if isinstance(exit.code, int) else 1)
        raise


def main(argv: Sequence[str]) -> None:
    """`FILE [ARGS]`: records what FILE runs."""
    if not argv:
        sys.exit("usage: python3 -m pdkit.core.recording FILE [ARGS]")
    install()
    run_file(argv[0], argv[1:])


if __name__ == "__main__":
    from pdkit.core import recording  # not this copy of it, which is called __main__

    recording.main(sys.argv[1:])
