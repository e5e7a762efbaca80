"""Imports SGLang once and forks servers and routers from that: `python3 -m pdkit.deployment.cpu.fork_server FD`.

FD is one end of a Unix socket (SOCK_SEQPACKET) of `pdkit.deployment.cpu.forked.ForkServer`. A request is a JSON object
{"module", "argv", "environ"} with the descriptor of the child's output; the answer is {"pid"}, and {"exited", "status"}
when the child has ended. A child has a session of its own, and forks its own children in turn: SGLang would spawn them,
each importing everything again. When the other end of the socket is closed all children are killed.

Only without a GPU: a CUDA context does not survive a fork. What only the spawned start of SGLang can show is not seen.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import runpy
import selectors
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from pdkit.deployment.cpu import plugin

MESSAGE = 1 << 20
WARM = """
    sglang.launch_server sglang.srt.entrypoints.http_server sglang.srt.managers.detokenizer_manager
    sglang.srt.managers.scheduler sglang.srt.models.registry sglang_router.launch_router
""".split()


def import_all() -> None:
    """What servers and routers import, and the plugins that they load."""
    import importlib

    for name in WARM:
        importlib.import_module(name)
    from sglang.srt.plugins import load_plugins

    load_plugins()
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.process.BaseProcess.run = named_by_their_work(multiprocessing.process.BaseProcess.run)
    multiprocessing.set_start_method = lambda method, force=False: None  # SGLang asks for spawn


def named_by_their_work(run: Callable[[multiprocessing.process.BaseProcess], None]) -> Callable:
    """`run` of a process that is forked: its name in /proc is that of the function it runs.

    `setproctitle`, by which SGLang names its processes, has no effect in a forked one.
    """

    def named(process: multiprocessing.process.BaseProcess) -> None:
        target = getattr(getattr(process, "_target", None), "__name__", process.name)
        with open("/proc/self/comm", "w") as comm:
            comm.write(target[:15])
        run(process)

    return named


def be_the_child(request: dict, output: int) -> NoReturn:
    """Run the requested module as `python -m` does, and exit with its status."""
    status = 1
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        os.environ.clear()
        os.environ.update(request["environ"])
        plugin.announce(os.environ[plugin.FAMILY_VARIABLE])
        sys.argv = [request["module"], *request["argv"]]
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def serve(connection: socket.socket) -> None:
    """Fork on request until the other end is closed."""
    ended, wake = os.pipe()
    os.set_blocking(ended, False)
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    children: set[int] = set()
    selector = selectors.DefaultSelector()
    selector.register(connection, selectors.EVENT_READ)
    selector.register(ended, selectors.EVENT_READ)
    try:
        while True:
            for key, _ in selector.select():
                if key.fileobj is not connection:
                    os.read(ended, 4096)
                    for pid, status in reap(children):
                        connection.send(json.dumps({"exited": pid, "status": status}).encode())
                    continue
                message, descriptors, _, _ = socket.recv_fds(connection, MESSAGE, 1)
                if not message:
                    return
                (output,) = descriptors
                pid = os.fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    selector.close()
                    connection.close()
                    os.close(ended)
                    os.close(wake)
                    be_the_child(json.loads(message), output)
                os.close(output)
                children.add(pid)
                connection.send(json.dumps({"pid": pid}).encode())
    finally:
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)


def reap(children: set[int]) -> list[tuple[int, int]]:
    """(pid, return code as subprocess has it) of children that have ended; they are removed from the set."""
    found = []
    for pid in sorted(children):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            found.append((pid, os.waitstatus_to_exitcode(status)))
            children.discard(pid)
    return found


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    import torch

    assert not torch.cuda.is_available(), "with a GPU servers cannot be forked"
    import_all()
    threads = len(os.listdir("/proc/self/task"))
    print(f"fork server: SGLang is imported, {threads} thread(s)", flush=True)
    connection.send(json.dumps({"ready": threads}).encode())
    try:
        serve(connection)
    finally:
        os._exit(0)  # nothing is left to put in order, and to take down all that was imported takes seconds


if __name__ == "__main__":
    main()
