"""One run of one test file: its process, its output, its end."""

import os
import shlex
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pdkit
from pdkit.core import events, ports
from pdkit.core.console import Console
from pdkit.core.loopback import past_proxies
from pdkit.core.secrets import Redactor, secret_values
from pdkit.runner import gpu_memory, guardian, orphans
from pdkit.runner.guardian import Ending, Guarded, Popen
from pdkit.runner.hang_report import diagnose, py_spy
from pdkit.runner.interruption import Interruption
from pdkit.runner.options import HISTORY_VARIABLE, Options
from pdkit.runner.outcome import FileState, Output, read_output
from pdkit.runner.owner import new_token
from pdkit.runner.report.evidence import directory_of
from pdkit.runner.results import Attempt

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
    environment = {**os.environ, **past_proxies(os.environ)}
    package_root = str(Path(pdkit.__path__[0]).parent)
    for name, first in (("PATH", python3_from), ("PYTHONPATH", package_root)):
        rest = environment.get(name)
        environment[name] = os.pathsep.join([first, rest] if rest else [first])
    environment["PYTHONUNBUFFERED"] = "1"
    environment["PYTHONFAULTHANDLER"] = "1"
    environment["SGLANG_TEST_MAX_RETRY"] = str(options.test_max_retry)
    environment[HISTORY_VARIABLE] = ""
    environment[events.TARGET_VARIABLE] = options.target or ""
    return environment


def _chunks(source: IO[bytes]) -> Iterator[bytes]:
    """The output as it comes, without secrets."""
    redactor = Redactor(secret_values(os.environ))
    while chunk := os.read(source.fileno(), 65536):
        yield redactor.feed(chunk)
    yield redactor.feed(b"")


def _pump(source: IO[bytes], log: Path, console: Console, is_shown: bool) -> None:
    """Writes all output to the log, and to the console if `is_shown`; to that alone once the log cannot be written.

    Nobody may wait for a log.
    """
    chunks = _chunks(source)
    with console.keeping(log), log.open("wb") as file:
        for chunk in chunks:
            if is_shown:
                console.write(chunk)
            file.write(chunk)
            file.flush()
    for chunk in chunks:
        console.write(chunk)


def _wait(guarded: Guarded, timeout: float, interruption: Interruption) -> FileState | None:
    """Why the command has to be ended, or None once it ended by itself."""
    deadline = time.monotonic() + timeout
    while not guarded.has_ended(max(0.0, min(POLL_S, deadline - time.monotonic()))):
        if interruption:
            return FileState.INTERRUPTED
        if time.monotonic() >= deadline:
            return FileState.TIMED_OUT
    return None


def _ending(guarded: Guarded, token: str, seconds: float) -> Ending:
    """Ends what is left, by the token where the guardian was killed."""
    ending = guarded.end()
    if ending is None:
        ended = orphans.end_carriers(token)
        unreleased = [f"{survivor} survived SIGKILL" for survivor in ended.survivors]
        unreleased += ports.wait_until_free(ended.ports, guardian.PORTS_S)
        ending = Ending(guarded.guardian_exit_code, seconds, ended.processes, tuple(unreleased))
    return ending


def run_attempt(
    command: tuple[str, ...],
    environment: dict[str, str],
    log: Path,
    timeout: float,
    console: Console,
    interruption: Interruption,
    test_max_retry: int = 0,
    is_shown: bool = True,
    popen: Popen = subprocess.Popen,
) -> Attempt:
    """Runs `command` in a new session for at most `timeout` seconds; whatever it started is gone afterwards.

    Its output goes to `log`, and to the console if `is_shown`; several threads may run one each at a time.
    Its events are read in the directory that belongs to `log`, which `environment` names to it. popen: what starts it
    and its guardian, see `pdkit.runner.warm`.
    """
    memory = gpu_memory.unaccounted()
    token, tic = new_token(environment), time.monotonic()
    guarded = Guarded(command, environment, token, popen=popen)
    pump = threading.Thread(target=_pump, args=(guarded.output, log, console, is_shown), daemon=True)
    pump.start()
    forced = _wait(guarded, timeout, interruption)
    phase = None
    if forced is FileState.TIMED_OUT and guarded.is_running:
        phase, lines = diagnose(guarded.descendants(), log, py_spy())
        with console.keeping(log):
            log.with_suffix(".hang.txt").write_text("\n".join(lines) + "\n")
        if is_shown:
            console.line("\n".join(lines))
    ending = _ending(guarded, token, time.monotonic() - tic)
    forced = forced if ending.exit_code is None else None
    pump.join(DRAIN_S)
    if guarded.output and not pump.is_alive():
        guarded.output.close()
    output = Output()
    with console.keeping(log), log.open(errors="replace") as text:
        output = read_output(text, events.read(directory_of(log)), test_max_retry)
    return Attempt(
        log=log.name,
        seconds=ending.seconds,
        exit_code=ending.exit_code,
        output=output,
        forced=forced,
        hung_in=phase,
        leftovers=() if forced else ending.ended,
        cpu_seconds=ending.cpu_seconds,
        unreleased=(*ending.unreleased, *gpu_memory.wait_for_release(memory)),
    )
