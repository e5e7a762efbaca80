"""PD test files of SGLang's shapes run unedited under `pdkit.deployment.attach`, on real servers of the embedded engine.

The files in test/data/sglang_pd_tests are our own; the central test runs as it stands.
"""

import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from pdkit.core import events, forked
from pdkit.core.ci_register import register_cpu_ci
from pdkit.core.errors import ExitCode
from pdkit.core.source import read
from pdkit.deployment.quirks import SUBSTITUTED

register_cpu_ci(est_time=25, suite="stage-a-test-cpu")

REPO = Path(__file__).resolve().parents[3]
ASSETS = REPO / "python" / "pdkit" / "assets"
SHAPES = REPO / "test" / "data" / "sglang_pd_tests"
CENTRAL = Path(__file__).with_name("test_disaggregation_dsv4.py")


class Attached(unittest.TestCase):
    """is_forked: what a file runs in, and its servers, are forked where our own process was; else started anew."""

    is_forked = True

    def setUp(self):
        self.directory = Path(self.enterContext(tempfile.TemporaryDirectory()))

    def attach(self, file, *names, before=None, model=ASSETS / "nano-dsv4", **environ):
        """Runs `file` attached, all or the tests `names`, after the statement `before`; its exit code and what it printed."""
        environ = {
            **os.environ,
            events.VARIABLE: str(self.directory),
            "SGLANG_PD_LOG_DIR": str(self.directory),
            "SGLANG_PD_GSM8K": str(ASSETS / "gsm8k_nano.jsonl"),
            "SGLANG_TEST_MAX_RETRY": "1",
            "CUDA_VISIBLE_DEVICES": str(os.getpid() % 9 + 1),  # SGLang's fixture has its ports by it
            "PDKIT_SERVER_MODULE": "embedded_as_sglang",
            "PYTHONPATH": os.pathsep.join(
                map(str, (REPO / "python", SHAPES, self.directory, os.environ.get("PYTHONPATH", "")))
            ),
            **({"SGLANG_PD_MODEL": str(model)} if model else {}),
            **environ,
        }
        program = f"import sys\n{before}\nfrom pdkit.deployment import attach\nattach.main(sys.argv[1:])\n"
        self.directory.joinpath("attach_after.py").write_text(program)
        module = "attach_after" if before else "pdkit.deployment.attach"
        popen = forked.popen() if self.is_forked else subprocess.Popen
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8", "errors": "replace"}
        with popen([sys.executable, "-m", module, str(file), *names, "-f"], env=environ, **streams) as process:
            output = process.stdout.read()
        print(output, flush=True)
        return process.returncode, output

    def events(self, *kinds):
        return events.read(self.directory).of(*kinds)

    def phases(self):
        return [event["name"] for event in self.events("phase") if event["state"] == "passed"]


class TestShapes(Attached):
    def test_the_central_test(self):
        """As SGLang's CI runs it, where its eight GPUs are taken for granted."""
        code, _ = self.attach(CENTRAL, SGLANG_IS_IN_CI="true")
        self.assertEqual(code, ExitCode.PASSED)
        (score,) = self.events("score")
        self.assertEqual((score["eval"], score["examples"], score["engine"]), ("gsm8k", 200, "embedded_as_sglang"))
        self.assertGreater(score["score"], 0.95)
        loading = ["launch prefill", "launch decode", "start load balancer", "first request"]
        self.assertEqual(self.phases(), [*loading, "gsm8k", "teardown"])
        self.assertEqual([event["name"] for event in self.events("launch")], ["prefill", "decode", "load balancer"])
        self.assertEqual([event["state"] for event in self.events("test")], ["passed"])
        transcript = self.directory / "TestDisaggregationDSV4.gsm8k.jsonl"
        self.assertEqual(len(transcript.read_text().splitlines()), 200)

    def test_servers_that_the_test_starts_and_ends_itself(self):
        code, _ = self.attach(SHAPES / "test_overrides_start.py", SECONDS_BEFORE_THE_END="0.6")
        self.assertEqual((code, self.events("death")), (ExitCode.PASSED, []))
        self.assertEqual([score["examples"] for score in self.events("score")], [40])

    def test_several_classes_with_a_model_each(self):
        models = {"FIRST_MODEL": str(ASSETS / "random-dsv4"), "SECOND_MODEL": str(ASSETS / "nano-dsv4")}
        code, _ = self.attach(SHAPES / "test_several_classes.py", model=None, **models)
        self.assertEqual(code, ExitCode.PASSED)
        self.assertEqual(sorted(event["state"] for event in self.events("test")), ["passed", "passed", "skipped"])
        prefills = [event["command"] for event in self.events("launch") if event["name"] == "prefill"]
        self.assertEqual([path in command for path, command in zip(models.values(), prefills)], [True, True])

    def test_a_server_that_dies_fails_the_test_with_its_log(self):
        code, output = self.attach(SHAPES / "test_several_classes.py", model="/nowhere")
        self.assertEqual(code, ExitCode.FAILED)
        (death,) = self.events("death")
        self.assertRegex(death["cause"], r"^(prefill|decode) exited with code 2$")
        self.assertIn("/nowhere", death["excerpt"])
        self.assertIn(f"AssertionError: {death['cause']}; last lines of ", output)


