"""Kills and freezes one process inside a server: its scheduler, while the HTTP process lives on.

Put it in place of RecoveryChecks.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from subprocess import TimeoutExpired

import psutil

from pdkit.checks.recovery.in_flight import STREAMING
from pdkit.checks.recovery.scenarios import GONE, RecoveryChecks

NAMES = "sglang::schedul", "run_scheduler_p"  # the first 15 characters: spawned, forked


def has_ended(process: psutil.Process) -> bool:
    """Whether a process is gone, or only waits for its parent to look."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class SchedulerDeathChecks(RecoveryChecks):
    """A server without its scheduler must end, so that whoever watches it starts it again, and clients get an error.

    dying  seconds within which it must
    """

    needs = ("require_harm",)

    dying = 30
    schedulers_only = False

    def test_decodes_scheduler_is_killed(self) -> None:
        self.kill_scheduler("decode", served=())

    def test_prefills_scheduler_is_killed(self) -> None:
        self.kill_scheduler("prefill", served=(STREAMING,))

    def test_decodes_scheduler_freezes(self) -> None:
        self.freeze_scheduler("decode")

    def test_prefills_scheduler_freezes(self) -> None:
        self.freeze_scheduler("prefill")

    def kill_scheduler(self, side: str, served: Sequence[str]) -> None:
        event = f"{side}'s scheduler killed"
        clients = self.in_flight()
        process = self.process(side)
        process.expects_exit = True
        struck = time.monotonic()
        scheduler = self.scheduler(side)
        os.kill(scheduler.pid, signal.SIGKILL)
        self.require_harm(f"kill scheduler of {side}", lambda: has_ended(scheduler))
        try:
            process.wait(self.dying)
        except TimeoutExpired:
            self.end(side)
            self.fail(f"{side} lives on without its scheduler, {self.dying} s after it was killed")
        print(f"{side} ended {time.monotonic() - struck:.1f} s after its scheduler", flush=True)
        process.kill_all()
        rows = self.account(event, clients, struck, served)
        rows += self.while_away(event, GONE, [side])
        self.back([side], rows, self.start_again)

    def freeze_scheduler(self, side: str) -> None:
        """For a moment, which costs time and nothing else."""
        type(self).schedulers_only = True
        self.addCleanup(setattr, type(self), "schedulers_only", False)
        self.freeze_shortly([side])

    @classmethod
    def scheduler(cls, side: str) -> psutil.Process:
        """The scheduler of a server. Raises AssertionError unless there is one."""
        inside = psutil.Process(cls.process(side).pid).children(recursive=True)
        found = [each for each in inside if each.name()[:15] in NAMES]
        names = [each.name() for each in inside]
        assert len(found) == 1, f"{side}: one scheduler expected among its processes, found {names}"
        return found[0]

    @classmethod
    def freeze(cls, name: str) -> None:
        if cls.schedulers_only:
            scheduler = cls.scheduler(name)
            os.kill(scheduler.pid, signal.SIGSTOP)
            cls.require_harm(f"freeze scheduler of {name}", lambda: scheduler.status() == psutil.STATUS_STOPPED)
        else:
            super().freeze(name)

    @classmethod
    def thaw(cls, name: str) -> None:
        if cls.schedulers_only:
            os.kill(cls.scheduler(name).pid, signal.SIGCONT)
        else:
            super().thaw(name)
