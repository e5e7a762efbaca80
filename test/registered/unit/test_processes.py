"""Processes of a run: the guardian ends what a command started, however it detached; what a killed runner left is found
by its token alone; what is said of a test that hangs; ports that runs claim side by side."""

import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import time
import unittest
from unittest import mock

import psutil
from cases import FolderCase
from detached import DEAF, LISTEN, SLEEP, command, is_alive, listening, orphaner, spawner
from pdkit.core import ports, processes
from pdkit.core.ci_register import register_cpu_ci
from pdkit.core.events import Events, append
from pdkit.runner import guardian, hang_report, orphans
from pdkit.runner import owner as run_token
from pdkit.runner.guardian import Guarded
from pdkit.runner.owner import GUARDIAN_VARIABLE, TOKEN_VARIABLE, Owner, abandoned_by, carries, new_token
from pdkit.runner.report import evidence

register_cpu_ci(est_time=10, suite="stage-a-test-cpu")


class ProcessCase(unittest.TestCase):
    def spawn(self, source, **options):
        """A process that runs `source` until the test ends."""
        process = self.enterContext(subprocess.Popen(command(source), stdout=subprocess.PIPE, **options))
        self.addCleanup(process.kill)
        return process

    def kill(self, pid):
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)


class TestGuardian(ProcessCase):
    def start(self, source):
        guarded = Guarded(command(source), dict(os.environ), new_token(os.environ))
        self.addCleanup(guarded.output.close)
        self.addCleanup(guarded.end)
        return guarded

    def read_number(self, guarded):
        return int(guarded.output.readline())

    def assert_all_end(self, *pids, seconds=20.0):
        left = [pid for pid in pids if not processes.wait_until(lambda pid=pid: not is_alive(pid), seconds)]
        self.assertEqual(left, [])

    def test_exit_code_and_output(self):
        said = "print('x', flush=True); print('y', file=sys.stderr)"
        for source, code in ((f"import sys; {said}; sys.exit(7)", 7), ("import os; os.kill(os.getpid(), 9)", -9)):
            with self.subTest(code):
                guarded = self.start(source)
                self.assertTrue(guarded.has_ended(20))
                ending = guarded.end()
                self.assertEqual((ending.exit_code, ending.ended, ending.unreleased), (code, (), ()))
                self.assertEqual(guarded.output.read(), b"x\ny\n" if code == 7 else b"")

    def test_a_session_of_its_own_and_the_token(self):
        guarded = self.start(f"import os; print(os.getsid(0) == os.getpid(), os.environ['{TOKEN_VARIABLE}'])")
        own_session, token = guarded.output.readline().split()
        self.assertEqual(own_session, b"True")
        self.assertTrue(token.decode().split(":")[-1].startswith(f"{os.getpid()}."))

    def test_the_cpu_time_of_all_that_ran(self):
        burns = "import time\nwhile time.process_time() < 0.3: pass"
        guarded = self.start(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burns!r}])")
        self.assertTrue(guarded.has_ended(60))
        self.assertGreater(guarded.end().cpu_seconds, 0.3)

    def test_orphans_are_reaped_while_the_command_runs(self):
        """An orphan ends when the guardian is its parent, and is gone then."""
        waits = "import os, time\nwhile str(os.getppid()) != os.environ['GUARDIAN']: time.sleep(0.01)"
        orphan = orphaner(waits, SLEEP, env="{'GUARDIAN': __import__('os').environ['GUARDIAN']}")
        guarded = self.start(f"import os; os.environ['GUARDIAN'] = str(os.getppid())\n{orphan}")
        orphan = self.read_number(guarded)
        self.assertTrue(processes.wait_until(lambda: not psutil.pid_exists(orphan), 10), "a zombie is left")

    def test_told_to_end(self):
        guarded = self.start(orphaner(SLEEP, SLEEP))
        orphan = self.read_number(guarded)
        self.assertTrue(guarded.is_running)
        ending = guarded.end()
        self.assertIsNone(ending.exit_code)
        for pid in (orphan, guarded.pid):
            self.assertIn(f"pid {pid} (", " ".join(ending.ended))
            self.assertFalse(is_alive(pid))

    def test_a_signal_to_the_guardian_ends_all_too(self):
        for number in guardian.TOLD_BY:
            with self.subTest(number):
                guarded = self.start(spawner(SLEEP, True, SLEEP))
                child = self.read_number(guarded)
                os.kill(guarded.guardian_pid, number)
                self.assertTrue(guarded.has_ended(20))
                self.assert_all_end(child, guarded.pid, seconds=0)

    def test_the_death_of_the_runner_ends_all(self):
        process = self.spawn(RUNNER.format(python=sys.executable, source=orphaner(SLEEP, SLEEP)))
        pids = [int(word) for word in process.stdout.readline().split()]
        self.assertEqual([is_alive(pid) for pid in pids], [True] * 3)
        process.kill()
        self.assert_all_end(*pids)

    def test_a_runner_that_is_gone_before_the_start(self):
        late = [sys.executable, "-m", "pdkit.runner.guardian", *command("print('started')")]
        environment = os.environ | {guardian.GUARDIAN_VARIABLE: "token"}
        options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
        done = subprocess.run(late, env=environment, **options)
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "", ""))

    def test_a_bystander_with_the_same_command_line_stays(self):
        source = orphaner(SLEEP, SLEEP)
        bystander = self.spawn(source, start_new_session=True, stderr=subprocess.PIPE)
        twin = int(bystander.stderr.readline())
        self.addCleanup(self.kill, twin)
        guarded = self.start(source)
        orphan = self.read_number(guarded)
        of_twin = psutil.Process(twin).cmdline()
        # between fork and exec it has none yet
        self.assertTrue(processes.wait_until(lambda: psutil.Process(orphan).cmdline() == of_twin, 30))
        guarded.end()
        self.assertFalse(is_alive(orphan))
        self.assertTrue(is_alive(twin))
        self.assertIsNone(bystander.poll())

    def test_ports_are_free_afterwards(self):
        guarded = self.start(spawner(LISTEN, True, SLEEP))
        (port,) = listening(psutil.Process(self.read_number(guarded)))
        self.assertFalse(ports.is_free(port))
        self.assertEqual(guarded.end().unreleased, ())
        self.assertTrue(ports.is_free(port))

    def test_a_command_that_cannot_be_started(self):
        guarded = Guarded(("/nowhere/python3",), dict(os.environ), "token")
        self.addCleanup(guarded.output.close)
        self.assertIsNone(guarded.pid)
        self.assertIsNone(guarded.end())
        self.assertIn(b"/nowhere/python3", guarded.output.read())


