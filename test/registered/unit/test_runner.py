"""What the runner makes of outputs and exit codes, how it starts and ends processes, and waits for GPU memory."""

import ast
import io
import os
import signal
import subprocess
import sys
import time
import unittest
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

from cases import FolderCase
from detached import SLEEP, is_alive, orphaner, spawner
from pdkit.core import ci_register
from pdkit.core import processes as process_tree
from pdkit.core.ci_register import register_cpu_ci
from pdkit.core.console import Console
from pdkit.core.errors import ExitCode, UsageError
from pdkit.core.events import TARGET_VARIABLE, Events
from pdkit.core.gpus import Gpu, GpuProcess
from pdkit.core.source import read
from pdkit.runner import gpu_memory
from pdkit.runner.attempt import child_environment, python3_directory, run_attempt
from pdkit.runner.interruption import Interruption
from pdkit.runner.options import Options, parse_options
from pdkit.runner.outcome import FileState, Output, TestCounts, exit_code_of, read_output, tally
from pdkit.runner.results import Attempt

register_cpu_ci(est_time=8, suite="stage-a-test-cpu")

NO_PID = 2**22 + 1  # more than Linux has
TEST = {"kind": "test", "id": "T.test_it", "state": "passed", "seconds": 0.1, "message": "", "details": ""}
TESTS = Events([TEST, {"kind": "run", "tests": 1, "successful": True}])


def counts_of(output, happened=TESTS[:0], **options):
    return read_output(output.splitlines(), Events(happened), **options).counts


class TestReadOutput(unittest.TestCase):
    def test_harm_without_effect_is_no_pass(self):
        def harm(what, passed):
            return {"kind": "verdict", "check": f"harm: {what}", "passed": passed, "message": ""}

        for done, unmet in (
            ((), ()),
            ((harm("kill decode", True), harm("fault x", False), harm("fault x", True)), ()),
            ((harm("kill decode", True), harm("fault x", False)), ("fault x",)),
        ):
            output = read_output([], Events([*TESTS, *done]))
            self.assertEqual(output.unmet, unmet)
            state, reason = Attempt("log", 1.0, 0, output).verdict
            self.assertIs(state, FileState.FAILED if unmet else FileState.PASSED, reason)
            self.assertEqual("fault x" in reason, bool(unmet))

    def test_events_count_before_what_is_printed(self):
        self.assertEqual(counts_of("1 failed in 0.1s", happened=TESTS), TestCounts(executed=1))
        self.assertEqual(counts_of("", happened=Events([{**TESTS[1], "successful": False}])), TestCounts(failed=1))

    def test_unittest_that_did_not_come_to_its_end(self):
        for happened, is_whole in ((TESTS, True), (TESTS.of("test"), False), (Events(), True)):
            self.assertEqual(read_output([], happened).is_whole, is_whole)

    def test_a_death_is_not_hidden_by_tests_that_passed_and_is_not_retried(self):
        """As an expected failure over a server that died has it."""
        died = Events([*TESTS, {"kind": "death", "ts": 1.0, "cause": "decode exited with code -9 (Killed)"}])
        output = read_output(["accuracy is too low"], died)
        self.assertFalse(output.is_retriable)
        state, reason = Attempt("x.log", 1.0, 0, output).verdict
        self.assertEqual((state, reason), (FileState.FAILED, "exit code 0, but decode exited with code -9 (Killed)"))

    def test_pytest(self):
        for closing, expected in (
            ("===== 3 passed in 0.12s =====", TestCounts(executed=3)),
            ("3 passed, 1 skipped, 2 warnings in 61.02s (0:01:01)", TestCounts(executed=3, skipped=1)),
            ("== 1 failed, 2 passed, 1 error in 1.00s ==", TestCounts(executed=4, failed=2)),
            ("\x1b[32m== \x1b[1m1 passed\x1b[0m, 1 rerun in 1.00s ==\x1b[0m", TestCounts(executed=1, retried=1)),
            ("== 2 skipped in 0.01s ==", TestCounts(skipped=2)),
            ("== 1 xfailed in 0.01s ==", TestCounts(executed=1)),
            ("== no tests ran in 0.01s ==", TestCounts()),
            ("== 2 deselected in 0.01s ==", TestCounts()),
            ("9 passed in 0.1s\n1 skipped in 0.1s", TestCounts(skipped=1)),  # the last one counts
        ):
            with self.subTest(closing):
                self.assertEqual(counts_of("noise\n" + closing), expected)

    def test_other_lines_are_no_closing(self):
        for line in ("", "OK", "all 3 tests passed", "200 requests in 12.3s", "Ran 3 tests in 1.0s\n\nOK", "3 passed"):
            with self.subTest(line):
                self.assertIsNone(counts_of(line))

    def test_retries_of_methods(self):
        retry = "retry() failed once (0th try, maximum 1 retries). Will delay 2.00s and retry. Error: 0.94\n"
        for maximum, retried in ((1, 1), (2, 0), (0, 0)):
            self.assertEqual(counts_of(retry, TESTS, test_max_retry=maximum).retried, retried)
            self.assertEqual(counts_of(f"{retry}1 passed in 0.1s", test_max_retry=maximum).retried, retried)

    def test_what_may_be_tried_again(self):
        for output, expected in (
            ("AssertionError: 0.94 not greater than 0.95", True),
            ("the score was low", True),
            ("Watchdog timeout", True),
            ("AssertionError: 1 != 2\nTypeError: no", False),
            ("score 3\nsglang.errors.RuntimeError: x", False),
            ("score 3\ntorch.OutOfMemoryError: CUDA out of memory", False),
            ("bootstrap_room of the score", True),
            ("RuntimeError: x\nServer failed to start within the timeout", True),
            ("something else", False),
        ):
            with self.subTest(output):
                self.assertEqual(read_output(output.splitlines()).is_retriable, expected)


