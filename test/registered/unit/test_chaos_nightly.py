"""Each night: the runner is killed at random moments, and leaves neither a process nor a port."""

import subprocess
import sys
import unittest
from pathlib import Path

from pdkit.core.ci_register import register_cpu_ci

register_cpu_ci(est_time=300, suite="stage-a-test-cpu", nightly=True)

CHAOS = Path(__file__).with_name("chaos_runner.py")
ROUNDS = 6


class TestChaosNightly(unittest.TestCase):
    def test_nothing_is_left(self):
        done = subprocess.run([sys.executable, str(CHAOS), "--rounds", str(ROUNDS)], capture_output=True, text=True)
        print(done.stdout, flush=True)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        self.assertEqual(done.stdout.count("left nothing"), 4 * ROUNDS, done.stdout)


if __name__ == "__main__":
    unittest.main()
