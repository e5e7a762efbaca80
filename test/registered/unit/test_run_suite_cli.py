"""The command `run_suite.py` as a user meets it: real processes on small trees; what it prints of each is in a record."""

import json
import os
import re
import signal
import subprocess
import sys
import unittest

import psutil
from detached import is_alive
from pdkit.core.ci_register import register_cpu_ci
from pdkit.core.errors import MEANINGS
from pdkit.runner.owner import TOKEN_VARIABLE, new_token
from suite_trees import HANG, SUITE, CommandCase, source_of

register_cpu_ci(est_time=40, suite="stage-a-test-cpu")

PASS = source_of()
FAIL = source_of("def test_it(self): self.fail()")
SKIP = source_of("def test_it(self): self.skipTest('no GPU')")
CODE_ERROR = source_of("def test_it(self): raise TypeError('a score')")
EMPTY = source_of("x = 1")
SILENT = source_of(main='\nif __name__ == "__main__":\n    print("fine")\n')
DISABLED = source_of(registration='register_cpu_ci(est_time=5, suite="stage-a-test-cpu", disabled="see #7")')


class TestRun(CommandCase):
    def test_pass(self):
        done = self.run_to_end(0, "2 passed, 0 failed, 0 skipped", PASS, PASS)
        self.assertRegex(done.stdout.splitlines()[0], "^suite stage-a-test-cpu on cpu: 2 files, estimated 10 s")
        self.assertEqual(len(re.findall(r"^\[\d/2\] passed: registered/test_\d.py", done.stdout, re.MULTILINE)), 2)
        self.assertNotIn("Ran 1 test in", done.stdout)
        self.assertEqual([path.name for path in self.root.iterdir()], ["registered"])

    def test_what_files_print_is_shown_on_request(self):
        done = self.run_to_end(0, "2 passed, 0 failed, 0 skipped", PASS, PASS, words=["-v"])
        self.assertEqual(done.stdout.count("\nRan 1 test in"), 2)
        command = rf"(?m)^\$ {sys.executable} -m pdkit.core.recording {self.root}/registered/test_0.py -f$"
        self.assertRegex(done.stdout, command)

    def test_failfast_within_a_file(self):
        two = source_of("def test_a(self): self.fail()\ndef test_b(self): self.fail()")
        self.assertIn("tests: 1 run, 0 skipped, 1 failed", self.run_files(two).stdout)
        self.assertIn("tests: 2 run, 0 skipped, 2 failed", self.run_files(two, words=["--no-failfast"]).stdout)

    def test_what_ran_no_test_is_not_passed(self):
        for name, sources, tally in (
            ("nothing ran", [EMPTY], "0 passed, 0 failed, 1 skipped"),
            ("no closing line", [SILENT], "0 passed, 0 failed, 1 skipped"),
            ("disabled", [DISABLED], "0 passed, 0 failed, 1 skipped"),
            ("all skipped", [SKIP, PASS], "1 passed, 0 failed, 1 skipped"),
        ):
            with self.subTest(name, files=len(sources)):
                done = self.run_files(*sources)
                self.assert_ended(done, 4, tally)
                self.assertIn(name, done.stdout)

    def test_a_file_that_changes_while_the_suite_runs_fails_alone(self):
        for change in ("open(path, 'w').write('def (:')", "os.unlink(path)"):
            changes = source_of(f"def test_it(self):\n    import os; path = __file__.replace('0.py', '1.py'); {change}")
            done = self.run_files(changes, PASS, PASS, words=["--continue-on-error"])
            self.assert_ended(done, 1, "2 passed, 1 failed, 0 skipped")

    def test_death_by_signal(self):
        done = self.run_to_end(
            1,
            "0 passed, 1 failed, 0 skipped",
            source_of("def test_it(self):\n    import os\n    os.kill(os.getpid(), 9)"),
        )
        self.assertIn("killed by SIGKILL", done.stdout)

    def test_environment_of_the_files(self):
        show = source_of(
            """
            def test_it(self):
                import os, subprocess
                names = "SGLANG_TEST_MAX_RETRY", "SGLANG_IS_IN_CI"
                print({name: os.environ.get(name) for name in names}, flush=True)
                subprocess.check_call(["python3", "-c", "import sys; print('prefix', sys.prefix)"])
            """
        )
        environment = {"SGLANG_TEST_MAX_RETRY": "3", "SGLANG_IS_IN_CI": "true"}
        done = self.run_files(show, words=["-v"], environment=environment)
        self.assertIn("{'SGLANG_TEST_MAX_RETRY': '0', 'SGLANG_IS_IN_CI': 'true'}", done.stdout)
        self.assertIn("SGLANG_TEST_MAX_RETRY=3 of the environment is ignored", done.stdout)
        self.assertIn(f"prefix {sys.prefix}\n", done.stdout)
        done = self.run_files(show, words=["-v", "--test-max-retry", "2"], environment=environment)
        self.assertIn("{'SGLANG_TEST_MAX_RETRY': '2', 'SGLANG_IS_IN_CI': 'true'}", done.stdout)


