"""Finding and ending everything that one of our processes started, and nothing else."""

import os
import time
import uuid

import psutil

TOKEN_VARIABLE = "PDKIT_RUN_TOKEN"
GRACE_S = 10.0
POLL_S = 0.05


def new_token(environment: dict[str, str]) -> str:
    """A value of `TOKEN_VARIABLE` for a new process tree; it extends that of the tree we are in, if any."""
    inherited = environment.get(TOKEN_VARIABLE)
    own = uuid.uuid4().hex
    return f"{inherited}:{own}" if inherited else own


def _carries(process: psutil.Process, token: str) -> bool:
    value = process.environ().get(TOKEN_VARIABLE, "")
    return value == token or value.startswith(token + ":")


def is_alive(process: psutil.Process) -> bool:
    """False for zombies: nobody may ever reap an orphan's remains in a container."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def members(leader: int, since: float, token: str) -> list[psutil.Process]:
    """Living processes that belong to the session leader `leader`, started at `since` (epoch seconds) with `token`.

    They are those of its session, its descendants, and those that carry the token in their environment wherever they
    went; the leader itself is one of them while it lives.
    """
    descendants = set()
    if psutil.pid_exists(leader):
        try:
            descendants = {p.pid for p in psutil.Process(leader).children(recursive=True)}
        except psutil.NoSuchProcess:
            pass
    found = []
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        try:
            if process.create_time() < since - 1 or not is_alive(process):
                continue
            ours = process.pid in descendants or os.getsid(process.pid) == leader or _carries(process, token)
        except (psutil.Error, OSError):
            continue
        if ours:
            found.append(process)
    return found


def _wait_gone(processes: list[psutil.Process], seconds: float):
    deadline = time.monotonic() + seconds
    while any(map(is_alive, processes)) and time.monotonic() < deadline:
        time.sleep(POLL_S)


def describe(process: psutil.Process) -> str:
    """`pid 123 (python3 -m server)`, the command line cut to 60 characters."""
    try:
        command = " ".join(process.cmdline()) or process.name()
    except psutil.Error:
        command = "gone"
    return f"pid {process.pid} ({command[:60]})"


def end(leader: int, since: float, token: str, grace_s: float = GRACE_S) -> list[str]:
    """Ends all `members`: SIGTERM, up to `grace_s` seconds of patience, SIGKILL; returns descriptions of them."""
    ended = {}
    for attempt in range(3):
        processes = members(leader, since, token)
        if not processes:
            break
        ended.update({p.pid: ended.get(p.pid) or describe(p) for p in processes})
        for process in processes:
            try:
                process.terminate() if attempt == 0 else process.kill()
            except psutil.NoSuchProcess:
                pass
        _wait_gone(processes, grace_s)
    return list(ended.values())
