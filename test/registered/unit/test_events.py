"""The channel of events: what is written and printed, what several processes and a torn line make of it."""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

from pdkit.core import events
from pdkit.core.ci_register import register_cpu_ci
from pdkit.core.events import FILE, TARGET_VARIABLE, VARIABLE, Tail
from pdkit.core.recording import RECORDER_VARIABLE
from pdkit.runner.outcome import TestCounts, read_output
from pdkit.runner.report import facts

register_cpu_ci(est_time=3, suite="stage-a-test-cpu")

PYTHON = str(Path(events.__file__).parents[2])


class Channel(unittest.TestCase):
    """A directory that is the channel of this process."""

    def setUp(self):
        self.directory = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.enterContext(mock.patch.dict(os.environ, {VARIABLE: str(self.directory), TARGET_VARIABLE: ""}))
        self.stdout, self.stderr = io.StringIO(), io.StringIO()

    def happened(self):
        return events.read(self.directory)

    @contextlib.contextmanager
    def printing(self):
        """Keeps back what is printed within."""
        with contextlib.redirect_stdout(self.stdout), contextlib.redirect_stderr(self.stderr):
            yield


class TestWriting(Channel):
    def test_one_line_per_event(self):
        events.emit("acceptance", lengths=[1.9, 1.8])
        events.table("recovery", ["event", "eval"], [("SIGKILL prefill", 3)], note="two rounds")
        acceptance, table = map(json.loads, (self.directory / FILE).read_text().splitlines())
        self.assertEqual((acceptance["kind"], acceptance["lengths"]), ("acceptance", [1.9, 1.8]))
        self.assertEqual((table["title"], table["rows"]), ("recovery", [["SIGKILL prefill", 3]]))
        self.assertEqual(table["note"], "two rounds")
        self.assertLessEqual(acceptance["ts"], table["ts"])

    def test_without_a_directory_nothing_is_written(self):
        with mock.patch.dict(os.environ, {VARIABLE: ""}):
            events.emit("x")
        self.assertFalse((self.directory / FILE).exists())

    def test_a_channel_that_is_gone_is_reported_and_stops_nothing(self):
        with mock.patch.dict(os.environ, {VARIABLE: "/nonexistent"}), self.printing(), events.phase("gate"):
            pass
        lost = "[events] phase is lost, /nonexistent: No such file or directory\n"
        self.assertEqual(self.stderr.getvalue(), lost * 2)
        with self.assertRaises(OSError):
            events.append(Path("/nonexistent"), "x")

    def test_a_line_that_does_not_fit_on_the_disk_is_reported(self):
        """A limit on the size of files stands in for a disk that is full: the first part of the line is written."""
        events.emit("x")
        size = (self.directory / FILE).stat().st_size
        source = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        source += f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size + 20},) * 2)\n"
        source += "from pdkit.core import events; events.emit('verdict', check='c', passed=True, message='')"
        environment = os.environ | {"PYTHONPATH": PYTHON}
        done = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True)
        self.assertEqual(done.stderr, f"[events] verdict is lost, {self.directory}: File too large\n")
        self.assertEqual((len(self.happened()), self.happened().broken), (1, 1))

    def test_a_row_that_does_not_fit_its_table(self):
        with self.assertRaisesRegex(AssertionError, r"table recovery: row \['SIGKILL'\] has 1 cells, expected 2"):
            events.table("recovery", ["event", "eval"], [["SIGKILL"]])

    def test_people_read_the_same(self):
        with self.printing():
            events.launch("load balancer", ["python3", "-m", "lb", "a b"], "/log", 7)
            with events.phase("gsm8k"):
                events.progress(120, 200, 0.983)
            with contextlib.suppress(OSError), events.phase("gate"):
                raise OSError
            events.score("gsm8k", 1.0, 200, gate=0.95, target="embedded", engine="pdkit.engine")
            events.score("mmlu", 0.5, 64)
            events.death("decode", "decode exited with code 7", "CUDA error\n", "/log")
        self.assertEqual(self.stderr.getvalue(), "[supervisor] decode exited with code 7\n")
        self.assertEqual(
            self.stdout.getvalue(),
            textwrap.dedent("""\
                [load balancer] python3 -m lb 'a b'
                [load balancer] log: /log
                [phase] gsm8k begins

                [progress] 120/200, score so far 0.983
                [phase] gsm8k: 0.0 s
                [phase] gate begins
                [phase] gate failed: 0.0 s
                target=embedded engine=pdkit.engine gsm8k=1.000 examples=200 gate=>0.95
                mmlu=0.500 examples=64
            """),
        )
        kinds = [event["kind"] for event in self.happened()]
        self.assertEqual(kinds, ["launch", *["phase", "progress", "phase"], *["phase"] * 2, *["score"] * 2, "death"])
        states = [event["state"] for event in self.happened().of("phase")]
        self.assertEqual(states[1:], ["passed", "begins", "failed"])

    def test_the_runner_names_the_target_of_a_test_that_does_not(self):
        with mock.patch.dict(os.environ, {TARGET_VARIABLE: "8xH200"}), self.printing():
            events.score("gsm8k", 1.0, 200)
            events.score("gsm8k", 1.0, 200, target="embedded")
        self.assertEqual([event["target"] for event in self.happened()], ["8xH200", "embedded"])


class TestReading(Channel):
    def test_text_that_is_not_unicode_can_be_written_again(self):
        events.emit("x", text="prefill \udcff \u2028 \x00 ✓")
        (event,) = self.happened()
        self.assertEqual(event["text"], "prefill ? \u2028 \x00 ✓")

    def test_threads_do_not_cut_each_other(self):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda i: events.emit("x", text="y" * 5000, i=i), range(64)))
        self.assertEqual({event["i"] for event in self.happened()}, set(range(64)))

    def test_two_processes_that_write_at_once(self):
        source = "import sys; from pdkit.core import events\n"
        source += "for i in range(500): events.emit('x', text=sys.argv[1] * 3000, i=i)"
        command = [sys.executable, "-c", source]
        environment = os.environ | {"PYTHONPATH": PYTHON}
        with ThreadPoolExecutor(2) as pool:
            done = pool.map(lambda name: subprocess.run([*command, name], env=environment, timeout=60).returncode, "ab")
            self.assertEqual(list(done), [0, 0])
        happened = self.happened()
        self.assertEqual((len(happened), happened.broken), (1000, 0))
        for name in "ab":
            self.assertEqual([event["i"] for event in happened if event["text"][0] == name], list(range(500)))

    def test_a_torn_last_line_costs_itself_only(self):
        events.verdict("accuracy gate", True)
        whole = (self.directory / FILE).read_bytes()
        for cut in (1, len(whole) // 2, len(whole) - 1):
            with self.subTest(cut):
                (self.directory / FILE).write_bytes(whole + whole[:cut])
                happened = self.happened()
                self.assertEqual((len(happened), happened.broken), (1 + (cut == len(whole) - 1), cut != len(whole) - 1))
                events.verdict("division of labour", False)
                self.assertEqual(self.happened()[-1]["check"], "division of labour")

    def test_lines_that_are_not_events_are_counted(self):
        phase = {"kind": "phase", "ts": 1.0, "name": "x", "state": "begins"}
        score = {"kind": "score", "ts": 1.0, "eval": "gsm8k", "score": 0.9, "examples": 200}
        for line in (
            *("not json", "[]", "3", '{"ts": 1}', '{"kind": "x"}', '{"kind": "x", "ts": "soon"}', "\udcff\udcfe"),
            *(json.dumps(phase | change) for change in ({"ts": float("nan")}, {"name": 3}, {"state": "passed"})),
            *(json.dumps(score | wrong) for wrong in ({"score": "high"}, {"score": float("nan")}, {"examples": True})),
            *(json.dumps({"kind": "table", "ts": 1, "title": "", "columns": [], "rows": r}) for r in (3, [3])),
        ):
            with self.subTest(line):
                (self.directory / FILE).write_text(f"{line}\n", errors="surrogateescape")
                self.assertEqual((list(self.happened()), self.happened().broken), ([], 1))
        (self.directory / FILE).write_text(json.dumps(score) + '\n\n{"kind": "of the future", "ts": 1}\n')
        self.assertEqual((len(self.happened()), self.happened().broken), (2, 0))

    def test_no_file_is_no_event(self):
        self.assertEqual(list(self.happened()), [])
        self.assertEqual(Tail(self.directory).new(), [])

    def test_a_tail_gives_each_event_once_and_whole_lines_only(self):
        tail = Tail(self.directory)
        events.emit("a")
        self.assertEqual([event["kind"] for event in tail.new()], ["a"])
        events.emit("b")
        data = (self.directory / FILE).read_bytes()
        (self.directory / FILE).write_bytes(data[:-5])
        self.assertEqual(tail.new(), [])
        (self.directory / FILE).write_bytes(data)
        events.emit("c")
        self.assertEqual([event["kind"] for event in tail.new()], ["b", "c"])


class TestFacts(Channel):
    def test_phases(self):
        begins = {"state": "begins"}
        for phases, expected, unfinished in (
            ([], [], None),
            ([("a", begins)], [("a", "unfinished")], "a"),
            ([("a", begins), ("a", {"state": "passed"})], [("a", "passed")], None),
            ([("a", begins), ("a", {"state": "failed"})], [("a", "failed")], None),
            ([("a", begins), ("b", begins), ("b", {"state": "passed"})], [("a", "unfinished"), ("b", "passed")], "a"),
            ([("a", begins), ("b", begins), ("a", {"state": "passed"})], [("a", "passed"), ("b", "unfinished")], "b"),
            ([("a", {"state": "passed"}), ("a", begins)], [("a", "passed"), ("a", "unfinished")], "a"),
            ([("a", begins), ("b", {"state": "passed"})], [("a", "unfinished"), ("b", "passed")], "a"),
        ):
            with self.subTest(phases):
                (self.directory / FILE).unlink(missing_ok=True)
                for name, fields in phases:
                    events.emit("phase", name=name, seconds=0.0, **fields)
                happened = self.happened()
                self.assertCountEqual([(p.name, p.state) for p in facts.phases_of(happened)], expected)
                self.assertEqual(facts.open_phase(happened), unfinished)

    def test_times_of_phases_count_from_the_first_event(self):
        for ts, fields in (
            (100.0, {"kind": "started"}),
            (103.0, {"kind": "phase", "name": "a", "state": "begins"}),
            (105.5, {"kind": "phase", "name": "a", "state": "passed", "seconds": 2.5}),
            (106.0, {"kind": "phase", "name": "b", "state": "begins"}),
        ):
            with open(self.directory / FILE, "a") as file:
                file.write(json.dumps({"ts": ts} | fields) + "\n")
        phases = facts.phases_of(self.happened(), 10.0)
        self.assertEqual([(p.name, p.start, p.seconds) for p in phases], [("a", 3.0, 2.5), ("b", 6.0, 4.0)])

    def test_the_score_that_a_gate_was_asked_about(self):
        with self.printing():
            self.assertIsNone(facts.score_of(self.happened()))
            events.score("gsm8k", 0.7, 100)
            self.assertEqual(facts.score_of(self.happened()).correct, 70)
            events.score("gsm8k", 0.985, 200, gate=0.95, target="embedded", throughput=312.5, acceptance_length=1.5)
            events.score("gsm8k", 0.8, 100)
            for score in (1.5, -0.1, float("nan")):
                events.score("gsm8k", score, 200, gate=0.95)
            events.score("gsm8k", 1.0, 0, gate=0.95)
        score = facts.score_of(self.happened())
        self.assertEqual((score.target, score.gate), ("embedded", "gate >0.95"))
        self.assertEqual((score.correct, score.examples), (197, 200))
        self.assertEqual(facts.score_of(self.happened()).throughput, 312.5)
        self.assertEqual(facts.acceptance_length_of(self.happened()), 1.5)
        events.measurement(facts.ACCEPTANCE_LENGTH, 1.9)
        self.assertEqual(facts.acceptance_length_of(self.happened()), 1.9)


PROGRAM = """
import io, unittest

class Methods(unittest.TestCase):
    def test_passes(self): pass
    def test_fails(self): self.assertEqual(1, 2)
    def test_breaks(self): raise TypeError("no\\nsuch thing")
    def test_retried(self):
        try:
            self.fail("0.94 not greater than 0.95")
        except AssertionError:
            raise Exception("retry() exceed maximum number of retries.")
    @unittest.expectedFailure
    def test_expected(self): self.fail()
    @unittest.expectedFailure
    def test_unexpected(self): pass

class Skips(unittest.TestCase):
    def test_skips(self): self.skipTest(OSError("no GPU"))

class SubTests(unittest.TestCase):
    def test_sub(self):
        for i in range(4):
            with self.subTest(i=i):
                self.assertIn(i, (0, 3))

class Within(unittest.TestCase):
    def test_runs_another(self):
        class Inner(unittest.TestCase):
            def test_it(self): self.fail()
        unittest.TextTestRunner(io.StringIO()).run(Inner("test_it"))

@unittest.skip("the whole class")
class SkippedClass(unittest.TestCase):
    def test_1(self): pass
    def test_2(self): pass

class SkippedSetUp(unittest.TestCase):
    @classmethod
    def setUpClass(cls): raise unittest.SkipTest("needs 8 GPUs")
    def test_it(self): pass

class BrokenSetUp(unittest.TestCase):
    @classmethod
    def setUpClass(cls): raise OSError("no port")
    def test_it(self): pass

class BrokenTearDown(unittest.TestCase):
    @classmethod
    def tearDownClass(cls): raise AssertionError("decode died")
    def test_it(self): pass

class TwiceBad(unittest.TestCase):
    def tearDown(self): raise OSError("in tearDown")
    def test_it(self): self.fail("in the test")

class Exits(unittest.TestCase):
    def test_exits(self): raise SystemExit(0)

class Interrupted(unittest.TestCase):
    def test_is_interrupted(self): raise KeyboardInterrupt
"""


RETRIED = """
import unittest

class Number(float):
    def __repr__(self):
        return f"np.float64({float(self)!r})"

def retry(call):
    try:
        return call()
    except Exception:
        raise Exception("retry() exceed maximum number of retries.")

class TestA(unittest.TestCase):
    def _callTestMethod(self, method):
        retry(lambda: super(TestA, self)._callTestMethod(method))

    def test_a(self):
        pass

    def test_b(self):
        self.assertGreater(Number(0.935), 0.95)

    def test_c(self):
        pass

    def test_d(self):
        '''It comes first.'''

    test_d.goes_first = True

if __name__ == "__main__":
    unittest.main()
"""


class TestRecording(Channel):
    def run_program(self, source, *words, argv=(), environment=None):
        """(exit code, what it printed) of a program, run so that it is recorded."""
        path = self.directory / "test_program.py"
        path.write_text(source)
        command = [sys.executable, *(words or ("-m", "pdkit.core.recording")), str(path), *argv]
        environ = {name: value for name, value in os.environ.items() if name != RECORDER_VARIABLE}
        environ |= {"PYTHONPATH": PYTHON, **(environment or {})}
        done = subprocess.run(command, env=environ, capture_output=True, text=True, cwd="/", timeout=60)
        return done.returncode, done.stdout + done.stderr

    def record(self, *classes, main="unittest.main()"):
        """The events of some classes of PROGRAM, and their counts."""
        (self.directory / FILE).unlink(missing_ok=True)
        self.code, self.output = self.run_program(f"{PROGRAM}\nif __name__ == '__main__':\n    {main}\n", argv=classes)
        return self.happened(), read_output(self.output.splitlines(), self.happened()).counts

    def test_a_retry_leaves_no_trace(self):
        """Neither its frames nor its words, nor numpy's: what is shown is what the test asserted."""
        _, output = self.run_program(RETRIED)
        (test,) = [test for test in self.happened().of("test") if test["state"] == "failed"]
        for text in (test["message"], test["details"], output.partition("======")[2]):
            self.assertIn("0.935 not greater than 0.95", text)
            for word in ("retry", "np.float64", "maximum number of retries", "_callTestMethod"):
                self.assertNotIn(word, text)
        self.assertIn("in test_b", test["details"])

    def test_order_and_what_was_left(self):
        self.run_program(RETRIED, argv=["-f"])
        happened = self.happened()
        names = [test["id"].rpartition(".")[2] for test in happened.of("test")]
        self.assertEqual(names, ["test_d", "test_a", "test_b"])
        self.assertEqual([run["left"] for run in happened.of("run")], [["__main__.TestA.test_c"]])
        self.assertEqual(happened.of("test")[0]["what"], "It comes first.")

    def states(self, happened):
        return {test["id"].replace("__main__.", ""): test["state"] for test in happened.of("test")}

    def test_methods(self):
        happened, counts = self.record("Methods", "Skips")
        states = {name.partition("test_")[2]: state for name, state in self.states(happened).items()}
        expected = {"passes": "passed", "fails": "failed", "breaks": "error", "retried": "failed", "skips": "skipped"}
        self.assertEqual(states, expected | {"expected": "expected failure", "unexpected": "unexpected success"})
        self.assertEqual(counts, TestCounts(executed=6, skipped=1, failed=4))
        messages = {test["id"].rpartition("_")[2]: test["message"] for test in happened.of("test")}
        self.assertEqual((messages["fails"], messages["breaks"]), ("1 != 2", "TypeError: no\nsuch thing"))
        self.assertEqual((messages["retried"], messages["skips"]), ("0.94 not greater than 0.95", "no GPU"))
        details = next(test["details"] for test in happened.of("test") if test["state"] == "error")
        self.assertTrue(details.startswith("Traceback (most recent call last):\n"), details)
        (run,) = happened.of("run")
        self.assertEqual((run["tests"], run["successful"], self.code), (7, False, 1))

    def test_what_is_counted_of_a_file(self):
        """Sub-tests belong to their method, a run within a run is not recorded, a set-up that fails ran no test."""
        two, passes = {"SkippedClass.test_1": "skipped", "SkippedClass.test_2": "skipped"}, "Methods.test_passes"
        torn = {"BrokenTearDown.test_it": "passed", "tearDownClass (BrokenTearDown)": "failed"}
        failed, error = {"SubTests.test_sub (i=1)": "failed", "SubTests.test_sub (i=2)": "failed"}, "OSError: no port"
        for classes, states, messages, counts in (
            (("Skips", passes), {"Skips.test_skips": "skipped", passes: "passed"}, [], TestCounts(1, skipped=1)),
            (("SubTests",), failed, ["1 not found in (0, 3)", "2 not found in (0, 3)"], TestCounts(1, failed=2)),
            (("Within",), {"Within.test_runs_another": "passed"}, [], TestCounts(1)),
            (("SkippedClass",), two, [], TestCounts(skipped=2)),
            (("SkippedClass", passes), {**two, passes: "passed"}, [], TestCounts(1, skipped=2)),
            (("SkippedSetUp",), {"setUpClass (SkippedSetUp)": "skipped"}, [], TestCounts(skipped=1)),
            (("BrokenSetUp",), {"setUpClass (BrokenSetUp)": "error"}, [error], TestCounts(failed=1)),
            (("BrokenTearDown",), torn, ["decode died"], TestCounts(1, failed=1)),
            (
                ("TwiceBad",),
                {"TwiceBad.test_it": "error"},
                ["in the test", "OSError: in tearDown"],
                TestCounts(1, failed=2),
            ),
        ):
            with self.subTest(classes):
                happened, found = self.record(*classes)
                self.assertEqual((self.states(happened), found), (states, counts))
                bad = [test["message"] for test in happened.of("test") if test["state"] in ("failed", "error")]
                self.assertEqual(bad, messages)
                (run,) = happened.of("run")
                self.assertEqual((run["successful"], self.code), (not messages, bool(messages)))

    def test_a_module_that_is_skipped_or_fails_as_a_whole(self):
        for raised, state, expected in (
            ("unittest.SkipTest('no GPU')", "skipped", TestCounts(skipped=1)),
            ("OSError('no port')", "error", TestCounts(failed=1)),
        ):
            with self.subTest(raised):
                main = f"def setUpModule(): raise {raised}\n    unittest.main()"
                happened, counts = self.record("Methods.test_passes", main=main)
                self.assertEqual((self.states(happened), counts), ({"setUpModule (__main__)": state}, expected))

    def test_a_test_that_turns_its_own_events_elsewhere_is_recorded_where_its_run_is(self):
        source = """
            import os, unittest

            class T(unittest.TestCase):
                def setUp(self):
                    os.environ["PDKIT_REPORT_DIR"] = "/nonexistent"

                def test_it(self):
                    self.fail()

            if __name__ == "__main__":
                unittest.main()
        """
        self.run_program(textwrap.dedent(source))
        self.assertEqual(self.states(self.happened()), {"T.test_it": "failed"})
        self.assertEqual([run["successful"] for run in self.happened().of("run")], [False])

    def test_no_test_at_all(self):
        happened, counts = self.record(main="unittest.main(argv=['x', '-k', 'nothing'])")
        self.assertEqual((len(happened.of("run")), counts), (1, TestCounts()))

    def test_a_program_that_swallows_how_its_tests_ended_has_failed_all_the_same(self):
        """One that leaves by itself: test_run_suite_cli."""
        for name in ("Exits", "Interrupted"):
            with self.subTest(name):
                main = "try: unittest.main()\n    except BaseException: pass"
                happened, counts = self.record("Methods.test_passes", name, main=main)
                self.assertEqual((self.code, counts.executed), (0, 1 + (name == "Exits")))
                self.assertFalse(read_output([], happened).is_whole and not counts.failed)

    def test_it_runs_as_python_would_run_it(self):
        source = "import sys; print(__name__, sys.argv[1:], sys.path[0], __file__)\nsys.exit(7)"
        path = self.directory / "test_program.py"
        for words in ((), ("-P", "-m", "pdkit.core.recording")):
            code, output = self.run_program(source, *words, argv=["-f", "x"])
            self.assertEqual((code, output), (7, f"__main__ ['-f', 'x'] {self.directory} {path}\n"))

    def test_pickles_of_the_program_are_read_in_a_spawned_process(self):
        source = """
            import multiprocessing

            def double(x):
                return 2 * x

            if __name__ == "__main__":
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    print(pool.map(double, [21]))
        """
        self.assertEqual(self.run_program(textwrap.dedent(source)), (0, "[42]\n"))

    def test_tests_in_a_process_of_a_test_are_not_those_of_its_file(self):
        source = """
            import subprocess, sys, unittest

            class T(unittest.TestCase):
                def test_it(self):
                    if len(sys.argv) == 1:
                        subprocess.run([sys.executable, "-m", "pdkit.core.recording", __file__, "T"])
                    else:
                        self.fail()

            if __name__ == "__main__":
                unittest.main()
        """
        self.assertEqual(self.run_program(textwrap.dedent(source))[0], 0)
        self.assertEqual([test["state"] for test in self.happened().of("test")], ["passed"])


if __name__ == "__main__":
    unittest.main()