class TestPrograms(CommandCase):
    """What a file is judged by, that is no unittest program."""

    def printing(self, text):
        return source_of(main=f'\nif __name__ == "__main__":\n    print({text!r})\n')

    def test_pytest_by_its_closing_line(self):
        for closing, code in (("== 1 passed in 0.01s ==", 0), ("== 1 skipped in 0.01s ==", 4), ("1 failed in 0.1s", 1)):
            with self.subTest(closing):
                self.assertEqual(self.run_files(self.printing(closing)).returncode, code)

    def test_who_prints_what_unittest_prints_has_run_nothing(self):
        self.run_to_end(4, "0 passed, 0 failed, 1 skipped", self.printing(f".\n{'-' * 70}\nRan 1 test in 0.001s\n\nOK"))

    def test_who_swallows_the_exit_has_failed_all_the_same(self):
        for main in ("unittest.main(exit=False)", "try: unittest.main()\n    except SystemExit: pass"):
            swallows = f'\nif __name__ == "__main__":\n    {main}\n'
            source = source_of("def test_it(self): self.fail()", main=swallows)
            done = self.run_to_end(1, "0 passed, 1 failed, 0 skipped", source)
            self.assertIn("exit code 0, but tests of it failed", done.stdout)

    def test_who_leaves_before_its_tests_have_ended_has_failed(self):
        self.run_to_end(4, "0 passed, 0 failed, 1 skipped", source_of("def test_it(self): import os; os._exit(0)"))
        two = source_of("def test_1(self): pass\ndef test_2(self): import os; os._exit(0)")
        done = self.run_to_end(1, "0 passed, 1 failed, 0 skipped", two)
        self.assertIn("exit code 0, but it ended before unittest did", done.stdout)


class TestRetry(CommandCase):
    RETRY = ("--enable-retry", "--retry-wait-seconds", "0")

    def test_attempts_are_bounded(self):
        done = self.run_to_end(1, "0 passed, 1 failed, 0 skipped", FAIL, words=[*self.RETRY, "--max-attempts", "3"])
        self.assertIn("3 attempts", done.stdout)

    def test_errors_in_the_code_are_not_retried(self):
        done = self.run_to_end(1, "0 passed, 1 failed, 0 skipped", CODE_ERROR, words=self.RETRY)
        self.assertNotIn("attempts", done.stdout)

    def test_a_timeout_is_retried(self):
        words = [*self.RETRY, "--timeout-per-file", "0.5", "--retry-timeout-increase", "0"]
        done = self.run_to_end(1, "0 passed, 1 failed, 0 skipped", HANG, words=words)
        self.assertIn("2 attempts", done.stdout)

    def test_a_retried_method_is_shown_as_such(self):
        source = source_of(
            """
            def test_it(self):
                print("retry() failed once (0th try, maximum 1 retries). Will delay 2.00s and retry. Error: x")
            """
        )
        done = self.run_to_end(0, "1 passed, 0 failed, 0 skipped", source, words=["--test-max-retry", "1"])
        self.assertIn("passed on retry: registered/test_0.py", done.stdout)
        self.assertNotIn("passed: ", done.stdout)


