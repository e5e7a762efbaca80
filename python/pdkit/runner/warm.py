"""Processes from which those of test files are forked, which then start at once.

One has imported SGLang, torch and transformers: that takes about ten seconds of CPU time, which each file with servers,
and each of its servers, would pay. Another one, for files that import little, has what the runner itself is made of
(0.2 s, for the guardian and for the file). A runner that was forked itself uses the fork server beside it instead.
Only for CPU suites, on machines without a GPU; `--no-warm` starts each file anew.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pdkit.core import forked, source
from pdkit.core.console import Console
from pdkit.core.forked import ForkServer, ForkServerError
from pdkit.core.gpus import visible_gpus
from pdkit.core.registry import Registration
from pdkit.runner.guardian import Popen
from pdkit.runner.interruption import POLL_S, Interruption
from pdkit.runner.owner import FORKS_VARIABLE, TOKEN_VARIABLE, new_token

MUCH, LITTLE = "pdkit.runner.preload:much", "pdkit.runner.preload:little"
FORKED = "pdkit.core.forked"
SLOW = (
    *("sglang", "torch", "transformers", "pdkit.checks", "pdkit.deployment", "pdkit.engine", "pdkit.faults"),
    *(FORKED, "record"),  # what imports them starts programs that import those
)
ENOUGH = 2  # files of a kind: for one, importing once is as slow


def imports_much(test: Path) -> bool:
    """Whether what a test file imports takes seconds, as far as its own import statements tell."""
    try:
        names = source.read(test).imports.values()
    except OSError:  # whoever runs it reports that
        return False
    return any(f"{name}.".startswith(tuple(f"{slow}." for slow in SLOW)) for name in names)


def forks(test: Path) -> bool:
    """Whether a file that imports little starts programs by a fork, through a module beside it. Others get no fork server
    of their own: it is a child that a test of processes does not expect.
    """
    try:
        names = {name.partition(".")[0] for name in source.read(test).imports.values()}
        helpers = [path for name in names if (path := test.with_name(f"{name}.py")).is_file()]
        return any(name.startswith(FORKED) for path in helpers for name in source.read(path).imports.values())
    except (OSError, SyntaxError):  # whoever runs it reports that
        return False


class Warm:
    """These processes, while a suite runs.

    environment: of the processes, and so of what is read while modules are imported. logs: where their output goes.
    """

    def __init__(
        self,
        files: Sequence[Registration],
        environment: Mapping[str, str],
        logs: Path,
        console: Console,
        interruption: Interruption,
        is_on: bool = True,
    ):
        self._environment = {**environment, TOKEN_VARIABLE: new_token(environment)}
        self._logs, self._console, self._interruption = logs, console, interruption
        is_on = is_on and all(file.hw == "cpu" for file in files) and not visible_gpus()
        self._needed = {file.filename: MUCH if imports_much(Path(file.filename)) else LITTLE for file in files if is_on}
        self._servers: dict[str, ForkServer] = {}
        self._usable: set[ForkServer] = set()  # those that have not failed to fork

    def begin(self) -> None:
        """Starts those that enough files can use."""
        if self._needed and (inherited := forked.here()):
            self._servers[LITTLE] = inherited
        for prepare, count in Counter(self._needed.values()).items():
            if count >= ENOUGH and prepare not in self._servers:
                log = self._logs / f"preload.{prepare.partition(':')[2]}.log"
                self._servers[prepare] = ForkServer(prepare, self._environment, str(log))
        self._usable.update(self._servers.values())

    def next_of(self, files: Sequence[Registration]) -> int:
        """Which of them to start: the first, or while SGLang is imported, the first that does not wait for it."""
        server = self._servers.get(MUCH)
        if server is None or server.has_started(0):
            return 0
        return next((place for place, file in enumerate(files) if self._needed[file.filename] != MUCH), 0)

    def popen_for(self, file: str) -> Popen:
        """What starts the guardian of `file`: that of a process, if there is one for it, or `subprocess.Popen`."""
        server = self._servers.get(self._needed.get(file, ""))
        return partial(self._popen, server, file) if server and server in self._usable else subprocess.Popen

    def _popen(self, server: ForkServer, file: str, *args: Any, **kwargs: Any) -> subprocess.Popen[Any]:
        while not server.has_started(POLL_S):
            if self._interruption:
                return subprocess.Popen(*args, **kwargs)
        environment = dict(kwargs.get("env") or os.environ)
        if self._needed[file] == MUCH or forks(Path(file)):
            environment[FORKS_VARIABLE] = "1"
        try:
            return server.popen(*args, **{**kwargs, "env": environment})
        except ForkServerError as error:
            with contextlib.suppress(KeyError):  # another lane has said so
                self._usable.remove(server)
                self._console.line(f"test files are started anew, not forked: {error}")
            return subprocess.Popen(*args, **kwargs)

    def close(self) -> None:
        """Ends the processes that this run started."""
        for server in self._servers.values():
            if server is not forked.here():
                server.close()
