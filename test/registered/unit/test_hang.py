"""What is said of a test that ran out of time: phase, stacks, last lines."""

import ctypes
import os
import signal
import subprocess
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import psutil
from detached import SLEEP, command, is_alive
from pdkit import hang
from pdkit.ci_register import register_cpu_ci

register_cpu_ci(est_time=1, suite="stage-a-test-cpu")

HANG = "import time\ndef waits_for_godot():\n    print('up', flush=True)\n    time.sleep(300)\nwaits_for_godot()"
PTRACE_SEIZE = 0x4206


class TestPhases(unittest.TestCase):
    def test_the_open_phase(self):
        begins, ended, failed = "[phase] {} begins", "[phase] {}: 1.0 s", "[phase] {} failed: 61.5 s"
        for lines, expected in (
            ([], None),
            (["unrelated", "gsm8k begins"], None),
            ([begins.format("launch prefill")], "launch prefill"),
            ([begins.format("launch prefill"), ended.format("launch prefill")], None),
            ([begins.format("gsm8k"), failed.format("gsm8k")], None),
            ([begins.format("launch prefill"), begins.format("launch decode")], "launch decode"),
            ([begins.format("a"), begins.format("b"), ended.format("b")], "a"),
            ([begins.format("a"), begins.format("b"), ended.format("a")], "b"),
            ([ended.format("gsm8k"), begins.format("gsm8k") + "\n"], "gsm8k"),
            ([begins.format("gsm8k"), ended.format("gate")], "gsm8k"),
            ([".sF" + begins.format("gsm8k")], "gsm8k"),
        ):
            with self.subTest(lines):
                self.assertEqual(hang.open_phase(lines), expected)

    def test_tails(self):
        lines = ["start", "[prefill] a", "[decode] b", "[prefill] c", "[phase] gsm8k begins", "[prefill] d", "[9] end"]
        expected = {"test": ["[phase] gsm8k begins", "[9] end"], "prefill": ["[prefill] c", "[prefill] d"]}
        self.assertEqual(hang.tails(lines, 2), expected | {"decode": ["[decode] b"]})


class TestStacks(unittest.TestCase):
    def start(self, source, **options):
        environment = os.environ | {"PYTHONFAULTHANDLER": "1"}
        process = self.enterContext(
            subprocess.Popen(
                command(source), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
            )
        )
        self.addCleanup(process.kill)
        self.assertEqual(process.stdout.readline(), "up\n")
        return psutil.Process(process.pid), process

    def test_of_a_child_and_grandchild(self):
        parent = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {HANG!r}])"
        process, _ = self.start(parent)
        self.addCleanup(process.children()[0].kill)
        text = "\n".join(hang.stacks([process, *process.children()], hang.py_spy()))
        self.assertIn("waits_for_godot (<string>:4)", text)
        for found in (process, *process.children()):
            self.assertIn(f"Process {found.pid}: ", text)

    def test_faulthandler_where_py_spy_may_not_trace(self):
        process, _ = self.start(HANG)
        libc = ctypes.CDLL(None, use_errno=True)
        self.assertEqual(libc.ptrace(PTRACE_SEIZE, process.pid, None, None), 0, os.strerror(ctypes.get_errno()))
        with mock.patch.object(hang, "_abort", return_value=[]):  # a traced process stops before it dies
            lines = list(hang.stacks([process], hang.py_spy()))
        self.assertIn("no stacks by py-spy: ", lines[0])
        self.assertRegex(lines[0], "(?i)permi")
        self.assertIn("CAP_SYS_PTRACE", lines[1])
        self.assertEqual(lines[2][lines[2].index("made") :], "made to print stacks above, ending the processes: none")

    def test_faulthandler_where_py_spy_is_missing(self):
        process, popen = self.start(HANG)
        lines = list(hang.stacks([process], None))
        self.assertEqual(lines[0], "no stacks by py-spy: it is not installed")
        self.assertTrue(lines[-1].endswith(f": {process.pid}"), lines)
        self.assertEqual(popen.wait(10), -signal.SIGABRT)
        self.assertIn("in waits_for_godot", popen.stderr.read())

    def test_children_before_their_parents(self):
        child = f"[sys.executable, '-c', {HANG!r}]"
        parent = f"import subprocess, sys\nchild = subprocess.run({child}, stderr=-1)\nprint('child', child.stderr)"
        process, popen = self.start(parent + "\n" + HANG)
        list(hang.stacks([process, *process.children()], None))
        self.assertIn("waits_for_godot", popen.stdout.readline())

    def test_other_programs_have_no_stacks(self):
        with subprocess.Popen(["sleep", "300"]) as process:
            self.addCleanup(process.kill)
            self.assertEqual(list(hang.stacks([psutil.Process(process.pid)], None)), [])
            self.assertTrue(is_alive(process.pid))
            process.kill()

    def test_a_process_that_is_gone(self):
        with subprocess.Popen(command(SLEEP)) as process:
            self.addCleanup(process.kill)
            found = psutil.Process(process.pid)
            process.kill()
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            self.assertEqual(list(hang.stacks([found], hang.py_spy())), [])


class TestDiagnose(unittest.TestCase):
    def test_report(self):
        with tempfile.TemporaryDirectory() as directory:
            log = Path(directory, "log")
            log.write_text("[phase] first request begins\n[decode] cannot allocate\nwaiting\n")
            phase, lines = hang.diagnose([], log, None)
        self.assertEqual(phase, "first request")
        expected = "hangs in phase first request|last lines of test:|  [phase] first request begins|  waiting|"
        self.assertEqual("|".join(lines), expected + "last lines of decode:|  [decode] cannot allocate")


if __name__ == "__main__":
    unittest.main()
