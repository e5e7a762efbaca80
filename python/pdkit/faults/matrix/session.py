"""Workers side by side: each run is one fault, or none, on all of them."""

import json
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from pdkit.core import forked, processes
from pdkit.faults.library import LIBRARY
from pdkit.faults.matrix.results import Run
from pdkit.faults.matrix.verdicts import CheckVerdict, merged

STOP_TIMEOUT = 60


class WorkerFailed(RuntimeError):
    """A worker ended on its own; the message is one line that names its log."""


@dataclass(frozen=True)
class Subject:
    """Tests of class `cls` in `file`; all of them unless `tests` names some.

    by_request: a fault meets only those of its tests that the fault itself asks for, see `Fault.asks`
    test_of: the one test that a fault meets, for those that are named in it
    """

    name: str
    file: Path
    cls: str
    tests: tuple[str, ...] = ()
    by_request: bool = False
    test_of: Mapping[str, str] = field(default_factory=dict)


class Worker:
    """One `pdkit.faults.matrix.worker`, in a session of its own; its events go to `events` as (worker, event or None)."""

    def __init__(self, subject: Subject, log: Path, events: "queue.Queue[Any]") -> None:
        self.subject, self.log = subject, log
        command = [
            sys.executable,
            "-m",
            "pdkit.faults.matrix.worker",
            str(subject.file),
            subject.cls,
            str(log),
            *subject.tests,
        ]
        self.process = forked.popen()(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", start_new_session=True
        )
        assert self.process.stdin and self.process.stdout  # pipes
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.is_busy = True
        self._reader = threading.Thread(target=self._read, args=(events,), daemon=True)
        self._reader.start()

    def _read(self, events: "queue.Queue[Any]") -> None:
        for line in self.stdout:
            event = json.loads(line)
            self.is_busy = event["event"] == "test"
            events.put((self, event))
        events.put((self, None))

    def send(self, fault: str | None, tests: Sequence[str] | None = None) -> None:
        self.is_busy = True
        self.stdin.write(json.dumps({"fault": fault, "tests": tests}) + "\n")
        self.stdin.flush()

    def stop(self) -> None:
        """It stops its servers and ends; a start or run that is going on is interrupted."""
        self.stdin.close()
        if self.is_busy and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join()
        self.stdout.close()


class Session:
    """Use as a context manager: what was started within is ended after. `progress(text)` gets what happens meanwhile."""

    def __init__(
        self, subjects: Sequence[Subject], log_dir: Path, progress: Callable[[str], None] = lambda text: None
    ) -> None:
        self.subjects, self.log_dir, self.progress = subjects, log_dir, progress
        self.workers: list[Worker] = []
        self.tests: dict[str, list[str]] = {}
        self._events: queue.Queue[Any] = queue.Queue()

    def __enter__(self) -> "Session":
        processes.become_subreaper()
        self._not_ours = {*processes.descendants(psutil.Process())}
        try:
            self.log_dir.mkdir(parents=True, exist_ok=True)
            for subject in self.subjects:
                self.workers.append(Worker(subject, self.log_dir / f"{subject.name}.log", self._events))
            self.progress(f"starting the servers of {', '.join(subject.name for subject in self.subjects)}")
            for _ in self.workers:
                worker, event = self._next()
                self.tests[worker.subject.name] = event["tests"]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        stopping = [threading.Thread(target=worker.stop) for worker in self.workers]
        for thread in stopping:
            thread.start()
        for thread in stopping:
            thread.join()
        left = processes.end(self._left, lambda: not self._left())
        if left.processes:
            self.progress(f"ended what workers had left: {', '.join(left.processes)}")

    def _left(self) -> list[psutil.Process]:
        """Servers of workers that were killed or ended on their own: they have sessions of their own and live on."""
        return [each for each in processes.descendants(psutil.Process()) if each not in self._not_ours]

    def _next(self) -> Any:
        worker, event = self._events.get()
        if event is None:
            raise WorkerFailed(f"the worker of {worker.subject.name} ended on its own; its log: {worker.log}")
        return worker, event

    def _asked(self, fault: str | None) -> dict[Worker, list[str] | None]:
        """Whom a fault is put before, and which tests they run (None: all). A run without a fault is all of all."""
        wanted = LIBRARY[fault].asks if fault in LIBRARY else ()
        if not wanted:
            asked = [worker for worker in self.workers if fault is None or not worker.subject.by_request]
            ones = {worker: worker.subject.test_of.get(fault or "") for worker in asked}
            return {worker: [test] if test else None for worker, test in ones.items()}
        own = {worker: [test for test in self.tests[worker.subject.name] if test in wanted] for worker in self.workers}
        return {worker: tests for worker, tests in own.items() if tests}

    def run(self, fault: str | None, index: int = 0) -> Run:
        """The tests of all subjects that are about `fault`. Raises WorkerFailed."""
        verdicts: dict[str, CheckVerdict] = {}
        finished: dict[str, float] = {}
        clocks = {worker: 0.0 for worker in self.workers}
        done: dict[Worker, dict[str, Any]] = {}
        asked = self._asked(fault)
        for worker, tests in asked.items():
            worker.send(fault, tests)
        while len(done) < len(asked):
            worker, event = self._next()
            if event["event"] == "done":
                done[worker] = event
                continue
            clocks[worker] += event["seconds"]
            self.progress(f"{fault or 'no fault'}: {event['test']} of {worker.subject.name}")
            for check, told in event["verdicts"].items():
                verdict = CheckVerdict(**told)
                verdicts[check] = merged(verdicts.get(check), verdict)
                if verdict.caught:
                    finished.setdefault(check, clocks[worker])
        return Run(
            fault=fault,
            index=index,
            met=sum(event["met"] for event in done.values()),
            seconds=max(event["seconds"] for event in done.values()),
            restarted="; ".join(event["restarted"] for event in done.values() if event["restarted"]),
            verdicts=verdicts,
            first_caught=min(finished.values(), default=None),
        )
