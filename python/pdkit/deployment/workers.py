"""The processes below a server that must live as long as it does, and how one of them ended."""

import contextlib
import os
import re
import signal
from collections.abc import Iterator, Mapping

import psutil

from pdkit.core import processes

# SGLang names its workers by setproctitle: sglang::scheduler_TP0, sglang::detokenizer, sglang::data_parallel_controller.
TITLED = re.compile(r"^sglang::\S+")
# Others count only where they are seen to end by a signal that nobody sends on purpose.
CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSYS, signal.SIGTRAP}


def ending(status: int) -> str:
    """A wait status in words: `ended by signal 6 (Aborted)`, `exited with code 3`."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return f"ended by signal {number} ({signal.strsignal(number)})"
    return f"exited with code {os.waitstatus_to_exitcode(status)}"


def wait_status(pid: int) -> int | None:
    """The wait status of a zombie, from the last field of /proc/PID/stat (proc(5)); None where it is not shown."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return int(fields[49]) if fields and fields[0] == b"Z" and len(fields) > 49 else None


class Workers:
    """Looks below the process `pid` again and again."""

    def __init__(self, pid: int) -> None:
        self._server = psutil.Process(pid)
        self._known: dict[psutil.Process, str] = {}

    def ended(self, parent_of: Mapping[int, int] | None = None) -> str | None:
        """The first worker that ended since the last look, and how; None where all of them live.

        parent_of: what `processes.parents` has just found; a look of its own without it.
        """
        with contextlib.suppress(psutil.Error):
            children = []
            for pid in processes.below(self._server.pid, processes.parents() if parent_of is None else parent_of):
                with contextlib.suppress(psutil.NoSuchProcess):
                    children.append(psutil.Process(pid))
            found = next(self._deaths(children), None)
            return found if self._server.is_running() and self._server.status() != psutil.STATUS_ZOMBIE else None
        return None

    def _deaths(self, children: list[psutil.Process]) -> Iterator[str]:
        present = set()
        for child in children:
            with contextlib.suppress(psutil.Error):
                if child.status() != psutil.STATUS_ZOMBIE:
                    present.add(child)
                    self._note(child)
                    continue
                status = wait_status(child.pid)
                name = self._known.pop(child, "")
                crashed = status is not None and os.WIFSIGNALED(status) and os.WTERMSIG(status) in CRASHES
                if TITLED.match(name) or crashed:
                    how = ending(status) if status is not None else "ended"
                    yield f"{name or 'a process below it'} (pid {child.pid}) {how}"
        for gone in [each for each in self._known if each not in present]:
            name = self._known.pop(gone)
            if TITLED.match(name):
                yield f"{name} (pid {gone.pid}) ended (its exit status was taken before it could be read)"

    def _note(self, child: psutil.Process) -> None:
        if not TITLED.match(self._known.get(child, "")):
            title = _title(child)
            # A fork has the title of the worker that it comes from; it may end when it likes.
            is_fork = title is not None and (parent := child.parent()) is not None and title == _title(parent)
            self._known[child] = f"a fork of {title}" if is_fork else title or child.name()


def _title(process: psutil.Process) -> str | None:
    """The name that SGLang gave it, if any."""
    command = process.cmdline()
    return command[0].split(" ")[0] if command and TITLED.match(command[0]) else None
