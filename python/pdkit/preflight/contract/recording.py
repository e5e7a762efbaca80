"""Lets the PD test classes of a file launch their processes, and writes down what they would have started."""

import errno
import importlib.util
import io
import itertools
import os
import subprocess
import sys
import threading
import unittest
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

ROUTER = "sglang_router.launch_router"
PID_MAX = 2**22  # of Linux, so that a signal to a recorded process reaches nobody


@dataclass(frozen=True)
class Launch:
    """One `python -m module *argv`, and the environment variables that it gets beyond those that were there before."""

    module: str
    argv: tuple[str, ...]
    env: Mapping[str, str]


@dataclass(frozen=True)
class RecordedPlan:
    """What one test class launches, in order; `problem` is one line where it did not come to an end."""

    test: str
    launches: tuple[Launch, ...]
    problem: str | None = None


class RecordedProcess:
    """Stands for subprocess.Popen: notes `python -m ...`, knows no other program, and never ends."""

    commands: list[tuple[list[str], dict[str, str]]] = []
    _pids = itertools.count(PID_MAX + 1)

    def __init__(
        self, args: str | Sequence[str], *_: object, env: Mapping[str, str] | None = None, **kwargs: object
    ) -> None:
        command = args.split() if isinstance(args, str) else [os.fsdecode(arg) for arg in args]
        if "-m" not in command:
            raise FileNotFoundError(errno.ENOENT, "not run while a plan is read", command[0])
        self.commands.append((command, dict(os.environ if env is None else env)))
        self.args, self.pid, self.returncode = command, next(self._pids), None
        self.stdin, self.stdout, self.stderr = io.StringIO(), io.StringIO(), io.StringIO()

    def __class_getitem__(cls, item: object) -> type:
        return cls

    def poll(self) -> None:
        return None

    def wait(self, timeout: float | None = None) -> int:
        """Only a thread that watches waits for the end that does not come; the test itself has given up by then."""
        if threading.current_thread() is not threading.main_thread():
            threading.Event().wait()
        return 0

    def communicate(self, input: str | None = None, timeout: float | None = None) -> tuple[str, str]:
        self.wait()
        return "", ""

    def send_signal(self, number: int = 0) -> None:
        pass

    terminate = kill = send_signal


def start_recording() -> None:
    """From here on this process starts no other, and whatever it asks over HTTP is healthy.

    To call before the test is imported, since a test may subclass Popen.
    """
    import requests

    from pdkit.deployment import ports  # psutil: a release may be asked where it is not installed

    healthy = SimpleNamespace(status_code=200, ok=True, text="", json=dict, raise_for_status=lambda: None)
    vars(subprocess).update(Popen=RecordedProcess)
    vars(requests).update(dict.fromkeys(("get", "post"), lambda *args, **kwargs: healthy))
    # nothing is bound, so other plans may be read
    vars(ports).update(lock=lambda test: SimpleNamespace(close=lambda: None), require_free=lambda test: None)


def import_test(path: Path) -> ModuleType:
    """The module at `path`, named as when it runs by itself; what it raises is passed on."""
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, path
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pd_tests(module: ModuleType, fixture: type[unittest.TestCase]) -> list[Any]:
    """Classes with tests that `module` itself defines on top of SGLang's PD `fixture`, in order."""
    classes = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]
    return [c for c in classes if issubclass(c, fixture) and unittest.defaultTestLoader.getTestCaseNames(c)]


def record(test: Any, baseline: Mapping[str, str]) -> RecordedPlan:
    """What `test` launches. A class with `configure()` is settled by it, any other by its setUpClass().

    The load balancer is the last that the fixture launches: what fails after it speaks to servers that are not there.
    """
    RecordedProcess.commands = []
    problem = None
    try:
        # A monolithic server that has ended before the pair takes its GPUs; all but its ports is among their flags.
        if hasattr(test, "ask_monolithic"):
            test.ask_monolithic = lambda: None
        (getattr(test, "configure", None) or test.setUpClass)()
        if not RecordedProcess.commands:
            test.launch_all()
    except unittest.SkipTest as skip:
        problem = f"skips before it launches: {skip}"
    except (Exception, SystemExit) as error:
        problem = f"raises before all is launched: {type(error).__name__}: {error}"
    finally:
        test.doClassCleanups()  # the next class of the file may have the same ports
    if any(ROUTER in command for command, _ in RecordedProcess.commands):
        problem = None
    launches = tuple(_launch(command, env, baseline) for command, env in RecordedProcess.commands)
    if not launches:
        problem = problem or "launches nothing"
    return RecordedPlan(test.__name__, launches, " ".join(problem.split()) if problem else None)


def _launch(command: Sequence[str], env: Mapping[str, str], baseline: Mapping[str, str]) -> Launch:
    at = command.index("-m") + 1
    added = {name: value for name, value in sorted(env.items()) if baseline.get(name) != value and name != "PATH"}
    return Launch(command[at], tuple(command[at + 1 :]), added)
