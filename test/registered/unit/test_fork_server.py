"""A program that is forked cannot be told from one that was started, and is supervised like one."""

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import psutil
import test_processes
from cases import FolderCase
from detached import LISTEN, SLEEP, is_alive, listening, spawner
from pdkit.core import forked, ports, processes
from pdkit.core.ci_register import register_cpu_ci
from pdkit.core.console import Console
from pdkit.core.forked import ForkServer, ForkServerError
from pdkit.core.registry import Registration
from pdkit.runner import orphans
from pdkit.runner import warm as warm_module
from pdkit.runner.guardian import Guarded
from pdkit.runner.interruption import Interruption
from pdkit.runner.owner import FORKS_VARIABLE, TOKEN_VARIABLE, new_token
from pdkit.runner.warm import Warm

register_cpu_ci(est_time=7, suite="stage-a-test-cpu")

PROGRAM = "import sys\nexec(compile(sys.argv[1], 'program', 'exec'))\n"
IMPORTED = """
import atexit, logging, os, sys, tempfile, weakref
kept = open(os.devnull)
def end():
    with open(os.environ.get("ENDS", os.devnull), "a") as file:
        print(os.getpid(), file=file)
atexit.register(end)
weakref.finalize(end, end)
def prepare():
    os.environ["SET_BY_AN_IMPORT"] = "1"
    sys.argv[1:] = [""]
    import program, parts.part
    tempfile.gettempdir()
    return None
def threads():
    import threading, time
    threading.Thread(target=time.sleep, args=(300,), daemon=True).start()
"""
PART = """
print("executed", __name__)
if __name__ == "__main__":
    from parts import part
"""
FACTS = """
import faulthandler, json, os, signal, sys, tempfile, threading
def words(name):
    return open(f"/proc/self/{name}").read().split("\\0")[:-1]
files = [os.readlink(f"/proc/self/fd/{n}") if os.path.lexists(f"/proc/self/fd/{n}") else "" for n in range(3, 64)]
signals = [line for line in open("/proc/self/status") if line.startswith("Sig") and "Q" not in line]
print(json.dumps({
    "argv": sys.argv, "orig_argv": sys.orig_argv[1:], "cmdline": words("cmdline")[1:], "environ": dict(os.environ),
    "seen environ": dict(each.split("=", 1) for each in words("environ")), "directory": os.getcwd(), "path": sys.path,
    "leads a session": os.getsid(0) == os.getpid() == os.getpgid(0), "files": sorted(filter(None, files)),
    "signals": signals, "wakeup": signal.set_wakeup_fd(-1), "threads": threading.active_count(),
    "is main": threading.current_thread() is threading.main_thread(), "faulthandler": faulthandler.is_enabled(),
    "stdin": sys.stdin.read(), "main": getattr(__import__("__main__").__spec__, "name", ""), "name": __name__,
    "temporary files": tempfile.gettempdir(),
    "executable": os.readlink("/proc/self/exe"), "unbuffered": sys.stdout.write_through,
}))
"""
ENDS = {
    "returns": "print('x')",
    "exit code": "sys.exit(7)",
    "exit code of more than a byte": "sys.exit(300)",
    "exit without a code": "sys.exit(None)",
    "exit with a text": "sys.exit('why')",
    "standard output that cannot be written": "sys.stdout = open('/dev/full', 'w'); sys.stdout.write('x')",
    "exception": "raise ValueError('why')",
    "KeyboardInterrupt": "raise KeyboardInterrupt",
    "os._exit": "import os; print('x', flush=True); os._exit(3)",
    "atexit": "import atexit; atexit.register(print, 'x'); sys.exit(4)",
    "a finalizer": "import weakref; weakref.finalize(weakref.finalize, print, 'x')",
    "a logger": "import logging.handlers as h; kept = h.MemoryHandler(9, 9, h.logging.StreamHandler())\n"
    "kept.emit(h.logging.makeLogRecord({'msg': 'x'}))",
    "a thread that ends later": "import threading, time\nthreading.Thread(target=lambda: time.sleep(0.2) or print('x')).start()",
    "SIGTERM": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "SIGKILL": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "SIGABRT": "import os, signal; print('x', flush=True); os.kill(os.getpid(), signal.SIGABRT)",
}
ASKS_BESIDE = """
import os, subprocess
from pdkit.core.forked import here
process = here().popen([sys.executable, "-m", "program", {source!r}], stdout=subprocess.PIPE, encoding="utf-8")
print(os.getpid(), here().pid, process.pid, flush=True)
print(process.stdout.readline(), end="", flush=True)
{then}
"""