class TestReport(CommandCase):
    def test_logs_and_results(self):
        report = self.root / "new" / "report"
        done = self.run_files(PASS, FAIL, SKIP, DISABLED, words=["--continue-on-error", "--report-dir", str(report)])
        self.assertEqual(done.returncode, 1)
        results = json.loads((report / "results.json").read_text())
        self.assertEqual((results["exit_code"], results["result"], results["finished"]), (1, "failed", True))
        self.assertEqual((results["hw"], results["suite"]), ("cpu", "stage-a-test-cpu"))
        states = [entry["state"] for entry in results["files"]]
        self.assertEqual(states, ["passed", "failed", "all skipped", "disabled"])
        entry = results["files"][1]
        self.assertEqual(entry["tests"], {"executed": 1, "skipped": 0, "failed": 1, "retried": 0})
        command = [sys.executable, "-m", "pdkit.core.recording", str(self.root / "registered/test_1.py"), "-f"]
        self.assertEqual(entry["command"], command)
        self.assertEqual((entry["exit_code"], len(entry["attempts"])), (1, 1))
        self.assertIn("FAILED (failures=1)", (report / entry["attempts"][0]["log"]).read_text())

    def test_results_are_not_claimed_before_the_end(self):
        peek = source_of(
            """
            def test_it(self):
                import json, os
                with open(os.environ["PEEK"]) as file:
                    results = json.load(file)
                self.assertEqual((results["finished"], results["exit_code"], results["result"]), (False, None, None))
                self.assertEqual([entry["state"] for entry in results["files"]], ["passed"])
            """
        )
        options = {"words": ["--report-dir", "report"], "environment": {"PEEK": str(self.root / "report/results.json")}}
        self.run_to_end(0, "2 passed, 0 failed, 0 skipped", PASS, peek, **options)

    def test_what_cannot_be_kept_is_said_and_changes_no_verdict(self):
        report = self.root / "report"
        (report / "results.json").mkdir(parents=True)
        done = self.run_to_end(0, "1 passed, 0 failed, 0 skipped", PASS, words=["--report-dir", str(report)])
        self.assertRegex(done.stdout, rf"(?m)^cannot be kept: {report}/.*: Is a directory$")

    def test_a_test_that_removes_the_channel_of_its_events_has_not_passed(self):
        removes = source_of(
            """
            def test_it(self):
                import os, shutil
                shutil.rmtree(os.environ["PDKIT_REPORT_DIR"])
            """
        )
        for words in ([], ["--report-dir", str(self.root / "report")]):
            done = self.run_to_end(4, "0 passed, 0 failed, 1 skipped", removes, words=words)
            lost = r"(?m)^  .*\[events\] test is lost, /.*/001-test_0.1: No such file or directory$"
            self.assertRegex(done.stdout, lost)

    def test_a_full_disk_hangs_nothing_and_is_no_pass(self):
        """A limit on the size of files stands in for it: writing fails in the same way."""
        talks = source_of("""
            def test_it(self):
                from pdkit.core import events

                for _ in range(100):
                    print("y" * 4095, flush=True)
                    events.emit("note", text="y" * 1000)
        """)
        command = self.command({"test_0.py": talks}, *SUITE, "-v", "--report-dir", str(self.root / "report"))
        limited = ["bash", "-c", 'ulimit -f 64; exec "$@"', "bash", *command]
        done = subprocess.run(limited, capture_output=True, text=True, timeout=60)
        self.assert_ended(done, 4, "0 passed, 0 failed, 1 skipped")
        self.assertRegex(done.stdout, r"(?m)^cannot be kept: /.*/001-test_0.1.log: File too large$")
        self.assertRegex(done.stdout, r"(?m)\[events\] test is lost, /.*/001-test_0.1: File too large$")
        self.assertEqual(done.stdout.count("y" * 4095), 100)


class TestInterrupt(CommandCase):
    def test_sigkill_of_the_guardian_too(self):
        """Below a token of its own, so that no run beside it takes the leftovers."""
        environment = os.environ | {TOKEN_VARIABLE: new_token(os.environ)}
        command = self.command({"test_0.py": HANG}, *SUITE, "-v")
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
        self.enterContext(process)
        self.addCleanup(process.kill)
        sleeper = next(int(line.split()[1]) for line in process.stdout if line.startswith(b"sleeper"))
        (guardian,) = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGSTOP)
        guardian.kill()
        process.kill()
        process.wait()
        self.addCleanup(lambda: is_alive(sleeper) and os.kill(sleeper, signal.SIGKILL))
        self.assertTrue(is_alive(sleeper))
        done = self.run_suite({"test_0.py": PASS}, *SUITE, environment=environment)
        self.assert_ended(done, 0, "1 passed, 0 failed, 0 skipped")
        self.assertRegex(done.stdout, rf"(?m)^left behind by an earlier run, .*; ended now: pid {sleeper} \(")
        self.assertFalse(is_alive(sleeper))