class TestStates(unittest.TestCase):
    @staticmethod
    def verdict(exit_code=0, counts=None, forced=None, is_whole=True):
        return Attempt("log", 1.0, exit_code, Output(counts, is_whole), forced).verdict

    def test_the_state_follows_from_exit_code_and_counts(self):
        for exit_code, counts, expected in (
            (0, TestCounts(executed=1), FileState.PASSED),
            (0, TestCounts(executed=1, skipped=4), FileState.PASSED),
            (0, TestCounts(executed=1, retried=1), FileState.PASSED_ON_RETRY),
            (0, TestCounts(skipped=1), FileState.ALL_SKIPPED),
            (0, TestCounts(), FileState.NOTHING_RAN),
            (0, None, FileState.NOTHING_RAN),
            (0, TestCounts(executed=1, failed=1), FileState.FAILED),
            (1, TestCounts(executed=1), FileState.FAILED),
            (1, None, FileState.FAILED),
            (1, TestCounts(), FileState.FAILED),
            (5, TestCounts(), FileState.NOTHING_RAN),
            (5, TestCounts(skipped=1), FileState.ALL_SKIPPED),
            (5, TestCounts(executed=1), FileState.FAILED),
            (5, None, FileState.FAILED),
            (-9, TestCounts(executed=1), FileState.FAILED),
        ):
            with self.subTest(exit_code=exit_code, counts=counts):
                self.assertIs(self.verdict(exit_code, counts)[0], expected)

    def test_reasons(self):
        self.assertEqual(self.verdict(3)[1], "exit code 3")
        self.assertEqual(self.verdict(-9)[1], "killed by SIGKILL")
        self.assertIn("no event of unittest, and no closing line of pytest", self.verdict(0)[1])

    def test_a_program_that_ended_before_its_tests_did(self):
        for counts in (TestCounts(executed=1), TestCounts(skipped=1), TestCounts()):
            self.assertIs(self.verdict(0, counts, is_whole=False)[0], FileState.FAILED)

    def test_a_forced_end_overrules_the_output(self):
        self.assertIs(self.verdict(None, TestCounts(executed=1), FileState.TIMED_OUT)[0], FileState.TIMED_OUT)

    def test_every_state_has_one_kind(self):
        for state in FileState:
            kinds = [state.is_pass, state.is_failure, state.proves_nothing, not state.was_started]
            self.assertEqual(sum(kinds), 1, state)

    def test_the_worst_state_gives_the_exit_code(self):
        s = FileState
        for states, expected in (
            ([s.PASSED, s.PASSED_ON_RETRY, s.DISABLED], ExitCode.PASSED),
            ([s.PASSED, s.ALL_SKIPPED], ExitCode.NOTHING_RAN),
            ([s.PASSED, s.NOTHING_RAN], ExitCode.NOTHING_RAN),
            ([s.DISABLED], ExitCode.NOTHING_RAN),
            ([], ExitCode.NOTHING_RAN),
            ([s.PASSED, s.FAILED, s.NOTHING_RAN, s.NOT_RUN], ExitCode.FAILED),
            ([s.TIMED_OUT], ExitCode.FAILED),
            ([s.FAILED, s.INTERRUPTED], ExitCode.INTERRUPTED),
        ):
            with self.subTest(states=states):
                self.assertIs(exit_code_of(states), expected)

    def test_tally_counts_every_file_once(self):
        self.assertEqual(tally(FileState), "2 passed, 3 failed, 4 skipped")