class ForkServerCase(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.root = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        (cls.root / "program.py").write_text(PROGRAM)
        (cls.root / "imported.py").write_text(IMPORTED)
        (cls.root / "parts").mkdir()
        sources = {"__init__": "", "part": PART, "__main__": "import parts.part\nprint(parts.part.__name__)"}
        for name, source in sources.items():
            (cls.root / "parts" / f"{name}.py").write_text(source)
        path = os.pathsep.join(filter(None, [str(cls.root), os.environ.get("PYTHONPATH")]))
        cls.environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        cls.server = ForkServer("imported:prepare", cls.environment, str(cls.root / "log"))
        cls.addClassCleanup(cls.server.close)

    def popen(self, source, popen=None, program=("-m", "program"), **options):
        options = {"env": self.environment, "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, **options}
        command = ["python3", *program, source]
        process = (popen or self.server.popen)(command, **{"encoding": "utf-8", "start_new_session": True, **options})
        self.addCleanup(process.stdout.close)
        return process


class TestTheSame(ForkServerCase):
    def test_what_a_program_sees_of_itself(self):
        """The forked one also has what imports set and opened, as one that imports itself has."""
        more = {"TOKEN": "é =x", "PYTHONFAULTHANDLER": "1", "TMPDIR": str(self.root)}
        self.maxDiff = None
        for program in (["-m", "program"], [str(self.root / "program.py")]):
            found = []
            for popen in (subprocess.Popen, self.server.popen):
                options = {"env": self.environment | more, "stderr": subprocess.STDOUT}
                process = self.popen(FACTS, popen, program, **options)
                found.append(json.loads(process.stdout.read()))
                self.assertEqual(process.wait(20), 0)
            spawned, forked = found
            self.assertEqual(forked["environ"].pop("SET_BY_AN_IMPORT"), "1")
            self.assertEqual(forked["seen environ"].pop("SET_BY_AN_IMPORT"), "1")
            forked["files"].remove(os.devnull)
            self.assertEqual(forked, spawned)

    def test_streams_and_directory(self):
        source = "import os; print(os.getcwd(), sys.stdin.read()); print('e', file=sys.stderr)"
        before = os.getcwd()
        self.addCleanup(os.chdir, before)
        os.chdir(self.root)
        process = self.popen(source, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        self.addCleanup(process.stderr.close)
        process.stdin.write("in")
        process.stdin.close()
        self.assertEqual((process.stdout.read(), process.stderr.read()), (f"{self.root} in\n", "e\n"))

    def test_how_it_ends(self):
        for name, source in ENDS.items():
            with self.subTest(name):
                ends = []
                for popen in (subprocess.Popen, self.server.popen):
                    process = self.popen(source, popen, stderr=subprocess.STDOUT)
                    output = process.stdout.read()
                    ends.append((process.wait(20), output.splitlines()[-1:]))
                self.assertEqual(*ends)

    def test_a_package_and_a_module_of_it_that_were_imported_before(self):
        for name, last in (("parts", "parts.part"), ("parts.part", "executed parts.part")):
            for popen in (subprocess.Popen, self.server.popen):
                process = self.popen("", popen, ["-m", name], stderr=subprocess.STDOUT)
                self.assertEqual(process.stdout.read().splitlines()[-1:], [last])
                self.assertEqual(process.wait(20), 0)

    def test_programs_side_by_side(self):
        many = [self.popen(f"import time; time.sleep(0.1); print({n}); sys.exit({n})") for n in range(16)]
        self.assertEqual([(each.stdout.read(), each.wait(20)) for each in many], [(f"{n}\n", n) for n in range(16)])


class TestEnds(ForkServerCase):
    def test_children_go_on_when_the_server_ends(self):
        server = ForkServer("imported:prepare", self.environment, str(self.root / "second"))
        child = self.popen("import time; time.sleep(0.5); print('done')", server.popen)
        server.close()
        self.assertEqual((child.stdout.read(), child.wait(20)), ("done\n", -signal.SIGKILL))  # nobody saw its status
        with self.assertRaises(ForkServerError):
            self.popen("", server.popen)

    def test_what_imports_registered_is_called_once_and_by_the_server(self):
        ends = self.root / "ends"
        server = ForkServer("imported:prepare", {**self.environment, "ENDS": str(ends)}, str(self.root / "third"))
        child = self.popen("import weakref; weakref.finalize(weakref.finalize, print, 'x')", server.popen)
        self.assertEqual((child.stdout.read(), child.wait(20)), ("x\n", 0))
        server.close()
        self.assertEqual(ends.read_text().split(), [str(server.pid)] * 2)

    def test_what_cannot_be_forked_from(self):
        for name, why in (("imported:threads", "started threads"), ("nowhere:f", "No module named 'nowhere'")):
            server = ForkServer(name, self.environment, str(self.root / "refused"))
            self.addCleanup(server.close)
            with self.assertRaisesRegex(ForkServerError, why):
                self.popen("", server.popen)

    def test_a_request_that_is_too_long(self):
        with self.assertRaisesRegex(
            ForkServerError, r"-m program .*: cannot be forked .* \d+ bytes: make them shorter"
        ):
            self.popen("", env={**self.environment, "LONG": "x" * 500_000})
        self.assertEqual(self.popen("print('x')").stdout.read(), "x\n")

    def test_a_command_whose_output_others_keep_open_is_waited_for_no_longer(self):
        source = f"import subprocess; print(subprocess.Popen([{sys.executable!r}, '-c', {SLEEP!r}]).pid, file=open('pid', 'w'))"
        for server in (self.server, None):
            with mock.patch.object(forked, "here", lambda server=server: server):
                with self.assertRaises(subprocess.TimeoutExpired):
                    command = ["python3", "-m", "program", source]
                    forked.run(command, env=self.environment, cwd=str(self.root), timeout=2)
            child = psutil.Process(int((self.root / "pid").read_text()))
            self.assertTrue(child.is_running(), "it was waited for")
            child.kill()

    def test_left_behind_by_a_runner_that_is_gone(self):
        """Its own token finds it, not that of the process it was forked from."""
        runner = "import os; from pdkit.runner.owner import new_token; print(new_token({}))"
        gone = subprocess.run([sys.executable, "-c", runner], capture_output=True, text=True, check=True).stdout.strip()
        own = {name: value for name, value in self.environment.items() if name != TOKEN_VARIABLE}
        left = self.popen("print('up'); " + SLEEP, env={**own, TOKEN_VARIABLE: gone})
        stays = self.popen("print('up'); " + SLEEP, env=own)
        self.addCleanup(stays.kill)
        self.assertEqual([left.stdout.readline(), stays.stdout.readline()], ["up\n"] * 2)
        lines = list(orphans.end_earlier_runs())
        self.assertTrue(any(f"pid {left.pid} (" in line for line in lines), lines)
        self.assertEqual(left.wait(20), -signal.SIGTERM)
        self.assertIsNone(stays.poll())


class TestForkedGuardian(ForkServerCase, test_processes.TestGuardian):
    """What holds for a guardian and its command holds where both are forked."""

    def start(self, source, forks=False):
        command = [sys.executable, "-m", "program", source]
        environment = self.environment | ({FORKS_VARIABLE: "1"} if forks else {})
        guarded = Guarded(command, environment, new_token(os.environ), popen=self.server.popen)
        self.addCleanup(guarded.output.close)
        self.addCleanup(guarded.end)
        return guarded

    def test_both_were_forked(self):
        guarded = self.start("import os; print(os.getppid(), flush=True); " + SLEEP)
        self.assertEqual(self.read_number(guarded), guarded.guardian_pid)
        self.assertEqual(psutil.Process(guarded.guardian_pid).ppid(), self.server.pid)

    def test_only_a_command_that_forks_has_a_child_that_it_did_not_start(self):
        source = "import os, psutil; print(len(psutil.Process().children()), 'PDKIT_FORKS' in os.environ, flush=True)"
        for forks, shown in ((False, b"0 False\n"), (True, b"1 False\n")):
            self.assertEqual(self.start(source, forks).output.readline(), shown)

    def test_the_fork_server_beside_it(self):
        """What it forks runs below the command; a server that is left behind is ended."""
        guarded = self.start(
            ASKS_BESIDE.format(source="print('up'); " + SLEEP, then="import os; os._exit(5)"), forks=True
        )
        command, beside, server = map(int, guarded.output.readline().split())
        self.assertEqual(guarded.output.readline(), b"up\n")
        self.assertTrue(guarded.has_ended(30))
        ending = guarded.end()
        self.assertEqual((command, ending.exit_code, len(ending.ended)), (guarded.pid, 5, 1), ending)
        self.assertIn(f"pid {server} (", ending.ended[0])
        self.assert_all_end(beside, server)

    def test_ports_of_what_was_forked_beside_it(self):
        guarded = self.start(ASKS_BESIDE.format(source="print('up'); " + LISTEN, then=SLEEP), forks=True)
        _, beside, server = map(int, guarded.output.readline().split())
        self.assertEqual([psutil.Process(pid).ppid() for pid in (server, beside)], [beside, guarded.pid])
        (port,) = listening(psutil.Process(server))
        ending = guarded.end()
        for pid in (server, guarded.pid):
            self.assertIn(f"pid {pid} (", " ".join(ending.ended))
        self.assertEqual((ports.is_free(port), ending.unreleased), (True, ()))

    def test_the_death_of_the_fork_server(self):
        server = ForkServer("imported:prepare", self.environment, str(self.root / "killed"))
        command = [sys.executable, "-m", "program", spawner(SLEEP, True, SLEEP)]
        guarded = Guarded(command, self.environment, new_token(os.environ), popen=server.popen)
        self.addCleanup(guarded.output.close)
        child = self.read_number(guarded)
        os.kill(server.pid, signal.SIGKILL)
        self.addCleanup(server.close)
        self.assertTrue(processes.wait_until(lambda: not server.is_there, 20))
        self.assertTrue(is_alive(child))
        ended = " ".join(guarded.end().ended)
        self.assertTrue(f"pid {child} (" in ended and f"pid {guarded.pid} (" in ended, ended)
        self.assert_all_end(child, guarded.pid)


class TestHere(unittest.TestCase):
    def test_threads_that_ask_at_once_get_the_same(self):
        def at(*_):
            time.sleep(0.1)
            return mock.Mock(is_there=True)

        with (
            mock.patch.object(forked, "_here", None),
            mock.patch.object(forked.fork_server, "beside", (None, 0)),
            mock.patch.object(forked.ForkServer, "at", at),
            ThreadPoolExecutor(4) as pool,
        ):
            found = [pool.submit(forked.here) for _ in range(4)]
            self.assertEqual(len({id(each.result()) for each in found}), 1)


class FakeServer:
    """One whose programs are their own name."""

    is_there = True

    def __init__(self, prepare):
        self.popen = lambda **_: prepare

    def has_started(self, timeout):
        return True

    def close(self):
        """There is nothing to end."""


class TestWarm(FolderCase):
    """Which files a run forks, and when."""

    def warm(self, **files):
        """A `Warm` over files of that content; "gpu" is registered for CUDA."""
        self.registrations, self.shown = [], io.BytesIO()
        for name, text in files.items():
            path, hw = self.write(f"{name}.py", text), "cuda" if name == "gpu" else "cpu"
            self.registrations.append(Registration(str(path), name, hw=hw, suite="s", est_time=1))
        warm = Warm(self.registrations, dict(os.environ), self.root, Console(self.shown), Interruption())
        warm.begin()
        self.addCleanup(warm.close)
        return warm

    def forked(self, inherited=None, **files):
        """{a process: the files that are forked from it}."""
        with (
            mock.patch.object(warm_module, "ForkServer", lambda prepare, *_: FakeServer(prepare)),
            mock.patch.object(warm_module.forked, "here", lambda: inherited),
        ):
            warm = self.warm(**files)
        found = {}
        for each in self.registrations:
            popen = warm.popen_for(each.filename)
            if popen is not subprocess.Popen:
                found.setdefault(popen(), set()).add(each.name)
        return found

    def test_files_that_import_much_and_others_if_there_are_several(self):
        light = {"a": "import json, sglang_router\nfrom pdkit.core import events", "e": "import os"}
        heavy = {"b": "import sglang", "c": "from pdkit.deployment import fixture", "d": "from torch.nn import Linear"}
        much, little = {warm_module.MUCH: {"b", "c", "d"}}, {warm_module.LITTLE: {"a", "e"}}
        self.assertEqual(self.forked(**light, **heavy), much | little)
        self.assertEqual(self.forked(**light, b="import sglang"), little)
        self.assertEqual(self.forked(a="import os", **heavy), much)
        self.assertEqual(self.forked(a="import os", b="import sglang"), {})

    def test_which_of_those_that_import_little_start_programs_by_a_fork(self):
        self.write("helper.py", "from pdkit.core import forked")
        self.write("broken.py", "def (:")
        for text, forks in (("import json", False), ("from helper import run", True), ("import broken", False)):
            self.assertEqual(warm_module.forks(self.write("test_it.py", text)), forks, text)

    def test_a_runner_that_was_forked_forks_a_single_file_in_turn(self):
        inherited = FakeServer("inherited")
        self.assertEqual(self.forked(inherited, a="import os", b="import sglang"), {"inherited": {"a"}})

    def test_others_start_first_while_the_process_imports(self):
        with mock.patch.object(warm_module, "ForkServer") as server:
            warm = self.warm(a="import torch", b="import json", c="import torch", d="import os")
        server.return_value.has_started.return_value = False
        first, *others = self.registrations
        self.assertEqual(
            [warm.next_of(each) for each in (self.registrations, [first, *others[1:]], [first])], [1, 2, 0]
        )
        server.return_value.has_started.return_value = True
        self.assertEqual(warm.next_of(self.registrations), 0)

    def test_what_is_imported_of_ours_is_there_and_depends_on_no_environment(self):
        """Children with other variables would differ from programs that were started with these."""
        source = (
            "import os, sys; from pdkit.runner import preload; before = dict(os.environ)\n"
            "preload._import([*preload.RUNNER, *preload.COMMANDS])\n"
            "print({*os.environ.items()} ^ {*before.items()}, 'sglang' in sys.modules, 'torch' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
        self.assertEqual((done.stdout, done.stderr), ("set() False False\n", ""))

    def test_not_where_there_is_a_gpu(self):
        heavy = {"a": "import torch", "b": "import torch"}
        self.assertFalse(self.forked(**heavy, gpu="import torch"))
        with mock.patch.object(warm_module, "visible_gpus", lambda: ["a GPU"]):
            self.assertFalse(self.forked(**heavy))
        self.assertTrue(self.forked(**heavy))

    def test_a_process_that_cannot_import_is_done_without(self):
        with mock.patch.object(warm_module, "MUCH", "nowhere:f"):
            warm = self.warm(a="import torch", b="import torch")
        popen = warm.popen_for(self.registrations[0].filename)
        process = self.enterContext(popen([sys.executable, "-m", "platform"], stdout=subprocess.PIPE))
        self.assertTrue(process.stdout.read())
        self.assertIs(warm.popen_for(self.registrations[0].filename), subprocess.Popen)

    def test_one_that_failed_before_a_file_was_started_is_reported_once(self):
        with mock.patch.object(warm_module, "MUCH", "nowhere:f"):
            warm = self.warm(a="import torch", b="import torch")
        server = warm._servers["nowhere:f"]
        self.assertTrue(server.has_started(60))
        for each in self.registrations:
            popen = warm.popen_for(each.filename)
            self.enterContext(popen([sys.executable, "-m", "platform"], stdout=subprocess.DEVNULL))
        shown = self.shown.getvalue().decode()
        self.assertEqual(shown.count("test files are started anew, not forked: "), 1, shown)


if __name__ == "__main__":
    unittest.main()
