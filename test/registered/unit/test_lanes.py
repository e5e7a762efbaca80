"""Test files side by side: `--jobs N`, none of which can fail, hang or be left behind unseen."""

import contextlib
import itertools
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import time
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

from detached import is_alive
from pdkit.core.ci_register import register_cpu_ci
from pdkit.core.registry import Registration
from pdkit.runner import suite
from pdkit.runner.options import Options
from pdkit.runner.suite import SuiteRun, lanes
from suite_trees import HANG, CommandCase, source_of

register_cpu_ci(est_time=30, suite="stage-a-test-cpu")

REPO = Path(__file__).resolve().parents[3]
SUITE = ["--hw", "cpu", "--suite", "stage-a-test-cpu"]
PASS = source_of()
FAIL = source_of("def test_it(self): self.fail('a reason')")


def cpu(seconds):
    return f'register_cpu_ci(est_time={seconds}, suite="stage-a-test-cpu")'


def meets(me, other, then="pass", seconds=5):
    """A test file that passes only beside another."""
    return source_of(
        f"""
        def test_it(self):
            from pathlib import Path
            from pdkit.core.processes import wait_until
            here = Path(__file__).parent
            (here / "{me}").touch()
            self.assertTrue(wait_until((here / "{other}").exists, 40), "nobody came")
            {then}
        """,
        registration=cpu(seconds),
    )


def registration(name, seconds, hw="cpu"):
    return Registration(f"/t/{name}.py", f"registered/{name}.py", hw, "s", seconds)


class TestOrder(unittest.TestCase):
    FILES = [registration("a", 1), registration("b", 9, hw="cuda"), registration("c", 3), registration("d", 5)]

    def groups(self, jobs=None, cores=4):
        with mock.patch("os.sched_getaffinity", lambda _: set(range(cores))):
            found = lanes(self.FILES, Options(Path("/"), "cpu", "s", jobs=jobs))
        return [([(number, Path(each.filename).stem) for number, each in files], count) for files, count in found]

    def test_the_longest_start_first_and_those_that_need_gpus_are_alone(self):
        self.assertEqual(self.groups(), [([(1, "d"), (2, "c"), (3, "a")], 3), ([(4, "b")], 1)])

    def test_in_order_where_there_is_one_lane(self):
        self.assertEqual(self.groups(cores=1), [([(1, "a"), (2, "c"), (3, "d")], 1), ([(4, "b")], 1)])
        self.assertEqual(self.groups(jobs=1), [([(1, "a"), (2, "b"), (3, "c"), (4, "d")], 1)])

    def test_who_asks_for_it_gets_it(self):
        self.assertEqual(self.groups(jobs=3, cores=1), [([(1, "b"), (2, "d"), (3, "c"), (4, "a")], 3)])

    def test_no_more_lanes_than_files(self):
        self.assertEqual(self.groups(jobs=9)[0][1], 4)


