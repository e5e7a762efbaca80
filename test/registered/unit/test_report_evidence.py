"""What a run leaves behind: real runs of small test files, secrets in their environment and output, a slow phase."""

import io
import json
import os
import re
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from cases import FolderCase, without
from pdkit.core import events
from pdkit.core.ci_register import register_cpu_ci
from pdkit.core.console import Console
from pdkit.core.events import FILE
from pdkit.core.host import command_line
from pdkit.core.secrets import REMOVED, Redactor, cleaned, is_secret, redacted, scrub, secret_values
from pdkit.runner.report import evidence
from pdkit.runner.report.evidence import GPU_PLAN_FILE
from pdkit.runner.report.progress import Board, environment
from suite_trees import RUN_SUITE, SUITE, run_tree, source_of

register_cpu_ci(est_time=8, suite="stage-a-test-cpu")

SECRET = "sk-0123456789"

TEST_FILE = source_of(
    """
    def test_x(self):
        import os, subprocess, sys
        from pathlib import Path
        from pdkit.core import events

        events.emit("note", key=os.environ["MY_API_KEY"])
        Path(os.environ["SGLANG_PD_LOG_DIR"], "T.prefill.log").write_text("api_key='%s'" % os.environ["MY_API_KEY"])
        Path(os.environ["SGLANG_TEST_METRICS_OUTPUT"] + ".1.jsonl").write_text("{}")
        print("the key is", os.environ["MY_API_KEY"], os.environ["PROXY"], flush=True)
        subprocess.Popen(["sh", "-c", "sleep 60; : $0", os.environ["MY_API_KEY"]], start_new_session=True)
        if os.environ.get("HANG"):
            source = "import time; print('up', flush=True); time.sleep(60)"
            child = subprocess.Popen([sys.executable, "-c", source, os.environ["MY_API_KEY"]], stdout=subprocess.PIPE)
            child.stdout.readline()
            print("ready", flush=True)
            child.wait()
        self.fail("on purpose")
    """
)


