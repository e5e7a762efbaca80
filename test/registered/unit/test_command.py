"""What a command says and returns where something goes wrong."""

import contextlib
import io
import subprocess
import sys
import unittest

from pdkit.core.ci_register import CIRegisterNotFound, register_cpu_ci
from pdkit.core.command import run_command
from pdkit.core.errors import ExitCode, NotReady, UsageError

register_cpu_ci(est_time=1, suite="stage-a-test-cpu")


class TestRunCommand(unittest.TestCase):
    def ends(self, error):
        def main(argv):
            self.assertEqual(argv, ["x"])
            raise error

        with contextlib.redirect_stderr(io.StringIO()) as said:
            code = run_command("tool.py", main, ["x"])
        return code, said.getvalue()

    def test_what_is_expected_is_a_line_each_and_a_code(self):
        for error, code, said in (
            (UsageError("one\ntwo"), ExitCode.BAD_USAGE, "tool.py: error: one\ntool.py: error: two\n"),
            (NotReady("no GPU"), ExitCode.NOT_READY, "tool.py: error: no GPU\n"),
            (CIRegisterNotFound("no sglang"), ExitCode.NOT_READY, "tool.py: error: no sglang\n"),
            (FileNotFoundError(2, "No such file", "/x"), ExitCode.BAD_USAGE, "tool.py: error: /x: No such file\n"),
            (KeyboardInterrupt(), ExitCode.INTERRUPTED, ""),
        ):
            with self.subTest(repr(error)):
                self.assertEqual(self.ends(error), (code, said))

    def test_a_bug_is_raised(self):
        for error in (ValueError("bug"), ProcessLookupError(3, "No such process"), SystemExit(7)):
            with self.subTest(repr(error)), self.assertRaises(type(error)):
                self.ends(error)

    def test_the_code_of_the_command(self):
        self.assertIs(run_command("tool.py", lambda argv: ExitCode.NOTHING_RAN, []), ExitCode.NOTHING_RAN)

    def test_a_reader_that_leaves(self):
        source = "import sys; from pdkit.core.command import run_command; "
        source += "sys.exit(run_command('x', lambda argv: print('x' * 100_000) or 0, []))"
        with subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as tool:
            tool.stdout.close()
            self.assertEqual((tool.stderr.read(), tool.wait()), (b"", 0))


if __name__ == "__main__":
    unittest.main()