class TestLanes(CommandCase):
    def run_lanes(self, *words, jobs="2", **files):
        files = {f"{name}.py": source for name, source in files.items()}
        return self.run_suite(files, *SUITE, "--jobs", jobs, *words)

    def test_only_beside_others_a_file_is_told_to_be_modest_unless_the_user_says_otherwise(self):
        source = source_of(
            f"""
            def test_it(self):
                import os
                from pathlib import Path
                found = [os.environ.get(name) for name in {[*suite.SIDE_BY_SIDE]}]
                Path(__file__).with_suffix(".found").write_text(str(found))
            """
        )
        modest, named = [*suite.SIDE_BY_SIDE.values()], {next(iter(suite.SIDE_BY_SIDE)): "7"}
        for jobs, given, expected in ((2, {}, modest), (2, named, ["7", *modest[1:]]), (1, {}, [None] * len(modest))):
            with mock.patch.dict("os.environ", given):
                for name in suite.SIDE_BY_SIDE.keys() - given.keys():
                    os.environ.pop(name, None)
                done = self.run_lanes(jobs=str(jobs), test_0=source, test_1=source)
            self.assert_ended(done, 0, "2 passed, 0 failed, 0 skipped")
            self.assertEqual((self.root / "registered" / "test_0.found").read_text(), str(expected))

    def test_two_run_side_by_side(self):
        done = self.run_lanes(test_a=meets("a", "b"), test_b=meets("b", "a"), test_c=PASS)
        self.assert_ended(done, 0, "3 passed, 0 failed, 0 skipped")

    def test_a_file_that_fails_is_seen_in_either_lane_whichever_ends_first(self):
        fail = "self.fail('a reason')"
        wait = 'self.assertTrue(wait_until((here / "ended").exists, 40))'
        end = 'import atexit; atexit.register((here / "ended").touch)'
        for fails in "ab":
            for first in "ab":
                with self.subTest(fails=fails, ends_first=first):
                    for name in ("a", "b", "ended"):
                        (self.root / "registered" / name).unlink(missing_ok=True)
                    a, b = (f"{end if it == first else wait}; {fail if it == fails else 'pass'}" for it in "ab")
                    meeting = {"test_a": meets("a", "b", a, seconds=7), "test_b": meets("b", "a", b)}
                    done = self.run_lanes("--continue-on-error", **meeting, test_c=PASS)
                    self.assert_ended(done, 1, "2 passed, 1 failed, 0 skipped")
                    self.assertRegex(done.stdout, rf"\n\[\d/3\] failed: registered/test_{fails}.py; ")
                    self.assertIn("a reason", done.stdout)

    def test_after_a_failure_no_other_file_is_started(self):
        slow = meets("a", "b", 'self.assertTrue(wait_until((here / "failed").exists, 40))', seconds=9)
        fails = meets("b", "a", '(here / "failed").touch(); self.fail()', seconds=8)
        after = source_of("def test_it(self): open(__file__ + '.ran', 'w').close()")
        done = self.run_lanes("--report-dir", "report", test_a=slow, test_b=fails, test_c=after)
        self.assertEqual(done.returncode, 1, done.stdout)
        states = {entry["file"][-4]: entry["state"] for entry in self.results()}
        self.assertEqual((states["b"], len(states)), ("failed", 3))
        was_free_before = (self.root / "registered" / "test_c.py.ran").exists()  # the lane of a, which ended first
        self.assertEqual(states["c"], "passed" if was_free_before else "not run")

    def results(self):
        return json.loads((self.root / "report" / "results.json").read_text())["files"]

    def test_results_are_in_the_order_of_their_numbers(self):
        files = {f"test_{number}": source_of(registration=cpu(number + 1)) for number in range(5)}
        done = self.run_lanes("--report-dir", "report", **files)
        self.assert_ended(done, 0, "5 passed, 0 failed, 0 skipped")
        self.assertEqual([entry["file"][-4] for entry in self.results()], [*"43210"])
        logs = [entry["attempts"][0]["log"] for entry in self.results()]
        self.assertEqual([log[:3] for log in logs], ["001", "002", "003", "004", "005"])

    def test_what_files_print_is_not_mixed(self):
        prints = "for _ in range(50): print('{0}' * 70, flush=True)"
        a, b = (f"{prints.format(mark)}; self.fail()" for mark in "#@")
        done = self.run_lanes("--continue-on-error", test_a=meets("a", "b", a), test_b=meets("b", "a", b))
        lines = [line.strip() for line in done.stdout.splitlines()]
        blocks = [mark for mark, _ in itertools.groupby(line for line in lines if line in ("#" * 70, "@" * 70))]
        self.assertEqual(sorted(blocks), ["#" * 70, "@" * 70])

    def test_a_timeout_and_what_is_left_behind_end_in_their_lane_alone(self):
        done = self.run_lanes("--continue-on-error", "--timeout-per-file", "10", test_a=HANG, test_b=PASS, test_c=PASS)
        self.assert_ended(done, 1, "2 passed, 1 failed, 0 skipped")
        why = r"after \d+ s in phase first request; its processes were ended"
        self.assertRegex(done.stdout, rf"timed out: registered/test_a\.py; .*{why}")
        self.assertIn("\n  hangs in phase first request\n", done.stdout)
        self.assertRegex(done.stdout, r"\n +T\.test_it \(test_a\.py:\d+\)\n")
        self.assertIn("\n  last lines of test:\n", done.stdout)
        self.assert_sleeper_gone(done.stdout)

    def test_a_signal_reaches_every_lane(self):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            with self.subTest(number):
                files = {"test_a.py": HANG, "test_b.py": HANG, "test_c.py": PASS}
                command = self.command(files, *SUITE, "--jobs", "2", "--report-dir", "report")
                shutil.rmtree(self.root / "report", ignore_errors=True)
                process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=self.root)
                self.addCleanup(process.kill)
                with ThreadPoolExecutor() as pool:
                    output = pool.submit(process.communicate)
                    try:
                        sleepers = self.wait_for_sleepers(process, 2)
                    finally:
                        process.send_signal(number)
                    output = output.result()[0].decode()
                self.assertEqual(process.returncode, 130, output)
                self.assertIn(f"interrupted by {number.name}\n", output)
                self.assertEqual(output.splitlines()[-1], "0 passed, 2 failed, 1 skipped")
                self.assertNotIn("KeyboardInterrupt", output)
                self.assertEqual([entry["state"] for entry in self.results()], ["interrupted"] * 2 + ["not run"])
                self.assertEqual([pid for pid in sleepers if is_alive(pid)], [])

    def wait_for_sleepers(self, process, count):
        found = []
        while len(found) < count and process.poll() is None:
            logs = (self.root / "report").glob("*.log")
            time.sleep(0.05)
            found = [int(pid) for log in logs for pid in re.findall(r"^sleeper (\d+)\n", log.read_text(), re.M)]
        return found

    def test_nohup_stays_nohup(self):
        source = source_of("def test_it(self):\n    import os\n    os.kill(int(os.environ['RUNNER']), 1)")
        command = self.command({"test_a.py": source}, *SUITE)
        nohup = ["bash", "-c", 'trap "" HUP; export RUNNER=$$; exec "$@"', "bash", *command]
        done = subprocess.run(nohup, capture_output=True, text=True, timeout=60)
        self.assert_ended(done, 0, "1 passed, 0 failed, 0 skipped")

    def test_what_breaks_a_lane_breaks_the_run(self):
        """A mistake of the runner's own, not of a test file."""
        files = [registration("a", 1), registration("b", 1)]
        selection = suite.Selection(tuple(files), (), {})
        run = SuiteRun(selection, Options(Path("/t"), "cpu", "s", jobs=2), self.root, self.root, suite.Interruption())
        breaks = mock.patch.object(SuiteRun, "_run_file", side_effect=ZeroDivisionError)
        with breaks, self.assertRaises(ZeroDivisionError):
            run.run()


