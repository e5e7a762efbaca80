"""Programs that are forked from a process which imported all that they need, as `subprocess.Popen` presents others.

fork_server = ForkServer("MODULE:FUNCTION", environment, log_path)
process = fork_server.popen(["python3", "-m", ...], env=..., stdout=PIPE, ...)

server_class = fork_server.based_on(Server)    # a subclass of Popen that calls super().__init__

done = run(["python3", "-m", ...])    # forked from this process's own fork server, where it has one
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from functools import partial
from typing import IO, Any, TypeVar

from pdkit.core import fork_server
from pdkit.core.fork_server import MESSAGE, Request, python_program

START_TIMEOUT = 300

P = TypeVar("P", bound="subprocess.Popen[Any]")


class ForkServerError(RuntimeError):
    """The fork server ended, or did not start; the message has the end of its log."""


class ForkServer:
    """The process that programs are forked from; it imports while we go on, and whoever comes first waits for it.

    prepare: "MODULE:FUNCTION" of what it imports. environment: of the process, and so of what is read while modules are
    imported. log_path: of its own output. flags: of the interpreter.
    """

    def __init__(self, prepare: str, environment: Mapping[str, str], log_path: str, flags: Sequence[str] = ()):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, open(log_path, "w", encoding="utf-8") as log:
            module = ("-m", "pdkit.core.fork_server", str(theirs.fileno()), prepare)
            self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
                [sys.executable, *flags, *module],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._listen_to(ours, self._process.pid, log_path)

    @classmethod
    def at(cls, connection: socket.socket, pid: int) -> ForkServer:
        """The one that waits at the other end of `connection`."""
        server = cls.__new__(cls)
        server._process = None
        server._listen_to(connection, pid, os.devnull)
        server._started.set()
        return server

    def _listen_to(self, connection: socket.socket, pid: int, log_path: str) -> None:
        self.pid, self.log_path = pid, log_path
        self._connection, self.is_there = connection, True
        self._started = threading.Event()
        self._answers: queue.Queue[dict[str, int] | None] = queue.Queue()
        self._waiting: dict[int, ForkedPopen] = {}
        self._ended: dict[int, int] = {}
        self._lock, self._forking = threading.Lock(), threading.Lock()
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
            if "ready" in answer:
                self._started.set()
                continue
            if "pid" in answer:
                self._answers.put(answer)
                continue
            with self._lock:
                process = self._waiting.pop(answer["exited"], None)
                if process is None:
                    self._ended[answer["exited"]] = answer["status"]
            if process is not None:
                process.end(answer["status"])
        self.is_there = False
        self._started.set()
        self._answers.put(None)
        with self._lock:
            left, self._waiting = self._waiting, {}
        for process in left.values():
            process.go_on_unseen()

    def has_started(self, timeout: float) -> bool:
        """Whether it has imported all, or has failed, within `timeout` seconds."""
        return self._started.wait(timeout)

    def _answer(self) -> dict[str, int]:
        answer = self._answers.get() if self.has_started(START_TIMEOUT) else None
        if answer is None:
            self._answers.put(None)
            with open(self.log_path, encoding="utf-8", errors="replace") as log:
                end = "".join(log.readlines()[-15:])
            raise ForkServerError(f"nothing can be forked from pid {self.pid}; last lines of {self.log_path}:\n{end}")
        return answer

    def fork(self, process: ForkedPopen, request: Request, streams: Sequence[int]) -> int:
        """The pid of a child that runs `request` with these standard streams. Raises ForkServerError."""
        with self._forking:
            message = request.dump()
            try:
                socket.send_fds(self._connection, [message], streams)
            except (BrokenPipeError, ConnectionResetError):
                pass  # `_answer` reports why
            except OSError as error:
                raise ForkServerError(
                    f"{' '.join(request.argv)[:200]}: cannot be forked ({error.strerror}); its arguments and environment "
                    f"are {len(message)} bytes: make them shorter"
                ) from None
            pid = self._answer()["pid"]
        with self._lock:
            status = self._ended.pop(pid, None)
            if status is None:
                self._waiting[pid] = process
        if status is not None:
            process.end(status)
        return pid

    def based_on(self, popen: type[P]) -> type[P]:
        """`popen`, a subclass of Popen that calls super().__init__, with its processes forked from here."""
        return type(f"Forked{popen.__name__}", (popen, ForkedPopen), {"fork_server": self})

    @property
    def popen(self) -> type[ForkedPopen]:
        """What stands for `subprocess.Popen`."""
        return type("Forked", (ForkedPopen,), {"fork_server": self})

    def close(self) -> None:
        """End the process; what it forked goes on. Harmless if it was ended before."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        if self._process is not None and self._process.returncode is None:
            self._process.wait()
            self._connection.close()


