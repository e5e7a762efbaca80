"""The console, shared by the runner's lines and the output of its children."""

import threading
from typing import BinaryIO


class Console:
    """The output stream, shared by our lines and the bytes of the children; a reader that goes away stops nothing."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream
        self._lock = threading.Lock()
        self._at_margin = True
        self._is_open = True

    def write(self, data: bytes):
        with self._lock:
            if not (data and self._is_open):
                return
            try:
                self._stream.write(data)
                self._stream.flush()
            except OSError:
                self._is_open = False
            self._at_margin = data.endswith(b"\n")

    def line(self, text: str = ""):
        margin = "" if self._at_margin else "\n"
        self.write(f"{margin}{text}\n".encode())