class TestEnd(ProcessCase):
    def end(self, process, **seconds):
        found = psutil.Process(process.pid)
        return processes.end(lambda: [found], lambda: process.poll() is not None, **seconds)

    def test_sigterm_comes_first(self):
        process = self.spawn(SLEEP)
        self.assertIn(f"pid {process.pid} (", self.end(process).processes[0])
        self.assertEqual(process.wait(5), -signal.SIGTERM)

    def test_sigkill_follows_where_sigterm_is_ignored(self):
        process = self.spawn(DEAF)
        process.stdout.readline()
        self.end(process, grace_s=0.3)
        self.assertEqual(process.wait(5), -signal.SIGKILL)

    def test_patience_is_bounded_and_survivors_are_named(self):
        process = self.spawn(DEAF)
        process.stdout.readline()
        found = psutil.Process(process.pid)
        tic = time.monotonic()
        ended = processes.end(lambda: [found], lambda: False, grace_s=0.1, kill_s=0.1)
        self.assertLess(time.monotonic() - tic, 10)
        self.assertIn(f"pid {process.pid} (", ended.survivors[0])

    def test_what_is_started_meanwhile_is_ended_too(self):
        source = (
            "import os, signal, subprocess, sys, time\n"
            f"again = lambda *_: print(subprocess.Popen([sys.executable, '-c', {DEAF!r}], stdout=-3).pid, flush=True)\n"
            "signal.signal(signal.SIGTERM, again)\nprint('up', flush=True)\n" + SLEEP
        )
        process = self.spawn(source)
        process.stdout.readline()
        me = psutil.Process(process.pid)

        def find():
            return [found for found in [me, *late] if processes.is_alive(found)]

        late = []

        def are_gone():
            late[:] = {*late, *processes.descendants(me)}
            process.poll()
            return not find()

        ended = processes.end(find, are_gone, grace_s=1.0)
        self.assertEqual((len(ended.processes), ended.survivors), (2, ()))
        self.assertFalse(is_alive(int(process.stdout.readline())))


