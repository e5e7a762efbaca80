"""A death is reported within two seconds, with its cause, in every phase: of a server, a worker below it, a router.

And what servers are asked before a test: until they are ready, and until no kernel is compiled any more.
"""

import concurrent.futures
import contextlib
import inspect
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
import unittest
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import requests
from cases import FolderCase, printed
from fake_pair import NEVER, Fate, fake_pair
from pdkit.core import events, processes
from pdkit.deployment import attach, evals, fixture, ports, supervisor, warm_up
from pdkit.deployment import workers as below
from pdkit.deployment.fixture import PDServers
from pdkit.deployment.fleet import Fleet
from pdkit.deployment.monolithic import MonolithicBeside
from pdkit.deployment.server import FATAL, Server
from pdkit.deployment.supervisor import Supervisor
from pdkit.deployment.workers import Workers
from sglang.test.ci.ci_register import register_cpu_ci
from stub_server import JsonHandler, StubServer

register_cpu_ci(est_time=41, suite="stage-a-test-cpu")

WORKER = "sglang::scheduler_TP0"


def messages_of(case):
    """Of the errors and failures of a run of a fake pair."""
    result = unittest.TestResult()
    printed(unittest.TestSuite([case("test_gsm8k")]).run, result)
    return [message for _, message in result.errors + result.failures]


class Supervised(FolderCase):
    def setUp(self):
        super().setUp()
        self.log_dir = str(self.root)
        environ = {"SGLANG_IS_IN_CI": "false", "SGLANG_TEST_MAX_RETRY": "1", events.VARIABLE: self.log_dir}
        self.enterContext(mock.patch.dict(os.environ, environ))
        self.struck_at = None
        self.titled, title_of = set(), below._title

        def noted(process):
            title = title_of(process)
            self.titled |= {process.pid} if title else set()
            return title

        self.enterContext(mock.patch.object(below, "_title", noted))

    def run_pair(self, **pair):
        """The messages of a run of a fake pair."""
        return messages_of(fake_pair(self.log_dir, **pair))

    def worker_of(self, name):
        found = lambda: re.search(r"^worker (\d+)$", Path(self.log_dir, f"{name}.log").read_text(), re.M)  # noqa: E731
        self.assertTrue(processes.wait_until(lambda: found() and int(found()[1]) in self.titled, NEVER))
        return int(found()[1])  # it has its title, and the supervisor has seen it

    def strike(self, pid, number):
        self.struck_at = time.time()
        os.kill(pid, number)

    def death(self):
        (found,) = events.read(self.log_dir).of("death")
        return found


@contextlib.contextmanager
def supervised():
    watch = Supervisor()
    try:
        yield watch
    finally:
        watch.stop()
        watch.release_signals()


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
        head = "what died, phase, seconds to the report, to the end of the run:"
        print(head, *map(tuple, rows), sep="\n  ", flush=True)


