"""A process that has imported SGLang, torch and transformers once, from which the processes of test files are forked.

Importing them takes about ten seconds of CPU time, which each file with servers, and each of its servers, would pay.
Files that import little are started anew.
Only for CPU suites, on machines without a GPU; `--no-warm` starts each file anew.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pdkit.core import source
from pdkit.core.console import Console
from pdkit.core.forked import ForkServer, ForkServerError
from pdkit.core.gpus import visible_gpus
from pdkit.core.registry import Registration
from pdkit.runner.guardian import Popen
from pdkit.runner.interruption import POLL_S, Interruption
from pdkit.runner.owner import TOKEN_VARIABLE, new_token

PREPARE = "pdkit.deployment.preload:prepare"
SLOW = (
    *("sglang", "torch", "transformers", "pdkit.checks", "pdkit.deployment", "pdkit.engine", "pdkit.faults"),
    *("pdkit.core.forked", "record"),  # what imports them starts programs that import those
)
ENOUGH = 2  # such files: for one, importing once is as slow


def imports_much(test: Path) -> bool:
    """Whether what a test file imports takes seconds, as far as its own import statements tell."""
    try:
        names = source.read(test).imports.values()
    except OSError:  # whoever runs it reports that
        return False
    return any(f"{name}.".startswith(tuple(f"{slow}." for slow in SLOW)) for name in names)


class Warm:
    """The process, while a suite runs.

    environment: of the process, and so of what is read while modules are imported. log: where its output goes.
    """

    def __init__(
        self,
        files: Sequence[Registration],
        environment: Mapping[str, str],
        log: Path,
        console: Console,
        interruption: Interruption,
        is_on: bool = True,
    ):
        self._environment = {**environment, TOKEN_VARIABLE: new_token(environment)}
        self._log, self._console, self._interruption = log, console, interruption
        self._slow = {file.filename for file in files if is_on and imports_much(Path(file.filename))}
        self._is_on = len(self._slow) >= ENOUGH and all(file.hw == "cpu" for file in files) and not visible_gpus()
        self._server: ForkServer | None = None

    def begin(self) -> None:
        """Starts the process, if enough files can use it."""
        if self._is_on:
            self._server = ForkServer(PREPARE, self._environment, str(self._log))

    def next_of(self, files: Sequence[Registration]) -> int:
        """Which of them to start: the first, or while the process still imports, the first that does not wait for it."""
        if self._server is None or self._server.has_started(0):
            return 0
        return next((place for place, file in enumerate(files) if file.filename not in self._slow), 0)

    def popen_for(self, file: str) -> Popen:
        """What starts the guardian of `file`: that of the process, where it imports much, or `subprocess.Popen`."""
        return self._popen if self._is_on and file in self._slow else subprocess.Popen

    def _popen(self, *args: Any, **kwargs: Any) -> subprocess.Popen[Any]:
        assert self._server, "begin() makes it"
        while not self._server.has_started(POLL_S):
            if self._interruption:
                return subprocess.Popen(*args, **kwargs)
        try:
            return self._server.popen(*args, **kwargs)
        except ForkServerError as error:
            self._is_on = False
            self._console.line(f"test files are started anew, not forked: {error}")
            return subprocess.Popen(*args, **kwargs)

    def close(self) -> None:
        """Ends the process."""
        if self._server is not None:
            self._server.close()
