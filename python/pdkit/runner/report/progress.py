"""One line that says where a run is, from its events: which phase, for how long, how far the eval is."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pdkit.core.console import Console
from pdkit.core.events import Tail

REFRESH_S = 1.0
LINE_EVERY_S = 15.0
TERMINAL_LINE_EVERY_S = 5.0
PROGRESS_VARIABLE = "SGLANG_PD_PROGRESS_S"


class Live:
    """Follows the events in the directory of one run of a test file; use as a context manager.

    On a terminal the last line is refreshed each second; elsewhere a line is printed for each LINE_EVERY_S that a
    phase takes, unless the test printed one itself. `clock` gives seconds since 1970, as events have them.
    """

    def __init__(self, console: Console, directory: Path, clock: Callable[[], float] = time.time):
        self._console, self._directory, self._clock = console, directory, clock
        self._tail = Tail(directory)
        self._phases: dict[str, float] = {}
        self._said_at = clock()
        self._progress = ""
        self._ended = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> "Live":
        self._ticker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._ticker.join()
        self._console.status("")

    def _read(self, event: dict[str, Any]) -> None:
        if event["kind"] == "progress":
            self._said_at = event["ts"]
            self._progress = f", {event['done']}/{event['total']}, score so far {event['score']:.3f}"
        elif event["kind"] == "phase" and event["state"] == "begins":
            self._phases.pop(event["name"], None)
            self._phases[event["name"]] = self._said_at = event["ts"]
            self._progress = ""
        elif event["kind"] == "phase":
            self._phases.pop(event["name"], None)

    def status(self) -> str:
        """`gsm8k 31 s, 120/200, score so far 0.983`, or nothing between phases."""
        if not self._phases:
            return ""
        name, began = list(self._phases.items())[-1]
        return f"{name} {self._clock() - began:.0f} s{self._progress}"

    def tick(self) -> None:
        """What is due at this moment."""
        try:
            for event in self._tail.new():
                self._read(event)
        except OSError:
            return  # who reads the events at the end says that they cannot be read
        status = self.status()
        if self._console.is_terminal:
            self._console.status(status)
        elif status and self._clock() - self._said_at >= LINE_EVERY_S:
            self._said_at = self._clock()
            self._console.line(f"[progress] {status}")

    def _tick(self) -> None:
        while not self._ended.wait(REFRESH_S):
            self.tick()


def environment(is_terminal: bool) -> dict[str, str]:
    """On a terminal somebody waits: the test prints more often how far it is."""
    return (
        {PROGRESS_VARIABLE: str(TERMINAL_LINE_EVERY_S)} if is_terminal and PROGRESS_VARIABLE not in os.environ else {}
    )