class TestOptions(unittest.TestCase):
    RUN = ["--hw", "cpu", "--suite", "s"]

    def parse(self, *words):
        return parse_options([*self.RUN, *words], Path("/"))

    def test_defaults(self):
        options = self.parse()
        self.assertEqual((options.failfast, options.attempts, options.test_max_retry), (True, 1, 0))
        self.assertFalse(options.continue_on_error or options.nightly)

    def test_the_flags_of_sglang(self):
        words = "--nightly --timeout-per-file 90 --continue-on-error --auto-partition-id 1 --auto-partition-size 4 "
        words += "--enable-retry --max-attempts 3 --retry-wait-seconds 5 --retry-timeout-increase 7 "
        options = self.parse(*words.split(), "--partition-model-file", "f.json")
        self.assertTrue(options.nightly and options.continue_on_error)
        self.assertEqual((options.partition_id, options.partition_size), (1, 4))
        self.assertEqual((options.attempts, options.retry_wait_seconds), (3, 5))
        self.assertEqual(options.timeout(1e6), 97)
        self.assertEqual(options.partition_model_file, Path("f.json"))

    def test_default_timeout_is_the_one_of_the_installed_release(self):
        """Against SGLang's own function, which is taken from its source: its module imports all of SGLang."""
        nodes = [
            node
            for node in read(ci_register.locate().with_name("ci_utils.py")).tree.body
            if (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).startswith("DERIVED_TIMEOUT_"))
            or (isinstance(node, ast.FunctionDef) and node.name == "derive_timeout_per_file")
        ]
        namespace = {}
        exec(compile(ast.Module(nodes, type_ignores=[]), "ci_utils", "exec"), namespace)
        derived = namespace["derive_timeout_per_file"]
        for est_time in (1, 250, 2000, 3600, 5000):
            self.assertEqual(self.parse().timeout(est_time), derived(est_time))
        self.assertEqual(self.parse("--enable-retry").timeout(250), derived(250) + 600)

    def test_default_timeout_of_a_release_that_derives_none(self):
        with mock.patch("pdkit.runner.options._timeout_rule", return_value=(0, 0)):
            self.assertEqual(self.parse().timeout(250), 1200)
            self.assertEqual(self.parse().timeout(2000), 3000)
            self.assertEqual(self.parse("--enable-retry").timeout(250), 1800)

    def test_bad_usage(self):
        """More of it, by the command itself, in test_robustness."""
        for words, expected in (
            ("--auto-partition-size 2", "needs --auto-partition-id"),
            ("--auto-partition-size 0 --auto-partition-id 0", "--auto-partition-size: invalid number of at least 1"),
            ("--timeout 3", "unknown option --timeout; nearest known: --timeout-per-file"),
            ("test_a.py --last-failed", "both name files"),
            ("--repeat 0", "--repeat: invalid number of at least 1"),
            ("--jobs 0", "--jobs: invalid number of at least 1"),
        ):
            with self.subTest(words), self.assertRaises(UsageError) as raised:
                self.parse(*words.split())
            self.assertIn(expected, str(raised.exception))
            self.assertNotIn("\n", str(raised.exception))

    def test_a_run_needs_hardware_and_suite(self):
        with self.assertRaisesRegex(UsageError, "^--hw and --suite missing"):
            parse_options([], Path("/"))
        self.assertTrue(parse_options(["--list"], Path("/")).list_only)