class TestWhatIsAttached(Attached):
    def test_names_that_the_release_lacks(self):
        before = (
            "from sglang.test import test_utils; from sglang.test.server_fixtures import disaggregation_fixture;"
            "del test_utils.popen_with_error_check, disaggregation_fixture.popen_with_error_check"
        )
        code, output = self.attach(SHAPES / "test_several_classes.py", before=before)
        self.assertEqual(code, ExitCode.NOT_READY)
        (line,) = [line for line in output.splitlines() if line.startswith("attach: error:")]
        name = r"sglang\.test\.\S+\.popen_with_error_check"
        self.assertRegex(line, rf" has no {name}, {name}: its tests cannot be attached to; ")
        self.assertEqual(self.events("launch"), [])

    def test_each_name_is_substituted_where_a_test_takes_it_from(self):
        self.directory.joinpath("test_names.py").write_text(
            "import importlib, sys\n"
            f"for module, names in {SUBSTITUTED!r}.items():\n"
            "    for name in names:\n"
            "        found = getattr(importlib.import_module(module), name)\n"
            "        assert found.__module__.startswith('pdkit.deployment.'), (module, name, found)\n"
            "print('all are ours')\n"
        )
        code, output = self.attach(self.directory / "test_names.py")
        self.assertEqual(code, ExitCode.PASSED)
        self.assertIn("all are ours", output)

    def test_only_what_stands_on_sglangs_fixture_alone(self):
        attached = {path.name for path in CENTRAL.parent.glob("test_*.py") if stands_on_sglang(path)}
        self.assertEqual(attached, {CENTRAL.name})
        self.assertTrue(all(map(stands_on_sglang, SHAPES.glob("test_*.py"))))

    def test_the_central_test_alone_skips_in_one_line_and_names_a_command(self):
        """Plain unittest, without this package, of which it imports nothing."""
        roots = {name.partition(".")[0] for name in read(CENTRAL).imports.values()}
        self.assertEqual(roots - set(sys.stdlib_module_names), {"sglang"})
        environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", events.VARIABLE)}
        command = [sys.executable, "-m", "unittest", "-v", CENTRAL.stem]
        done = forked.run(command, cwd=str(CENTRAL.parent), env={**environ, "SGLANG_IS_IN_CI": "false"})
        self.assertEqual(done.returncode, 0, done.stderr)
        (line,) = [line for line in done.stderr.splitlines() if "skipped" in line and "test_gsm8k" in line]
        self.assertIn("on this machine the same test runs as: scripts/run.sh", line)

    def test_the_central_test_fits_on_a_page(self):
        self.assertLessEqual(len(CENTRAL.read_text().splitlines()), 120)


def stands_on_sglang(path):
    return any(cls.stands_on_sglang for cls in read(path).classes.values())


if __name__ == "__main__":
    unittest.main()
