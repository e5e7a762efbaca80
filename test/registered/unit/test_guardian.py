"""The guardian ends what a command started, however it detached, and nothing else."""

import os
import signal
import subprocess
import sys
import time
import unittest

import psutil
from detached import DEAF, LISTEN, SLEEP, command, is_alive, listening, orphaner, spawner
from pdkit.core import ports, processes
from pdkit.core.ci_register import register_cpu_ci
from pdkit.runner import guardian
from pdkit.runner.guardian import Guarded
from pdkit.runner.owner import TOKEN_VARIABLE, new_token

register_cpu_ci(est_time=6, suite="stage-a-test-cpu")


class GuardianCase(unittest.TestCase):
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


class TestGuardian(GuardianCase):
    def test_exit_code_and_output(self):
        for source, code in (("import sys; print('x'); sys.exit(7)", 7), ("import os; os.kill(os.getpid(), 9)", -9)):
            with self.subTest(code):
                guarded = self.start(source)
                self.assertTrue(guarded.has_ended(20))
                ending = guarded.end()
                self.assertEqual((ending.exit_code, ending.ended, ending.unreleased), (code, (), ()))
                self.assertEqual(guarded.output.read(), b"x\n" if code == 7 else b"")

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
        runner = (
            "import os, time\n"
            "from pdkit.runner.guardian import Guarded\n"
            f"guarded = Guarded({command(orphaner(SLEEP, SLEEP))!r}, dict(os.environ), 'token')\n"
            "print(guarded.pid, guarded.guardian_pid, int(guarded.output.readline()), flush=True)\n" + SLEEP
        )
        with subprocess.Popen(command(runner), stdout=subprocess.PIPE) as process:
            self.addCleanup(process.kill)
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
        bystander = subprocess.Popen(command(source), start_new_session=True, stderr=subprocess.PIPE)
        self.enterContext(bystander)
        self.addCleanup(bystander.kill)
        twin = int(bystander.stderr.readline())
        self.addCleanup(os.kill, twin, signal.SIGKILL)
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


class TestEnd(unittest.TestCase):
    def start(self, source):
        process = self.enterContext(subprocess.Popen(command(source), stdout=subprocess.PIPE))
        self.addCleanup(process.kill)
        return process

    def end(self, process, **seconds):
        found = psutil.Process(process.pid)
        return processes.end(lambda: [found], lambda: process.poll() is not None, **seconds)

    def test_sigterm_comes_first(self):
        process = self.start(SLEEP)
        self.assertIn(f"pid {process.pid} (", self.end(process).processes[0])
        self.assertEqual(process.wait(5), -signal.SIGTERM)

    def test_sigkill_follows_where_sigterm_is_ignored(self):
        process = self.start(DEAF)
        process.stdout.readline()
        self.end(process, grace_s=0.3)
        self.assertEqual(process.wait(5), -signal.SIGKILL)

    def test_patience_is_bounded_and_survivors_are_named(self):
        process = self.start(DEAF)
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
        process = self.start(source)
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


class TestListeningPorts(unittest.TestCase):
    def test_of_a_process(self):
        with subprocess.Popen(command(LISTEN)) as process:
            self.addCleanup(process.kill)
            (port,) = listening(psutil.Process(process.pid))
            self.assertIn((port, process.pid), ports.listeners())
            (line,) = ports.wait_until_free([port], 0.2)
            self.assertEqual(line[: line.index("(")], f"port {port} is still taken, by pid {process.pid} ")
            process.kill()
            process.wait()
            self.assertEqual(ports.wait_until_free([port], 10), [])


if __name__ == "__main__":
    unittest.main()