class TestQuiet(CommandCase):
    """About one line per file; what failed, and why, comes last."""

    DIES = source_of(
        """
        def test_it(self):
            import os
            from pathlib import Path
            from pdkit.core import events
            log = Path(os.environ["SGLANG_PD_LOG_DIR"], "T.decode.log")
            log.write_text("noise\\n" * 999 + "CUDA error: an illegal memory access\\n")
            with events.phase("gsm8k"):
                events.launch("decode", ["python3"], log, 1)
                events.death("decode", "decode exited with code 7", log=log)
                print("noise of a client\\n" * 999, flush=True)
                self.fail("no answer\\nwithin 300 s")
        """
    )
    NOISY = source_of("def test_it(self): print('noise of a server\\n' * 999, flush=True)")

    def run_quiet(self, environment=None):
        files = {f"test_{number}.py": self.NOISY for number in range(6)} | {"test_6.py": self.DIES, "test_7.py": FAIL}
        words = [*SUITE, "--jobs", "2", "--continue-on-error"]
        done = self.run_suite(files, *words, environment=environment)
        self.assert_ended(done, 1, "6 passed, 2 failed, 0 skipped")
        return done.stdout.splitlines()

    def test_two_lines_per_file_and_the_causes_at_the_end(self):
        lines = self.run_quiet()
        rule = lines.index("=" * 60)
        ours = [line for line in lines[:rule] if line.startswith("[")]
        self.assertEqual(len(ours), 2 * 8)
        self.assertLess(rule, 2 * 8 + 8 + 6)
        self.assertLess(len(lines) - rule, 100)
        causes = next(number for number, line in enumerate(lines) if line.startswith("failed: registered/test_6.py; "))
        cause = ["  in phase gsm8k", "  died first: decode exited with code 7", "  failed: __main__.T.test_it"]
        self.assertEqual(lines[causes + 1 : causes + 6], [*cause, "  no answer", "  within 300 s"])
        self.assertRegex(lines[causes + 7], "^failed: registered/test_7.py; .*exit code 1$")
        self.assertEqual(lines[causes + 8 : causes + 10], ["  failed: __main__.T.test_it", "  a reason"])
        self.assertRegex(lines[-2], r"^failed in [\d.]+ s$")
        self.assertEqual(len(lines), causes + 13)
        self.assertLess(rule, lines.index("  CUDA error: an illegal memory access"))
        self.assertLess(lines.index("  CUDA error: an illegal memory access"), causes)
        log = Path(lines[causes + 6].partition("log: ")[2])
        self.assertEqual(log.read_text().count("noise of a client\n"), 999)
        self.assertEqual((log.with_suffix("") / "T.decode.log").read_text().count("noise\n"), 999)
        self.assertFalse(any("noise of a server" in line for line in lines))

    def test_logs_are_groups_on_github(self):
        lines = self.run_quiet(environment={"GITHUB_ACTIONS": "true"})
        begins = [number for number, line in enumerate(lines) if line.startswith("::group::")]
        ends = [number for number, line in enumerate(lines) if line == "::endgroup::"]
        self.assertEqual([lines[at] for at in begins], [f"::group::logs of registered/test_{n}.py" for n in (6, 7)])
        self.assertEqual((len(ends), begins[0] < ends[0] < begins[1] < ends[1]), (2, True))
        noise = lines[begins[0] : ends[0]].count("  noise of a client")
        self.assertTrue(200 < noise < 300, noise)
        self.assertLess(len(lines) - ends[1], 20)

    def test_one_line_per_file_on_a_terminal(self):
        command = self.command({"test_0.py": self.NOISY, "test_1.py": self.NOISY}, *SUITE, "--jobs", "2")
        reader, writer = pty.openpty()
        process = subprocess.Popen(command, stdout=writer, stderr=writer)
        self.addCleanup(process.kill)
        os.close(writer)
        output = b""
        with contextlib.suppress(OSError):  # so ends a terminal that nobody has open any more
            while chunk := os.read(reader, 65536):
                output += chunk
        os.close(reader)
        self.assertEqual(process.wait(), 0, output)
        text = output.decode().replace("\r\n", "\n")
        self.assertRegex(text, r"\[\d/2\] registered/test_\d.py \d+ s\n\[\d/2\] registered/test_\d.py \d+ s")
        self.assertEqual(len(re.findall(r"\[\d/2\] passed: registered/test_\d.py; ", text)), 2)
        self.assertNotIn("estimated 5 s, limit", text)
        self.assertNotIn("noise", text)


class TestTestSh(unittest.TestCase):
    def test_arguments_go_to_the_runner(self):
        environment = {**os.environ, "PDKIT_PYTHON": shutil.which("python3"), "CUDA_VISIBLE_DEVICES": ""}
        command = [REPO / "scripts" / "test.sh", "--list", "--json"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        self.assertEqual(done.returncode, 0, done.stderr)
        listed = json.loads(done.stdout)
        self.assertEqual((listed["hw"], listed["suite"]), ("cpu", "stage-a-test-cpu"))
        self.assertIn("registered/unit/test_lanes.py", [entry["file"] for entry in listed["files"]])


if __name__ == "__main__":
    unittest.main()
