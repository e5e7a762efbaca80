"""One line that says where a run is, from what the test prints: which phase, for how long, how far the eval is."""

import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

from pdkit.report.record import append

REFRESH_S = 1.0
LINE_EVERY_S = 15.0
TERMINAL_LINE_EVERY_S = 5.0
PROGRESS_VARIABLE = "SGLANG_PD_PROGRESS_S"

PHASE = re.compile(  # unittest's signs of the methods before may precede it
    r"[.sFExu]*\[phase\] (?P<name>.+?)(?: (?P<begins>begins)|(?P<failed> failed)?: (?P<seconds>[\d.]+) s)"
)
_PROGRESS = re.compile(r"\[progress\] (?P<text>.+)")


class Live:
    """Follows the output of one test file; `write`, `line` and `keeping` pass on to the console.

    On a terminal the last line is refreshed each second; elsewhere a line is printed for each LINE_EVERY_S that a
    phase takes, unless the test printed one itself. With a `directory`, each phase becomes a record there, `at` in
    seconds since the start.
    """

    def __init__(self, console, directory: Path | None = None, clock: Callable[[], float] = time.monotonic):
        self._console, self._directory, self._clock = console, directory, clock
        self._start = clock()
        self._phases: dict[str, float] = {}
        self._said_at = self._start
        self._progress = ""
        self._partial = b""
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self):
        self._ticker.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._ticker.join()
        self._console.status("")

    def write(self, data: bytes):
        self._console.write(data)
        *lines, self._partial = (self._partial + data).split(b"\n")
        self._partial = self._partial[-65536:]
        for line in lines:
            if line.startswith(b"[p") or b"[phase]" in line:
                self._read(line.decode(errors="replace").strip())

    def line(self, text: str = ""):
        self._console.line(text)

    def keeping(self, path: Path):
        return self._console.keeping(path)

    def _read(self, line: str):
        with self._lock:
            if match := _PROGRESS.fullmatch(line):
                self._progress, self._said_at = f", {match['text']}", self._clock()
            elif match := PHASE.fullmatch(line):
                self._turn(match)

    def _turn(self, match: re.Match):
        name, now = match["name"], self._clock()
        if match["begins"]:
            self._phases[name], self._progress, self._said_at = now, "", now
            state = {"state": "begins"}
        else:
            self._phases.pop(name, None)
            state = {"state": "failed" if match["failed"] else "passed", "seconds": float(match["seconds"])}
        if self._directory:
            with self.keeping(self._directory):
                append(self._directory, "phase", name=name, at=round(now - self._start, 2), **state)

    def status(self) -> str:
        """`gsm8k 31 s, 120/200, score so far 0.983`, or nothing between phases."""
        if not self._phases:
            return ""
        name, began = list(self._phases.items())[-1]
        return f"{name} {self._clock() - began:.0f} s{self._progress}"

    def tick(self):
        """What is due at this moment."""
        with self._lock:
            status = self.status()
            if self._console.is_terminal:
                self._console.status(status)
            elif status and self._clock() - self._said_at >= LINE_EVERY_S:
                self._said_at = self._clock()
                self._console.line(f"[progress] {status}")

    def _tick(self):
        while not self._ended.wait(REFRESH_S):
            self.tick()


def environment(is_terminal: bool) -> dict[str, str]:
    """On a terminal somebody waits: the test shall say more often how far it is."""
    return (
        {PROGRESS_VARIABLE: str(TERMINAL_LINE_EVERY_S)} if is_terminal and PROGRESS_VARIABLE not in os.environ else {}
    )