class ProcessCase(FolderCase):
    def run_python(self, source, timeout=30.0, interruption=None):
        log = self.root / "log"
        command = (sys.executable, "-c", source)
        console, interruption = Console(io.BytesIO()), interruption or Interruption()
        attempt = run_attempt(command, dict(os.environ), log, timeout, console, interruption)
        return attempt, log.read_text()

    def assert_gone(self, pid):
        self.assertFalse(is_alive(pid), f"{pid} is alive")


class TestRunAttempt(ProcessCase):
    def test_own_session_and_no_input(self):
        source = "import os, sys; print(os.getsid(0) == os.getpid(), os.fstat(0).st_rdev)"
        real = os.dup(0)
        self.addCleanup(os.close, real)
        reader, writer = os.pipe()
        try:
            os.dup2(reader, 0)
            _, log = self.run_python(source)
        finally:
            os.dup2(real, 0)
            os.close(reader)
            os.close(writer)
        self.assertEqual(log, f"True {os.stat(os.devnull).st_rdev}\n")

    def test_what_a_file_leaves_behind_is_ended_and_named(self):
        for what, options in {
            "in the session": {"session": False},
            "in the session, without environment": {"session": False, "env": "{}"},
            "in a session of its own": {"session": True},
            "in a session of its own, without environment, orphaned": None,
        }.items():
            with self.subTest(what):
                attempt, log = self.run_python(spawner(SLEEP, **options) if options else orphaner(SLEEP))
                self.assert_gone(int(log))
                self.assertEqual(attempt.exit_code, 0)
                self.assertEqual(len(attempt.leftovers), 1)
                self.assertIn(f"pid {int(log)} (", attempt.leftovers[0])

    def test_a_file_whose_guardian_is_killed(self):
        attempt, log = self.run_python(spawner(SLEEP, True, "import os; os.kill(os.getppid(), 9); time.sleep(300)"))
        self.assertIs(attempt.verdict[0], FileState.FAILED)
        self.assertEqual(attempt.exit_code, -signal.SIGKILL)
        self.assert_gone(int(log))

    def test_what_is_still_held_is_told(self):
        observe = mock.Mock(side_effect=[(IDLE,), (holding(replace(OURS, pid=NO_PID)),)])
        before = partial(gpu_memory.unaccounted, observe)
        wait = partial(gpu_memory.wait_for_release, seconds=0.0, observe=observe)
        with mock.patch.multiple(gpu_memory, unaccounted=before, wait_for_release=wait):
            attempt, _ = self.run_python("pass")
        holds = f"GPU 0: 100000 MiB more in use than before, by pid {NO_PID} (python3, 100000 MiB)"
        self.assertEqual(attempt.unreleased, (holds,))

    def test_an_open_pipe_of_a_leftover_does_not_hang(self):
        tic = time.monotonic()
        self.run_python(spawner(SLEEP, True, out="None"))
        self.assertLess(time.monotonic() - tic, 10)

    def test_sleep_returns_when_interrupted(self):
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGTERM)
            tic = time.monotonic()
            interruption.sleep(60)
        self.assertLess(time.monotonic() - tic, 10)


