"""Small trees of test files for the tests of the runner, and how they are run."""

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

from cases import FolderCase
from detached import is_alive
from pdkit.core import forked

RUN_SUITE = Path(__file__).resolve().parents[2] / "run_suite.py"
SUITE = ["--hw", "cpu", "--suite", "stage-a-test-cpu", "--jobs", "1"]

MAIN = '\n\nif __name__ == "__main__":\n    unittest.main()\n'
IMPORTS = "import unittest\n\nfrom pdkit.core.ci_register import register_cpu_ci, register_cuda_ci\n\n"
CPU = 'register_cpu_ci(est_time=5, suite="stage-a-test-cpu")'


def source_of(methods: str = "def test_it(self): pass", registration: str = CPU, main: str = MAIN) -> str:
    """Source of a test file with one test class that has `methods`."""
    body = textwrap.indent(textwrap.dedent(methods), "    ")
    return f"{IMPORTS}{registration}\n\n\nclass T(unittest.TestCase):\n{body}\n{main}"


def write_tree(root: Path, files: dict[str, str]) -> Path:
    """Writes `files` below `root`/registered and returns that directory."""
    registered = root / "registered"
    registered.mkdir(exist_ok=True)
    for name, source in files.items():
        path = registered / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return registered


def command_for(root: Path, files: dict[str, str], *words: str) -> list[str]:
    """`run_suite.py` on `files` below `root`."""
    return [sys.executable, str(RUN_SUITE), "--test-root", str(write_tree(root, files)), *words]


def run_tree(
    root: Path,
    files: dict[str, str],
    *words: str,
    environment: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """`run_suite.py` on `files` below `root`, from there, to its end."""
    command = command_for(root, files, *words)
    return forked.run(command, cwd=str(root), env=environment, timeout=timeout, has_fork_server=True)


HANG = source_of(
    """
    def test_it(self):
        import subprocess, sys, time
        sleeper = [sys.executable, "-c", "import time; time.sleep(300)"]
        child = subprocess.Popen(sleeper, start_new_session=True)
        from pdkit.core import events
        events.emit("phase", name="first request", state="begins")
        print(f"sleeper {child.pid}", flush=True)
        time.sleep(300)
    """
)


class CommandCase(FolderCase):
    def setUp(self):
        super().setUp()
        self.enterContext(mock.patch.dict("os.environ", TMPDIR=str(self.root)))  # logs of what fails are kept there
        for name in ("GITHUB_ACTIONS", "SGLANG_PD_LOG_DIR"):  # of the run that this one is in
            os.environ.pop(name, None)

    def command(self, files, *words):
        return command_for(self.root, files, *words)

    def run_suite(self, files, *words, environment=None):
        return run_tree(self.root, files, *words, environment=os.environ | (environment or {}), timeout=60)

    def run_files(self, *sources, words=(), environment=None):
        files = {f"test_{number}.py": source for number, source in enumerate(sources)}
        return self.run_suite(files, *SUITE, *words, environment=environment)

    def run_to_end(self, code, tally, *sources, **options):
        """`run_files`, which must end with `code` and whose last line must be `tally`."""
        done = self.run_files(*sources, **options)
        self.assert_ended(done, code, tally)
        return done

    def assert_ended(self, done, code, tally):
        self.assertEqual((done.returncode, done.stdout.splitlines()[-1:]), (code, [tally]), done.stdout + done.stderr)
        self.assertNotIn("Traceback", done.stderr)

    def assert_usage_error(self, done, *expected):
        self.assertEqual((done.returncode, done.stdout), (2, ""))
        lines = done.stderr.splitlines()
        self.assertEqual(len(lines), len(expected), done.stderr)
        for line, text in zip(lines, expected, strict=True):
            self.assertTrue(line.startswith("run_suite.py: error: "), line)
            self.assertIn(text, line)

    def assert_sleeper_gone(self, output):
        pid = int(re.search(r"^ *sleeper (\d+)", output, re.MULTILINE)[1])
        self.assertFalse(is_alive(pid))
