"""What README and docs show is what the commands do, and the site is built from them."""

import re
import subprocess
import sys
import textwrap
import unittest
from pathlib import Path

from cases import FolderCase
from pdkit.core.ci_register import register_cpu_ci
from pdkit.core.errors import ExitCode
from pdkit.core.registry import collect
from pdkit.runner.targets import overview

register_cpu_ci(est_time=1, suite="stage-a-test-cpu")

REPO = Path(__file__).parents[3]
README = (REPO / "README.md").read_text()
DOCS = sorted((REPO / "docs").glob("*.md"))
EXAMPLE = "test_disaggregation_dsv4_no_prefix_cache.py"


class TestReadme(FolderCase):
    def test_targets_of_a_machine_without_gpu(self):
        shown = "$ scripts/pdkit list --targets\n" + overview(())
        self.assertIn(textwrap.indent(shown, "    "), README)

    def test_exit_codes(self):
        table = README[README.index("| exit code |") :].split("\n\n")[0]
        codes = [int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)]
        self.assertEqual(codes, [int(code) for code in ExitCode])

    def test_files_named_exist(self):
        for page in (REPO / "README.md", *DOCS):
            with self.subTest(page.name):
                below = r"\b((?:test|scripts|studies|python|docs|\.github)/[\w./-]+\.\w+)"
                paths = set(re.findall(below, page.read_text()))
                missing = [path for path in sorted(paths) if not (REPO / path).exists() and Path(path).name != EXAMPLE]
                self.assertEqual(missing, [])

    def test_the_readme_is_short(self):
        self.assertLessEqual(len(README.splitlines()), 150)

    def test_the_site_is_built_and_each_link_leads_somewhere(self):
        tool = Path(sys.executable).with_name("mkdocs")
        self.assertTrue(tool.exists(), f"mkdocs is not beside {sys.executable}: pip install -r requirements-dev.lock")
        command = [tool, "build", "-d", self.root]  # with -q it prints no warnings
        run = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
        self.assertEqual(run.returncode, 0, run.stdout + run.stderr)
        self.assertTrue((self.root / "index.html").is_file())

    def test_the_next_test_is_a_registered_one(self):
        (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
        self.write(EXAMPLE, code)
        collection = collect(self.root)
        self.assertEqual(collection.errors, ())
        self.assertEqual([(r.hw, r.suite) for r in collection.registrations], [("cpu", "stage-a-test-cpu")])


if __name__ == "__main__":
    unittest.main()
