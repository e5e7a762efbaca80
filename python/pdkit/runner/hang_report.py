"""Where a test that ran out of time hangs: its phase, the stacks of its processes, the last lines of each log."""

import contextlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import psutil

from pdkit.core import events
from pdkit.core.events import Events
from pdkit.core.processes import describe, is_alive, wait_until
from pdkit.core.secrets import cleaned
from pdkit.runner.report.evidence import directory_of
from pdkit.runner.report.facts import open_phase

DUMP_S = 20.0
ABORT_S = 2.0
PASS_ON_S = 1.0  # what a parent has to pass on the output of its children
TAIL_LINES = 15
NO_CORE_DUMP = 1  # see core(5): also keeps a core_pattern that is a pipe from getting one

_FORBIDDEN = re.compile(r"permission|not permitted", re.IGNORECASE)


def tails(log: Path, happened: Events, count: int = TAIL_LINES) -> dict[str, list[str]]:
    """The last `count` lines of the test's log and of each server's that it launched, without secrets."""
    logs = {"test": log} | {event["name"]: event["log"] for event in happened.of("launch") if event.get("log")}
    found = {}
    for name, path in logs.items():
        with contextlib.suppress(OSError), open(path, errors="replace") as lines:
            found[name] = [cleaned(line.rstrip()) for line in deque(lines, maxlen=count)]
    return found


def py_spy() -> str | None:
    """Path of the py-spy that belongs to this Python, or of one on PATH."""
    own = Path(sys.executable).with_name("py-spy")
    return str(own) if own.exists() else shutil.which("py-spy")


def dump(process: psutil.Process, command: str | None) -> str:
    """The stacks of a Python process, without secrets. Raises PermissionError if it may not be traced, or ValueError."""
    if command is None:
        raise PermissionError("it is not installed")
    try:
        done = subprocess.run(
            [command, "dump", "--pid", str(process.pid)], capture_output=True, text=True, timeout=DUMP_S
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"py-spy did not answer within {DUMP_S:g} s") from None
    if done.returncode == 0:
        return cleaned(done.stdout)
    said = " ".join(done.stderr.partition("Stack backtrace:")[0].split()) or f"py-spy ended with {done.returncode}"
    raise (PermissionError if _FORBIDDEN.search(said) else ValueError)(said)


def is_python(process: psutil.Process) -> bool:
    try:
        return Path(process.exe()).name.startswith("python")
    except (psutil.Error, OSError):
        return False


def stacks(processes: Iterable[psutil.Process], command: str | None) -> Iterator[str]:
    """Lines: the stacks of each Python process among `processes`.

    Where py-spy may not look into them, Python's own faulthandler is asked, which PYTHONFAULTHANDLER turns on: it
    prints the stacks into the log of each process, and ends it.
    """
    untraced: list[psutil.Process] = []
    for process in filter(is_python, processes):
        try:
            text = dump(process, command)
        except PermissionError as error:
            if not untraced:
                yield f"no stacks by py-spy: {error}"
                yield "(tracing needs the same user and, where kernel.yama.ptrace_scope is 1 or more, CAP_SYS_PTRACE)"
            untraced.append(process)
        except ValueError as error:
            yield f"no stacks of {describe(process)}: {error}"
        else:
            yield from text.rstrip().splitlines()
            yield ""
    if untraced:
        aborted = ", ".join(map(str, _abort(untraced))) or "none"
        yield f"instead, faulthandler was made to print stacks above, ending the processes: {aborted}"


def _is_gone(process: psutil.Process) -> bool:
    return not is_alive(process)


def _abort(processes: list[psutil.Process]) -> list[int]:
    """Ends processes by SIGABRT, the youngest first, so that each parent lives to pass its children's output on."""
    aborted: list[int] = []
    bereaved = set()
    for process in sorted(processes, key=psutil.Process.create_time, reverse=True):
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get("PYTHONFAULTHANDLER"):
                if process.pid in bereaved:
                    time.sleep(PASS_ON_S)
                bereaved.add(process.ppid())
                resource.prlimit(process.pid, resource.RLIMIT_CORE, (NO_CORE_DUMP, NO_CORE_DUMP))
                process.send_signal(signal.SIGABRT)
                wait_until(partial(_is_gone, process), ABORT_S)
                aborted.append(process.pid)
    return aborted


def diagnose(processes: list[psutil.Process], log: Path, command: str | None) -> tuple[str | None, list[str]]:
    """The phase in which a test hangs, and lines that show where; `processes` are its own and its servers'."""
    happened = events.read(directory_of(log))
    phase = open_phase(happened)
    report = [f"hangs in phase {phase}" if phase else "hangs outside of any phase", *stacks(processes, command)]
    for name, tail in tails(log, happened).items():
        report += [f"last lines of {name}:", *(f"  {line}" for line in tail)]
    return phase, report
