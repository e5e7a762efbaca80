"""The mark in the environment of everything that a runner starts: it says which runner, and so whether that one lives.

    PDKIT_RUN_TOKEN=4242.1182790.4026531836.9f3c01d2

are the runner's process id, its start in clock ticks after boot, its PID namespace, and a random part. A runner below
another extends the token by its own after a colon.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

TOKEN_VARIABLE = "PDKIT_RUN_TOKEN"
GUARDIAN_VARIABLE = "PDKIT_GUARDIAN_OF"
FORKS_VARIABLE = "PDKIT_FORKS"  # of a guardian whose command gets a fork server of its own


@dataclass(frozen=True)
class Owner:
    """The runner that a token names."""

    pid: int
    started: int
    namespace: int

    @classmethod
    def parse(cls, part: str) -> "Owner | None":
        """None where `part` is not of our making."""
        numbers = part.split(".")[:3]
        return cls(*map(int, numbers)) if len(numbers) == 3 and all(map(str.isdecimal, numbers)) else None

    @property
    def is_known_dead(self) -> bool:
        """False also where we cannot know: a process id means nothing in another PID namespace."""
        return self.namespace == _namespace() and _started(self.pid) != self.started


def new_token(environment: Mapping[str, str]) -> str:
    """A token of this process, below that of the run that we are part of, if any."""
    own = f"{os.getpid()}.{_started(os.getpid())}.{_namespace()}.{os.urandom(4).hex()}"
    inherited = environment.get(TOKEN_VARIABLE)
    return f"{inherited}:{own}" if inherited else own


def carries(value: str, token: str) -> bool:
    """Whether a process with `value` in its environment belongs to the run of `token`, or to one below it."""
    return value == token or value.startswith(token + ":")


def abandoned_by(value: str, own: str = "") -> Owner | None:
    """The dead runner that a process with the token `value` was left by; None where it is not for us to end.

    It is for us only if the outermost run that we, with the token `own`, are not a part of is dead: what is below a
    living run is that run's affair.
    """
    parts, shared = value.split(":"), own.split(":") if own else []
    while parts and shared and parts[0] == shared[0]:
        parts, shared = parts[1:], shared[1:]
    owner = Owner.parse(parts[0]) if parts else None
    return owner if owner and owner.is_known_dead else None


def _namespace() -> int:
    return Path("/proc/self/ns/pid").stat().st_ino


def _started(pid: int) -> int | None:
    """Field 22 of proc_pid_stat(5): unlike a time of day, no clock that is set changes it. None for the dead."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])
