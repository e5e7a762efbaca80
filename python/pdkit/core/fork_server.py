"""Imports what is slow to import once, and forks Python programs from that, each of which then starts at once.

    python3 -m pdkit.core.fork_server FD MODULE:FUNCTION

FD is one end of a Unix socket (SOCK_SEQPACKET) of `pdkit.core.forked.ForkServer`. FUNCTION does the imports; what it
returns, if anything, each child calls first. A request is a JSON object {"argv", "environ", "directory"} with the
descriptors of the child's standard streams; the answer is {"pid"}, and {"exited", "status"} when the child has ended.
When the other end of the socket is closed this process ends, and its children go on without it.

A child differs from a program that was started by exec in what was imported before, and in how it ends: exit code,
threads, atexit and buffers are as the interpreter has them, but objects that are left are not destroyed, and exit
functions of what was imported, which clean up what is the fork server's, are called when that ends. For what was
imported each takes ten times as long as all else, and copies each page of it. It has a session of its own, its own
environment and command line also for others to see in /proc, the streams and the directory that it was given, no
descriptor and no signal handler of ours. It can be forked from in turn, which is `start_here`, and a fork server of its own
waits beside it, which is `pdkit.core.forked.here`.

Only without a GPU: a CUDA context does not survive a fork.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import gc
import importlib
import json
import mmap
import os
import runpy
import selectors
import signal
import socket
import struct
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

MESSAGE = 1 << 20
PR_SET_PDEATHSIG, PR_SET_MM, PR_SET_MM_MAP = 1, 35, 14
MADV_COLLAPSE, HUGE_PAGE = 25, 2 << 20
_MM_MAP = struct.Struct("=12QIi")  # struct prctl_mm_map of linux/prctl.h

_libc = ctypes.CDLL(None, use_errno=True)
_server: _Server | None = None  # of this process, or of the one that it was forked from
beside: tuple[socket.socket, int] | None = None  # the fork server of this process: our end of its socket, its pid


@dataclass(frozen=True)
class Request:
    """A program to run: `argv` is what `python_program` returns; a fork server of its own is `pdkit.core.forked.here`."""

    argv: tuple[str, ...]
    environ: Mapping[str, str]
    directory: str
    has_fork_server: bool = False

    @classmethod
    def parse(cls, message: bytes) -> Request:
        return cls(**json.loads(message))

    def dump(self) -> bytes:
        return json.dumps(asdict(self)).encode()


@dataclass
class _Server:
    """What a child has to know of the fork server that it comes from."""

    descriptors: frozenset[int]  # the standard streams, and what the imports opened
    variables: Mapping[str, str]  # those that the imports set
    in_child: Callable[[], None] | None


def python_program(command: Sequence[str]) -> tuple[str, ...] | None:
    """["-m", MODULE, ARGUMENT...] or [FILE, ARGUMENT...] of a command that runs these by Python; None of any other."""
    is_python = len(command) > 1 and os.path.basename(command[0]).startswith("python")
    runs = is_python and (str(command[1]).endswith(".py") or (command[1] == "-m" and len(command) > 2))
    return tuple(map(str, command[1:])) if runs else None


def appear_as(argv: Sequence[str], environ: Mapping[str, str]) -> None:
    """What others read of this process in /proc/PID/cmdline and environ, as after an exec. Raises OSError.

    Who started a process is known by its environment (`pdkit.runner.owner`): that of our parent would be a lie.
    prctl(2), PR_SET_MM_MAP: no privilege is needed; the kernel needs CONFIG_CHECKPOINT_RESTORE.
    """
    arguments = b"".join(os.fsencode(each) + b"\0" for each in argv)
    variables = b"".join(os.fsencode(f"{name}={value}") + b"\0" for name, value in environ.items())
    memory = mmap.mmap(-1, len(arguments) + len(variables) + 1, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.write(arguments + variables)
    address = ctypes.c_char.from_buffer(memory)  # also keeps the memory, as a mapping that is exported cannot be closed
    _kept.append(address)
    start = ctypes.addressof(address)
    middle, end = start + len(arguments), start + len(arguments) + len(variables)
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start_code, end_code, start_stack, start_data, end_data, start_brk = (
        int(fields[number - 3])
        for number in (26, 27, 28, 45, 46, 47)  # proc_pid_stat(5)
    )
    _libc.sbrk.restype, _libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
    layout = _MM_MAP.pack(
        *(start_code, end_code, start_data, end_data, start_brk, _libc.sbrk(0), start_stack),
        *(start, middle, middle, end, 0, 0, -1),  # auxiliary vector and executable stay as they are
    )
    if _libc.prctl(PR_SET_MM, PR_SET_MM_MAP, layout, len(layout), 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_MM_MAP)")


_kept: list[Any] = []


def _begin(request: Request, streams: Sequence[int]) -> None:
    """Makes a process that was just forked what an exec would have made it."""
    assert _server is not None
    os.setsid()
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    _leave_exit_functions()
    for stream, descriptor in enumerate(streams):
        os.dup2(descriptor, stream)
    for descriptor in _open_descriptors() - _server.descriptors:
        os.close(descriptor)
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ.clear()
    os.environ.update({**_server.variables, **request.environ})
    appear_as([sys.executable, *request.argv], os.environ)
    if "tempfile" in sys.modules:
        vars(sys.modules["tempfile"])["tempdir"] = None  # that of our parent's TMPDIR
    os.chdir(request.directory)
    more = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path not in before]
    own = request.directory if request.argv[0] == "-m" else os.path.dirname(os.path.realpath(request.argv[0]))
    sys.path[:] = [own, *more, *sys.path[1:]]
    sys.orig_argv = [sys.executable, *request.argv]
    faulthandler.disable()
    if os.environ.get("PYTHONFAULTHANDLER"):
        faulthandler.enable()
    if _server.in_child:
        _server.in_child()


def _leave_exit_functions() -> None:
    """Leaves those of the process that this one was forked from, but for what all programs call that use these modules."""
    finalizers: Any = weakref.finalize
    _kept.append(finalizers._registry)
    finalizers._registry, finalizers._registered_with_atexit = {}, False
    atexit._clear()
    for module, function in (("logging", "shutdown"), ("multiprocessing.util", "_exit_function")):
        if module in sys.modules:
            atexit.register(getattr(sys.modules[module], function))


def _become(request: Request, streams: Sequence[int]) -> NoReturn:
    """Runs a program to its end in a process that was just forked, as the interpreter runs one."""
    error = None
    try:
        _begin(request, streams)
        _run(request)
    except BaseException as raised:
        error = raised
    _end(error)


def _run(request: Request) -> None:
    if request.has_fork_server:
        global beside
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent, pid = os.getpid(), os.fork()
        if pid == 0:
            ours.close()
            _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # who asks it to fork may end by os._exit
            if os.getppid() == parent:
                serve(theirs)
            os._exit(0)
        theirs.close()
        beside = ours, pid
        atexit.register(_end_beside)
    program, *arguments = request.argv
    if program == "-m":
        sys.argv[:] = arguments
        _forget(arguments[0])
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = request.argv
        runpy.run_path(program, run_name="__main__")


def _forget(name: str) -> None:
    """Who imports the module that runs as `__main__` gets another one than our parent's. Packages stay: those of their
    modules that are there would otherwise not be attributes of a new one.
    """
    if hasattr(sys.modules.get(name), "__path__") or sys.modules.pop(name, None) is None:
        return
    package, _, module = name.rpartition(".")
    if package in sys.modules:
        vars(sys.modules[package]).pop(module, None)


def _end(error: BaseException | None) -> NoReturn:
    """Ends this process as the interpreter ends a program that returned, or raised `error`."""
    code = 0
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if code and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
    elif error is not None:
        code = 1
        sys.excepthook(type(error), error, error.__traceback__)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError) as failure:
            if stream is sys.stdout:
                code = 120
                print(f"Exception ignored in: {stream!r}\n{type(failure).__name__}: {failure}", file=sys.stderr)
    if isinstance(error, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code & 0xFF)


def _end_beside() -> None:
    """Whoever sees our end must not find it still there."""
    assert beside is not None
    ours, pid = beside
    with contextlib.suppress(OSError):
        ours.shutdown(socket.SHUT_RDWR)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)


def start_here(
    command: Sequence[str], environ: Mapping[str, str], streams: Sequence[int], has_fork_server: bool
) -> int | None:
    """The process id of a child that runs `command`; None where it has to be started by an exec.

    It is a fork of this process, which must have no threads. streams: its standard input, output and error.
    has_fork_server: what it starts can be forked in turn.
    """
    argv = python_program(command)
    if _server is None or argv is None or threading.active_count() > 1:
        return None
    request = Request(argv, dict(environ), os.getcwd(), has_fork_server)
    return os.fork() or _become(request, streams)


def serve(connection: socket.socket) -> None:
    """Forks on request until the other end is closed."""
    ended, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: set[int] = set()
    with selectors.DefaultSelector() as selector, connection:
        selector.register(connection, selectors.EVENT_READ)
        selector.register(ended, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is not connection:
                    os.read(ended, 4096)
                    for pid, status in _reap(children):
                        _say(connection, exited=pid, status=status)
                    continue
                try:
                    message, streams, _, _ = socket.recv_fds(connection, MESSAGE, 3)
                except ConnectionResetError:
                    message = b""
                if not message:
                    return
                pid = os.fork()
                if pid == 0:
                    selector.close()
                    connection.close()
                    _become(Request.parse(message), streams)
                for stream in streams:
                    os.close(stream)
                children.add(pid)
                _say(connection, pid=pid)


def _say(connection: socket.socket, **what: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # who asked is gone
        connection.send(json.dumps(what).encode())


def _reap(children: set[int]) -> list[tuple[int, int]]:
    """(pid, return code as subprocess has it) of children that have ended; they are removed from the set."""
    found = []
    for pid in sorted(children):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            found.append((pid, os.waitstatus_to_exitcode(status)))
            children.discard(pid)
    return found


def _prepare(name: str, connection: socket.socket) -> _Server:
    """Imports; raises RuntimeError where nothing can be forked from what was imported."""
    before, directory = dict(os.environ), os.getcwd()
    module, _, function = name.partition(":")
    gc.disable()  # a sixth of the time of an import
    in_child = getattr(importlib.import_module(module), function)()
    os.chdir(directory)
    if threading.active_count() > 1:
        raise RuntimeError(f"{name} started threads: {threading.enumerate()}")
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        raise RuntimeError(f"{name} made a CUDA context, which does not survive a fork")
    appear_as(sys.orig_argv, before)  # or else children could not either
    variables = {name: value for name, value in os.environ.items() if before.get(name) != value}
    gc.collect()
    gc.freeze()  # what is there is neither looked at again nor copied for it
    gc.enable()
    _collapse()
    return _Server(_open_descriptors() - {connection.fileno()}, variables, in_child)


def _collapse() -> None:
    """Puts the memory of this process on huge pages, where the kernel has them (Linux 6.1): a fork copies the table of
    pages, which takes half as long then.
    """
    _libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, access, *_, inode = line.split()[:5]
        start, end = (int(address, 16) for address in addresses.split("-"))
        start, end = -(-start // HUGE_PAGE) * HUGE_PAGE, end // HUGE_PAGE * HUGE_PAGE
        if access == "rw-p" and inode == "0" and start < end:
            _libc.madvise(start, end - start, MADV_COLLAPSE)


def _open_descriptors() -> frozenset[int]:
    listed = map(int, os.listdir("/proc/self/fd"))
    return frozenset(number for number in listed if os.path.lexists(f"/proc/self/fd/{number}"))


def main(argv: Sequence[str]) -> NoReturn:
    global _server
    connection = socket.socket(fileno=int(argv[0]))
    connection.set_inheritable(False)
    _server = _prepare(argv[1], connection)
    threads = len(os.listdir("/proc/self/task"))
    print(f"fork server: {argv[1]} is done, {threads} thread(s) of the kernel", flush=True)
    connection.send(json.dumps({"ready": threads}).encode())
    serve(connection)
    _end(None)


if __name__ == "__main__":
    from pdkit.core import fork_server  # not this copy of it, which is called __main__

    fork_server.main(sys.argv[1:])
