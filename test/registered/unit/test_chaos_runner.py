"""The chaos script: it finds nothing left by the runner, and finds what a worse runner would leave."""

import os
import re
import runpy
import signal
import subprocess
import sys
import unittest
from pathlib import Path

from cases import FolderCase
from detached import LISTEN, command, orphaner
from pdkit.core.ci_register import register_cpu_ci
from pdkit.core.processes import become_subreaper

register_cpu_ci(est_time=10, suite="stage-a-test-cpu")

SCRIPT = Path(__file__).with_name("chaos_runner.py")


class TestChaosRunner(FolderCase):
    def test_nothing_is_left(self):
        words = ["--rounds", "1", "--attacks", "term", "kill-both", "--seed", "3"]
        done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=300)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        for line in (r"^1/1 SIG.* after .*: left nothing$", r"^SIG.* 1 .* 0 +0$"):
            self.assertEqual(len(re.findall(line, done.stdout, re.MULTILINE)), 2, done.stdout)

    def test_what_is_left_is_seen(self):
        become_subreaper()
        script = runpy.run_path(str(SCRIPT))

        class Careless(script["Chaos"]):
            def command(self, kinds):
                return command(orphaner(LISTEN, "time.sleep(300)"))

        attack = script["Attack"]("SIGTERM", signal.SIGTERM)
        found = Careless(self.root, None, dict(os.environ)).round(attack, 3.0)
        self.assertEqual((len(found.left), len(found.left_ports)), (1, 1), found)
        self.assertGreaterEqual(found.met[0], 2)

    def test_killed_main_jobs_are_no_history(self):
        script = runpy.run_path(str(SCRIPT))
        command = script["Chaos"](self.root, "embedded", dict(os.environ)).command(script["KINDS"])
        self.assertIn("--no-history", command)


if __name__ == "__main__":
    unittest.main()
