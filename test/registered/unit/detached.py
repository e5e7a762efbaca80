"""Programs for the tests of supervision: processes that get away from whoever started them."""

import sys

import psutil
from pdkit.core import processes

SLEEP = "import time; time.sleep(300)"
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); " + SLEEP
LISTEN = "import socket, time; listener = socket.create_server(('127.0.0.1', 0)); time.sleep(300)"


def spawner(source: str, session: bool = False, then: str = "", env: str = "None", out: str = "2") -> str:
    """A program that starts `source` and prints its process id, and then does `then`."""
    options = f"start_new_session={session}, env={env}, stdout={out}"
    start = f"subprocess.Popen([sys.executable, '-c', {source!r}], {options})"
    return f"import subprocess, sys, time; print({start}.pid, flush=True)\n{then}"


def orphaner(source: str, then: str = "", env: str = "{}") -> str:
    """A program that starts `source` as an orphan in a session of its own, and then does `then`.

    With `env` {} nothing ties the orphan to its origin but the table of processes; it prints its process id.
    """
    middle = spawner(source, session=True, env=env)
    return f"import subprocess, sys, time; subprocess.run([sys.executable, '-c', {middle!r}], stdout=2)\n{then}"


def command(source: str) -> tuple[str, ...]:
    return (sys.executable, "-c", source)


is_alive = processes.is_pid_alive


def listening(process: psutil.Process) -> set[int]:
    """Ports of a process that is about to listen."""
    found: set[int] = set()
    processes.wait_until(lambda: bool(found.update(processes.listening_ports([process])) or found), 20.0)
    return found
