"""One run of one test file: its process, its output, its end."""

import os
import shlex
import subprocess
import threading
import time
from pathlib import Path

import pdkit
from pdkit import process_tree
from pdkit.console import Console
from pdkit.interruption import Interruption
from pdkit.options import HISTORY_VARIABLE, Options
from pdkit.outcome import FileState, read_output
from pdkit.results import Attempt

POLL_S = 0.25
DRAIN_S = 5.0


def python3_directory(executable: str, scratch: Path) -> str:
    """A directory whose `python3` is `executable`: its own, or `scratch` with a wrapper written into it."""
    own = Path(executable).parent
    try:
        if os.path.samefile(own / "python3", executable):
            return str(own)
    except OSError:
        pass
    wrapper = scratch / "python3"
    wrapper.write_text(f'#!/bin/sh\nexec {shlex.quote(executable)} "$@"\n')
    wrapper.chmod(0o755)
    return str(scratch)


def child_environment(options: Options, python3_from: str) -> dict[str, str]:
    """Ours, but that children find this interpreter as `python3`, this package, and the retries that were asked for.

    What a test runs for its own purposes goes into no history.
    """
    environment = dict(os.environ)
    package_root = str(Path(pdkit.__path__[0]).parent)
    for name, first in (("PATH", python3_from), ("PYTHONPATH", package_root)):
        rest = environment.get(name)
        environment[name] = os.pathsep.join([first, rest] if rest else [first])
    environment["PYTHONUNBUFFERED"] = "1"
    environment["SGLANG_TEST_MAX_RETRY"] = str(options.test_max_retry)
    environment[HISTORY_VARIABLE] = ""
    return environment


def _pump(source, log: Path, console: Console):
    with log.open("wb") as file:
        while chunk := os.read(source.fileno(), 65536):
            file.write(chunk)
            file.flush()
            console.write(chunk)


def _wait(process: subprocess.Popen, timeout: float, interruption: Interruption) -> FileState | None:
    """Why the process has to be ended, or None once it ended by itself."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            process.wait(max(0.0, min(POLL_S, deadline - time.monotonic())))
            return None
        except subprocess.TimeoutExpired:
            if interruption:
                return FileState.INTERRUPTED
            if time.monotonic() >= deadline:
                return FileState.TIMED_OUT


def run_attempt(
    command: tuple[str, ...],
    environment: dict[str, str],
    log: Path,
    timeout: float,
    console: Console,
    interruption: Interruption,
    test_max_retry: int = 0,
) -> Attempt:
    """Runs `command` in a new session for at most `timeout` seconds; whatever it started is gone afterwards."""
    token = process_tree.new_token(environment)
    started, tic = time.time(), time.monotonic()
    process = subprocess.Popen(
        command,
        env=environment | {process_tree.TOKEN_VARIABLE: token},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    pump = threading.Thread(target=_pump, args=(process.stdout, log, console), daemon=True)
    pump.start()
    forced = _wait(process, timeout, interruption)
    seconds = time.monotonic() - tic
    ended = process_tree.end(process.pid, started, token)
    process.wait()
    pump.join(DRAIN_S)
    if not pump.is_alive():
        process.stdout.close()
    with log.open(errors="replace") as lines:
        output = read_output(lines, test_max_retry)
    return Attempt(
        log=log.name,
        seconds=seconds,
        exit_code=None if forced else process.returncode,
        output=output,
        forced=forced,
        leftovers=() if forced else tuple(ended),
    )
