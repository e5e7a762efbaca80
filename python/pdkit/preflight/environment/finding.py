"""One line about the machine."""

from dataclasses import dataclass
from enum import Enum


class Level(str, Enum):
    """An ERROR keeps the suite from running, a WARNING may spoil it, OK says what was found."""

    ERROR = "error"
    WARNING = "warning"
    OK = "ok"


@dataclass(frozen=True)
class Finding:
    """What was looked at (`subject`), what is the case, why that matters, and what to do."""

    level: Level
    subject: str
    what: str
    why: str = ""
    do: str = ""

    def __post_init__(self):
        assert self.level is Level.OK or (self.why and self.do), self

    def __str__(self):
        return f"{self.subject}: " + "; ".join(filter(None, (self.what, self.why, self.do)))


def error(subject: str, what: str, why: str, do: str) -> Finding:
    return Finding(Level.ERROR, subject, what, why, do)


def warning(subject: str, what: str, why: str, do: str) -> Finding:
    return Finding(Level.WARNING, subject, what, why, do)


def ok(subject: str, what: str) -> Finding:
    return Finding(Level.OK, subject, what)
