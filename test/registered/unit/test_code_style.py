"""ruff, import-linter and mypy find nothing: pyproject.toml says what they ask for."""

import ast
import os
import shutil
import subprocess
import sys
import tempfile
import unittest
from collections import defaultdict
from pathlib import Path

from pdkit.core import paths
from pdkit.core.ci_register import register_cpu_ci

register_cpu_ci(est_time=35, suite="stage-a-test-cpu")

REPO = Path(__file__).resolve().parents[3]
PYTHONPATH = str(REPO / "python")
TYPES_CACHE = f"--cache-dir={paths.cache() / 'mypy'}"


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

    def test_types(self):
        self.assert_clean("mypy", TYPES_CACHE)

    def test_an_import_that_is_not_allowed_is_found(self):
        """Each of `texts` is put at the end of a file of the package."""
        texts = {
            "engine/state.py": "\nimport sglang.srt\n",
            "core/errors.py": "\ndef late():\n    import pdkit.runner.targets\n",
            "faults/pieces.py": "\nimport pdkit.preflight.plan\n",
            "checks/http.py": "\nimport torch\n",
            "attic/__init__.py": '"""A room on no floor."""\n',
        }
        folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        shutil.copy(REPO / "pyproject.toml", folder)
        package = folder / "python" / "pdkit"
        shutil.copytree(REPO / "python" / "pdkit", package, ignore=shutil.ignore_patterns("assets", "__pycache__"))
        for path, text in texts.items():
            (package / path).parent.mkdir(exist_ok=True)
            with open(package / path, "a") as file:
                file.write(text)
        run = self.run_tool("lint-imports", "--no-cache", folder=folder, pythonpath=str(folder / "python"))
        self.assertEqual(run.returncode, 1, run.stdout + run.stderr)
        for found in (
            "pdkit.engine.state -> sglang",
            "pdkit.core.errors -> pdkit.runner",
            "pdkit.faults.pieces -> pdkit.preflight.plan",
            "pdkit.checks.http -> torch",
            "pdkit.attic",
        ):
            with self.subTest(found):
                self.assertIn(found, run.stdout)

    def test_a_class_name_stands_for_one_thing(self):
        """At most three names of top-level classes are defined in more than one module."""
        places = defaultdict(list)
        for path in sorted((REPO / "python" / "pdkit").rglob("*.py")):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef):
                    places[node.name].append(str(path.relative_to(REPO / "python")))
        self.assertGreater(len(places), 300)
        twice = {name: paths for name, paths in places.items() if len(paths) > 1}
        self.assertLessEqual(len(twice), 3, twice)

    def test_a_wrong_type_and_a_missing_one_are_found(self):
        text = "\ndef wrong() -> int:\n    return str(1)\n\n\ndef missing(word):\n    return word\n"
        folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        (folder / "wrong.py").write_text(text)
        printed = self.run_tool("mypy", TYPES_CACHE, str(folder / "wrong.py")).stdout
        for complaint in ("[return-value]", "[no-untyped-def]"):
            self.assertIn(complaint, printed)


if __name__ == "__main__":
    unittest.main()
