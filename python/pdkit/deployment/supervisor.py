"""Watches servers, what runs below them and what they log; the first death fails the run at once, with its cause."""

import contextlib
import math
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from pdkit.core import events, processes
from pdkit.deployment.one_token import one_token
from pdkit.deployment.server import Server
from pdkit.deployment.workers import Workers

POLL_S = 0.2
WAKE_AGAIN_S = 3.0  # longer than an exception takes through a test
STATED = "exited", "logged", "does", "answers", "fetches"  # how a sentence about a server goes on
FATAL_GRACE_S = 1.0  # between a line that says that a process ends, and its end


class ServerDied(BaseException):
    """A watched process ended. Not an Exception, so that neither an eval client nor a retry can swallow it."""


@dataclass
class _Watched:
    process: subprocess.Popen[str]
    workers: Workers | None = None

    def expects_exit(self) -> bool:
        return getattr(self.process, "expects_exit", False)

    def death(self, parent_of: Mapping[int, int]) -> tuple[float, str] | None:
        """When and how the server or a worker of it ended; `parent_of`: what `processes.parents` has just found."""
        if self.expects_exit():
            return None
        worker = self._worker_death(parent_of)
        code = self.process.poll()
        if self.expects_exit():  # since just now
            return None
        if worker:
            return time.monotonic(), worker
        if code is not None:
            by = f" ({signal.strsignal(-code)})" if code < 0 else ""
            return getattr(self.process, "ended_at", math.inf), f"exited with code {code}{by}"
        fatal_at: float = getattr(self.process, "fatal_at", math.inf)
        if time.monotonic() - fatal_at > FATAL_GRACE_S:
            return fatal_at, "logged a fatal error, and its process goes on"
        return None

    def _worker_death(self, parent_of: Mapping[int, int]) -> str | None:
        if self.workers is None:
            with contextlib.suppress(Exception):
                self.workers = Workers(self.process.pid)
        return self.workers.ended(parent_of) if self.workers else None


