"""Where a test that ran out of time hangs: its phase, the stacks of its processes, the last lines of each log."""

import contextlib
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

from pdkit import process_tree
from pdkit.report.live import PHASE
from pdkit.report.secrets import cleaned

DUMP_S = 20.0
ABORT_S = 2.0
TAIL_LINES = 15
NO_CORE_DUMP = 1  # see core(5): also keeps a core_pattern that is a pipe from getting one

_SOURCE = re.compile(r"\[(?!phase\]|supervisor\])(?P<name>[a-z][\w -]*)\] ")
_FORBIDDEN = re.compile(r"permission|not permitted", re.IGNORECASE)


def open_phase(lines: Iterable[str]) -> str | None:
    """The phase that began last and has not ended."""
    phases = []
    for line in lines:
        if match := PHASE.fullmatch(line.strip()):
            if match["begins"]:
                phases.append(match["name"])
            elif match["name"] in phases:
                phases.remove(match["name"])
    return phases[-1] if phases else None


def tails(lines: Iterable[str], count: int = TAIL_LINES) -> dict[str, list[str]]:
    """The last `count` lines of the test and of each server, told by the `[NAME] ` in front of the latter's lines."""
    last: dict[str, deque[str]] = {}
    for line in lines:
        match = _SOURCE.match(line)
        last.setdefault(match["name"] if match else "test", deque(maxlen=count)).append(line.rstrip())
    return {name: list(lines) for name, lines in last.items()}


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
    untraced = []
    for process in filter(is_python, processes):
        try:
            text = dump(process, command)
        except PermissionError as error:
            if not untraced:
                yield f"no stacks by py-spy: {error}"
                yield "(tracing needs the same user and, where kernel.yama.ptrace_scope is 1 or more, CAP_SYS_PTRACE)"
            untraced.append(process)
        except ValueError as error:
            yield f"no stacks of {process_tree.describe(process)}: {error}"
        else:
            yield from text.rstrip().splitlines()
            yield ""
    if untraced:
        aborted = ", ".join(map(str, _abort(untraced))) or "none"
        yield f"instead, faulthandler was made to print stacks above, ending the processes: {aborted}"


def _abort(processes: list[psutil.Process]) -> list[int]:
    """Ends processes by SIGABRT, the youngest first, so that each parent lives to pass its children's output on."""
    aborted = []
    for process in sorted(processes, key=psutil.Process.create_time, reverse=True):
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get("PYTHONFAULTHANDLER"):
                resource.prlimit(process.pid, resource.RLIMIT_CORE, (NO_CORE_DUMP, NO_CORE_DUMP))
                process.send_signal(signal.SIGABRT)
                process_tree.wait_until(lambda process=process: not process_tree.is_alive(process), ABORT_S)
                aborted.append(process.pid)
    return aborted


def diagnose(processes: list[psutil.Process], log: Path, command: str | None) -> tuple[str | None, list[str]]:
    """The phase in which a test hangs, and lines that show where; `processes` are its own and its servers'."""
    with log.open(errors="replace") as lines:
        phase = open_phase(lines)
    report = [f"hangs in phase {phase}" if phase else "hangs outside of any phase", *stacks(processes, command)]
    with log.open(errors="replace") as lines:
        for name, tail in tails(lines).items():
            report += [f"last lines of {name}:", *(f"  {line}" for line in tail)]
    return phase, report