class TestChildEnvironment(ProcessCase):
    def test_python3_of_the_children(self):
        with mock.patch.dict(os.environ):
            os.environ.pop("PYTHONPATH", None)
            found = python3_directory(sys.executable, self.root)
            environment = child_environment(Options(self.root, "cpu", "s"), found)
        source = "import pdkit.runner.suite, sys; print(sys.prefix)"
        out = subprocess.run(["python3", "-c", source], env=environment, capture_output=True, text=True, check=True)
        self.assertEqual(out.stdout.strip(), sys.prefix)

    def test_a_wrapper_where_python3_beside_it_is_another(self):
        interpreter = self.write("bin/python3.11", '#!/bin/sh\necho "right $@"\n')
        interpreter.chmod(0o755)
        self.write("bin/python3", "#!/bin/sh\necho wrong\n")
        found = python3_directory(str(interpreter), self.root)
        out = subprocess.run([f"{found}/python3", "-c", "x y"], capture_output=True, text=True, check=True)
        self.assertEqual(out.stdout, "right -c x y\n")

    def test_the_target_is_the_runner_s_to_name(self):
        with mock.patch.dict(os.environ, {TARGET_VARIABLE: "of an outer run"}):
            for target in (None, "embedded"):
                environment = child_environment(Options(self.root, "cpu", "s", target=target), "/bin")
                self.assertEqual(environment[TARGET_VARIABLE], target or "")


IDLE = Gpu("NVIDIA H200", memory_mib=143_000, free_mib=143_000, capability=(9, 0))
STRANGER = GpuProcess(7, "/usr/bin/train", 20_000)
OURS = GpuProcess(8, "/usr/bin/python3", 100_000)
CONTAINED = GpuProcess(9, "a process outside this container", 30_000)


def holding(*processes):
    return replace(IDLE, free_mib=IDLE.free_mib - sum(p.memory_mib for p in processes), processes=processes)


class TestWaitForRelease(unittest.TestCase):
    def setUp(self):
        self.living = {STRANGER.pid, OURS.pid}
        self.enterContext(mock.patch.object(process_tree, "is_pid_alive", self.living.__contains__))
        self.sleep = self.enterContext(mock.patch.object(gpu_memory.time, "sleep"))

    def wait(self, before, *observed, seconds=60.0):
        """What is told after our process has ended."""
        before = gpu_memory.unaccounted(lambda: before)
        self.living.discard(OURS.pid)
        return gpu_memory.wait_for_release(before, seconds, mock.Mock(side_effect=observed))

    def test_no_gpu(self):
        self.assertEqual(self.wait(()), [])

    def test_until_it_is_free(self):
        self.assertEqual(self.wait((IDLE,), (holding(OURS),), (holding(OURS),), (IDLE,)), [])
        self.assertEqual(self.sleep.call_count, 2)

    def test_what_is_about_to_be_ended_is_waited_for(self):
        self.assertEqual(self.wait((holding(STRANGER, OURS),), (holding(STRANGER, OURS),), (holding(STRANGER),)), [])
        self.assertEqual(self.sleep.call_count, 1)

    def test_what_others_hold_is_not_waited_for(self):
        for before in (IDLE, holding(STRANGER), holding(replace(STRANGER, memory_mib=1000))):
            self.assertEqual(self.wait((IDLE, before), (IDLE, holding(STRANGER))), [])
        self.assertEqual(self.wait((holding(CONTAINED),), (holding(CONTAINED),)), [])

    def test_a_stranger_that_ends_hides_nothing(self):
        (line,) = self.wait((holding(STRANGER),), (holding(OURS),), seconds=0)
        self.assertIn("100000 MiB more in use than before, by pid 8", line)

    def test_some_context_more_is_no_matter(self):
        self.assertEqual(self.wait((IDLE,), (replace(IDLE, free_mib=IDLE.free_mib - gpu_memory.SLACK_MIB),)), [])
        more = replace(IDLE, free_mib=IDLE.free_mib - gpu_memory.SLACK_MIB - 1)
        (line,) = self.wait((IDLE,), (more,), seconds=0)
        self.assertEqual(line, "GPU 0: 513 MiB more in use than before, by no process that the driver names")

    def test_who_holds_it_is_named(self):
        (line,) = self.wait((IDLE, holding(STRANGER)), (IDLE, holding(STRANGER, OURS)), seconds=0)
        self.assertEqual(line, "GPU 1: 100000 MiB more in use than before, by pid 8 (python3, 100000 MiB)")


if __name__ == "__main__":
    unittest.main()