class Supervisor:
    """Watches processes until `stop()`; the first to end raises ServerDied in the main thread, within `interrupting()`.

    What is left of the server that died is killed, so that nobody waits for it. SIGUSR1 wakes the main thread,
    again and again while code swallows that; SIGTERM and SIGHUP act like Ctrl-C (SIGINT), so that a run that is asked
    to end takes its servers with it.
    """

    def __init__(self) -> None:
        self.death: str | None = None
        self.probes = 0
        self._watched: dict[str, _Watched] = {}
        self._lock = threading.RLock()
        self.has_reported = False  # whether a death was raised
        self._depth = 0
        self._launching = self._terminated = self._released = False
        self._stopped = threading.Event()
        self._previous_handlers = {signal.SIGUSR1: signal.signal(signal.SIGUSR1, self._interrupt)}
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._previous_handlers[number] = signal.signal(number, self._terminate)
        self._thread = threading.Thread(target=self._watch, name="pd-supervisor", daemon=True)
        self._thread.start()

    def watch(self, name: str, process: subprocess.Popen[str]) -> None:
        """Watches `process` from now on, in the place of an earlier one of that name."""
        with self._lock:
            self._find_death()  # of the earlier one
            self._watched[name] = _Watched(process)

    def names(self) -> list[str]:
        """Of what is watched, in the order in which each was first named."""
        with self._lock:
            return list(self._watched)

    def process(self, name: str) -> subprocess.Popen[str] | None:
        """The process that is watched under `name`."""
        with self._lock:
            return self._watched[name].process if name in self._watched else None

    def watches(self, process: subprocess.Popen[str]) -> bool:
        """Whether this very process is watched, under whatever name."""
        with self._lock:
            return any(each.process is process for each in self._watched.values())

    def expect_exit(self, process: subprocess.Popen[str]) -> None:
        """`process` is about to be ended on purpose: that is not a death."""
        with self._lock:
            for name in [name for name, each in self._watched.items() if each.process is process]:
                del self._watched[name]

    def expect_exit_of(self, pid: int) -> None:
        """The same for the process with this id, where it is watched."""
        with self._lock:
            for each in list(self._watched.values()):
                if each.process.pid == pid:
                    self.expect_exit(each.process)

    def expect_all_exits(self) -> None:
        """The same for all that is watched now."""
        with self._lock:
            self._watched.clear()

    @contextlib.contextmanager
    def launching(self) -> Iterator[None]:
        """Within it neither a death nor a signal raises, only at its end: what starts must be known to be stopped."""
        self._launching = True
        try:
            yield
        finally:
            self._launching = False
        if self._terminated:
            raise KeyboardInterrupt
        self._check()

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Within it a death raises ServerDied at once; an error that a death explains is replaced by it."""
        self._depth += 1
        try:
            self._check()
            yield
            self._check()
        except Exception:
            self._check()
            raise
        finally:
            self._depth -= 1

    @contextlib.contextmanager
    def heartbeat(
        self,
        urls: Mapping[str, str],
        silence_s: float,
        answer_s: float,
        pair: Callable[[], tuple[str, str] | None] | None = None,
    ) -> Iterator[Callable[[], None]]:
        """Within it servers that hang without a death are found; yields what to call after each sign of progress.

        After `silence_s` seconds without progress each server of `urls` (name -> URL) is asked for one token by
        SGLang's /health_generate; one that does not answer within `answer_s` seconds counts as dead. Where all do,
        `pair` asks prefill and decode together: (name, what is wrong), or None. `probes` counts how often.
        """
        last, ended = [time.monotonic()], threading.Event()

        def ask() -> None:
            while not ended.wait(POLL_S):
                if time.monotonic() - last[0] < silence_s:
                    continue
                for name, url in urls.items():
                    problem = one_token(url, answer_s)
                    if problem and not ended.is_set() and time.monotonic() - last[0] >= silence_s:
                        self._report(name, f"{problem} after {silence_s:g} s without an answer to the eval: it hangs")
                        return
                if pair and not ended.is_set() and time.monotonic() - last[0] >= silence_s:
                    self.probes += 1
                    found = pair()
                    if found and not ended.is_set() and time.monotonic() - last[0] >= silence_s:
                        name, problem = found
                        self._report(name, f"{problem}; no answer to the test for {silence_s:g} s: it hangs")
                        return
                last[0] = time.monotonic()

        thread = threading.Thread(target=ask, name="pd-heartbeat", daemon=True)
        thread.start()
        try:
            yield lambda: last.__setitem__(0, time.monotonic())
        finally:
            ended.set()

    def stop(self) -> str | None:
        """Ends the watch; returns a death that no test has reported yet, or None."""
        self._stopped.set()
        self._thread.join()
        return None if self.has_reported else self._find_death()

    def release_signals(self) -> None:
        """Puts the handlers of signals back, once servers are stopped: until then SIGTERM must not end us."""
        with self._lock:
            self._released = True
            for number, handler in self._previous_handlers.items():
                signal.signal(number, handler)

    def _watch(self) -> None:
        while not self._stopped.wait(timeout=POLL_S):
            if self._find_death():
                break
        while not self._stopped.is_set():
            self._wake()
            self._stopped.wait(WAKE_AGAIN_S)

    def _wake(self) -> None:
        with self._lock:
            if not self._released:  # a heartbeat may report late
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    def _find_death(self) -> str | None:
        with self._lock:
            if self.death is None and self._watched:
                parent_of = processes.parents()
                deaths = [(death, name) for name, each in self._watched.items() if (death := each.death(parent_of))]
                if deaths:
                    (_, how), name = min(deaths)
                    self._record(name, how)
            return self.death

    def _report(self, name: str, how: str) -> None:
        """A death that was found in another way than by a look at the processes."""
        with self._lock:
            if self.death is None and name in self._watched and not self._watched[name].expects_exit():
                self._record(name, how)
        self._wake()

    def _record(self, name: str, how: str) -> None:
        process = self._watched[name].process
        cause, excerpt = f"{name} {how}" if how.startswith(STATED) else f"{name}: {how}", ""
        log = getattr(process, "log_path", None)
        if isinstance(process, Server):
            if process.poll() is None:
                time.sleep(POLL_S)  # the last words of the worker are on their way to the log
            process.kill_all()
            excerpt = process.log_tail()
        self.death = f"{cause}; {excerpt or 'its output is above'}"
        events.death(name, cause, excerpt, log)

    def _check(self) -> None:
        if self._depth and self._find_death():
            self._interrupt()

    def _interrupt(self, *_: object) -> None:
        if self._depth and self.death and not self._launching:
            self.has_reported = True
            raise ServerDied(self.death)

    def _terminate(self, *_: object) -> None:
        self._terminated = True
        if not self._launching:
            raise KeyboardInterrupt
