"""The GitHub Action: what its step runs, and that our workflows name inputs that it has."""

import os
import subprocess
import unittest
from pathlib import Path

import yaml
from cases import FolderCase
from pdkit.core import paths
from pdkit.core.ci_register import register_cpu_ci

register_cpu_ci(est_time=1, suite="stage-a-test-cpu")

REPOSITORY = paths.TEST.parent
ACTION = yaml.safe_load((REPOSITORY / "action.yml").read_text())
STEPS = {step["name"]: step for step in ACTION["runs"]["steps"]}
STUB = """#!/bin/bash
printf '<%s>' "$@" key="$SGLANG_PD_API_KEY"
echo
exit $STUB_CODE
"""


class TestAction(FolderCase):
    def setUp(self):
        super().setUp()
        self.write("pdkit/bin/pdkit", STUB).chmod(0o755)

    def run_step(self, code, **inputs):
        """(exit code, outputs, summary) of the step `Run`, as a runner would start it."""
        values = {name: spec.get("default", "") for name, spec in ACTION["inputs"].items()} | inputs
        environ = {**os.environ, "RUNNER_TEMP": str(self.root), "STUB_CODE": str(code)}
        for variable in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY"):
            environ[variable] = str(self.root / variable)
            Path(environ[variable]).write_text("")
        for variable, expression in STEPS["Run"]["env"].items():
            name = expression.removeprefix("${{ inputs.").removesuffix(" }}")
            environ[variable] = values[name]  # KeyError: no such input
        script = self.root / "script.sh"
        script.write_text(STEPS["Run"]["run"])
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)]
        run = subprocess.run(command, env=environ, capture_output=True, text=True)
        outputs = (self.root / "GITHUB_OUTPUT").read_text()
        return run.returncode, outputs, (self.root / "GITHUB_STEP_SUMMARY").read_text()

    def test_a_check(self):
        inputs = {"url": "http://lb:1", "baseline": "http://one:2", "options": "--quick --exact", "api-key": "k"}
        code, outputs, summary = self.run_step(0, **inputs)
        self.assertEqual((code, outputs), (0, "verdict=PASSED\n"))
        self.assertIn("<check><http://lb:1><--baseline><http://one:2><--quick><--exact><key=k>\n", summary)

    def test_verdicts(self):
        for given, verdict in ((1, "FAILED"), (5, "UNCONFIRMED"), (6, "DRIFTED"), (3, ""), (2, "")):
            code, outputs, summary = self.run_step(given, url="http://lb:1")
            self.assertEqual((code, outputs), (given, f"verdict={verdict}\n"))
            self.assertIn("<check><http://lb:1><key=>", summary)

    def test_lint(self):
        _, _, summary = self.run_step(0, command="lint", options="test/registered other")
        self.assertIn("### pdkit lint\n~~~text\n<lint><test/registered><other><key=>\n~~~\n", summary)

    def test_our_own_workflows_use_it(self):
        used = []
        for path in sorted((REPOSITORY / ".github" / "workflows").glob("*.yml")):
            jobs = yaml.safe_load(path.read_text())["jobs"].values()
            used += [step["with"] for job in jobs for step in job["steps"] if step.get("uses") == "./"]
        self.assertEqual(sorted(each.get("command", "check") for each in used), ["check", "lint"])
        for each in used:
            self.assertLessEqual(each.keys(), ACTION["inputs"].keys())


if __name__ == "__main__":
    unittest.main()
