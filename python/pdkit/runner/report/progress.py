"""Where the running test files are, from their events: in which phase, for how long, how far an eval is."""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from pdkit.core.console import Console
from pdkit.core.events import Tail

LINE_EVERY_S = 60.0
TERMINAL_LINE_EVERY_S = 5.0
PROGRESS_VARIABLE = "SGLANG_PD_PROGRESS_S"


class _Running:
    """One run of a test file, followed by the events in its directory; times in seconds since 1970."""

    def __init__(self, name: str, directory: Path, now: float):
        self.name, self.began, self.shown_at = name, now, now
        self._tail = Tail(directory)
        self._phases: dict[str, float] = {}
        self._progress = ""

    def read(self) -> None:
        """Reads what is new. Raises OSError."""
        for event in self._tail.new().of("progress", "phase"):
            if event["kind"] == "progress":
                self._progress = f", {event['done']}/{event['total']}, score so far {event['score']:.3f}"
                continue
            self._phases.pop(event["name"], None)
            if event["state"] == "begins":
                self._phases[event["name"]] = event["ts"]
                self._progress = ""

    def status(self, now: float) -> str:
        """`[3/60] registered/x.py 45 s; gsm8k 31 s, 120/200, score so far 0.983`."""
        line = f"{self.name} {now - self.began:.0f} s"
        if self._phases:
            name, began = list(self._phases.items())[-1]
            line += f"; {name} {now - began:.0f} s{self._progress}"
        return line


class Board:
    """On a terminal one line for each running file, refreshed by `tick`; elsewhere a line per LINE_EVERY_S and file.

    Any thread may call any method. `clock` gives seconds since 1970, as events have them.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.time):
        self._console, self._clock = console, clock
        self._running: dict[Path, _Running] = {}
        self._lock = threading.Lock()

    def begins(self, name: str, directory: Path) -> None:
        """A run of the file `name` begins, whose events go into `directory`."""
        with self._lock:
            self._running[directory] = _Running(name, directory, self._clock())
            self._show()

    def ends(self, directory: Path) -> None:
        with self._lock:
            del self._running[directory]
            self._show()

    def tick(self) -> None:
        """Shows what is due at this moment."""
        with self._lock:
            for run in self._running.values():
                with contextlib.suppress(OSError):  # who reads the events at the end says that they cannot be read
                    run.read()
            self._show()

    def _show(self) -> None:
        now = self._clock()
        if self._console.is_terminal:
            self._console.status([run.status(now) for run in self._running.values()])
            return
        for run in self._running.values():
            if now - run.shown_at >= LINE_EVERY_S:
                run.shown_at = now
                self._console.line(run.status(now))


def environment(is_terminal: bool) -> dict[str, str]:
    """On a terminal somebody waits: the test prints more often how far it is."""
    is_ours = is_terminal and PROGRESS_VARIABLE not in os.environ
    return {PROGRESS_VARIABLE: str(TERMINAL_LINE_EVERY_S)} if is_ours else {}
