"""`pdkit run --repeat` counts what failed, goes on where it was stopped, and ends what it started."""

import sys
import unittest
from unittest.mock import patch

from cases import FolderCase, pdkit
from pdkit.core.ci_register import register_cpu_ci
from pdkit.core.errors import ExitCode
from pdkit.runner import repeat

register_cpu_ci(est_time=8, suite="stage-a-test-cpu")

RUN = """
import sys
from pathlib import Path
from pdkit.core import events
directory = Path(sys.argv[sys.argv.index("--report-dir") + 1])
with open(directory.parent / "started", "a") as file:
    file.write(directory.name + " ")
(directory / "001-test.1").mkdir(exist_ok=True)
events.append(directory / "001-test.1", "score", eval="gsm8k", score=0.985, examples=200, gate=0.95)
sys.exit(directory.name == "run-002" and (directory.parent / "bad").exists())
"""


class TestRepeat(FolderCase):
    def repeat(self, *words):
        command = (sys.executable, str(self.write("fake.py", RUN)))
        with patch.object(repeat, "COMMAND", command):
            code, self.printed, self.errors = pdkit("run", "--on", "embedded", "--report-dir", self.root, *words)
        return code

    @property
    def started(self):
        return (self.root / "started").read_text().split()

    def test_clean_runs(self):
        self.assertEqual(self.repeat("--repeat", "4", "--jobs", "2"), ExitCode.PASSED)
        self.assertIn("4 runs, 0 failures; a failure rate above 52.7% is refuted at 95 %\n", self.printed)
        self.assertIn("scores: 0.985 to 0.985\n", self.printed)
        self.assertRegex(self.printed, r"\n    3  passed +\d+\.\d s  0\.985  #")

    def test_it_goes_on_where_it_was_stopped(self):
        self.repeat("--repeat", "2")
        self.assertEqual(self.repeat("--repeat", "3"), ExitCode.PASSED)
        self.assertEqual(self.started, ["run-001", "run-002", "run-003"])
        self.assertIn("3 runs, 0 failures", self.printed)

    def test_a_failure_is_named_and_ends_it(self):
        (self.root / "bad").touch()
        self.assertEqual(self.repeat("--repeat", "4"), ExitCode.FAILED)
        self.assertIn(f"failed: run 2, exit code 1: {self.root}/run-002\n", self.printed)
        self.assertNotIn("run-004", self.started)
        self.assertEqual(self.repeat("--repeat", "4", "--keep-going"), ExitCode.FAILED)
        self.assertIn("4 runs, 1 failures\n", self.printed)

    def test_runs_of_a_test_file(self):
        contents = {ExitCode.PASSED: "import sys; assert sys.argv[1:] == ['-f']", ExitCode.FAILED: "1 / 0"}
        for code, content in contents.items():
            words = ("--file", self.write(f"test_{code}.py", content), "--report-dir", self.root / str(code))
            self.assertEqual(self.repeat("--repeat", "2", *words), code)
        self.assertIn("ZeroDivisionError", (self.root / "1" / "run-001" / "output.log").read_text())
        self.assertEqual(self.repeat("--repeat", "2", "--file", "nowhere.py"), ExitCode.BAD_USAGE)
        self.assertIn("no such file", self.errors)


if __name__ == "__main__":
    unittest.main()
