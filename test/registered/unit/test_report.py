"""The report of a run: what is read, and what JUnit, GitHub, terminal and HTML make of it."""

import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from junitparser import JUnitXml
from pdkit.ci_register import register_cpu_ci
from pdkit.report.model import Distribution, Phase, Score
from pdkit.report.read import read_directory
from pdkit.report.write import STEP_SUMMARY_VARIABLE

register_cpu_ci(est_time=15, suite="stage-a-test-cpu")

RUN_SUITE = Path(__file__).parents[2] / "run_suite.py"

DEATH = """
import os, unittest
from pathlib import Path
from pdkit.ci_register import register_cpu_ci

register_cpu_ci(est_time=1, suite="s")


class TestX(unittest.TestCase):
    def test_x(self):
        print("[phase] launch prefill begins", flush=True)
        logs = Path(os.environ["SGLANG_PD_LOG_DIR"])
        (logs / "TestX.prefill.log").write_text("prefill loads\\n")
        batch = "Decode batch, accept len: 1.90, gen throughput (token/s): 812.5, "
        (logs / "TestX.decode.log").write_text(f"{batch}\\n<b>CUDA out of memory</b> \\x1b[31m\\n")
        print("[supervisor] decode exited with code 7", flush=True)
        print("[phase] launch prefill failed: 0.1 s", flush=True)
        print("[phase] teardown begins", flush=True)
        self.fail("decode exited with code 7 \\x1b[0m")


if __name__ == "__main__":
    unittest.main()
"""


def run_suite(directory, source):
    """The report directory and the output of a real run of one test file."""
    (directory / "tests").mkdir()
    (directory / "tests" / "test_x.py").write_text(source)
    command = [sys.executable, str(RUN_SUITE), "--hw", "cpu", "--suite", "s", "--skip-environment-check"]
    command += ["--test-root", str(directory / "tests"), "--report-dir", str(directory / "report")]
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("SGLANG_", "PDKIT_"))}
    environ |= {STEP_SUMMARY_VARIABLE: str(directory / "step.md")}
    run = subprocess.run(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return directory / "report", run


class TestDeath(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.root = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.directory, cls.suite = run_suite(cls.root, DEATH)
        (cls.run_,) = read_directory(cls.directory).files

    def test_the_first_that_died_is_shown_first(self):
        self.assertEqual((self.run_.death, self.run_.failed_phase), ("decode exited with code 7", "launch decode"))
        self.assertEqual([(log.name, log.died) for log in self.run_.logs][:2], [("decode", True), ("prefill", False)])
        lines = self.suite.stdout.splitlines()
        at = lines.index("tests/test_x.py failed in phase launch decode")
        self.assertEqual(lines[at + 1], "  died first: decode exited with code 7")
        self.assertIn("<b>CUDA out of memory</b>", lines[at + 4])

    def test_a_phase_that_did_not_end(self):
        self.assertEqual(
            [(p.name, p.state) for p in self.run_.phases], [("launch prefill", "failed"), ("teardown", "unfinished")]
        )

    def test_speeds_that_servers_logged(self):
        self.assertEqual((self.run_.acceptance_lengths, self.run_.decode_rates), ((1.9,), (812.5,)))

    def test_all_forms_are_written(self):
        text = (self.directory / "report.html").read_text()
        self.assertIn("&lt;b&gt;CUDA out of memory&lt;/b&gt;", text)
        self.assertNotIn("<b>CUDA", text)
        (case,) = JUnitXml.fromstring((self.directory / "junit.xml").read_bytes()).__iter__().__next__()
        self.assertIn("decode exited with code 7 ?[0m", case.result[0].text)
        self.assertEqual((self.root / "step.md").read_text(), (self.directory / "summary.md").read_text())
        self.assertIn(f"report: {self.directory / 'report.html'}\n", self.suite.stdout)
        self.assertEqual(self.suite.returncode, 1)

    def test_a_report_that_cannot_be_drawn_changes_no_verdict(self):
        with tempfile.TemporaryDirectory() as directory:
            root = Path(directory)
            (root / "report" / "report.html").mkdir(parents=True)
            source = DEATH.replace("self.fail(", "print(")
            _, run = run_suite(root, source)
        self.assertEqual(run.returncode, 0, run.stdout)
        self.assertIn("no report could be drawn from", run.stdout)


class TestModel(unittest.TestCase):
    def test_quantiles(self):
        distribution = Distribution(tuple(range(1, 201)))
        self.assertEqual([distribution.quantile(q) for q in (0, 0.5, 0.9, 0.99, 1)], [1, 100, 180, 198, 200])

    def test_histogram_counts_each_value_once(self):
        for values in ((1.0,), (2.0, 2.0), tuple(map(float, range(100))), (0.1, 0.2, 0.3, 10.0)):
            histogram = Distribution(values).histogram
            self.assertEqual(sum(count for _, _, count in histogram), len(values))
            self.assertEqual((histogram[0][0], round(histogram[-1][1], 9)), (min(values), max(values)))

    def test_the_gate_is_strict(self):
        self.assertFalse(Score("r", "e", 190, 200, 0.95).passed)
        self.assertTrue(Score("r", "e", 191, 200, 0.95).passed)

    def test_a_phase_that_passed_is_not_bad(self):
        self.assertEqual(
            [Phase("x", state, 0, 1).is_bad for state in ("passed", "failed", "unfinished")], [False, True, True]
        )


if __name__ == "__main__":
    unittest.main()
