"""What a killed runner left behind is found by its token, and only that."""

import os
import signal
import subprocess
import unittest
from unittest import mock

import psutil
from detached import LISTEN, SLEEP, command, is_alive, listening, orphaner, spawner
from pdkit.core import ports, processes
from pdkit.core.ci_register import register_cpu_ci
from pdkit.runner import orphans
from pdkit.runner import owner as run_token
from pdkit.runner.owner import GUARDIAN_VARIABLE, TOKEN_VARIABLE, Owner, abandoned_by, carries, new_token

register_cpu_ci(est_time=2, suite="stage-a-test-cpu")

RUNNER = """
import os, signal, subprocess, sys, time
from pdkit.runner.guardian import Guarded
from pdkit.runner.owner import new_token
guarded = Guarded(({python!r}, "-c", {source!r}), dict(os.environ), new_token(os.environ))
print(guarded.guardian_pid, int(guarded.output.readline()), flush=True)
time.sleep(300)
"""


class TestToken(unittest.TestCase):
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
        process = subprocess.Popen(command(SLEEP))
        self.addCleanup(process.wait)
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


class TestEndEarlierRuns(unittest.TestCase):
    """Below a token of this test, so that no run beside it takes its leftovers for its own.

    What others left behind on this machine is found here, too: only lines about our own processes are looked at.
    """

    def setUp(self):
        self.enterContext(mock.patch.dict(os.environ, {TOKEN_VARIABLE: new_token(os.environ)}))

    def start_runner(self, source):
        runner = RUNNER.format(python=command(source)[0], source=source)
        process = self.enterContext(subprocess.Popen(command(runner), stdout=subprocess.PIPE))
        self.addCleanup(process.kill)
        guardian, child = map(int, process.stdout.readline().split())
        self.addCleanup(self.kill, child)
        return process, guardian, child

    def lines_about(self, *pids):
        return [line for line in orphans.end_earlier_runs() if any(f"pid {pid} (" in line for pid in pids)]

    @staticmethod
    def kill(pid):
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)

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
        bystander = self.enterContext(subprocess.Popen(command(SLEEP), env=cleared, start_new_session=True))
        self.addCleanup(bystander.kill)
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


class TestEndCarriers(unittest.TestCase):
    def test_by_token(self):
        token = new_token(os.environ)
        source = spawner(SLEEP, True, SLEEP)
        marked, twin = (
            self.enterContext(subprocess.Popen(command(source), env=os.environ | more, stdout=subprocess.PIPE))
            for more in ({TOKEN_VARIABLE: token}, {})
        )
        pids = []
        for process in (marked, twin):
            self.addCleanup(process.kill)
            pids.append(int(process.stdout.readline()))
            self.addCleanup(TestEndEarlierRuns.kill, pids[-1])
        orphans.end_carriers(token)
        self.assertEqual([is_alive(pid) for pid in pids], [False, True])
        self.assertEqual((marked.wait(5), twin.poll()), (-signal.SIGTERM, None))


if __name__ == "__main__":
    unittest.main()