class TestListeningPorts(ProcessCase):
    def test_of_a_process(self):
        process = self.spawn(LISTEN)
        (port,) = listening(psutil.Process(process.pid))
        self.assertIn((port, process.pid), ports.listeners())
        (line,) = ports.wait_until_free([port], 0.2)
        self.assertEqual(line[: line.index("(")], f"port {port} is still taken, by pid {process.pid} ")
        process.kill()
        process.wait()
        self.assertEqual(ports.wait_until_free([port], 10), [])


RUNNER = """
import os, signal, subprocess, sys, time
from pdkit.runner.guardian import Guarded
from pdkit.runner.owner import new_token
guarded = Guarded(({python!r}, "-c", {source!r}), dict(os.environ), new_token(os.environ))
print(guarded.guardian_pid, int(guarded.output.readline()), guarded.pid, flush=True)
time.sleep(300)
"""


class TestToken(ProcessCase):
    def setUp(self):
        self.dead, self.other_dead = (f"{4_000_000 + n}.5.{os.stat('/proc/self/ns/pid').st_ino}.aa" for n in (1, 2))
        self.living = new_token({})

    def test_the_owner(self):
        token = self.living
        owner = Owner.parse(token)
        self.assertEqual(owner.pid, os.getpid())
        self.assertFalse(owner.is_known_dead)
        self.assertNotEqual(token, new_token({}))

    def test_the_start_counts_too(self):
        pid, started, rest = self.living.split(".", 2)
        self.assertTrue(Owner.parse(f"{pid}.{int(started) - 1}.{rest}").is_known_dead)

    def test_a_zombie_is_dead(self):
        process = self.spawn(SLEEP)
        _, _, namespace, _ = self.living.split(".")
        owner = Owner(process.pid, run_token._started(process.pid), int(namespace))
        self.assertFalse(owner.is_known_dead)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        self.assertTrue(owner.is_known_dead)

    def test_another_namespace_is_not_judged(self):
        pid, started, namespace, rest = self.dead.split(".")
        self.assertIsNone(abandoned_by(f"{pid}.{started}.{int(namespace) + 1}.{rest}"))

    def test_nesting(self):
        inner = new_token({TOKEN_VARIABLE: self.dead})
        self.assertTrue(inner.startswith(self.dead + ":"))
        self.assertTrue(carries(inner, self.dead) and carries(self.dead, self.dead))
        self.assertFalse(carries(self.dead + "0", self.dead) or carries("", self.dead))

    def test_who_was_left_behind(self):
        dead, living = self.dead, self.living
        for value, own, expected in (
            (dead, "", True),
            (living, "", False),
            ("", "", False),
            ("0123456789abcdef", "", False),
            (f"{dead}:{living}", "", True),
            (f"{living}:{dead}", "", False),
            (f"{living}:{dead}", living, True),
            (f"{living}:{dead}", f"{living}:{self.other_dead}", True),
            (living, living, False),
            (dead, dead, False),
            (f"{dead}:{living}", dead, False),
        ):
            with self.subTest(value=value, own=own):
                self.assertEqual(abandoned_by(value, own) is not None, expected)