class ForkedPopen(subprocess.Popen[Any]):
    """A child of a fork server, of which `pid`, `poll`, `wait`, `returncode`, signals and streams are as usual.

    Command: ["python3", "-m", MODULE, ARGUMENT...] or ["python3", "FILE.py", ARGUMENT...]. It has a session of its own.
    There is no `communicate`.
    has_fork_server: what it starts can be forked in turn, from its `here()`.
    """

    fork_server: ForkServer

    def __init__(
        self,
        args: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        stdin: int | IO[Any] | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        encoding: str | None = None,
        errors: str | None = None,
        start_new_session: bool = True,
        has_fork_server: bool = False,
    ):
        argv = python_program(args)
        assert argv and start_new_session, f"cannot be forked: {args}"
        self.args, self.returncode = args, None
        self._end_noticed = threading.Event()
        self._waitpid_lock = threading.Lock()
        self._child_created = False  # by somebody else, as far as Popen's destructor is concerned
        request = Request(argv, dict(os.environ if env is None else env), cwd or os.getcwd(), has_fork_server)
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            ends = [_stream(what, number, ours, theirs) for number, what in enumerate((stdin, stdout))]
            ends.append((ends[1][0], None) if stderr == subprocess.STDOUT else _stream(stderr, 2, ours, theirs))
            self.pid = self.fork_server.fork(self, request, [end for end, _ in ends])
            ours.pop_all()
        text = {"encoding": encoding, "errors": errors} if encoding else {}
        files = [end if end is None else _open(end, mode, text) for (_, end), mode in zip(ends, "wrr")]
        self.stdin, self.stdout, self.stderr = files

    def end(self, status: int) -> None:
        """The child has ended."""
        self.returncode = status
        self._end_noticed.set()

    def go_on_unseen(self) -> None:
        """The fork server is gone, and with it who would learn our return code: -9 once the child has ended."""

        def watch() -> None:
            with contextlib.suppress(ProcessLookupError):
                descriptor = os.pidfd_open(self.pid)
                select.select([descriptor], [], [])
                os.close(descriptor)
            self.end(-signal.SIGKILL)

        threading.Thread(target=watch, name=f"end of {self.pid}", daemon=True).start()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if not self._end_noticed.wait(timeout):
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self.returncode


def _open(descriptor: int, mode: str, text: Mapping[str, str | None]) -> IO[Any]:
    return open(descriptor, mode, **text) if text else open(descriptor, f"{mode}b")  # type: ignore[call-overload]


def _stream(
    what: int | IO[Any] | None, number: int, ours: contextlib.ExitStack, theirs: contextlib.ExitStack
) -> tuple[int, int | None]:
    """(descriptor for the child, our end of a pipe or None); both are closed with their stacks."""
    if what == subprocess.PIPE:
        read, write = os.pipe()
        child, own = (read, write) if number == 0 else (write, read)
        ours.callback(os.close, own)
        theirs.callback(os.close, child)
        return child, own
    if what == subprocess.DEVNULL:
        child = os.open(os.devnull, os.O_RDWR)
        theirs.callback(os.close, child)
        return child, None
    if what is None:
        return number, None
    return what if isinstance(what, int) else what.fileno(), None


_here: ForkServer | None = None
_finding = threading.Lock()  # two at its socket would take each other's answers


def here() -> ForkServer | None:
    """The fork server of this process, which forks from what it had imported when it began.

    None in a process that was not forked by a fork server itself, and once it has ended.
    """
    global _here
    with _finding:
        if _here is None and fork_server.beside is not None:
            _here = ForkServer.at(*fork_server.beside)
    return _here if _here is not None and _here.is_there else None


def popen(has_fork_server: bool = True) -> Callable[..., subprocess.Popen[Any]]:
    """What starts a program of Python: a fork where this process has a fork server, or else `subprocess.Popen`.

    has_fork_server: what it starts can fork in turn.
    """
    server = here()
    return partial(server.popen, has_fork_server=has_fork_server) if server else subprocess.Popen


def run(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    timeout: float | None = None,
    errors: str = "strict",
    has_fork_server: bool = False,
) -> subprocess.CompletedProcess[str]:
    """`subprocess.run(command, capture_output=True, text=True)` of such a command, forked where that can be.

    Raises TimeoutExpired, also where others keep its output open; the command has been ended.
    """
    server = here()
    options: dict[str, Any] = {"env": env, "cwd": cwd, "encoding": "utf-8", "errors": errors}
    options["stdin"], options["stdout"], options["stderr"] = subprocess.DEVNULL, subprocess.PIPE, subprocess.PIPE
    if server is None:
        return subprocess.run(command, timeout=timeout, **options)
    process = server.popen(command, has_fork_server=has_fork_server, **options)
    texts = _read(process.stdout), _read(process.stderr)
    began = time.monotonic()
    try:
        if wait(texts, timeout).not_done:  # somebody has them, if not the command itself
            raise subprocess.TimeoutExpired(command, timeout or 0.0)
        code = process.wait(None if timeout is None else max(0.0, began + timeout - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(command, code, *(text.result() for text in texts))


def _read(stream: IO[str] | None) -> Future[str]:
    """All that comes of it until its end, for which no other thread has to wait."""
    found: Future[str] = Future()

    def read() -> None:
        assert stream, "it is a pipe"
        with stream:
            try:
                found.set_result(stream.read())
            except Exception as error:
                found.set_exception(error)

    threading.Thread(target=read, daemon=True).start()
    return found
