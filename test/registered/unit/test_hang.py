"""What is said of a test that ran out of time: phase, stacks, last lines."""

import ctypes
import os
import signal
import subprocess
import unittest
from unittest import mock

import psutil
from cases import FolderCase
from detached import SLEEP, command, is_alive
from pdkit.core.ci_register import register_cpu_ci
from pdkit.core.events import Events, append
from pdkit.runner import hang_report
from pdkit.runner.report import evidence

register_cpu_ci(est_time=1, suite="stage-a-test-cpu")

HANG = "import time\ndef waits_for_godot():\n    print('up', flush=True)\n    time.sleep(300)\nwaits_for_godot()"
PTRACE_SEIZE = 0x4206


class TestStacks(unittest.TestCase):
    def start(self, source, **options):
        environment = os.environ | {"PYTHONFAULTHANDLER": "1"}
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = self.enterContext(subprocess.Popen(command(source), env=environment, **options))
        self.addCleanup(process.kill)
        self.assertEqual(process.stdout.readline(), "up\n")
        return psutil.Process(process.pid), process

    def test_of_a_child_and_grandchild(self):
        parent = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {HANG!r}])"
        process, _ = self.start(parent)
        self.addCleanup(process.children()[0].kill)
        text = "\n".join(hang_report.stacks([process, *process.children()], hang_report.py_spy()))
        self.assertIn("waits_for_godot (<string>:4)", text)
        for found in (process, *process.children()):
            self.assertIn(f"Process {found.pid}: ", text)

    def test_faulthandler_where_py_spy_may_not_trace(self):
        process, _ = self.start(HANG)
        libc = ctypes.CDLL(None, use_errno=True)
        self.assertEqual(libc.ptrace(PTRACE_SEIZE, process.pid, None, None), 0, os.strerror(ctypes.get_errno()))
        with mock.patch.object(hang_report, "_abort", return_value=[]):  # a traced process stops before it dies
            lines = list(hang_report.stacks([process], hang_report.py_spy()))
        self.assertIn("no stacks by py-spy: ", lines[0])
        self.assertRegex(lines[0], "(?i)permi")
        self.assertIn("CAP_SYS_PTRACE", lines[1])
        self.assertEqual(lines[2][lines[2].index("made") :], "made to print stacks above, ending the processes: none")

    def test_faulthandler_where_py_spy_is_missing(self):
        process, popen = self.start(HANG)
        lines = list(hang_report.stacks([process], None))
        self.assertEqual(lines[0], "no stacks by py-spy: it is not installed")
        self.assertTrue(lines[-1].endswith(f": {process.pid}"), lines)
        self.assertEqual(popen.wait(10), -signal.SIGABRT)
        self.assertIn("in waits_for_godot", popen.stderr.read())

    def test_children_before_their_parents(self):
        child = f"[sys.executable, '-c', {HANG!r}]"
        parent = f"import subprocess, sys\nchild = subprocess.run({child}, stderr=-1)\nprint('child', child.stderr)"
        process, popen = self.start(parent + "\n" + HANG)
        list(hang_report.stacks([process, *process.children()], None))
        self.assertIn("waits_for_godot", popen.stdout.readline())

    def test_other_programs_have_no_stacks(self):
        with subprocess.Popen(["sleep", "300"]) as process:
            self.addCleanup(process.kill)
            self.assertEqual(list(hang_report.stacks([psutil.Process(process.pid)], None)), [])
            self.assertTrue(is_alive(process.pid))
            process.kill()

    def test_a_process_that_is_gone(self):
        with subprocess.Popen(command(SLEEP)) as process:
            self.addCleanup(process.kill)
            found = psutil.Process(process.pid)
            process.kill()
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            self.assertEqual(list(hang_report.stacks([found], hang_report.py_spy())), [])


class TestDiagnose(FolderCase):
    def setUp(self):
        super().setUp()
        self.log = self.write("001-test_x.1.log", "start\n[phase] a server prints that begins\nwaiting\n")
        self.directory = evidence.directory_of(self.log)
        self.directory.mkdir()

    def emit(self, kind, **fields):
        append(self.directory, kind, **fields)

    def test_report(self):
        decode = self.directory / "TestX.decode.log"
        decode.write_text("loads\ncannot allocate\nkey-of-somebody\n")
        for name, path in (("decode", decode), ("prefill", self.directory / "absent.log"), ("load balancer", None)):
            self.emit("launch", name=name, command="x", log=path and str(path), pid=1)
        self.emit("phase", name="launch decode", state="passed", seconds=1.0)
        self.emit("phase", name="first request", state="begins")
        with mock.patch.dict(os.environ, A_KEY="key-of-somebody"):
            phase, lines = hang_report.diagnose([], self.log, None)
        self.assertEqual(phase, "first request")
        expected = ["hangs in phase first request", "last lines of test:", "  start"]
        expected += ["  [phase] a server prints that begins", "  waiting"]
        self.assertEqual(lines, [*expected, "last lines of decode:", "  loads", "  cannot allocate", "  (removed)"])

    def test_the_last_lines_only(self):
        self.log.write_text("".join(f"{i}\n" for i in range(100)))
        self.assertEqual(hang_report.tails(self.log, Events(), 2), {"test": ["98", "99"]})

    def test_outside_of_any_phase(self):
        self.emit("phase", name="gate", state="begins")
        self.emit("phase", name="gate", state="failed", seconds=1.0)
        phase, lines = hang_report.diagnose([], self.log, None)
        self.assertEqual((phase, lines[0]), (None, "hangs outside of any phase"))


if __name__ == "__main__":
    unittest.main()
