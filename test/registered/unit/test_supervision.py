"""A death is reported within two seconds, with its cause, in every phase: of a server, a worker below it, a router."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from pathlib import Path
from unittest import mock

from fake_pair import NEVER, Fate, fake_pair
from pdkit.core import events, processes
from pdkit.deployment.monolithic import MonolithicBeside
from pdkit.deployment.server import FATAL
from pdkit.deployment.supervisor import Supervisor
from pdkit.deployment.workers import Workers
from sglang.test.ci.ci_register import register_cpu_ci

register_cpu_ci(est_time=60, suite="stage-a-test-cpu")

WORKER = "sglang::scheduler_TP0"


class Supervised(unittest.TestCase):
    def setUp(self):
        self.log_dir = self.enterContext(tempfile.TemporaryDirectory())
        environ = {"SGLANG_IS_IN_CI": "false", "SGLANG_TEST_MAX_RETRY": "1", events.VARIABLE: self.log_dir}
        self.enterContext(mock.patch.dict(os.environ, environ))
        self.struck_at = None

    def run_pair(self, **pair):
        """The messages of a run of a fake pair."""
        case, result = fake_pair(self.log_dir, **pair), unittest.TestResult()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            unittest.TestSuite([case("test_gsm8k")]).run(result)
        return [message for _, message in result.errors + result.failures]

    def worker_of(self, name):
        words = Path(self.log_dir, f"{name}.log").read_text().split()
        return int(words[words.index("worker") + 1])

    def strike(self, pid, number):
        self.struck_at = time.time()
        os.kill(pid, number)

    def death(self):
        (found,) = events.read(self.log_dir).of("death")
        return found


class TestDeathInEachPhase(Supervised):
    """`victims`: name -> (what to kill by which signal, what the first words of the report are)."""

    victims = {
        "decode": (
            lambda self, case: (case.process_decode.pid, signal.SIGKILL),
            r"decode exited with code -9 \(Killed\)",
        ),
        "scheduler of decode": (
            lambda self, case: (self.worker_of("decode"), signal.SIGABRT),
            rf"decode: {WORKER} \(pid \d+\) ended by signal 6 \(Aborted\)",
        ),
        "load balancer": (
            lambda self, case: (case.process_lb.pid, signal.SIGSEGV),
            r"load balancer exited with code -11 \(Segmentation fault\)",
        ),
    }

    def killer(self, case, victim, after=0.7):
        find, _ = self.victims[victim]
        timer = threading.Timer(after, lambda: self.strike(*find(self, case)))
        timer.start()
        self.addCleanup(timer.cancel)

    def load(self, victim):
        """While it loads; the load balancer while it starts."""
        outer, of_balancer = self, victim == "load balancer"

        class Strikes:
            @classmethod
            def start_decode(cls):
                super().start_decode()
                if not of_balancer:
                    outer.killer(cls, victim)

            @classmethod
            def start_lb(cls, command):
                cls.process_lb = super().start_lb(command)
                if of_balancer:
                    outer.killer(cls, victim)
                return cls.process_lb

        return dict(
            mixins=(Strikes,),
            decode=Fate(healthy=0 if of_balancer else NEVER, worker=True),
            lb=Fate(healthy=NEVER if of_balancer else 0),
        )

    def references(self, victim):
        """While the monolithic server is asked, by code that waits for an answer that does not come."""
        outer = self

        class Strikes:
            @classmethod
            def take_references(cls):
                processes.wait_until(lambda: cls.process_lb is not None, NEVER)
                outer.killer(cls, victim)
                cls.supervisor.process("monolithic").wait(30)

        return dict(mixins=(Strikes, MonolithicBeside), decode=Fate(worker=True))

    def eval(self, victim):
        """In an eval that swallows whatever goes wrong."""

        def test(case):
            self.killer(case, victim)
            while True:
                with contextlib.suppress(Exception):
                    threading.Event().wait(NEVER)

        return dict(test=test, decode=Fate(worker=True))

    def teardown(self, victim):
        """After the last test has passed."""

        def test(case):
            find, _ = self.victims[victim]
            case.addCleanup(time.sleep, 0.3)
            case.addCleanup(lambda: self.strike(*find(self, case)))

        return dict(test=test, decode=Fate(worker=True))

    def test_reported_with_its_cause(self):
        rows = []
        for phase in (self.load, self.references, self.eval, self.teardown):
            for victim, (_, words) in self.victims.items():
                if phase == self.references and victim == "load balancer":
                    continue  # it may not have started: its own phase is "load"
                with self.subTest(phase=phase.__name__, victim=victim):
                    Path(self.log_dir, events.FILE).unlink(missing_ok=True)
                    message = "\n".join(self.run_pair(**phase(victim)))
                    self.assertRegex(message, words)
                    death = self.death()
                    self.assertRegex(death["cause"], f"^{words}")
                    self.assertIn(death["excerpt"].splitlines()[0], message)
                    seconds = death["ts"] - self.struck_at, time.time() - self.struck_at
                    rows.append([victim, phase.__name__, *(f"{each:.2f}" for each in seconds)])
        print(
            "what died, phase, seconds to the report, to the end of the run:", *map(tuple, rows), sep="\n  ", flush=True
        )


class TestWhatCannotHideADeath(Supervised):
    def test_code_that_catches_every_base_exception(self):
        def test(case):
            with contextlib.suppress(BaseException):
                self.strike(case.process_decode.pid, signal.SIGKILL)
                time.sleep(NEVER)

        (message,) = self.run_pair(test=test)
        self.assertIn("decode exited with code -9 (Killed)", message)

    def test_a_fatal_error_in_the_log_of_a_process_that_goes_on(self):
        def test(case):
            time.sleep(NEVER)

        (message,) = self.run_pair(test=test, decode=Fate(dies=1.5, code=-1))
        self.assertIn("decode logged a fatal error, and its process goes on", message)
        self.assertIn("CUDA error: an illegal memory access was encountered\nafter it\n", message)

    def test_a_server_that_hangs_without_a_death(self):
        def test(case):
            type(case).silence_s, type(case).answer_s = 0.5, 1.0
            with case.heartbeat():
                os.killpg(case.process_decode.pid, signal.SIGSTOP)
                time.sleep(NEVER)

        (message,) = self.run_pair(test=test)
        self.assertRegex(message, r"decode does not answer /health_generate within 1 s after 0.5 s .*: it hangs")

    def test_a_server_that_answers_while_the_eval_is_silent_is_left_alone(self):
        def test(case):
            type(case).silence_s, type(case).answer_s = 0.2, 5.0
            with case.heartbeat():
                time.sleep(1.5)

        self.assertEqual(self.run_pair(test=test), [])

    def test_a_worker_whose_exit_status_its_parent_took(self):
        reaps = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]]); input()"
        worker = f"import setproctitle, time; setproctitle.setproctitle({WORKER!r}); time.sleep(1)"
        parent = self.enterContext(subprocess.Popen([sys.executable, "-c", reaps, worker], stdin=subprocess.PIPE))
        self.addCleanup(parent.kill)
        workers, deadline = Workers(parent.pid), time.monotonic() + 30
        while not (ended := workers.ended()):
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.1)
        self.assertRegex(ended, rf"^{WORKER} \(pid \d+\) ended \(its exit status was taken")


class TestWhatIsNoDeath(Supervised):
    def test_servers_that_a_test_ends_by_the_methods_of_popen(self):
        for end in ("terminate", "kill"):
            with self.subTest(end):

                def test(case, end=end):
                    getattr(case.process_decode, end)()
                    case.process_decode.wait()
                    time.sleep(0.5)

                self.assertEqual(self.run_pair(test=test), [])

    def test_a_process_below_a_server_that_is_not_a_worker(self):
        def test(case):
            words = Path(self.log_dir, "decode.log").read_text().split()
            os.kill(int(words[words.index("orphan") + 1]), signal.SIGTERM)
            time.sleep(0.6)

        self.assertEqual(self.run_pair(test=test), [])

    def test_lines_that_only_mention_what_is_fatal(self):
        for line in (
            "torch.cuda.OutOfMemoryError: CUDA out of memory, falling back to a smaller batch",
            "[rank0] NCCL watchdog thread started",
            "INFO: set TORCH_NCCL_DUMP_ON_TIMEOUT=1 to trace a watchdog",
            "disable faulthandler: Fatal Python error is not printed",
        ):
            self.assertIsNone(FATAL.search(line), line)

    def test_fatal_lines(self):
        for line in (
            "Fatal Python error: Aborted",
            "terminate called after throwing an instance of 'c10::AcceleratorError'",
            "torch.AcceleratorError: CUDA error: an illegal memory access was encountered",
            "[rank2]:[E] [PG ID 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7",
            "[rank2] Process group watchdog thread terminated with exception: CUDA error: unspecified launch failure",
            "[2026-11-26 13:06:36 DP1 TP1] Scheduler hit an exception: Traceback (most recent call last):",
        ):
            self.assertIsNotNone(FATAL.search(line), line)

    def test_handlers_are_put_back(self):
        before = signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGTERM)
        Supervisor().stop()
        self.assertEqual((signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGTERM)), before)


if __name__ == "__main__":
    unittest.main()
