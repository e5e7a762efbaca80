"""Processes: who is alive, what is theirs, and how a set of them is ended."""

import contextlib
import ctypes
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import psutil

from pdkit.core.secrets import cleaned

GRACE_S = 10.0
KILL_S = 10.0
POLL_S = 0.05
PR_SET_CHILD_SUBREAPER = 36  # prctl(2)


@dataclass(frozen=True)
class Ended:
    """What `end` did: descriptions of the processes it met, TCP ports they listened on, and who is alive after all."""

    processes: tuple[str, ...] = ()
    ports: tuple[int, ...] = ()
    survivors: tuple[str, ...] = ()


def become_subreaper() -> None:
    """Makes this process the parent of its descendants' orphans. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def is_alive(process: psutil.Process) -> bool:
    """False for zombies: nobody may ever reap an orphan's remains in a container."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def is_pid_alive(pid: int) -> bool:
    """As far as this PID namespace tells."""
    try:
        return is_alive(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return False


def descendants(process: psutil.Process) -> list[psutil.Process]:
    """Those alive, as far as one look at the table of processes can tell."""
    try:
        return [child for child in process.children(recursive=True) if is_alive(child)]
    except psutil.NoSuchProcess:
        return []


def parents() -> dict[int, int]:
    """{pid: pid of its parent} of all processes, zombies too: one look for many questions."""
    found = {}
    for pid in psutil.pids():
        with contextlib.suppress(OSError):  # five looks a second: a file object would double what they take
            stat = os.open(f"/proc/{pid}/stat", os.O_RDONLY)
            try:
                found[pid] = int(os.read(stat, 1024).rpartition(b")")[2].split(None, 2)[1])  # proc(5)
            finally:
                os.close(stat)
    return found


def below(pid: int, parent_of: Mapping[int, int]) -> list[int]:
    """The processes below `pid`, by what `parents` found."""
    found, seen = [pid], set()
    while found:
        seen.update(found)
        found = [child for child, parent in parent_of.items() if parent in found and child not in seen]
    return sorted(seen - {pid})


def describe(process: psutil.Process) -> str:
    """`pid 123 (python3 -m server)`, the command line without secrets and cut to 60 characters."""
    try:
        command = cleaned(" ".join(process.cmdline())) or process.name()
    except psutil.Error:
        command = "gone"
    return f"pid {process.pid} ({command[:60]})"


def describe_pid(pid: int) -> str:
    try:
        return describe(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return f"pid {pid} (gone)"


def listening_ports(processes: Iterable[psutil.Process]) -> set[int]:
    """TCP ports on which one of `processes` listens."""
    ports = set()
    for process in processes:
        with contextlib.suppress(psutil.Error, OSError):
            connections = process.net_connections(kind="tcp")
            ports |= {connection.laddr.port for connection in connections if connection.status == psutil.CONN_LISTEN}
    return ports


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether `condition` came true within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_S)
    return True


def end(
    find: Callable[[], list[psutil.Process]],
    are_gone: Callable[[], bool],
    grace_s: float = GRACE_S,
    kill_s: float = KILL_S,
) -> Ended:
    """Ends what `find` finds: SIGTERM, up to `grace_s` seconds of patience, then SIGKILL for up to `kill_s` seconds.

    `find` is asked again and again, since what is being ended may start more; `are_gone` has the last word.
    """
    met: dict[int, str] = {}
    ports: set[int] = set()

    def terminate() -> bool:
        new = [process for process in find() if process.pid not in met]
        met.update((process.pid, describe(process)) for process in new)
        ports.update(listening_ports(new))
        for process in new:
            with contextlib.suppress(psutil.Error):
                process.terminate()
        return are_gone()

    def kill() -> bool:
        for process in find():
            met.setdefault(process.pid, describe(process))
            with contextlib.suppress(psutil.Error):
                process.kill()
        return are_gone()

    gone = wait_until(terminate, grace_s) or wait_until(kill, kill_s)
    survivors = () if gone else tuple(map(describe, find()))
    return Ended(tuple(met.values()), tuple(sorted(ports)), survivors)
