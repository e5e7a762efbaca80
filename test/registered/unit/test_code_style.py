"""ruff and import-linter find nothing: pyproject.toml says what they ask for."""

import os
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from pdkit.core.ci_register import register_cpu_ci

register_cpu_ci(est_time=5, suite="stage-a-test-cpu")

REPO = Path(__file__).resolve().parents[3]
PYTHONPATH = str(REPO / "python")


class TestCodeStyle(unittest.TestCase):
    def run_tool(self, name: str, *words: str, folder: Path = REPO, pythonpath: str = PYTHONPATH):
        tool = Path(sys.executable).with_name(name)
        self.assertTrue(
            tool.exists(), f"{name} is not installed beside {sys.executable}: pip install -r requirements-dev.lock"
        )
        environment = os.environ | {"PYTHONPATH": pythonpath, "COLUMNS": "120"}
        return subprocess.run([tool, *words], cwd=folder, env=environment, capture_output=True, text=True)

    def assert_clean(self, name: str, *words: str):
        run = self.run_tool(name, *words)
        self.assertEqual(run.returncode, 0, f"{name} {' '.join(words)}:\n{run.stdout}{run.stderr}")

    def test_ruff_check(self):
        self.assert_clean("ruff", "check", "--no-cache")

    def test_ruff_format(self):
        self.assert_clean("ruff", "format", "--check", "--no-cache")

    def test_imports(self):
        self.assert_clean("lint-imports", "--no-cache")

    def test_an_import_that_is_not_allowed_is_found(self):
        folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        shutil.copy(REPO / "pyproject.toml", folder)
        shutil.copytree(
            REPO / "python" / "pdkit", folder / "pdkit", ignore=shutil.ignore_patterns("assets", "__pycache__")
        )
        with open(folder / "pdkit" / "engine" / "state.py", "a") as file:
            file.write("\nimport sglang.srt\n")
        run = self.run_tool("lint-imports", "--no-cache", folder=folder, pythonpath=str(folder))
        self.assertEqual(run.returncode, 1, run.stdout + run.stderr)
        self.assertIn("pdkit.engine.state -> sglang", run.stdout)
        self.assertIn("1 broken", run.stdout)


if __name__ == "__main__":
    unittest.main()
