"""Runs the tests of one class, fault after fault, against servers that it starts once.

    python3 -m pdkit.faults.matrix.worker FILE CLASS LOG [TEST ...]

Standard input: one JSON line a run, {"fault": name or null, "tests": names or null}. Standard output: one JSON line an event:

    {"event": "ready", "tests": [...]}
    {"event": "test", "test": name, "seconds": s, "verdicts": {check: {...}}}
    {"event": "done", "met": n, "seconds": s, "restarted": reason or ""}

Everything else that is printed goes to the file LOG, the events of the tests into a directory of its name. The class has
FaultSwitchServers.
"""

import importlib.util
import json
import os
import shutil
import signal
import sys
import time
import unittest
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import requests

from pdkit.checks.accounting import checks as accounting
from pdkit.checks.accounting.ledger import OK, Ledger
from pdkit.core.events import BAD, VARIABLE, Events, Tail
from pdkit.core.recording import RecordingResult
from pdkit.faults.driver import observe
from pdkit.faults.matrix.verdicts import one_line, verdicts_of

HEALTH_TIMEOUT = 5
LONGEST_SLEEP = 0.05


class PatientLedger(Ledger):
    """Gives up at once on servers that never answer, late on those that sometimes do.

    The accuracy gate alone would retry a request that failed until it succeeds: a ledger that soon refused them would
    lend it eyes. The client's backoff is no part of what is judged, and is cut short (LONGEST_SLEEP).
    """

    NEVER, SOMETIMES = 20, 400

    @property
    def give_up_after(self) -> int:
        answered = any(attempt.outcome == OK and attempt.sequences for attempt in self.attempts)
        return self.SOMETIMES if answered else self.NEVER

    @give_up_after.setter
    def give_up_after(self, value: int) -> None:
        pass


class RunningSubject:
    """A test class whose servers are up."""

    def __init__(self, cls: Any, tests: Sequence[str] = (), directory: Path = Path()) -> None:
        self.cls, self.events = cls, Tail(directory)
        self.restarted = ""
        self.tests = list(tests) or [
            name for name in unittest.TestLoader().getTestCaseNames(cls) if callable(getattr(cls, name))
        ]

    def start(self) -> None:
        self.cls.setUpClass()

    def stop(self) -> None:
        try:
            self.cls.tearDownClass()
        except AssertionError as error:
            print(f"[matrix] teardown: {error}", flush=True)
        finally:
            self.cls.doClassCleanups()

    def run(
        self, fault: str | None, emit: Callable[[dict[str, Any]], None], tests: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """`tests` (None: all) under `fault`, or none (None); returns the last event. Verdicts are emitted one by one."""
        started, self.restarted = time.monotonic(), ""
        self._flush_caches()
        checks = {test: partial(self._run_and_emit, test, emit) for test in (self.tests if tests is None else tests)}
        found = observe(self.cls.switch, fault, checks, goes_on=lambda: not self.restarted)
        restarted = self.restarted or self.unusable()
        if restarted:
            print(f"[matrix] restart after {fault}: {restarted}", flush=True)
            self.stop()
            self.start()
        return {"event": "done", "met": found.met, "seconds": time.monotonic() - started, "restarted": restarted}

    def _run_and_emit(self, test: str, emit: Callable[[dict[str, Any]], None]) -> str | None:
        began = time.monotonic()
        happened = self.run_test(test)
        seconds = time.monotonic() - began
        verdicts = verdicts_of(test, happened, seconds)
        if verdicts:
            told = {check: asdict(verdict) for check, verdict in verdicts.items()}
            emit({"event": "test", "test": test, "seconds": seconds, "verdicts": told})
        if any(event["state"] in BAD for event in happened.of("test")):
            self.restarted = self.unusable()
        return next((verdict.message for verdict in verdicts.values() if verdict.caught), None)

    def run_test(self, test: str) -> Events:
        """What happened in one test, whose servers are up already."""
        runner = unittest.TextTestRunner(sys.stdout, resultclass=RecordingResult)
        with (
            mock.patch.object(accounting, "Ledger", PatientLedger),
            mock.patch.object(time, "sleep", partial(_sleep_less, time.sleep)),
        ):
            runner.run(self.cls(test))
        return self.events.new()

    def unusable(self) -> str:
        """Why the servers cannot be used any more, or the empty string."""
        for name in ("prefill", "decode", "lb"):
            process = getattr(self.cls, f"process_{name}")
            if process.poll() is not None:
                return f"{name} exited with code {process.returncode}"
            try:
                status = requests.get(f"{getattr(self.cls, f'{name}_url')}/health", timeout=HEALTH_TIMEOUT).status_code
            except requests.RequestException as error:
                return one_line(f"{name} does not answer: {type(error).__name__}")
            if status != 200:
                return f"health of {name}: status {status}"
        return ""

    def _flush_caches(self) -> None:
        for url in (self.cls.prefill_url, self.cls.decode_url):
            requests.post(f"{url}/flush_cache", params={"timeout": HEALTH_TIMEOUT}, timeout=2 * HEALTH_TIMEOUT)


def _sleep_less(sleep: Callable[[float], None], seconds: float) -> None:
    """Cuts a client's backoff short; how long the checks wait themselves is part of what they do."""
    caller = sys._getframe(1).f_globals.get("__name__", "")
    sleep(seconds if caller.startswith("pdkit.") else min(seconds, LONGEST_SLEEP))


def load_class(file: str, name: str) -> Any:
    """The class `name` of the test file at `file`, whose neighbours it may import."""
    path = Path(file).resolve()
    sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader, f"{path} is not a module"
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return getattr(module, name)


def main(argv: Sequence[str] | None = None) -> None:
    file, name, log, *tests = sys.argv[1:] if argv is None else argv
    events = os.fdopen(os.dup(1), "w")
    with open(log, "a", encoding="utf-8") as file_of_log:
        os.dup2(file_of_log.fileno(), 1)
        os.dup2(file_of_log.fileno(), 2)

    def emit(event: Any) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    os.environ["SGLANG_TEST_MAX_RETRY"] = "0"
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    directory = Path(log).with_suffix("")  # one run of the worker is one channel of events
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    os.environ[VARIABLE] = str(directory)
    subject = RunningSubject(load_class(file, name), tests, directory)
    try:
        subject.start()
        emit({"event": "ready", "tests": subject.tests})
        for line in sys.stdin:
            emit(subject.run(emit=emit, **json.loads(line)))
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subject.stop()


if __name__ == "__main__":
    main()