class TestList(CommandCase):
    FILES = {"unit/test_a.py": PASS, "unit/test_b.py": DISABLED}

    def test_table(self):
        done = self.run_suite(self.FILES, "--list")
        self.assertEqual(done.returncode, 0, done.stderr)
        header, a, b, total = done.stdout.splitlines()
        self.assertEqual(header.split(), ["FILE", "SUITE", "HW", "EST", "NIGHTLY", "PARTITION", "DISABLED"])
        self.assertEqual(a.split(), ["registered/unit/test_a.py", "stage-a-test-cpu", "cpu", "5", "s", "no", "-", "-"])
        self.assertTrue(b.endswith("see #7"))
        self.assertEqual(total, "1 file would run, estimated 5 s; 1 disabled")

    def test_json(self):
        words = ["--list", "--json", *SUITE, "--auto-partition-size", "2"]
        done = self.run_suite(self.FILES, *words)
        document = json.loads(done.stdout)
        self.assertEqual((document["suite"], document["est_time"], document["partition_size"]), (SUITE[3], 5, 2))
        a, b = document["files"]
        self.assertEqual((a["file"], a["partition"], a["disabled"]), ("registered/unit/test_a.py", 0, None))
        self.assertEqual((b["partition"], b["disabled"]), (None, "see #7"))

    def test_nothing_would_run(self):
        done = self.run_suite({"test_b.py": DISABLED}, "--list", *SUITE)
        self.assertEqual(done.returncode, 4)
        self.assertIn("0 files would run", done.stdout)

    def test_nothing_heavy_is_imported(self):
        command = self.command(self.FILES, "--list")
        source = (
            "import runpy, sys\n"
            "sys.argv = sys.argv[1:]\n"
            "try:\n"
            "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "except SystemExit as end:\n"
            "    heavy = {'torch', 'sglang', 'numpy', 'psutil', 'rich'} & set(sys.modules)\n"
            "    print(f'exit {end.code}, heavy {heavy}')\n"
        )
        done = subprocess.run([sys.executable, "-c", source, *command[1:]], capture_output=True, text=True)
        self.assertEqual(done.stdout.splitlines()[-1], "exit 0, heavy set()", done.stderr)

    def test_a_reader_that_leaves_early(self):
        process = subprocess.Popen(self.command(self.FILES, "--list"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdout.close()
        self.assertEqual(process.stderr.read(), b"")
        process.stderr.close()
        process.wait()


class TestBadInput(CommandCase):
    def test_bad_registrations_are_all_named(self):
        files = {
            "test_a.py": source_of(registration=""),
            "test_b.py": source_of(main=""),
            "test_c.py": source_of(registration='register_cpu_ci(est_time=N, suite="s")'),
            "test_d.py": PASS,
        }
        for words in (["--list"], SUITE):
            self.assert_usage_error(
                self.run_suite(files, *words),
                f"No CI registry found in {self.root}/registered/test_a.py",
                f"{self.root}/registered/test_b.py: missing `if __name__",
                f"{self.root}/registered/test_c.py: est_time is a required constant in register_cpu_ci()",
            )

    def test_a_selected_file_that_is_not_python(self):
        done = self.run_files(PASS, source_of("def test_it(self): a b"))
        self.assert_usage_error(done, "registered/test_1.py:9: not valid Python: ")

    def test_report_directory_cannot_be_written(self):
        (self.root / "report" / "environment.json").mkdir(parents=True)
        done = self.run_files(PASS, words=["--report-dir", str(self.root / "report")])
        self.assert_usage_error(done, f"--report-dir {self.root}/report/environment.json: Is a directory")

    def test_without_sglang(self):
        for words, code in ((["--list"], 0), ([*SUITE, "--list", "--auto-partition-size", "2"], 3)):
            command = [sys.executable, "-I", "-S", *self.command({"test_a.py": PASS}, *words)[1:]]
            done = subprocess.run(command, capture_output=True, text=True)
            self.assertEqual(done.returncode, code, done.stderr)
        self.assertRegex(done.stderr, "^run_suite.py: error: sglang.* is not installed for .*: pip install sglang\n$")

    def test_help_names_the_exit_codes(self):
        done = self.run_suite({}, "--help")
        self.assertEqual(done.returncode, 0)
        text = " ".join(done.stdout.split())
        for code, meaning in MEANINGS.items():
            self.assertIn(f"{int(code)} {meaning}", text)


if __name__ == "__main__":
    unittest.main()
