"""docs/findings: each file can be posted as it is, and what can be shown without a GPU is shown by the script."""

import contextlib
import importlib.util
import io
import os
import re
import subprocess
import unittest
from pathlib import Path
from unittest import mock

from pdkit.core.ci_register import register_cpu_ci
from pdkit.core.errors import ExitCode, UsageError
from pdkit.core.host import installed

register_cpu_ci(est_time=1, suite="stage-a-test-cpu")

ROOT = Path(__file__).parents[3]
RELEASE = "0.5.23"  # whose source the patches are for
PARTS = "**Seen.**", "**Releases.**", "eproduction.** "
SOLUTIONS = "**Patch.**", "**Proposal.**"


def script():
    spec = importlib.util.spec_from_file_location("sglang_findings", ROOT / "studies" / "sglang_findings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestFindings(unittest.TestCase):
    def test_each_file_has_what_an_issue_needs_and_stands_in_the_table(self):
        folder = ROOT / "docs" / "findings"
        table = (folder / "README.md").read_text()
        files = sorted(path for path in folder.glob("*.md") if path.name != "README.md")
        self.assertGreater(len(files), 6)
        for path in files:
            text = path.read_text()
            with self.subTest(file=path.name):
                self.assertIn(f"]({path.name})", table)
                for part in PARTS:
                    self.assertIn(part, text)
                self.assertTrue(any(each in text for each in SOLUTIONS))

    @unittest.skipUnless(installed("sglang") == RELEASE, f"the patches are for SGLang {RELEASE}")
    def test_each_patch_applies_to_the_installed_source(self):
        packages = Path(importlib.util.find_spec("sglang").origin).parents[1]
        apply = ["git", "apply", "--check", "-p2", "-"]  # a/python/sglang/... -> sglang/...
        outside = os.environ | {"GIT_CEILING_DIRECTORIES": str(packages.parent)}
        patches = 0
        for path in sorted((ROOT / "docs" / "findings").glob("*.md")):
            for patch in re.findall(r"^```diff\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE):
                with self.subTest(file=path.name):
                    run = subprocess.run(apply, input=patch, cwd=packages, env=outside, text=True, capture_output=True)
                    self.assertEqual(run.returncode, 0, run.stderr)
                patches += 1
        self.assertGreater(patches, 5)

    def test_exit_codes(self):
        module = script()
        for there, code in ((True, ExitCode.FAILED), (False, ExitCode.PASSED)):
            said = io.StringIO()
            with (
                mock.patch.dict(module.FINDINGS, {"one-room": lambda there=there: (there, "rooms [7, 7]")}),
                contextlib.redirect_stdout(said),
            ):
                self.assertEqual(module.main(["one-room"]), code)
            self.assertIn("rooms [7, 7]", said.getvalue())

    def test_an_unknown_name_is_refused(self):
        with self.assertRaisesRegex(UsageError, "two-rooms: expected one-room, "):
            script().main(["two-rooms"])


if __name__ == "__main__":
    unittest.main()
