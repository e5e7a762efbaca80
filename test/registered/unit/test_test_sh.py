"""scripts/test.sh and halves.py: two halves side by side, neither of which can fail unseen."""

import os
import shutil
import signal
import subprocess
import tempfile
import unittest
from pathlib import Path

from pdkit.core.ci_register import register_cpu_ci

register_cpu_ci(est_time=3, suite="stage-a-test-cpu")

REPO = Path(__file__).resolve().parents[3]
RUNNER = """
import os, signal, sys, time
half = sys.argv[sys.argv.index("--auto-partition-id") + 1] if "--auto-partition-id" in sys.argv else "whole"
signal.signal(signal.SIGTERM, lambda *_: (print("told", half), sys.exit(130)))
print("began", half, *sys.argv[1:], flush=True)
end = time.monotonic() + float(os.environ.get(f"SECONDS_{half}", 0))
while time.monotonic() < end:
    time.sleep(0.05)  # never one long sleep: a signal that arrives just before it would be seen only after it
sys.exit(int(os.environ.get(f"CODE_{half}", 0)))
"""


class TestTestSh(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.root = Path(directory.name)
        (self.root / "scripts").mkdir()
        (self.root / "test").mkdir()
        for script in ("test.sh", "halves.py"):
            shutil.copy(REPO / "scripts" / script, self.root / "scripts")
        (self.root / "scripts" / "env.sh").write_text('#!/bin/sh\nexec "$@"\n')
        (self.root / "scripts" / "env.sh").chmod(0o755)
        (self.root / "test" / "run_suite.py").write_text(RUNNER)

    def start(self, *args, **environment):
        return subprocess.Popen(
            [self.root / "scripts" / "test.sh", *args],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def code_and_output(self, *args, **environment):
        process = self.start(*args, **environment)
        self.addCleanup(process.kill)
        output, _ = process.communicate(timeout=30)
        return process.returncode, output

    def test_both_halves_run_and_are_shown(self):
        code, output = self.code_and_output()
        self.assertEqual(code, 0, output)
        self.assertLess(output.index("began 0"), output.index("began 1"))

    def test_a_half_that_fails_is_seen_whichever_ends_first(self):
        for half in "01":
            for first in "01":
                with self.subTest(fails=half, ends_first=first):
                    slow = {f"SECONDS_{1 - int(first)}": "0.5", f"CODE_{half}": "3"}
                    self.assertEqual(self.code_and_output(**slow)[0], 3)

    def test_arguments_make_it_one_run(self):
        code, output = self.code_and_output("--list", CODE_whole="4")
        self.assertEqual((code, output.count("began")), (4, 1))
        self.assertIn("--list", output)

    def test_a_signal_is_told_to_both(self):
        process = self.start(SECONDS_0="60", SECONDS_1="60")
        self.addCleanup(process.kill)
        self.assertIn("began 0", process.stdout.readline())
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=30)
        self.assertEqual(process.returncode, 130)
        self.assertIn("told 0", output)


if __name__ == "__main__":
    unittest.main()
