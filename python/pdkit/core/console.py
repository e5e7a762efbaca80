"""The console, shared by the runner's lines and the output of its children."""

import shutil
import threading
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

CLEAR = b"\r\x1b[K"
UP = b"\x1b[A"


class Console:
    """The output stream, shared by our lines and the bytes of the children; a reader that goes away stops nothing."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._at_margin = True
        self._is_open = True
        self._status: list[bytes] = []
        self.is_terminal = stream.isatty()
        self.lost: str | None = None  # why the first thing that could not be kept was not

    def write(self, data: bytes) -> None:
        with self._lock:
            self._write(data)

    def _write(self, data: bytes) -> None:
        if not data:
            return
        self._put(self._clearing() + data)
        self._at_margin = data.endswith(b"\n")
        if self._at_margin:
            self._put(b"\n".join(self._status))

    def _clearing(self) -> bytes:
        """What takes the lines of the status away, where they are shown: below what was written, at the margin."""
        return CLEAR + (UP + CLEAR) * (len(self._status) - 1) if self._status and self._at_margin else b""

    def status(self, lines: Sequence[str]) -> None:
        """On a terminal, keeps `lines` below all that was written, until they are replaced."""
        with self._lock:
            if not self.is_terminal or not self._at_margin:
                return
            width = shutil.get_terminal_size().columns - 1
            clear, self._status = self._clearing(), [line[:width].encode() for line in lines]
            self._put(clear + b"\n".join(self._status))

    def _put(self, data: bytes) -> None:
        if not self._is_open or not data:
            return
        try:
            self._stream.write(data)
            self._stream.flush()
        except OSError:
            self._is_open = False

    @contextmanager
    def keeping(self, path: Path, hint: str = "") -> Iterator[None]:
        """What is written within, and cannot be, is said in a line and stops nothing."""
        try:
            yield
        except OSError as error:
            self.lost = self.lost or error.strerror
            self.line(f"cannot be kept: {error.filename or path}: {error.strerror}{hint}")

    def line(self, text: str = "") -> None:
        """A line of its own, or several that stay together."""
        with self._lock:
            margin = "" if self._at_margin else "\n"
            self._write(f"{margin}{text}\n".encode(errors="backslashreplace"))


def columns(rows: Sequence[Sequence[str]], right: Container[int] = (), indent: str = "") -> str:
    """One line per row, its cells two blanks apart; columns whose numbers (from 0) are in `right` end together.

    For what is piped into grep as well as read: unlike a table of rich, no line is ever wrapped or cut.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        return (indent + "  ".join(cells)).rstrip()

    return "\n".join(map(line, rows))
