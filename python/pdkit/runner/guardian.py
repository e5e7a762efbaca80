"""A process between the runner and a test file that ends everything the file started, even if the runner is killed.

Orphans below a child subreaper (prctl(2)) become its children: as such, the guardian stays the ancestor of whatever
the file starts, also of what took a session of its own and dropped its environment. Once the file has ended, or the
guardian was told to end it, all of that is ended. What tells it is the end of its standard input, a pipe which only
the runner holds: closed on purpose, or by the kernel after a SIGKILL of the runner.
"""

import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from pdkit.core import fork_server, ports, processes
from pdkit.runner.owner import FORKS_VARIABLE, GUARDIAN_VARIABLE, TOKEN_VARIABLE

SETTLE_S = 0.5
PORTS_S = 10.0
LIMIT_S = SETTLE_S + processes.GRACE_S + processes.KILL_S + PORTS_S + 10.0
Popen = Callable[..., subprocess.Popen[Any]]
TOLD_BY = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class Ending:
    """How a guarded command ended.

    `exit_code` is None where it had to be ended, `seconds` how long it ran, `cpu_seconds` the CPU time of all that ran.
    `ended` describes the processes that were still there, `unreleased` what is there after all was done.
    """

    exit_code: int | None
    seconds: float
    ended: tuple[str, ...] = ()
    unreleased: tuple[str, ...] = ()
    cpu_seconds: float = 0.0


class Guarded:
    """A command that runs under a guardian; its `output`, standard error included, is a pipe."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        token: str,
        popen: Popen = subprocess.Popen,
    ) -> None:
        self._ending: Ending | None = None
        self._guardian = popen(
            [sys.executable, "-m", __name__, *command],
            env={**environment, GUARDIAN_VARIABLE: token},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._guardian.stdin and self._guardian.stdout, "both are pipes"
        self._tell, self._said = self._guardian.stdin, self._guardian.stdout
        self.output = self._guardian.stderr
        self.guardian_pid = self._guardian.pid
        self.pid = (self._hear() or {}).get("pid")

    def _hear(self) -> dict[str, Any] | None:
        line = self._said.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    @property
    def guardian_exit_code(self) -> int | None:
        return self._guardian.returncode

    @property
    def is_running(self) -> bool:
        """Whether the command, as against what it started, has not ended."""
        return any(process.pid == self.pid for process in self.descendants())

    def has_ended(self, timeout: float) -> bool:
        """Whether the command and all that it started ended within `timeout` seconds."""
        try:
            self._guardian.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True

    def descendants(self) -> list[psutil.Process]:
        """The living processes of the command, itself among them."""
        try:
            return processes.descendants(psutil.Process(self.guardian_pid))
        except psutil.NoSuchProcess:
            return []

    def end(self) -> Ending | None:
        """Ends what is left; None where the guardian itself was killed and can say nothing. May be called again."""
        if self._tell.closed:
            return self._ending
        self._tell.close()
        if not self.has_ended(LIMIT_S):
            self._guardian.kill()
            self._guardian.wait()
        with self._said:
            said = self._hear()
        if said:
            said |= {name: tuple(said[name]) for name in ("ended", "unreleased")}
            self._ending = Ending(**said)
        return self._ending


class Children:
    """The children of this process, adopted ones included, where nobody else waits for them."""

    def __init__(self) -> None:
        self.exit_codes: dict[int, int] = {}

    def are_gone(self) -> bool:
        """True if there are none, and therefore no descendants either."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return True
            if not pid:
                return False
            self.exit_codes[pid] = os.waitstatus_to_exitcode(status)


def _say(**what: Any) -> None:
    try:
        os.write(sys.stdout.fileno(), (json.dumps(what) + "\n").encode())
    except BrokenPipeError:  # the runner is gone
        pass


def _bell() -> int:
    """A file descriptor from which the number of a signal can be read once it came."""
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, *TOLD_BY):
        signal.signal(number, lambda *_: None)
    return reader


def _wait(leader: int, children: Children, bell: int) -> None:
    """Returns when `leader` has ended or we are told to end it."""
    while True:
        ready, _, _ = select.select([sys.stdin, bell], [], [])
        rung = {*os.read(bell, 4096)} if bell in ready else set()
        children.are_gone()
        if leader in children.exit_codes or sys.stdin in ready or rung - {signal.SIGCHLD}:
            return


def _start(command: list[str], environment: dict[str, str], forks: bool) -> int:
    """The process id of `command`; where we are a fork that has imported what it needs, it is a fork of us."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    if pid := fork_server.start_here(command, environment, (nothing, 2, 2), forks):
        return pid
    streams: dict[str, Any] = {"stdin": nothing, "stdout": sys.stderr, "stderr": sys.stderr}
    leader = subprocess.Popen(command, env=environment, **streams, start_new_session=True)
    leader.returncode = 0  # nobody but `Children` waits for it
    return leader.pid


def guard(command: list[str], environment: dict[str, str], forks: bool) -> Ending:
    """Runs `command`, with a fork server of its own if it `forks`, and ends all that it started."""
    children, bell = Children(), _bell()
    tic = time.monotonic()
    leader = _start(command, environment, forks)
    _say(pid=leader)
    _wait(leader, children, bell)
    exit_code, seconds = children.exit_codes.get(leader), time.monotonic() - tic
    if exit_code is not None:
        processes.wait_until(children.are_gone, SETTLE_S)
    me = psutil.Process()
    ended = processes.end(lambda: processes.descendants(me), children.are_gone)
    unreleased = [f"{survivor} survived SIGKILL" for survivor in ended.survivors]
    unreleased += ports.wait_until_free(ended.ports, PORTS_S)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Ending(exit_code, seconds, ended.processes, tuple(unreleased), used.ru_utime + used.ru_stime)


def main(command: list[str]) -> None:
    processes.become_subreaper()
    token, forks = os.environ.pop(GUARDIAN_VARIABLE), bool(os.environ.pop(FORKS_VARIABLE, ""))
    if not select.select([sys.stdin], [], [], 0)[0]:  # or else the runner is gone already
        _say(**asdict(guard(command, os.environ | {TOKEN_VARIABLE: token}, forks)))


if __name__ == "__main__":
    main(sys.argv[1:])
