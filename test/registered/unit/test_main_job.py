"""The command behind scripts/run.sh: verdict, closing summary, and what a skip, a wrong rung or Ctrl-C make of it."""

import io
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import unittest
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

from pdkit import main_job
from pdkit.ci_register import register_cpu_ci
from pdkit.exit_codes import ExitCode
from pdkit.main_job import main, read_report, summary
from pdkit.rung import LADDER, Gpu

register_cpu_ci(est_time=5, suite="stage-a-test-cpu")

EMBEDDED = LADDER[-1]
RESULT = "rung=embedded engine=pdkit.engine gsm8k=0.985 gate=>0.95"
RUN = ["rung=embedded engine=pdkit.engine model=m", "[phase] load prefill and decode: 4.3 s", RESULT, "[phase] teardown: 5.1 s"]


class TestReport(unittest.TestCase):
    def test_phases_and_result_are_read(self):
        report = read_report(["noise\n", *(line + "\n" for line in RUN), "[prefill] [phase] not ours: 1.0 s\n"])
        self.assertEqual(report.phases, (("load prefill and decode", 4.3), ("teardown", 5.1)))
        self.assertEqual((report.result.rung, report.result.engine), ("embedded", "pdkit.engine"))
        self.assertEqual((report.result.score, report.result.gate), (0.985, ">0.95"))

    def test_an_engine_name_may_have_spaces(self):
        report = read_report(["rung=8xH200 engine=sglang 0.5.23 gsm8k=0.960 gate=>0.95"])
        self.assertEqual(report.result.engine, "sglang 0.5.23")

    def test_summary_shows_score_gate_and_phases(self):
        text = summary(EMBEDDED, read_report(RUN), ExitCode.PASSED, 61.23)
        self.assertEqual(
            text,
            textwrap.dedent("""\
                main job on rung embedded: PASSED
                  engine                   pdkit.engine
                  score                    0.985 (gate >0.95)
                  load prefill and decode  4.3 s
                  teardown                 5.1 s
                  total                    61.2 s"""),
        )

    def test_summary_without_a_score_says_so(self):
        self.assertIn("none, the test did not get that far", summary(EMBEDDED, read_report(RUN[:2]), ExitCode.FAILED, 9))


class TestMain(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.test_file = Path(directory.name) / EMBEDDED.test_file
        self.test_file.parent.mkdir(parents=True)
        self.test_dir = Path(directory.name)

    def write_test(self, *lines, code=0):
        self.test_file.write_text("\n".join([*(f"print({line!r})" for line in lines), f"raise SystemExit({code})"]))

    def main(self, *argv, gpus=()):
        self.out, self.err = io.TextIOWrapper(io.BytesIO(), write_through=True), io.StringIO()
        patches = patch.object(main_job, "TEST_DIR", self.test_dir), patch.object(main_job, "visible_gpus", lambda: gpus)
        with redirect_stdout(self.out), redirect_stderr(self.err), patches[0], patches[1]:
            code = main(argv)
        self.out.seek(0)
        self.printed = self.out.read()
        return code

    def test_a_scored_run_passes_and_says_where_it_ran(self):
        self.write_test(*RUN)
        self.assertEqual(self.main(), ExitCode.PASSED)
        first = self.printed.splitlines()[:2]
        self.assertEqual(first[0], f"main job on rung embedded: {EMBEDDED.engine}")
        self.assertEqual(first[1], "  8xH200 needs 8 Hopper GPUs of 141 GB; found no GPU")
        self.assertIn("\nmain job on rung embedded: PASSED\n", self.printed)

    def test_a_failed_run_fails_though_it_was_scored(self):
        self.write_test(*RUN, code=1)
        self.assertEqual(self.main(), ExitCode.FAILED)

    def test_a_skip_is_no_pass(self):
        self.write_test("OK (skipped=1)")
        self.assertEqual(self.main(), ExitCode.NOTHING_RAN)

    def test_the_score_of_another_rung_is_no_pass(self):
        self.write_test(RESULT.replace("embedded", "8xH200"))
        self.assertEqual(self.main(), ExitCode.NOTHING_RAN)

    def test_unknown_rung(self):
        self.assertEqual(self.main("--rung", "8xH100"), ExitCode.BAD_USAGE)
        self.assertIn("nearest known: 8xH200", self.err.getvalue())

    def test_unavailable_rung_runs_nothing(self):
        self.write_test(*RUN)
        self.assertEqual(self.main("--rung", "8xH200"), ExitCode.NOT_READY)
        self.assertEqual(self.printed, "")

    def test_ladder(self):
        self.assertEqual(self.main("--ladder", gpus=[Gpu("NVIDIA H200", 143_771, (9, 0))]), ExitCode.PASSED)
        self.assertRegex(self.printed, r"8xH200 +8 Hopper GPUs of 141 GB +not here\nembedded +no GPU +runs here\n")
        self.assertIn("this machine has 1 GPU (NVIDIA H200, 140 GiB)", self.printed)


class TestInterrupt(unittest.TestCase):
    """The test process stops its servers when it is interrupted; the command waits for that and says 130."""

    TEST = """
        import time
        print("[phase] started: 0.1 s", flush=True)
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            time.sleep(0.3)
            print("[phase] servers stopped: 0.3 s", flush=True)
            raise SystemExit(1)
    """
    COMMAND = "import sys; from pathlib import Path; from pdkit import main_job; "
    COMMAND += "main_job.TEST_DIR = Path(sys.argv[1]); sys.exit(main_job.main(['--rung', 'embedded']))"

    def interrupted(self, send, test):
        with tempfile.TemporaryDirectory() as directory:
            test_file = Path(directory) / EMBEDDED.test_file
            test_file.parent.mkdir(parents=True)
            test_file.write_text(textwrap.dedent(test))
            command = [sys.executable, "-c", self.COMMAND, directory]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
                try:
                    for line in process.stdout:
                        if "started" in line:
                            break
                    time.sleep(0.2)
                    send(process.pid)
                    rest = process.stdout.read()
                    return process.wait(timeout=30), rest
                finally:
                    process.poll() is None and os.killpg(process.pid, signal.SIGKILL)

    def test_ctrl_c(self):
        code, rest = self.interrupted(lambda pid: os.killpg(pid, signal.SIGINT), self.TEST)
        self.assertEqual(code, ExitCode.INTERRUPTED)
        self.assertRegex(rest, r"main job on rung embedded: INTERRUPTED\n(.*\n)*  servers stopped +0.3 s\n")

    def test_sigterm_reaches_the_test(self):
        test = "import signal\nsignal.signal(signal.SIGTERM, signal.default_int_handler)\n" + textwrap.dedent(self.TEST)
        code, rest = self.interrupted(lambda pid: os.kill(pid, signal.SIGTERM), test)
        self.assertEqual(code, ExitCode.INTERRUPTED)
        self.assertIn("servers stopped", rest)


if __name__ == "__main__":
    unittest.main()
