"""One server process: started in a session of its own, its output in a log file, ended with all that it started."""

import contextlib
import math
import os
import re
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import IO

import psutil

from pdkit.core import events

GRACE_S = 60.0
TAIL_LINES = 40
LINES_BEFORE, LINES_AFTER = 15, 25
LONGEST_LINE = 2000  # characters of a line in an excerpt

# Lines after which the process that wrote them does not go on. All are other people's words: CPython's faulthandler,
# the C++ runtime, CUDA as PyTorch reports it, NCCL's watchdog in PyTorch, and SGLang's processes and their watchdog.
# They begin a line, but for tags in brackets and names of exceptions: a request that is logged may quote them.
FATAL = re.compile(
    r"^(?:\[[^\]]*\]:? ?|[\w.]*(?:Error|Exception): |  what\(\): +)*"
    r"(?:Fatal Python error: "
    r"|terminate called (?:after throwing|without an active|recursively)"
    r"|CUDA error: (?:an illegal memory access|unspecified launch failure|misaligned address|device-side assert"
    r"|an illegal instruction|uncorrectable ECC|the launch timed out)"
    r"|(?:Process group|NCCL) watchdog thread terminated with exception"
    r"|Watchdog caught collective operation timeout"
    r"|(?:Scheduler|DataParallelController|(?:Det|T)okenizerManager|Multi(?:Det|T)okenizerRouter) hit an exception"
    r"|.{0,40}watchdog timeout \(self\.watchdog_timeout=.*self\.soft=False\))"
)


class Server(subprocess.Popen[str]):
    """A process in its own session; what it prints goes to `log_path` and, led by its name, to the console.

    stop: the signal that asks it to end; SIGKILL where there is nothing to put in order.
    copies: further text streams that receive its output.
    reaches_console: False where its output goes to the log and the copies alone.
    """

    reaches_console = True

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        env: Mapping[str, str] | None,
        log_path: str,
        stop: signal.Signals = signal.SIGTERM,
        copies: Sequence[IO[str]] = (),
    ) -> None:
        self.name, self.command, self.log_path = name, list(command), log_path
        self.expects_exit = False
        self.ended_at = math.inf
        self.fatal_at, self.fatal_line = math.inf, 0
        self._stop, self._was_asked, self._copies = stop, False, tuple(filter(None, copies))
        super().__init__(
            command,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        events.launch(name, self.command, log_path, self.pid)
        self._copier = threading.Thread(target=self._copy_output, daemon=True)
        self._copier.start()
        threading.Thread(target=self._note_end, daemon=True).start()

    def _copy_output(self) -> None:
        assert self.stdout is not None  # a pipe
        with self.stdout, self._open_log() as log:
            for number, line in enumerate(self.stdout, start=1):
                with contextlib.suppress(OSError, ValueError):  # a full disk or a closed console must not block it
                    log.write(line)
                    log.flush()
                for copy in self._copies:
                    with contextlib.suppress(OSError, ValueError):
                        copy.write(line)
                with contextlib.suppress(OSError, ValueError):
                    if self.reaches_console:
                        print(f"[{self.name}] {line}", end="", flush=True)
                if self.fatal_at == math.inf and FATAL.search(line):
                    self.fatal_line, self.fatal_at = number, time.monotonic()

    def _open_log(self) -> IO[str]:
        """The log, or nowhere if it cannot be opened: what is tested must not end by it."""
        try:
            return open(self.log_path, "w", encoding="utf-8")
        except OSError as error:
            with contextlib.suppress(OSError, ValueError):
                print(f"[{self.name}] no log at {self.log_path}: {error.strerror}", flush=True)
            return open(os.devnull, "w", encoding="utf-8")

    def _note_end(self) -> None:
        self.wait()
        self.ended_at = time.monotonic()

    def send_signal(self, sig: int) -> None:
        """Sends `sig`; a server that is asked to end is expected to."""
        if sig in (signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGQUIT):
            self.expects_exit = True
        super().send_signal(sig)

    def log_tail(self) -> str:
        """The lines of the log around the one that says why it ended, or the last ones."""
        self._copier.join(timeout=0.5)
        try:
            with open(self.log_path, encoding="utf-8", errors="replace") as file:
                log = (line[:LONGEST_LINE] + "\n" * (len(line) > LONGEST_LINE) for line in file)
                if self.fatal_line:
                    first = max(1, self.fatal_line - LINES_BEFORE)
                    lines = [line for n, line in enumerate(log, start=1) if first <= n <= self.fatal_line + LINES_AFTER]
                    return f"{self.log_path} from line {first} on:\n" + "".join(lines)
                return f"last lines of {self.log_path}:\n" + "".join(deque(log, maxlen=TAIL_LINES))
        except OSError as error:
            return f"no log at {self.log_path}: {error.strerror}"

    def kill_all(self) -> None:
        """SIGKILL for the process, all that runs below it, and what it left in its process group."""
        self.expects_exit = True
        below = []
        if self.poll() is None:
            with contextlib.suppress(psutil.Error):
                below = psutil.Process(self.pid).children(recursive=True)
        elif psutil.pid_exists(self.pid):
            return  # a number is given to another process only when nothing is left of the group
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        for process in below:
            with contextlib.suppress(psutil.Error):
                process.kill()

    def ask_to_end(self) -> None:
        """Sends the signal for that, once: to many servers a second one means to drop everything."""
        if not self._was_asked and self._stop != signal.SIGKILL:
            self._was_asked = True
            self.send_signal(self._stop)

    def stop(self, grace_s: float = GRACE_S) -> None:
        """Asks the server to end, kills what has not ended after `grace_s` seconds, and waits for it."""
        self.ask_to_end()
        if self.poll() is None and self._stop != signal.SIGKILL:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.wait(grace_s)
        self.kill_all()
        self.wait()
        self._copier.join(timeout=2.0)
