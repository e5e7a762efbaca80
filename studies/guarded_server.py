"""Servers that a script starts: guarded, their logs in files, ended with the script."""

import contextlib
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import requests
from pdkit.runner.guardian import Guarded
from pdkit.runner.owner import new_token


class GuardedServer:
    """`python3 -m command...` at a port of 127.0.0.1; its output is kept in `logs`."""

    def __init__(self, logs: Path, name: str, port: int, *command: str) -> None:
        self.name, self.url, self.log = name, f"http://127.0.0.1:{port}", logs / f"{name}.log"
        address = ("--host", "127.0.0.1", "--port", str(port))
        with open(self.log, "w") as log:
            self.guarded = Guarded([sys.executable, "-m", *command, *address], os.environ, new_token(os.environ), log)

    def wait_until_ready(self, timeout: float = 300.0) -> None:
        """Returns once it answers /health; ends the script, with the end of its log, if it dies or takes too long."""
        deadline = time.monotonic() + timeout
        while self.guarded.is_running and time.monotonic() < deadline:
            with contextlib.suppress(requests.RequestException):
                requests.get(self.url + "/health", timeout=30).raise_for_status()
                return
            time.sleep(0.2)
        sys.exit(f"{self.name} did not get ready:\n{self.log.read_text()[-2000:]}")

    def end(self) -> None:
        self.guarded.end()


def start_all(logs: Path, commands: Iterable[tuple[Any, ...]], stack: contextlib.ExitStack) -> list[GuardedServer]:
    """A GuardedServer for each (name, port, *command), started side by side, once all are ready; `stack` ends them."""
    servers = []
    for name, port, *command in commands:
        servers.append(GuardedServer(logs, name, port, *command))
        stack.callback(servers[-1].end)
    for server in servers:
        server.wait_until_ready()
    return servers