class TestEndEarlierRuns(ProcessCase):
    """Below a token of this test, so that no run beside it takes its leftovers for its own.

    What others left behind on this machine is found here, too: only lines about our own processes are looked at.
    """

    def setUp(self):
        self.enterContext(mock.patch.dict(os.environ, {TOKEN_VARIABLE: new_token(os.environ)}))

    def start_runner(self, source):
        process = self.spawn(RUNNER.format(python=sys.executable, source=source))
        guardian, child, _ = map(int, process.stdout.readline().split())
        self.addCleanup(self.kill, child)
        return process, guardian, child

    def lines_about(self, *pids):
        return [line for line in orphans.end_earlier_runs() if any(f"pid {pid} (" in line for pid in pids)]

    def kill_with_guardian(self, process, guardian):
        os.kill(process.pid, signal.SIGSTOP)
        os.kill(guardian, signal.SIGKILL)
        process.kill()
        process.wait()
        self.assertTrue(processes.wait_until(lambda: not is_alive(guardian), 10))

    def test_runner_and_guardian_killed(self):
        process, guardian, child = self.start_runner(spawner(LISTEN, True, SLEEP))
        before = listening(psutil.Process(child))
        self.kill_with_guardian(process, guardian)
        self.assertTrue(is_alive(child))
        (line,) = self.lines_about(child)
        self.assertFalse(is_alive(child))
        self.assertIn(f"an earlier run, whose runner (pid {process.pid}) is gone; ended now:", line)
        self.assertEqual([port for port, _ in ports.listeners() if port in before], [])
        self.assertEqual(self.lines_about(child), [])

    def test_descendants_of_a_leftover_that_dropped_their_environment(self):
        process, guardian, child = self.start_runner(spawner(SLEEP, True, SLEEP, env="{}"))
        self.kill_with_guardian(process, guardian)
        self.assertTrue(is_alive(child))
        list(orphans.end_earlier_runs())
        self.assertFalse(is_alive(child))

    def test_a_guardian_at_work_is_waited_for(self):
        process, guardian, child = self.start_runner(orphaner(SLEEP, SLEEP))
        os.kill(guardian, signal.SIGSTOP)
        process.kill()
        process.wait()
        for line in orphans.end_earlier_runs():
            if f"whose runner (pid {process.pid}) is gone" in line:
                os.kill(guardian, signal.SIGCONT)
        self.assertFalse(is_alive(child) or is_alive(guardian))

    def test_a_living_run_is_left_alone(self):
        process, guardian, child = self.start_runner(orphaner(SLEEP, SLEEP, env="None"))
        self.assertEqual(self.lines_about(child, guardian, process.pid), [])
        self.assertTrue(is_alive(child) and is_alive(guardian))
        self.assertIsNone(process.poll())

    def test_what_no_runner_marked_is_left_alone(self):
        process, guardian, child = self.start_runner(spawner(SLEEP, True, SLEEP))
        cleared = {name: value for name, value in os.environ.items() if name not in (TOKEN_VARIABLE, GUARDIAN_VARIABLE)}
        bystander = self.spawn(SLEEP, env=cleared, start_new_session=True)
        self.kill_with_guardian(process, guardian)
        list(orphans.end_earlier_runs())
        self.assertFalse(is_alive(child))
        self.assertIsNone(bystander.poll())

    def test_we_are_no_leftover_of_the_run_that_we_are_in(self):
        dead = f"4000001.5.{os.stat('/proc/self/ns/pid').st_ino}.aa"
        source = "from pdkit.runner import orphans; print(*orphans.end_earlier_runs(), 'alive')"
        started = os.environ | {TOKEN_VARIABLE: f"{os.environ[TOKEN_VARIABLE]}:{dead}"}
        done = subprocess.run(command(source), env=started, capture_output=True, text=True, timeout=60)
        self.assertEqual((done.returncode, done.stdout.split()[-1:]), (0, ["alive"]), done.stderr)