class TestWhatCannotHideADeath(Supervised):
    def test_code_that_catches_every_base_exception(self):
        def test(case):
            with contextlib.suppress(BaseException):
                self.strike(case.process_decode.pid, signal.SIGKILL)
                time.sleep(NEVER)

        (message,) = self.run_pair(test=test)
        self.assertIn("decode exited with code -9 (Killed)", message)

    def test_code_that_swallows_it_again_and_again(self):
        def test(case):
            self.strike(case.process_decode.pid, signal.SIGKILL)
            deadline = time.monotonic() + NEVER
            for _ in range(2):
                with contextlib.suppress(BaseException):
                    threading.Event().wait(deadline - time.monotonic())

        (message,) = self.run_pair(test=test)
        self.assertIn("decode exited with code -9 (Killed)", message)
        self.assertLess(time.time() - self.struck_at, NEVER / 2)

    def test_a_log_that_cannot_be_opened_ends_no_server(self):
        def test(case):
            self.assertIsNone(case.process_decode.poll())

        case = fake_pair(self.log_dir, test=test)
        case.log_path = classmethod(lambda cls, name, kind="log": f"/nowhere/{name}.{kind}")
        self.assertEqual(messages_of(case), [])

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

    def test_a_death_while_a_test_is_set_up_or_torn_down(self):
        def waits(case):
            self.strike(case.process_decode.pid, signal.SIGKILL)
            time.sleep(20)

        class InSetUp:
            setUp = waits

        class InTearDown:
            tearDown = waits

        class InCleanUp:
            def setUp(case):
                case.addCleanup(waits, case)

        for mixin in (InSetUp, InTearDown, InCleanUp):
            with self.subTest(mixin.__name__):
                (message,) = self.run_pair(mixins=(mixin,), test=lambda case: None)
                self.assertIn("decode exited with code -9 (Killed)", message)
                self.assertLess(time.time() - self.struck_at, 10)

    def test_a_death_of_a_server_in_whose_place_another_is_launched(self):
        process = self.enterContext(subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"]))
        process.wait()
        successor = SimpleNamespace(pid=os.getpid(), poll=lambda: None)
        with mock.patch.object(supervisor, "POLL_S", 60), supervised() as watch:
            watch.watch("decode", process)
            with contextlib.redirect_stderr(io.StringIO()):
                watch.watch("decode", successor)
            self.assertRegex(watch.stop() or "", "^decode exited with code 7")

    def test_a_worker_whose_exit_status_its_parent_took(self):
        reaps = (  # whoever ignores SIGCHLD leaves no zombie to read a status from
            "import signal, subprocess, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
            "worker = subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdin=subprocess.PIPE)\n"
            "input(); worker.stdin.close(); input()"
        )
        worker = (
            f"import setproctitle; setproctitle.setproctitle({WORKER!r})\nprint('named', flush=True)\nopen(0).read()"
        )
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        parent = self.enterContext(subprocess.Popen([sys.executable, "-c", reaps, worker], **pipes))
        self.addCleanup(parent.kill)
        self.assertEqual(parent.stdout.readline(), "named\n")
        workers = Workers(parent.pid)
        self.assertIsNone(workers.ended())
        parent.stdin.write("end\n")
        parent.stdin.flush()
        deadline = time.monotonic() + 60
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

    def test_a_server_that_is_ended_while_its_workers_are_looked_at(self):
        process = SimpleNamespace(pid=os.getpid(), expects_exit=False)
        process.poll = lambda: -9 if process.expects_exit else None
        looks = SimpleNamespace(ended=lambda parent_of: setattr(process, "expects_exit", True))
        with mock.patch.object(supervisor, "Workers", return_value=looks), supervised() as watch:
            watch.watch("decode", process)
            self.assertTrue(processes.wait_until(lambda: process.expects_exit, 10))
            self.assertIsNone(watch.stop())

    def test_a_server_that_a_test_ended_is_not_asked_whether_it_lives(self):
        def test(case):
            type(case).silence_s, type(case).answer_s = 0.2, 1.0
            case.process_decode.terminate()
            case.process_decode.wait()
            with case.heartbeat():
                time.sleep(1.5)

        self.assertEqual(self.run_pair(test=test), [])

    def test_servers_of_a_test_that_expects_their_exit(self):
        """SGLang's fault-injection tests say so by this name."""

        class Expects:
            expect_server_exit = True

        def test(case):
            os.killpg(case.process_decode.pid, signal.SIGKILL)
            time.sleep(0.6)

        self.assertEqual(self.run_pair(test=test, mixins=(Expects,)), [])

    def test_servers_that_a_test_ends_with_all_that_it_started(self):
        def test(case):
            def kill(*_, **__):
                os.killpg(case.process_decode.pid, signal.SIGKILL)
                time.sleep(0.6)

            with mock.patch.object(attach, "_kill_process_tree", kill):
                attach.kill_process_tree(pid)

        for pid in (None, os.getpid()):
            with self.subTest(pid):
                self.assertEqual(self.run_pair(test=test), [])

    def test_a_fork_of_a_worker(self):
        """Until it runs another program it has the worker's title."""
        forks = "if not (pid := os.fork()): time.sleep(1); os._exit(0)"
        title = f"import os, setproctitle, time; setproctitle.setproctitle({WORKER!r})"
        worker = f"{title}\n{forks}\nprint(pid, flush=True)\nos.waitpid(pid, 0)\ntime.sleep(60)"
        parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
        command = [sys.executable, "-c", parent, worker]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        self.addCleanup(server.communicate)
        self.addCleanup(os.killpg, server.pid, signal.SIGKILL)
        fork, workers = int(server.stdout.readline()), Workers(server.pid)
        self.assertIsNone(workers.ended())
        while processes.is_pid_alive(fork):
            self.assertIsNone(workers.ended())
            time.sleep(0.05)
        self.assertIsNone(workers.ended())

    def test_which_lines_are_fatal(self):
        for line in (  # these only mention it
            "torch.cuda.OutOfMemoryError: CUDA out of memory, falling back to a smaller batch",
            "[rank0] NCCL watchdog thread started",
            "INFO: set TORCH_NCCL_DUMP_ON_TIMEOUT=1 to trace a watchdog",
            "disable faulthandler: Fatal Python error is not printed",
            "[2026-11-26 13:06:36] Receive: obj=GenerateReqInput(text='Fatal Python error: Aborted')",
            "Scheduler watchdog timeout (self.watchdog_timeout=60.0, self.soft=True)",
        ):
            self.assertIsNone(FATAL.search(line), line)
        for line in (
            "Fatal Python error: Aborted",
            "terminate called after throwing an instance of 'c10::AcceleratorError'",
            "torch.AcceleratorError: CUDA error: an illegal memory access was encountered",
            "[rank2]:[E] [PG ID 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7",
            "[rank2] Process group watchdog thread terminated with exception: CUDA error: unspecified launch failure",
            "[2026-11-26 13:06:36 DP1 TP1] Scheduler hit an exception: Traceback (most recent call last):",
            "[2026-11-26 13:06:36] MultiTokenizerRouter hit an exception: Traceback (most recent call last):",
            "[2026-11-26 13:06:36] MultiDetokenizerRouter hit an exception: Traceback (most recent call last):",
            "[2026-11-26 13:06:36 TP0] Scheduler watchdog timeout (self.watchdog_timeout=300, self.soft=False)",
        ):
            self.assertIsNotNone(FATAL.search(line), line)

    def test_handlers_are_put_back(self):
        numbers = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        before = [signal.getsignal(number) for number in numbers]
        with supervised():
            pass
        self.assertEqual([signal.getsignal(number) for number in numbers], before)


class TestFirstRequest(Supervised):
    """The first request of an attached test, whose class need not keep what it evaluates in `model`."""

    def test_it_has_the_model_and_the_key_of_the_eval(self):
        asked = []

        class Handler(JsonHandler):
            def do_POST(self):
                asked.append((self.body()["model"], self.headers["Authorization"]))
                self.answer(200, {"choices": [{"text": "2"}]})

        class Servers(PDServers):
            log_dir = self.log_dir

        url = StubServer(self, Handler).url
        self.enterContext(mock.patch.dict(os.environ, {"OPENAI_API_KEY": "sk-0"}))
        self.enterContext(mock.patch.object(evals, "sglang_eval", lambda args: {"score": 1.0}))
        self.enterContext(contextlib.redirect_stdout(io.StringIO()))
        Servers.begin()
        self.addCleanup(Servers.doClassCleanups)
        args = SimpleNamespace(base_url=url, model="m", eval_name="gsm8k", api="completion", num_examples=1)
        evals.run_eval(args)
        self.assertEqual(asked, [("m", "Bearer sk-0")])


class TestReadiness(unittest.TestCase):
    def test_a_server_is_asked_often_at_first_and_then_once_a_second(self):
        """SGLang's own wait follows: it has the last word."""
        pauses = []
        busy, ready = (SimpleNamespace(status_code=code) for code in (503, 200))
        get = mock.Mock(side_effect=[requests.ConnectionError(), *[busy] * 28, *[ready] * 9])
        self.enterContext(mock.patch.object(requests, "get", get))
        self.enterContext(mock.patch.object(fixture.time, "sleep", pauses.append))
        self.assertGreater(fixture.ask_until_ready("http://x/health", 600), 500)
        self.assertEqual((len(pauses), pauses[-1]), (29, 1.0))
        self.assertLess(sum(pauses[:7]), 1.0)
        self.assertEqual(fixture.ask_until_ready("http://x/health", 0.5), 1.0)


class TestWhatIsLeft(Supervised):
    """No server outlives the class that launched it."""

    def setUp(self):
        super().setUp()
        self.pids = []

    def note_servers(self, case):
        self.pids += [process.pid for process in (case.process_prefill, case.process_decode, case.process_lb)]

    def assert_all_ended(self):
        self.assertTrue(self.pids)
        self.assertEqual([pid for pid in self.pids if processes.is_pid_alive(pid)], [])

    def test_after_a_fleet(self):
        class Routers:
            @classmethod
            def _launch_router(cls, name, port, *options):
                return cls.launch(name, Fate().command(port))

        def test(case):
            self.pids += [case.process(name).pid for name in case.names()]
            case.end("decode")

        self.assertEqual(self.run_pair(test=test, mixins=(Routers, Fleet)), [])
        self.assertEqual(len(self.pids), 4)
        self.assert_all_ended()

    def interrupted_launch(self, strike):
        """A mixin whose decode server is being launched while `strike(cls)` happens."""

        class Strikes:
            @classmethod
            def start_decode(cls):
                def launch(name, command, log, pid):
                    self.pids.append(pid)
                    strike(cls)
                    time.sleep(1.5)

                with mock.patch.object(events, "launch", launch):
                    super().start_decode()

        return Strikes

    def test_after_a_death_while_another_server_is_launched(self):
        mixin = self.interrupted_launch(lambda cls: os.kill(cls.process_prefill.pid, signal.SIGKILL))
        (message,) = self.run_pair(mixins=(mixin,))
        self.assertIn("prefill exited with code -9 (Killed)", message)
        self.assert_all_ended()

    def test_after_a_signal_while_a_server_is_launched(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            classes = []

            def strike(cls, number=number, classes=classes):
                classes.append(cls)
                os.kill(os.getpid(), number)

            with self.subTest(number), self.assertRaises(KeyboardInterrupt):
                self.run_pair(mixins=(self.interrupted_launch(strike),))
            printed(classes[0].tearDownClass)  # at exit
            self.assert_all_ended()

    def test_after_a_class_that_is_set_up_again_in_a_test(self):
        def test(case):
            self.note_servers(case)
            case.tearDownClass()
            case.setUpClass()
            self.note_servers(case)

        self.assertEqual(self.run_pair(test=test), [])
        self.assertEqual(len(self.pids), 6)
        self.assert_all_ended()

    def test_after_servers_that_were_launched_in_threads(self):
        class Threads:
            @classmethod
            def start_prefill(cls):
                with concurrent.futures.ThreadPoolExecutor(2) as threads:
                    for started in [threads.submit(super().start_prefill), threads.submit(super().start_decode)]:
                        started.result()

            @classmethod
            def start_decode(cls):
                """Has been started beside prefill."""

        with mock.patch.object(ports, "require_free", lambda test: time.sleep(0.5)):
            self.assertEqual(self.run_pair(test=lambda case: self.note_servers(case), mixins=(Threads,)), [])
        self.assert_all_ended()

    def test_servers_are_asked_to_end_all_at_once(self):
        """Each of two that end only when both were asked."""
        ends = (
            "import pathlib, signal, sys, time\n"
            "here, me, other = pathlib.Path(sys.argv[1]), *sys.argv[2:]\n"
            "def end(*_):\n"
            "    (here / me).touch()\n"
            "    while not (here / other).exists(): time.sleep(0.02)\n"
            "    (here / f'{me} met').touch()\n"
            "    sys.exit()\n"
            "signal.signal(signal.SIGTERM, end)\n"
            "(here / f'{me} up').touch()\n"
            "time.sleep(300)\n"
        )

        def test(case):
            for me, other in (("a", "b"), ("b", "a")):
                case.launch(me, [sys.executable, "-c", ends, self.log_dir, me, other])
                self.assertTrue(processes.wait_until((self.root / f"{me} up").exists, 30))

        self.assertEqual(self.run_pair(test=test), [])
        self.assertEqual(sorted(path.name for path in self.root.glob("* met")), ["a met", "b met"])

    def test_after_sigterm_while_servers_are_stopped(self):
        def stop(server):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)

        deadly = mock.Mock()
        self.addCleanup(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, deadly))
        with mock.patch.object(Server, "stop", stop), contextlib.suppress(KeyboardInterrupt):
            self.run_pair(test=lambda case: self.note_servers(case))
        deadly.assert_not_called()
        self.assertTrue(processes.wait_until(lambda: not any(map(processes.is_pid_alive, self.pids)), 5))

    def test_logs_of_servers_that_had_the_same_name(self):
        def test(case):
            first = case.process_decode
            first.terminate()
            first.wait()
            source = "import time; print('of the second', flush=True); time.sleep(60)"
            second = case.launch("decode", [sys.executable, "-c", source])
            processes.wait_until(lambda: "of the second" in second.log_tail(), 20)
            self.assertIn("orphan", Path(first.log_path).read_text())
            self.assertIn("of the second", Path(second.log_path).read_text())
            second.terminate()

        self.assertEqual(self.run_pair(test=test), [])