class TestRun(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.directory = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.report = cls.directory / "report"
        environ = without("SGLANG_", "PDKIT_")
        environ |= {"MY_API_KEY": SECRET, "PROXY": "http://me:hunter22@proxy:3128/", "HEADER": f"Bearer {SECRET}"}

        def run(report, *words, **more):
            words = [*SUITE, "--skip-environment-check", "--report-dir", str(report), *words]
            return run_tree(cls.directory, {"test_x.py": TEST_FILE}, *words, environment=environ | more)

        cls.suite = run(cls.report)
        cls.hung = run(cls.directory / "hung", "--timeout-per-file", "6", HANG="1")

    def test_all_is_kept(self):
        self.assertEqual(self.suite.returncode, 1, self.suite.stdout)
        names = {str(path.relative_to(self.report)) for path in self.report.rglob("*") if path.is_file()}
        left = {f"001-test_x.1/{name}" for name in ("T.prefill.log", "metrics.1.jsonl", "events.jsonl")}
        self.assertLessEqual({"environment.json", "results.json", "001-test_x.1.log"} | left, names)

    def test_environment(self):
        recorded = json.loads((self.report / "environment.json").read_text())
        self.assertEqual(recorded["command"][1], str(RUN_SUITE))
        self.assertIn("torch", recorded["versions"])
        shown = {name: recorded["environment"][name] for name in ("MY_API_KEY", "PROXY", "HEADER")}
        told = {"MY_API_KEY": "(removed)", "PROXY": "http://(removed)@proxy:3128/", "HEADER": "Bearer (removed)"}
        self.assertEqual(shown, told)

    def test_no_secret_anywhere(self):
        self.assertIn("the key is (removed) http://(removed)@proxy:3128/\n", self.suite.stdout)
        for path in filter(Path.is_file, self.report.rglob("*")):
            for secret in (SECRET, "hunter22"):
                self.assertNotIn(secret, path.read_text(), path)

    def test_no_secret_of_an_argument(self):
        self.assertRegex(self.suite.stdout, r"ended now: pid \d+ \(sh -c .*\(removed\)\)")
        stacks = next((self.directory / "hung").glob("*.hang.txt")).read_text()
        self.assertIn("time.sleep(60) (removed)", stacks)
        for path in filter(Path.is_file, (self.directory / "hung").rglob("*")):
            self.assertNotIn(SECRET, path.read_text(), path)


class TestAgain(FolderCase):
    def test_nothing_of_an_earlier_run_is_left(self):
        directory = "001-test_x.1"
        of_a_file = (f"{directory}/{FILE}", f"{directory}/metrics.1.jsonl", f"{directory}.hang.txt")
        old = [self.write(name, "{}") for name in (*of_a_file, GPU_PLAN_FILE, "report.html")]
        theirs = [self.write(name, "{}") for name in ("notes.txt", "001-test_x.2.log")]
        evidence.begin(self.root, ())
        evidence.start(self.root / f"{directory}.log")
        self.assertEqual([path for path in old[1:] if path.exists()], [])
        self.assertEqual([event["kind"] for event in events.read(old[0])], ["started"])
        self.assertEqual([path for path in theirs if not path.exists()], [])


class TestSecrets(FolderCase):
    def test_names(self):
        for name in (
            *("HF_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "npm_config__auth", "PGPASSWORD"),
            *("GITHUB_PAT", "MYSQL_PWD", "SESSION_COOKIE", "AccessToken", "DB_PASS", "LITELLM_KEYS"),
        ):
            self.assertTrue(is_secret(name), name)
        for name in ("SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK", "PWD", "KEYBOARD", "MONKEY", "PATH"):
            self.assertFalse(is_secret(name), name)

    def test_values(self):
        environ = {"A_KEY": SECRET, "OPENAI_API_KEY": "EMPTY", "B_TOKEN": "abc", "C": "x"}
        environ |= {"URL": "https://user:pa55@h/"}
        self.assertEqual(secret_values(environ), (SECRET, "user:pa55"))
        self.assertEqual(redacted(environ)["URL"], "https://(removed)@h/")
        environ = {"URL": "https://user:hunter@22@h/a@b"}
        self.assertEqual(secret_values(environ), ("user:hunter@22", "hunter@22"))
        self.assertEqual(redacted(environ)["URL"], "https://(removed)@h/a@b")

    def test_a_secret_as_json_has_it_and_each_of_its_lines(self):
        environ = {"A_KEY": 'quo"ted\\key', "SSH_KEY": "-----BEGIN\nbase64 of it\n"}
        for text in (environ["A_KEY"], json.dumps(environ["A_KEY"])[1:-1], "base64 of it"):
            self.assertEqual(cleaned(f"x {text} y", environ), f"x {REMOVED} y")

    def test_the_command_of_the_run(self):
        with mock.patch.object(sys, "argv", ["x", SECRET]), mock.patch.dict(os.environ, A_KEY=SECRET):
            self.assertEqual(command_line()[1:], ["x", REMOVED])

    def test_urls_in_other_texts(self):
        self.assertEqual(cleaned("curl http://me:pw@h:80/x", {}), "curl http://(removed)@h:80/x")
        body = '{"url": "http://h:30000", "mail": "a@b"}'
        self.assertEqual(cleaned(body, {}), body)

    def test_a_secret_that_is_cut_in_two(self):
        for cut in range(1, len(SECRET)):
            redactor = Redactor([SECRET])
            parts = [redactor.feed(part.encode()) for part in (f"a {SECRET[:cut]}", f"{SECRET[cut:]} b sk-01")]
            self.assertEqual(b"".join([*parts, redactor.feed(b"")]), b"a (removed) b sk-01")

    def test_nothing_is_held_back_without_need(self):
        self.assertEqual(Redactor([SECRET]).feed(b"120/200"), b"120/200")
        self.assertEqual(Redactor([]).feed(b"x"), b"x")

    def test_scrub(self):
        guilty = self.write("a", f"x{SECRET}y")
        self.write("b", "innocent")
        self.assertEqual(scrub(self.root, [SECRET]), [guilty])
        self.assertEqual(guilty.read_text(), "x(removed)y")
        with mock.patch.object(Path, "read_bytes", side_effect=AssertionError("there is nothing to look for")):
            self.assertEqual(scrub(self.root, []), [])


class Terminal(io.BytesIO):
    def isatty(self):
        return True

    def screen(self):
        """The lines that are seen: what was written, after erasing lines and moving up as a terminal does."""
        rows, at = [""], 0
        for text in re.split(r"(\r\x1b\[K|\x1b\[A|\n)", self.getvalue().decode()):
            if text == "\n":
                at += 1
                rows += [""] * (at == len(rows))
            elif text == "\x1b[A":
                at -= 1
            elif text == "\r\x1b[K":
                rows[at] = ""
            else:
                rows[at] += text
        return [row for row in rows if row]


class TestBoard(FolderCase):
    now = 1000.0

    def board(self, stream, *names):
        self.stream = stream
        self.console = Console(stream)
        board = Board(self.console, clock=lambda: self.now)
        for name in names:
            (self.root / name).mkdir()
            board.begins(name, self.root / name)
        return board

    def emit(self, file, kind, **fields):
        with mock.patch("time.time", lambda: self.now):
            events.append(self.root / file, kind, **fields)

    def lines(self):
        return self.stream.getvalue().decode().splitlines()

    def test_a_line_now_and_then(self):
        board = self.board(io.BytesIO(), "a")
        self.now += 10
        self.emit("a", "phase", name="gsm8k", state="begins")
        for self.now in range(1011, 1130):
            if self.now == 1014:
                self.emit("a", "progress", done=120, total=200, score=0.983)
            if self.now == 1100:
                self.emit("a", "phase", name="gsm8k", state="passed", seconds=90.0)
            board.tick()
        self.assertEqual(self.lines(), ["a 60 s; gsm8k 50 s, 120/200, score so far 0.983", "a 120 s"])

    def test_nothing_of_who_is_quick(self):
        board = self.board(io.BytesIO(), "a", "b")
        self.now += 59
        board.tick()
        board.ends(self.root / "a")
        self.now += 2
        board.tick()
        self.assertEqual(self.lines(), ["b 61 s"])

    def test_a_line_for_each_on_a_terminal_below_all_output(self):
        board = self.board(Terminal(), "a", "b")
        self.emit("b", "phase", name="launch prefill", state="begins")
        self.now += 2
        board.tick()
        self.console.line("passed: c")
        self.assertEqual(self.stream.screen(), ["passed: c", "a 2 s", "b 2 s; launch prefill 2 s"])
        self.console.write(b"no end of line")
        self.console.line("passed: d")
        board.tick()
        screen = self.stream.screen()
        self.assertEqual(screen[:3], ["passed: c", "no end of line", "passed: d"])
        self.assertEqual(screen[-2:], ["a 2 s", "b 2 s; launch prefill 2 s"])
        board.ends(self.root / "a")
        board.ends(self.root / "b")
        self.assertEqual(self.stream.screen(), ["passed: c", "no end of line", "passed: d"])

    def test_lines_are_not_wider_than_the_terminal(self):
        self.board(Terminal(), "x" * 200)
        self.assertLess(len(self.stream.screen()[0]), 200)

    def test_only_a_terminal_hears_more_often(self):
        with mock.patch.dict(os.environ):
            os.environ.pop("SGLANG_PD_PROGRESS_S", None)
            self.assertEqual(environment(False), {})
            self.assertEqual(environment(True), {"SGLANG_PD_PROGRESS_S": "5.0"})


if __name__ == "__main__":
    unittest.main()
