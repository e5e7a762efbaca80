"""What the commands of this project return to the shell."""

from enum import IntEnum


class UsageError(Exception):
    """The command line cannot be obeyed; the message has one line for each reason."""


class NotReady(Exception):
    """The environment cannot run what was asked for; the message has one line for each reason."""


def not_installed(packages: str) -> str:
    """What to do about packages of an extra that are missing. matplotlib draws; the rest is what launches servers."""
    extra = "pictures" if packages == "matplotlib" else "suite"
    return f"{packages}: not installed here; pip install 'sglang-pd-suite[{extra}]'"


class ExitCode(IntEnum):
    PASSED = 0
    FAILED = 1
    BAD_USAGE = 2
    NOT_READY = 3
    NOTHING_RAN = 4
    UNCONFIRMED = 5
    DRIFTED = 6
    INTERRUPTED = 130


MEANINGS = {
    ExitCode.PASSED: "every file ran and passed",
    ExitCode.FAILED: "a file failed or ran out of time",
    ExitCode.BAD_USAGE: "bad usage or a bad registration",
    ExitCode.NOT_READY: "the environment is not ready",
    ExitCode.NOTHING_RAN: "nothing ran, or a file ran none of its tests",
    ExitCode.INTERRUPTED: "interrupted",
}
