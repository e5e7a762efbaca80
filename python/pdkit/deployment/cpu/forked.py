"""Servers that are forked from one process which imported SGLang once, presented as `subprocess.Popen` presents others.

fork_server = ForkServer(environment, log_path)
class Forked(Server, ForkedPopen): fork_server = ...     Server: a subclass of Popen that calls super().__init__
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import IO, Any

from pdkit.deployment.cpu.fork_server import MESSAGE

START_TIMEOUT = 300


class ForkServerError(RuntimeError):
    """The fork server ended, or did not start; the message has the end of its log."""


class ForkServer:
    """The process that servers are forked from. Importing begins at once; `start` waits for it.

    environment: of the process, and so of what SGLang reads while it is imported. log_path: of its own output.
    """

    def __init__(self, environment: Mapping[str, str], log_path: str) -> None:
        self.log_path = log_path
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, open(log_path, "w", encoding="utf-8") as log:
            command = [sys.executable, "-W", "ignore", "-m", "pdkit.deployment.cpu.fork_server", str(theirs.fileno())]
            self._process = subprocess.Popen(
                command,
                env=dict(environment),
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self.pid = self._process.pid
        self._connection = ours
        self._answers: queue.Queue[dict[str, int] | None] = queue.Queue()
        self._waiting: dict[int, ForkedPopen] = {}
        self._ended: dict[int, int] = {}
        self._lock, self._forking = threading.Lock(), threading.Lock()
        self._ready = False
        threading.Thread(target=self._listen, name="fork-server", daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                message = self._connection.recv(MESSAGE)
            except OSError:
                message = b""
            if not message:
                break
            answer = json.loads(message)
            if "exited" not in answer:
                self._answers.put(answer)
                continue
            with self._lock:
                process = self._waiting.pop(answer["exited"], None)
                if process is None:
                    self._ended[answer["exited"]] = answer["status"]
            if process is not None:
                process.end(answer["status"])
        self._answers.put(None)
        with self._lock:
            left, self._waiting = self._waiting, {}
        for process in left.values():
            process.end(-9)  # a fork server that ends kills its children

    def _answer(self) -> dict[str, int]:
        try:
            answer = self._answers.get(timeout=START_TIMEOUT)
        except queue.Empty:
            answer = None
        if answer is None:
            self._answers.put(None)
            with open(self.log_path, encoding="utf-8", errors="replace") as log:
                end = "".join(log.readlines()[-15:])
            raise ForkServerError(f"SGLang's servers cannot be forked; last lines of {self.log_path}:\n{end}")
        return answer

    def fork(
        self, process: ForkedPopen, module: str, argv: Sequence[str], environ: Mapping[str, str]
    ) -> tuple[int, IO]:
        """(pid, its output as text) of a child that runs `module` as `python -m` would. Raises ForkServerError."""
        request = json.dumps({"module": module, "argv": list(argv), "environ": dict(environ)}).encode()
        with self._forking:
            if not self._ready:
                self._answer()
                self._ready = True
            read, write = os.pipe()
            try:
                socket.send_fds(self._connection, [request], [write])
            except OSError:
                pass  # `_answer` reports why
            finally:
                os.close(write)
            pid = self._answer()["pid"]
        with self._lock:
            status = self._ended.pop(pid, None)
            if status is None:
                self._waiting[pid] = process
        if status is not None:
            process.end(status)
        return pid, open(read, encoding="utf-8", errors="replace")

    def close(self) -> None:
        """End the process, and with it what it forked and still runs. Harmless if it was ended before."""
        if self._process.returncode is None:
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)
            self._process.wait()
            self._connection.close()


class ForkedPopen(subprocess.Popen):
    """A child of a fork server, of which `pid`, `poll`, `wait`, `returncode`, signals and `stdout` are as usual.

    Command: ["python3", "-m", MODULE, ARGUMENT...]; standard error goes to standard output.
    """

    fork_server: ForkServer

    def __init__(self, args: Sequence[str], *, env: Mapping[str, str] | None = None, **_: Any) -> None:
        python, dash_m, module, *argv = args
        assert (os.path.basename(python).startswith("python"), dash_m) == (True, "-m"), f"cannot be forked: {args}"
        self.args, self.stdin, self.stderr, self.returncode = args, None, None, None
        self._end_noticed = threading.Event()
        self._waitpid_lock = threading.Lock()
        self._child_created = False  # by somebody else, as far as Popen's destructor is concerned
        self.pid, self.stdout = self.fork_server.fork(self, module, argv, os.environ if env is None else env)

    def end(self, status: int) -> None:
        """The child has ended."""
        self.returncode = status
        self._end_noticed.set()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if not self._end_noticed.wait(timeout):
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode
