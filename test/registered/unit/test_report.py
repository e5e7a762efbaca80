"""The report of a recorded run: what is read, and what JUnit, GitHub, terminal and HTML make of it.

`report.tar.xz` was left by the target embedded on questions of which 12 have a wrong answer beside them; its events were
made later, of what it printed.
"""

import json
import os
import re
import shutil
import tarfile
import tempfile
import unittest
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from unittest import mock

from cases import pdkit, without
from junitparser import JUnitXml
from pdkit.checks.hints import ComparedRequest, Evidence
from pdkit.core import events
from pdkit.core.ci_register import register_cpu_ci
from pdkit.core.errors import UsageError
from pdkit.core.events import append
from pdkit.preflight import plan as gpu_plan
from pdkit.runner.report.compare import compared
from pdkit.runner.report.html import page
from pdkit.runner.report.issue import issue
from pdkit.runner.report.junit import junit
from pdkit.runner.report.markdown import markdown
from pdkit.runner.report.model import ComparedRound, Distribution, Phase, Score
from pdkit.runner.report.read import read_directory
from pdkit.runner.report.rejudge import judged, rejudged
from pdkit.runner.report.terminal import cause, log_tails, rows, scores
from pdkit.runner.report.write import STEP_SUMMARY_VARIABLE, write
from suite_trees import run_tree, source_of

register_cpu_ci(est_time=12, suite="stage-a-test-cpu")

RECORDED = Path(__file__).with_name("report.tar.xz")
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

SUITE_S = 'register_cpu_ci(est_time=1, suite="s")'
DEATH = source_of(
    """
    EXCERPT = ""

    def test_x(self):
        import os
        from pathlib import Path
        from pdkit.core import events

        events.emit("phase", name="launch prefill", state="begins")
        logs = Path(os.environ["SGLANG_PD_LOG_DIR"])
        (logs / "A.prefill.log").write_text("of another class, comes first by name\\n")
        (logs / "T.prefill.log").write_text("prefill loads\\n")
        batch = "Decode batch, accept len: 1.90, gen throughput (token/s): 812.5, "
        (logs / "T.decode.log").write_text(f"{batch}\\n<b>CUDA out of memory</b> \\x1b[31m\\n")
        events.launch("decode", ["python3", "-m", "engine"], logs / "T.decode.log", 7)
        events.death("decode", "decode exited with code 7 \\x07", self.EXCERPT, logs / "T.decode.log")
        events.death("load balancer", "load balancer exited with code 1")
        events.emit("phase", name="launch prefill", state="failed", seconds=0.1)
        events.emit("phase", name="teardown", state="begins")
        self.fail("decode exited with code 7 \\x1b[31m\\x07\\x1b[0m \\ufffe \\u2713")
    """,
    registration=SUITE_S,
)


def recorded(test):
    """The recorded report directory, unpacked until `test` ends: a test, or a class in its setUpClass."""
    enter = test.enterClassContext if isinstance(test, type) else test.enterContext
    directory = enter(tempfile.TemporaryDirectory())
    with tarfile.open(RECORDED) as archive:
        archive.extractall(directory, filter="data")
    return Path(directory, "report")


def run_suite(directory, source, *options):
    """The report directory and the output of a real run of one test file."""
    words = ["--hw", "cpu", "--suite", "s", "--skip-environment-check", "--report-dir", str(directory / "report")]
    environ = without("SGLANG_", "PDKIT_") | {STEP_SUMMARY_VARIABLE: str(directory / "step.md")}
    return directory / "report", run_tree(directory, {"test_x.py": source}, *words, *options, environment=environ)


class Balanced(HTMLParser):
    """Collects what is wrong with the nesting of elements."""

    VOID = {"meta", "link", "br", "hr", "img", "wbr"}

    def __init__(self, text):
        super().__init__()
        self.open, self.wrong, self.ids = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append((tag, self.getpos()))


class TestRecorded(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.directory = recorded(cls)
        cls.report = read_directory(cls.directory)
        (cls.run_,) = cls.report.files

    def test_score(self):
        score = self.run_.score
        self.assertEqual((score.target, score.engine), ("embedded", "pdkit.engine"))
        self.assertEqual((score.correct, score.examples), (188, 200))
        self.assertEqual((score.value, score.threshold, score.passed), (0.94, 0.95, False))
        low, high = score.interval
        self.assertTrue(0.89 < low < 0.94 < high < 0.97)
        self.assertEqual((self.report.title, self.report.verdict), ("main job on embedded", "failed"))

    def test_phases(self):
        names = [phase.name for phase in self.run_.phases]
        first = ["launch prefill", "launch decode", "start load balancer", "first request", "gsm8k", "gate", "teardown"]
        self.assertEqual(names, first)
        self.assertEqual(self.run_.failed_phase, "gate")
        for phase, following in pairwise(self.run_.phases):
            self.assertLess(phase.start + phase.seconds, following.start + 0.1)
        self.assertLess(self.run_.phases[-1].start, self.run_.seconds)

    def test_examples(self):
        run = self.run_
        self.assertEqual((len(run.examples), len(run.wrong)), (200, 12))
        wrong = run.wrong[0]
        self.assertTrue(wrong.question.startswith("Question: ") and wrong.question.endswith("Answer:"))
        self.assertEqual(wrong.question.count("Question: "), 1)
        self.assertEqual(int(wrong.correct_answer), int(wrong.extracted_answer) + 1)
        self.assertEqual(wrong.reason, f"answered {wrong.extracted_answer}, {wrong.correct_answer} is right")
        self.assertTrue(all(example.tokens_per_s > 0 for example in run.examples))
        self.assertGreater(run.score.throughput, 0)

    def test_commands(self):
        self.assertEqual([name for name, _ in self.run_.launched], ["prefill", "decode", "load balancer"])
        self.assertRegex(self.run_.launched[0][1], "^python3 -m pdkit.engine --model-path .* --port 31806$")
        self.assertIn("--disaggregation-mode decode", page(self.report))

    def test_what_the_test_handed_over(self):
        (table,) = self.run_.tables
        self.assertEqual((table.columns, table.rows[0][0]), (("event", "loading", "eval"), "SIGKILL prefill"))
        self.assertEqual(dict(self.run_.metrics)["gsm8k_score"], "0.94")

    def test_logs(self):
        names = [log.name for log in self.run_.logs]
        self.assertEqual(names, ["test", "decode", "load balancer", "prefill"])
        self.assertEqual({log.died for log in self.run_.logs}, {False})
        self.assertIn("must be greater than 0.95", self.run_.failure)

    def test_junit(self):
        (suite,) = JUnitXml.fromstring(junit(self.report).encode())
        (case,) = suite
        self.assertEqual((suite.tests, suite.failures, suite.name.rpartition("/")[2]), (1, 1, "test_recorded.py"))
        self.assertEqual(case.name, "TestDisaggregationDSV4Recorded.test_gsm8k")
        self.assertIn("failed in phase gate", case.result[0].message)
        self.assertIn("score 0.940 (188 of 200)", case.system_out)

    def test_markdown(self):
        text = markdown(self.report)
        self.assertIn("## main job on embedded: failed\n", text)
        self.assertIn("**score 0.940 (188 of 200), exact 95 % interval ", text)
        self.assertIn("| SIGKILL prefill | ", text)
        self.assertIn("failed in phase gate", text)
        self.assertIn("End of 001-test_recorded.1.log:\n", text)

    def test_terminal(self):
        self.assertIn("score 0.940 (188 of 200), exact 95 % interval ", scores(self.report)[0])
        (run,) = self.report.files
        self.assertEqual([*cause(run)][0], "  in phase gate")
        self.assertEqual([*log_tails(run, Path("r"))][0], "test, the end of r/001-test_recorded.1.log:")
        self.assertLess(len([*cause(run)]), 15)

    def test_html_is_well_formed_and_needs_nothing_else(self):
        text = page(self.report)
        balanced = Balanced(text)
        self.assertEqual((balanced.wrong, balanced.open), ([], []))
        self.assertEqual(len(balanced.ids), len(set(balanced.ids)))
        self.assertIn("<title>main job on embedded: failed</title>", text)
        self.assertNotRegex(text, r"<script|<iframe|<img|@import|url\(|(src|href)=\"(https?:)?//")
        self.assertNotRegex(text, r'role="img"(?! aria-label="[^"]+")')


class TestDeath(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.root = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.directory, cls.suite = run_suite(cls.root, DEATH)
        (cls.run_,) = read_directory(cls.directory).files

    def test_the_first_that_died_is_shown_first(self):
        death = "decode exited with code 7 \x07"
        self.assertEqual((self.run_.death.cause, self.run_.failed_phase), (death, "launch decode"))
        self.assertEqual(self.run_.launched, (("decode", "python3 -m engine"),))
        order = [("decode", True), ("test", False), ("prefill", False), ("prefill", False)]
        self.assertEqual([(log.name, log.died) for log in self.run_.logs], order)
        lines = self.suite.stdout.splitlines()
        at = lines.index("  in phase launch decode")
        self.assertRegex(lines[at - 1], "^failed: registered/test_x.py; ")
        self.assertEqual(lines[at + 1 : at + 3], [f"  died first: {death}", "  failed: __main__.T.test_x"])
        tail = next(number for number, line in enumerate(lines) if line.startswith("decode, the end of "))
        self.assertIn("<b>CUDA out of memory</b>", lines[tail + 2])
        self.assertLess(tail, at)

    def test_a_phase_that_did_not_end(self):
        states = [(phase.name, phase.state) for phase in self.run_.phases]
        self.assertEqual(states, [("launch prefill", "failed"), ("teardown", "unfinished")])

    def test_the_lines_that_show_why_are_shown_instead_of_the_last_ones(self):
        path = self.directory / "001-test_x.1" / events.FILE
        whole = path.read_text()
        self.addCleanup(path.write_text, whole)
        path.write_text(whole.replace('"excerpt": ""', '"excerpt": "rank 2: CUDA error\\nfar above"'))
        (run,) = read_directory(self.directory).files
        self.assertEqual((run.logs[0].name, run.logs[0].lines), ("decode", ("rank 2: CUDA error", "far above")))

    def test_speeds_that_servers_logged(self):
        self.assertEqual((self.run_.acceptance_lengths, self.run_.decode_rates), ((1.9,), (812.5,)))

    def test_all_forms_are_written(self):
        text = (self.directory / "report.html").read_text()
        self.assertIn("&lt;b&gt;CUDA out of memory&lt;/b&gt; </pre>", text)
        self.assertNotIn("<b>CUDA", text)
        ((case,),) = JUnitXml.fromstring((self.directory / "junit.xml").read_bytes())
        self.assertEqual(case.result[0].message, "failed in phase launch decode: decode exited with code 7 ?")
        shown = case.result[0].text.splitlines()[:2]
        self.assertEqual(shown, ["failed: __main__.T.test_x", "decode exited with code 7 ? ? \u2713"])
        self.assertEqual((self.root / "step.md").read_text(), (self.directory / "summary.md").read_text())
        self.assertIn(f"report: {self.directory / 'report.html'}\n", self.suite.stdout)
        self.assertEqual(self.suite.returncode, 1)

    def test_a_report_that_cannot_be_drawn_changes_no_verdict(self):
        with tempfile.TemporaryDirectory() as directory:
            root = Path(directory)
            (root / "report" / "report.html").mkdir(parents=True)
            source = DEATH.replace("self.fail(", "print(").replace("events.death(", "print(")
            _, run = run_suite(root, source)
        self.assertEqual(run.returncode, 0, run.stdout)
        self.assertIn("no report could be drawn from", run.stdout)


CHECKS = source_of(
    """
    def test_a_gate(self):
        events.score("gsm8k", 0.5, 10, gate=0.25, target="embedded")
        Equal().assert_passed()

    def test_b_documented(self):
        \"\"\"Nothing is lost.\"\"\"

    def test_c_skipped(self):
        self.skipTest("no draft here")

    def test_c_too_low(self):
        events.score("gsm8k", 0.935, 200)
        self.assertGreater(0.935, 0.95)

    def test_d_parts(self):
        for part in range(3):
            with self.subTest(part=part):
                self.assertEqual(part, 0, "is not zero")
        events.verdict("request accounting", False, "request accounting: FAIL, 1 lost\\n  more")

    def test_e_accounted(self):
        events.verdict("request accounting", True, "")
    """,
    registration=f"""
from pdkit.checks.judgement import Judgement
from pdkit.core import events

{SUITE_S}


class Equal(Judgement):
    problems = ()

    def report(self):
        return "parity: PASS, 5 of 5 | equal"


class Y(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        raise RuntimeError("no port is free")

    def test_y(self):
        pass
""",
)
ROWS = [
    ("T.test_a_gate", "PASS", "score 0.500 of 10 examples, must be greater than 0.25; parity: 5 of 5 | equal"),
    ("T.test_b_documented", "PASS", "Nothing is lost."),
    ("T.test_c_skipped", "SKIP", "no draft here"),
    ("T.test_c_too_low", "FAIL", "score 0.935 of 200 gsm8k examples, must be greater than 0.95"),
    ("T.test_d_parts", "FAIL", "1 != 0 : is not zero"),
    ("T.test_e_accounted", "PASS", ""),
    ("Y.setUpClass", "FAIL", "RuntimeError: no port is free"),
    ("request accounting", "FAIL", "in 1 of 2 tests: request accounting: FAIL, 1 lost"),
]


class TestRows(unittest.TestCase):
    """One row per test method and check, in every form of the report, and what the target leaves out."""

    @classmethod
    def setUpClass(cls):
        root = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.directory, cls.suite = run_suite(root, CHECKS, "--no-failfast")
        cls.report = read_directory(cls.directory)

    def test_rows(self):
        (run,) = self.report.files
        self.assertEqual([(row.name, row.state, row.sentence) for row in run.rows], ROWS)
        self.assertTrue(all(row.seconds is not None for row in run.rows[:6]))

    def test_what_a_stop_at_the_first_failure_left(self):
        root = Path(self.enterContext(tempfile.TemporaryDirectory()))
        directory, _ = run_suite(root, CHECKS)
        (run,) = read_directory(directory).files
        left = [(row.name, row.state) for row in run.rows if row.sentence.startswith("not run")]
        names = ("T.test_d_parts", "T.test_e_accounted", "Y.test_y")
        self.assertEqual(left, [(name, "SKIP") for name in names])

    def test_console(self):
        for name, state, sentence in ROWS:
            line = next(line for line in self.suite.stdout.splitlines() if line.split()[:2] == [state, name.split()[0]])
            self.assertTrue(line.endswith(sentence), line)
        self.assertIn("not exercised on embedded:\n  SGLang's scheduler", self.suite.stdout)

    def test_junit(self):
        (suite,) = JUnitXml.fromstring((self.directory / "junit.xml").read_bytes())
        self.assertEqual([case.name for case in suite], [name for name, _, _ in ROWS])
        states = ["FAIL" if case.is_failure else "SKIP" if case.is_skipped else "PASS" for case in suite]
        self.assertEqual(states, [state for _, state, _ in ROWS])
        self.assertTrue(any("--on sglang-cpu" in each.value for each in suite.properties()))

    def test_step_summary(self):
        text = (self.directory / "summary.md").read_text()
        scored = "score 0.500 of 10 examples, must be greater than 0.25; parity"
        self.assertIn(f"| ✅ PASS | T.test_a_gate | {scored}", text)
        self.assertIn("| ❌ FAIL | T.test_d_parts | 1 != 0 : is not zero |", text)
        self.assertIn("### Not exercised on embedded\n", text)

    def test_step_summary_of_many_files(self):
        (run,) = self.report.files
        passed = replace(run, file="other.py", state="passed", score=None, rows=(run.rows[1], run.rows[2]))
        self.assertTrue(passed.is_plain)
        text = markdown(replace(self.report, files=(run, passed)))
        other = text.partition("### other.py")[2].partition("###")[0]
        self.assertIn("| – SKIP | T.test_c_skipped |", other)
        self.assertNotIn("test_b_documented", other)
        self.assertIn("| ✅ PASS | T.test_b_documented |", text.partition("### other.py")[0])

    def test_html(self):
        text = (self.directory / "report.html").read_text()
        self.assertEqual(Balanced(text).wrong, [])
        self.assertEqual(text.count('<td class="sentence">'), len(ROWS))
        self.assertIn("<h2>Not exercised on embedded</h2>", text)

    def test_of_many_those_that_did_not_pass(self):
        (run,) = self.report.files
        lines = rows(run, is_whole=False)
        self.assertEqual([line.split()[0] for line in lines], ["SKIP", *["FAIL"] * 4, "PASS"])
        self.assertEqual(lines[-1], "  PASS  3 more")


class TestTwoRuns(unittest.TestCase):
    """`pdkit report --compare A B`, on a run and on what is left of it."""

    @classmethod
    def setUpClass(cls):
        cls.directory = recorded(cls)
        cls.run_ = read_directory(cls.directory)

    def cells(self, text, name):
        line = next(line for line in text.splitlines() if line.strip().startswith(f"{name}  "))
        return re.split(" {2,}", line.strip())[1:]

    def test_a_run_and_itself(self):
        text = compared(self.run_, self.run_)
        self.assertNotIn("data incomplete", text)
        self.assertNotIn("differs", text)
        self.assertEqual(self.cells(text, "exact 95 % interval")[2], "they overlap")
        self.assertEqual(self.cells(text, "checks that ended alike"), ["1", "1"])

    def test_what_differs(self):
        (file,) = self.run_.files
        row = replace(file.rows[0], state="PASS", sentence="score 1.000")
        worse = replace(file, rows=(replace(file.rows[0], sentence="score 0.300"),))
        text = compared(self.run_, replace(self.run_, files=(worse,)))
        self.assertEqual(self.cells(text, row.name)[1:], ["FAIL score 0.300", "differs"])
        better = replace(file, state="passed", score=replace(file.score, correct=200), rows=(row,))
        surroundings = {**self.run_.surroundings, "versions": {"sglang": "0.5.24"}}
        other = replace(self.run_, result="passed", files=(better,), surroundings=surroundings)
        text = compared(self.run_, other)
        self.assertEqual(self.cells(text, "result"), ["failed", "passed", "differs"])
        self.assertEqual(self.cells(text, "sglang"), ["0.5.23", "0.5.24", "differs"])
        self.assertEqual(self.cells(text, "exact 95 % interval")[2], "apart")
        self.assertEqual(self.cells(text, row.name)[1:], ["PASS score 1.000", "differs"])

    def test_what_is_missing_is_no_difference(self):
        bare = replace(self.run_, result=None, surroundings={}, target=None, files=())
        text = compared(self.run_, bare)
        for name in ("result", "target", "commit", "gpus", "sglang", "state", "score", "phase gsm8k"):
            self.assertEqual(self.cells(text, name)[1:], ["data incomplete"])

    def test_the_command(self):
        shown = pdkit("report", "--compare", self.directory, self.directory)
        self.assertEqual(shown.returned, 0)
        self.assertIn("they overlap", shown.out)
        self.assertEqual(pdkit("report").returned, 2)


class TestRejudge(unittest.TestCase):
    """`pdkit report DIR --rejudge`: newer checkers on what an older run recorded."""

    @classmethod
    def setUpClass(cls):
        cls.directory = recorded(cls)
        cls.run_ = read_directory(cls.directory)
        (cls.file,) = cls.run_.files

    def states(self, **changed):
        return {each.check: (each.state, each.sentence) for each in judged(replace(self.file, **changed))}

    def test_the_recorded_run(self):
        found = self.states()
        self.assertEqual(found["score"], ("FAIL", "188 of 200, must be greater than 0.95"))
        self.assertEqual(found["answers"], ("PASS", "200 of 200 read again, each scored as it was"))
        self.assertEqual(found["order of wrong answers"][0], "data incomplete")

    def test_answers_that_contradict_the_score(self):
        score = replace(self.file.score, correct=195)
        self.assertEqual(self.states(score=score)["answers"], ("FAIL", "188 answers were right, the score says 195"))
        right, *others = sorted(self.file.examples, key=lambda each: not each.is_right)
        examples = (replace(right, answer="#### 123456789"), *others)
        self.assertIn("1 are scored otherwise", self.states(examples=examples)["answers"][1])
        self.assertEqual(self.states(examples=examples[1:])["answers"][0], "data incomplete")

    def test_a_checker_that_the_run_did_not_have_finds_its_decay(self):
        for wrong, state in ((range(151, 200, 5), "FAIL"), (range(3, 200, 20), "PASS")):
            examples = tuple(
                replace(each, began=index * 1.0, seconds=0.5, score=float(index not in wrong))
                for index, each in enumerate(self.file.examples)
            )
            self.assertEqual(self.states(examples=examples)["by request number"][0], state)

    def test_compared_requests(self):
        requests = tuple(ComparedRequest(f"r{index}", 10, 1, 3) for index in range(80))
        wrong = (*requests[:79], replace(requests[79], token=1))

        def states(requests, further):
            return self.states(compared=(ComparedRound(Evidence("alone", requests, {}), further),))

        self.assertEqual(states(requests, ())["compared to the bit"], ("PASS", "0 of 80 differ"))
        state, sentence = states(wrong, ())["compared to the bit"]
        self.assertEqual((state, sentence[:24]), ("FAIL", "1 of 80 differ, first r7"))
        self.assertEqual(states(wrong, None)["compared"][0], "data incomplete")
        found = states(requests, (-1,) * 40 + (1,) * 40)
        self.assertEqual(found["compared with a control"][0], "PASS")
        self.assertEqual(found["by request number"][0], "FAIL")
        self.assertEqual(states(requests, (1,) * 80)["compared with a control"][0], "FAIL")

    def test_what_was_recorded_is_read_from_the_files(self):
        requests = (ComparedRequest("r0", 10, 1, 3), ComparedRequest("r1", 11, 1, 3, 0, 1, 1, 0.5))
        directory = recorded(self)
        (log,) = directory.glob("*.log")
        append(log.with_suffix(""), "compared", **Evidence("alone", requests, {}).as_event(), further=())
        (file,) = read_directory(directory).files
        self.assertEqual(file.compared, (ComparedRound(Evidence("alone", requests, {}), ()),))

    def test_the_command(self):
        shown = pdkit("report", self.directory, "--rejudge")
        self.assertEqual(shown.returned, 1)
        self.assertIn("judged again: 1 passed, 1 failed, 1 data incomplete", shown.out)
        self.assertEqual(pdkit("report", self.directory, "--rejudge", "--issue").returned, 2)
        self.assertEqual(rejudged(replace(self.run_, files=()))[1], 4)


class TestIssue(unittest.TestCase):
    """`pdkit report DIR --issue`."""

    def test_what_is_pasted(self):
        report = read_directory(recorded(self))
        (run,) = report.files
        failure = run.failure.replace("0.95\n", "0.95\n  hint: only at 8 or more\n", 1)
        report = replace(report, files=(replace(run, hint="only at 8 or more", failure=failure),))
        text = issue(report)
        self.assertTrue(text.startswith("**registered/test_recorded.py failed in phase gate on target embedded**"))
        words = text.split("~~~")[1].splitlines()
        self.assertEqual(words[2], "score 0.940 of 200 gsm8k examples, must be greater than 0.95")
        for part in (
            "Hint, by which requests differ: only at 8 or more",
            "| sglang | 0.5.23 |",
            "scripts/run.sh --on embedded",
        ):
            self.assertIn(part, text)
        self.assertEqual((text.count("~~~") % 2, text.count("only at 8 or more")), (0, 1))
        self.assertNotIn("Traceback", text.partition("<details>")[0])

    def test_nothing_failed(self):
        report = read_directory(recorded(self))
        passed = replace(report, result="passed", files=(replace(report.files[0], state="passed"),))
        self.assertIn("no file failed", issue(passed))


class TestBroken(unittest.TestCase):
    def setUp(self):
        self.directory = recorded(self)
        self.evidence = next(path for path in self.directory.iterdir() if path.is_dir())

    def test_no_run(self):
        for spoil in ("", "[]", "{", '{"files": 1}', '{"files": [1]}'):
            (self.directory / "results.json").write_text(spoil)
            with self.subTest(spoil), self.assertRaisesRegex(UsageError, "no results.json of a run"):
                read_directory(self.directory)

    def test_lines_that_were_cut(self):
        for name in (events.FILE, "TestDisaggregationDSV4Recorded.gsm8k.jsonl"):
            with open(self.evidence / name, "a") as file:
                file.write('{"kind": "tab')
        (self.directory / "environment.json").write_text("{")
        report = read_directory(self.directory)
        self.assertEqual((len(report.files[0].examples), len(report.files[0].tables)), (200, 1))
        self.assertEqual(len(report.notes), 3)
        self.assertIn("Not all of the report could be read", page(report))

    def test_lines_that_say_something_else(self):
        def append(name, *lines):
            with open(self.evidence / name, "a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)

        phase = {"kind": "phase", "name": "x", "ts": 1.0, "state": "begins"}
        append(events.FILE, {"kind": "phase"}, phase | {"ts": "soon"}, phase | {"state": "passed"})
        append(events.FILE, {"kind": "table", "ts": 1.0, "rows": 3}, {"kind": "of the future", "ts": 1.0})
        example = {"example": 1, "score": 1.0, "seconds": 1.0, "prompt": "p", "answer": "a"}
        append("x.jsonl", example | {"seconds": float("nan")}, example | {"seconds": "1"})
        report = read_directory(self.directory)
        self.assertEqual((len(report.files[0].examples), len(report.files[0].tables)), (200, 1))
        notes = [note.partition(": ")[2] for note in report.notes]
        self.assertEqual(notes, ["4 lines cannot be read", "2 lines cannot be read"])
        page(report)

    def test_only_results(self):
        shutil.rmtree(self.evidence)
        for path in self.directory.glob("*.log"):
            path.unlink()
        report = read_directory(self.directory)
        self.assertEqual((report.files[0].score, report.files[0].phases), (None, ()))
        self.assertEqual(Balanced(page(report)).wrong, [])

    def test_a_score_without_gate_target_and_engine(self):
        path = self.evidence / events.FILE
        lines = [line for line in path.read_text().splitlines() if json.loads(line)["kind"] != "score"]
        lines.append(json.dumps({"kind": "score", "ts": 1.0, "eval": "mmlu", "score": 0.5, "examples": 64}))
        path.write_text("\n".join(lines) + "\n")
        report = read_directory(self.directory)
        for text in (page(report), markdown(report), junit(report), *scores(report)):
            self.assertIn("no gate", text)
            self.assertNotIn("None", text.replace("None of", ""))

    def test_gpu_plan(self):
        server = gpu_plan.Server("decode", tp=4, attention_dp=4, base_gpu_id=4, ports={"http": 21200})
        others, runner = {"load balancer": {"http": 21000}}, gpu_plan.Runner("8-gpu", 8, None)
        plan = gpu_plan.GpuPlan("TestX", (server,), others, runner)
        (self.directory / "gpu_plan.json").write_text(json.dumps([gpu_plan.as_data(plan)]))
        text = page(read_directory(self.directory))
        self.assertIn("4 of 8 GPUs used, runner 8-gpu.", text)
        self.assertEqual(re.findall(r'<td class="used">(.*?) </td>', text), [f"tp{i} dp{i}" for i in range(4)])
        self.assertIn("<strong>load balancer</strong>: ports 21000 http", text)
        self.assertEqual(Balanced(text).wrong, [])

    def test_a_run_that_was_killed(self):
        results = json.loads((self.directory / "results.json").read_text())
        results |= {"result": None, "exit_code": None, "finished": False}
        (self.directory / "results.json").write_text(json.dumps(results))
        report = read_directory(self.directory)
        self.assertEqual((report.result, report.verdict), (None, "did not end"))
        self.assertIn("none: it did not end", page(report))


class TestModel(unittest.TestCase):
    def test_histogram_counts_each_value_once(self):
        for values in ((1.0,), (2.0, 2.0), tuple(map(float, range(100))), (0.1, 0.2, 0.3, 10.0)):
            histogram = Distribution(values).histogram
            self.assertEqual(sum(count for _, _, count in histogram), len(values))
            self.assertEqual((histogram[0][0], round(histogram[-1][1], 9)), (min(values), max(values)))

    def test_the_gate_is_strict(self):
        self.assertFalse(Score("r", "e", 190, 200, 0.95).passed)
        self.assertTrue(Score("r", "e", 191, 200, 0.95).passed)

    def test_a_score_that_no_gate_was_asked_about(self):
        score = Score(None, None, 10, 200, None)
        self.assertEqual((score.passed, score.gate, score.where), (True, "no gate", "target unknown"))

    def test_a_phase_that_passed_is_not_bad(self):
        bad = [Phase("x", state, 0, 1).is_bad for state in ("passed", "failed", "unfinished")]
        self.assertEqual(bad, [False, True, True])


def browser():
    """Path of a Chromium, or None."""
    return os.environ.get("PDKIT_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)


class TestInBrowser(unittest.TestCase):
    """The page as one sees it: real Chromium, wide and on a phone."""

    @classmethod
    def setUpClass(cls):
        if browser() is None:
            reason = "no Chromium to look at the report with: scripts/browser.sh installs one, PDKIT_BROWSER names one"
            if os.environ.get("SGLANG_IS_IN_CI") == "true":
                raise AssertionError(reason)
            print(reason, flush=True)
            raise unittest.SkipTest(reason)
        from playwright.sync_api import sync_playwright

        cls.directory = recorded(cls)
        with mock.patch.dict(os.environ):
            os.environ.pop(STEP_SUMMARY_VARIABLE, None)
            write(cls.directory)
        playwright = cls.enterClassContext(sync_playwright())
        # Chromium's sandbox does not start as root; the page is our own.
        cls.chromium = playwright.chromium.launch(executable_path=browser(), args=["--no-sandbox"])
        cls.addClassCleanup(cls.chromium.close)

    def visit(self, width, scheme="light"):
        page = self.chromium.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
        self.addCleanup(page.close)
        self.said, self.asked = [], []
        page.on("console", lambda message: self.said.append(message.text))
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("request", lambda request: self.asked.append(request.url))
        page.goto((self.directory / "report.html").as_uri())
        return page

    def test_key_figures_are_on_screen(self):
        for width in (1280, 390):
            page = self.visit(width)
            self.assertEqual(page.title(), "main job on embedded: failed")
            figures = (
                "0.940", "188 of 200 right", "gate 0.95", "Failed in phase: gate", "12 of 200", "launch prefill",
                "must be greater than 0.95", "output tokens/s", "Latency of a request", "Token rate of a request",
                "No acceptance length", "No test of this run uses a GPU", "SIGKILL prefill", "is right",
            )  # fmt: skip
            for figure in figures:
                with self.subTest(figure, width=width):
                    box = page.get_by_text(figure).first.bounding_box()
                    self.assertIsNotNone(box, "not rendered")
                    self.assertGreater(min(box["width"], box["height"]), 5)
                    self.assertTrue(0 <= box["x"] and box["x"] + box["width"] <= width, box)

    def test_nothing_is_complained_about_or_fetched(self):
        page = self.visit(1280)
        page.wait_for_load_state("networkidle")
        self.assertEqual(self.said, [])
        self.assertEqual([url for url in self.asked if not url.startswith(("file:", "data:"))], [])

    def test_no_horizontal_scrolling(self):
        for width in (1280, 390, 320):
            page = self.visit(width)
            for details in page.locator("details").all():
                details.evaluate("element => { element.open = true }")
            with self.subTest(width=width):
                self.assertLessEqual(page.evaluate("document.documentElement.scrollWidth"), width)

    def test_drawings(self):
        page = self.visit(1280)
        bars = [bar.bounding_box() for bar in page.locator(".timeline .bar").all()]
        self.assertEqual(len(bars), 7)
        self.assertTrue(all(bar["width"] >= 3 and bar["height"] > 5 for bar in bars), bars)
        self.assertEqual([bar["x"] for bar in bars], sorted(bar["x"] for bar in bars))
        gate, point = (page.locator(f".score .{name}").bounding_box() for name in ("gate", "point"))
        interval = page.locator(".score .interval").bounding_box()
        middle = point["x"] + point["width"] / 2
        self.assertTrue(interval["x"] < middle < gate["x"] < interval["x"] + interval["width"])
        for histogram in page.locator(".histogram").all():
            self.assertGreater(max(bar.bounding_box()["height"] for bar in histogram.locator("span").all()), 50)

    def test_without_colour_vision(self):
        """What is bad says so by words and pattern, and texts stand out from their ground in light and dark."""
        page = self.visit(1280)
        self.assertIn("failed ✗", page.locator(".timeline li", has_text="gate").inner_text())
        self.assertIn("gradient", page.locator(".bar.striped").evaluate("bar => getComputedStyle(bar).backgroundImage"))
        for scheme in ("light", "dark"):
            page = self.visit(1280, scheme)
            ground = page.locator(".card").first.evaluate("card => getComputedStyle(card).backgroundColor")
            for selector in ("h2", ".badge.bad", ".scale", ".facts dt", ".reason"):
                ink = page.locator(f".card {selector}").first.evaluate("element => getComputedStyle(element).color")
                with self.subTest(selector, scheme=scheme):
                    self.assertGreater(contrast(ink, ground), 4.5)


def contrast(one, two):
    """Contrast ratio of two `rgb(...)` colours by WCAG 2.1, 1 to 21."""
    light, dark = sorted(map(luminance, (one, two)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour):
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear))


if __name__ == "__main__":
    unittest.main()