class TestEndCarriers(ProcessCase):
    def test_by_token(self):
        token = new_token(os.environ)
        environments = os.environ | {TOKEN_VARIABLE: token}, os.environ
        marked, twin = (self.spawn(spawner(SLEEP, True, SLEEP), env=environment) for environment in environments)
        pids = []
        for process in (marked, twin):
            pids.append(int(process.stdout.readline()))
            self.addCleanup(self.kill, pids[-1])
        orphans.end_carriers(token)
        self.assertEqual([is_alive(pid) for pid in pids], [False, True])
        self.assertEqual((marked.wait(5), twin.poll()), (-signal.SIGTERM, None))


HANG = "import time\ndef waits_for_godot():\n    print('up', flush=True)\n    time.sleep(300)\nwaits_for_godot()"
PTRACE_SEIZE = 0x4206


class TestStacks(ProcessCase):
    def start(self, source):
        environment = os.environ | {"PYTHONFAULTHANDLER": "1"}
        process = self.spawn(source, env=environment, stderr=subprocess.PIPE, text=True)
        self.assertEqual(process.stdout.readline(), "up\n")
        return psutil.Process(process.pid), process

    def test_of_a_child_and_grandchild(self):
        parent = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {HANG!r}])"
        process, _ = self.start(parent)
        self.addCleanup(process.children()[0].kill)
        text = "\n".join(hang_report.stacks([process, *process.children()], hang_report.py_spy()))
        self.assertIn("waits_for_godot (<string>:4)", text)
        for found in (process, *process.children()):
            self.assertIn(f"Process {found.pid}: ", text)

    def test_faulthandler_where_py_spy_may_not_trace(self):
        process, _ = self.start(HANG)
        libc = ctypes.CDLL(None, use_errno=True)
        self.assertEqual(libc.ptrace(PTRACE_SEIZE, process.pid, None, None), 0, os.strerror(ctypes.get_errno()))
        with mock.patch.object(hang_report, "_abort", return_value=[]):  # a traced process stops before it dies
            lines = list(hang_report.stacks([process], hang_report.py_spy()))
        self.assertIn("no stacks by py-spy: ", lines[0])
        self.assertRegex(lines[0], "(?i)permi")
        self.assertIn("CAP_SYS_PTRACE", lines[1])
        self.assertEqual(lines[2][lines[2].index("made") :], "made to print stacks above, ending the processes: none")

    def test_faulthandler_where_py_spy_is_missing(self):
        process, popen = self.start(HANG)
        lines = list(hang_report.stacks([process], None))
        self.assertEqual(lines[0], "no stacks by py-spy: it is not installed")
        self.assertTrue(lines[-1].endswith(f": {process.pid}"), lines)
        self.assertEqual(popen.wait(10), -signal.SIGABRT)
        self.assertIn("in waits_for_godot", popen.stderr.read())

    def test_children_before_their_parents(self):
        child = f"[sys.executable, '-c', {HANG!r}]"
        passes_on = f"child = subprocess.run({child}, stderr=-1)\ntime.sleep(0.2)\nprint('child', child.stderr)"
        parent = f"import subprocess, sys, time\n{passes_on}"
        process, popen = self.start(parent + "\n" + HANG)
        list(hang_report.stacks([process, *process.children()], None))
        self.assertIn("waits_for_godot", popen.stdout.readline())

    def test_other_programs_have_no_stacks(self):
        with subprocess.Popen(["sleep", "300"]) as process:
            self.addCleanup(process.kill)
            self.assertEqual(list(hang_report.stacks([psutil.Process(process.pid)], None)), [])
            self.assertTrue(is_alive(process.pid))
            process.kill()

    def test_a_process_that_is_gone(self):
        process = self.spawn(SLEEP)
        found = psutil.Process(process.pid)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        self.assertEqual(list(hang_report.stacks([found], hang_report.py_spy())), [])


