"""What earlier runs left behind, whose runner was killed: found by the token in its environment, and ended."""

import contextlib
import os
from collections.abc import Iterator

import psutil

from pdkit.core import ports, processes
from pdkit.runner import gpu_memory, guardian
from pdkit.runner.owner import GUARDIAN_VARIABLE, TOKEN_VARIABLE, Owner, abandoned_by, carries

Found = dict[psutil.Process, Owner]


def _us() -> set[int]:
    """This process, and those that we run in."""
    return {os.getpid(), *(process.pid for process in psutil.Process().parents())}


def _others() -> Iterator[tuple[psutil.Process, dict[str, str]]]:
    """Living processes of this user, but for `_us`, with the environment they started with."""
    us = _us()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid not in us and process.uids().real == os.getuid() and processes.is_alive(process):
                yield process, process.environ()


def _abandoned() -> tuple[Found, Found]:
    """(guardians, everything else) of dead runners; also their descendants, whatever became of their environment."""
    own = os.environ.get(TOKEN_VARIABLE, "")
    guardians, rest = {}, {}
    for process, environment in _others():
        if owner := abandoned_by(environment.get(GUARDIAN_VARIABLE, ""), own):
            guardians[process] = owner
        elif owner := abandoned_by(environment.get(TOKEN_VARIABLE, ""), own):
            rest[process] = owner
    us = _us()
    for process, owner in [*guardians.items(), *rest.items()]:
        for child in processes.descendants(process):
            if child not in guardians and child.pid not in us:
                rest.setdefault(child, owner)
    return guardians, rest


def end_earlier_runs(grace_s: float = processes.GRACE_S) -> Iterator[str]:
    """Ends what is left of runs of this user whose runner is gone; yields one line for each process.

    What belongs to a living run is left alone, as is everything that no runner of ours has marked. A guardian that is
    still at work is waited for: it also knows what dropped the mark.
    """
    guardians, rest = _abandoned()
    if not guardians and not rest:
        return
    for process, owner in rest.items():
        what = processes.describe(process)
        yield f"left behind by an earlier run, whose runner (pid {owner.pid}) is gone; ended now: {what}"
    memory = gpu_memory.unaccounted()
    processes.wait_until(lambda: not any(map(processes.is_alive, guardians)), guardian.LIMIT_S)

    def find() -> list[psutil.Process]:
        return [process for group in _abandoned() for process in group]

    ended = processes.end(find, lambda: not find(), grace_s)
    yield from (f"{survivor} survived SIGKILL" for survivor in ended.survivors)
    yield from ports.wait_until_free(ended.ports, guardian.PORTS_S)
    yield from gpu_memory.wait_for_release(memory)


def end_carriers(token: str, grace_s: float = processes.GRACE_S) -> processes.Ended:
    """Ends what carries `token` in its environment, and its descendants."""

    def find() -> list[psutil.Process]:
        carriers = [process for process, env in _others() if carries(env.get(TOKEN_VARIABLE, ""), token)]
        return list({*carriers, *(child for each in carriers for child in processes.descendants(each))})

    return processes.end(find, lambda: not find(), grace_s)
