"""The command `pdkit`: its sub-commands, what each imports, and what is said where something goes wrong."""

import contextlib
import io
import json
import os
import subprocess
import sys
import tarfile
import unittest
from pathlib import Path
from unittest.mock import patch

from cases import FolderCase, pdkit
from pdkit.cli.main import COMMANDS
from pdkit.core.ci_register import CIRegisterNotFound, register_cpu_ci
from pdkit.core.command import run_command
from pdkit.core.errors import ExitCode, NotReady, UsageError

register_cpu_ci(est_time=6, suite="stage-a-test-cpu")

SCREEN_LINES, SCREEN_COLUMNS = 30, 100
RECORDED_RUN = Path(__file__).with_name("report.tar.xz")
HEAVY = {"sglang", "torch", "transformers"}
IMPORTED = """
import contextlib, io, json, sys
from pdkit.cli.main import main
found = {}
for words in json.loads(sys.argv[1]):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        assert main(words) == (words[0] == "history") * 4, words
    found[" ".join(words)] = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps(found))
"""


class TestCommands(unittest.TestCase):
    def setUp(self):
        self.enterContext(patch.dict("os.environ", COLUMNS=str(SCREEN_COLUMNS)))

    def test_each_is_explained_on_one_screen(self):
        for words in ([], *([name] for name in COMMANDS)):
            with self.subTest(*words):
                code, out, err = pdkit(*words, "--help")
                self.assertEqual((code, err), (0, ""))
                self.assertLessEqual(len(out.splitlines()), SCREEN_LINES, out)
                self.assertLessEqual(max(map(len, out.splitlines())), SCREEN_COLUMNS, out)

    def test_all_are_listed(self):
        _, out, _ = pdkit("--help")
        for name, summary in COMMANDS.items():
            self.assertRegex(out, f"(?m)^    {name} +{summary[:30]}")

    def test_without_a_command_they_are_listed(self):
        self.assertEqual(pdkit(), (2, pdkit("--help")[1], ""))

    def test_output_that_cannot_be_written(self):
        command = [sys.executable, "-m", "pdkit", "lint", "--rules"]
        with open("/dev/full", "w") as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
        error = "pdkit lint: error: output cannot be written: No space left on device\n"
        self.assertEqual((done.returncode, done.stderr), (1, error))

    def test_what_was_meant(self):
        for words, line in (
            (["list", "--hardware", "cpu"], "pdkit list: error: unknown option --hardware; nearest known: --hw"),
            (["list", "--suite", "stage-a-test-gpu"], "nearest known: stage-a-test-cpu"),
            (["list", "more"], "pdkit list: error: unexpected argument 'more'"),
            (
                ["plan", "--suite", "nosuch"],
                "pdkit plan: error: --suite nosuch: its name says no number of GPUs; name one",
            ),
        ):
            with self.subTest(words):
                code, out, err = pdkit(*words)
                self.assertEqual((code, out), (2, ""))
                self.assertIn(line, err)
                self.assertEqual(len(err.splitlines()), 1, err)

    def test_what_a_shell_completes(self):
        for typed, expected in (("pdkit li", "list"), ("pdkit list --targ", "--targets"), ("pdkit run --rep", "--rep")):
            with self.subTest(typed):
                command = ["bash", "-c", f'"{sys.executable}" -m pdkit 8>&1 9>/dev/null']
                asked = {"_ARGCOMPLETE": "1", "COMP_LINE": typed, "COMP_POINT": str(len(typed))}
                done = subprocess.run(command, env={**os.environ, **asked}, stdout=subprocess.PIPE, text=True)
                self.assertIn(expected, done.stdout)


class TestImports(FolderCase):
    def imported(self, *commands: list[str], first: str = "") -> dict[str, list[str]]:
        """Top-level modules that are there after each of `commands`, one after the other in one process."""
        command = [sys.executable, "-c", first + IMPORTED, json.dumps(commands)]
        done = subprocess.run(command, capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        return json.loads(done.stdout)

    def test_what_needs_none_of_them_imports_none_of_them(self):
        with tarfile.open(RECORDED_RUN) as archive:
            archive.extractall(self.root, filter="data")
        (run,) = {path.parent for path in self.root.rglob("results.json")}
        helps = (["--help"], *([name, "--help"] for name in COMMANDS))
        lists = (["list"], ["list", "--targets"], ["plan"], ["lint"], ["preflight", "--record"])
        cpu = ["preflight", "--hw", "cpu", "--suite", "stage-a-test-cpu"]
        found = self.imported(*helps, *lists, cpu, ["report", str(run)], ["history", str(self.write("history.jsonl"))])
        self.assertGreater(len(found), len(COMMANDS))
        for words, modules in found.items():
            self.assertEqual(HEAVY & set(modules), set(), words)

    def test_it_would_be_seen(self):
        self.assertIn("torch", self.imported(["--help"], first="import sys; sys.modules['torch'] = sys")["--help"])

    def test_help_of_one_command_imports_no_other(self):
        modules = self.imported(["--help"])["--help"]
        self.assertEqual({"requests", "rich", "psutil", "numpy", "unittest"} & set(modules), set())


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