class TestDiagnose(FolderCase):
    def setUp(self):
        super().setUp()
        self.log = self.write("001-test_x.1.log", "start\n[phase] a server prints that begins\nwaiting\n")
        self.directory = evidence.directory_of(self.log)
        self.directory.mkdir()

    def emit(self, kind, **fields):
        append(self.directory, kind, **fields)

    def test_report(self):
        decode = self.directory / "TestX.decode.log"
        decode.write_text("loads\ncannot allocate\nkey-of-somebody\n")
        for name, path in (("decode", decode), ("prefill", self.directory / "absent.log"), ("load balancer", None)):
            self.emit("launch", name=name, command="x", log=path and str(path), pid=1)
        self.emit("phase", name="launch decode", state="passed", seconds=1.0)
        self.emit("phase", name="first request", state="begins")
        with mock.patch.dict(os.environ, A_KEY="key-of-somebody"):
            phase, lines = hang_report.diagnose([], self.log, None)
        self.assertEqual(phase, "first request")
        expected = ["hangs in phase first request", "last lines of test:", "  start"]
        expected += ["  [phase] a server prints that begins", "  waiting"]
        self.assertEqual(lines, [*expected, "last lines of decode:", "  loads", "  cannot allocate", "  (removed)"])

    def test_the_last_lines_only(self):
        self.log.write_text("".join(f"{i}\n" for i in range(100)))
        self.assertEqual(hang_report.tails(self.log, Events(), 2), {"test": ["98", "99"]})

    def test_outside_of_any_phase(self):
        self.emit("phase", name="gate", state="begins")
        self.emit("phase", name="gate", state="failed", seconds=1.0)
        phase, lines = hang_report.diagnose([], self.log, None)
        self.assertEqual((phase, lines[0]), (None, "hangs outside of any phase"))


CLAIM = (
    "import sys\nfrom pdkit.core import ports\nports.BLOCKS = {}\nblocks = [ports.claim() for _ in range(5)]\n"
    "print(*(port for block in blocks for port in block.ports), flush=True)\nsys.stdin.read()"
)


class TestClaim(ProcessCase):
    def claim(self):
        block = ports.claim()
        self.addCleanup(block.release)
        return block

    def test_processes_that_claim_at_the_same_time_do_not_meet(self):
        few = random.sample(ports.BLOCKS, 40)
        claimants = [self.spawn(CLAIM.format(few), stdin=subprocess.PIPE) for _ in range(4)]
        claimed = [int(port) for process in claimants for port in process.stdout.readline().split()]
        self.assertEqual(len(claimed), 4 * 5 * (ports.BLOCK_SIZE - 1))
        self.assertEqual(len(set(claimed)), len(claimed))

    def test_clear_of_the_ports_of_sglang_s_fixtures(self):
        for gpu in range(10):
            for base in (10_000 + 2000 * gpu + 1000, 20_000 + 1000 * gpu + 1000):  # in SGLang's CI, and outside of it
                derived = range(base, base + 600)
                self.assertEqual([block for block in ports.BLOCKS if block in derived], [])
        self.assertLess(max(ports.BLOCKS) + ports.BLOCK_SIZE, 32768)

    def test_a_listener_within_the_block_spoils_it(self):
        with mock.patch.object(ports, "BLOCKS", ports.BLOCKS[:1]):
            block = self.claim()
            with self.assertRaises(RuntimeError):
                ports.claim()
            block.release()
            with socket.create_server(("", block.ports[-1])), self.assertRaisesRegex(RuntimeError, "no 10 free ports"):
                ports.claim()
            self.assertEqual(self.claim().ports, block.ports)


if __name__ == "__main__":
    unittest.main()