class TestNames(unittest.TestCase):
    def test_what_stands_before_a_deployment_means_the_same_by_its_names(self):
        self.enterContext(mock.patch.object(sys, "path", [*sys.path, str(Path(__file__).parents[1] / "distributed")]))
        import test_disaggregation_dsv4_recovery as recovery
        import test_disaggregation_dsv4_scale_out as scale_out

        def shape(value):
            return list(inspect.signature(value).parameters) if callable(value) else "a value"

        for test in (recovery.TestDisaggregationDSV4Recovery, scale_out.TestDisaggregationDSV4ScaleOut):
            for name in vars(PDServers).keys() & {name for base in test.__mro__ for name in vars(base)}:
                if not name.startswith("__"):
                    with self.subTest(test=test.__name__, name=name):
                        self.assertEqual(shape(getattr(test, name)), shape(getattr(PDServers, name)))


class TestWarmUp(unittest.TestCase):
    def served(self, at_once, status=200):
        """URL of a server that answers when as many requests have arrived."""
        barrier = threading.Barrier(at_once, timeout=60)
        return StubServer(self, reply=lambda path, body: (status, {"place": barrier.wait()})).url

    def test_passes_go_on_until_two_take_about_as_long(self):
        for seconds, used in (([300, 20, 3, 2.9, 1], 4), ([5, 4.9], 2), ([3, 6, 5.9], 3), ([64, 32, 16, 8, 4, 2], 5)):
            left = iter(seconds)
            self.assertEqual(warm_up.until_settled(lambda left=left: next(left)), seconds[:used])

    def test_every_size_of_batch_up_to_the_threads(self):
        for threads, sizes in ((1, [1]), (8, [1, 2, 4, 8]), (128, [1, 2, 4, 8, 16, 32, 64, 128]), (5, [1, 2, 4, 5])):
            self.assertEqual([len(batch) for batch in warm_up.batches(threads)], sizes)
        lengths = {len(prompt) for batch in warm_up.batches(128) for prompt in batch}
        self.assertGreater(max(lengths), 30 * min(lengths))

    def test_a_batch_is_sent_at_once(self):
        self.assertGreater(warm_up.send(self.served(4), "model", warm_up.batches(4)[-1:], 90), 0)

    def test_a_refused_request_fails(self):
        with self.assertRaisesRegex(warm_up.requests.HTTPError, "503"):
            warm_up.send(self.served(1, 503), "model", warm_up.batches(1), 90)


if __name__ == "__main__":
    unittest.main()
