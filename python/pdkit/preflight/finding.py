"""One line about what may go wrong: about a machine, a flag or variable of a server, or a line of a test file."""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path


class Level(str, Enum):
    """An ERROR keeps the tests from running, a WARNING may spoil them, OK says what was found."""

    ERROR = "error"
    WARNING = "warning"
    OK = "ok"


@dataclass(frozen=True)
class Finding:
    """What was looked at (`subject`), what is the case, why that matters, and what to do.

    A finding of the lint is at a line (from 1) of the file at `path`, its subject is the rule, and `what` is all of
    the message.
    """

    level: Level
    subject: str
    what: str
    why: str = ""
    do: str = ""
    path: Path | None = None
    line: int = 0

    def __str__(self) -> str:
        place = f"{self.path}:{self.line}: " if self.path else ""
        return f"{place}{self.subject}: " + "; ".join(filter(None, (self.what, self.why, self.do)))

    @property
    def order(self) -> tuple[str, int, str, str]:
        """By file, line, subject and text."""
        return str(self.path), self.line, self.subject, self.what


def error(subject: str, what: str, why: str, do: str) -> Finding:
    assert why and do, what
    return Finding(Level.ERROR, subject, what, why, do)


def warning(subject: str, what: str, why: str, do: str) -> Finding:
    assert why and do, what
    return Finding(Level.WARNING, subject, what, why, do)


def ok(subject: str, what: str) -> Finding:
    return Finding(Level.OK, subject, what)


def broken(path: Path, line: int, rule: str, message: str) -> Finding:
    """A rule of the lint is broken: `message` says what is wrong and what to do."""
    return Finding(Level.ERROR, rule, message, path=path, line=line)
