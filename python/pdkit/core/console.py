"""The console, shared by the runner's lines and the output of its children."""

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

CLEAR = b"\r\x1b[K"


class Console:
    """The output stream, shared by our lines and the bytes of the children; a reader that goes away stops nothing."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._at_margin = True
        self._is_open = True
        self._status = b""
        self.is_terminal = stream.isatty()

    def write(self, data: bytes) -> None:
        with self._lock:
            self._write(data)

    def _write(self, data: bytes) -> None:
        if not data:
            return
        self._put((CLEAR if self._status else b"") + data)
        self._at_margin = data.endswith(b"\n")
        if self._status and self._at_margin:
            self._put(self._status)

    def status(self, text: str) -> None:
        """On a terminal, keeps `text` below all that was written, until it is replaced."""
        with self._lock:
            if not self.is_terminal or not self._at_margin:
                return
            width = shutil.get_terminal_size().columns - 1
            self._put((CLEAR if self._status else b"") + text[:width].encode())
            self._status = text[:width].encode()

    def _put(self, data: bytes) -> None:
        if not self._is_open:
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
            self.line(f"cannot be kept: {error.filename or path}: {error.strerror}{hint}")

    def line(self, text: str = "") -> None:
        """A line of its own, or several that stay together."""
        with self._lock:
            margin = "" if self._at_margin else "\n"
            self._write(f"{margin}{text}\n".encode())
