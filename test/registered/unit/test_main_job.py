"""`pdkit run`: its target, verdict and closing summary, what a skip or Ctrl-C make of it, and `--repeat`."""

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import unittest
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

from cases import FolderCase, pdkit
from pdkit.cli.main import main
from pdkit.core import paths
from pdkit.core.ci_register import register_cpu_ci
from pdkit.core.errors import ExitCode, NotReady, UsageError
from pdkit.core.events import Events
from pdkit.core.gpus import Gpu, found
from pdkit.runner import repeat, run
from pdkit.runner.report import evidence
from pdkit.runner.run import summary
from pdkit.runner.targets import DISTRIBUTED, PARTS, TARGETS, choose, left_out, why
from suite_trees import source_of, write_tree

register_cpu_ci(est_time=16, suite="stage-a-test-cpu")

TOP, MIDDLE, SGLANG_CPU, EMBEDDED = TARGETS
PRINTED = "target=embedded engine=pdkit.engine gsm8k=0.985 examples=200 gate=>0.95"


def score(target="embedded", **more):
    return {"kind": "score", "eval": "gsm8k", "score": 0.985, "examples": 200, "gate": 0.95, "target": target, **more}


def phase(name, state, seconds=0.0):
    return {"kind": "phase", "name": name, "state": state, "seconds": seconds}


RUN = [
    phase("launch prefill", "passed", 4.3),
    score(engine="pdkit.engine", throughput=312.345),
    phase("teardown", "passed", 5.1),
]


def happened(*events):
    return Events([{"ts": 0.0, **event} for event in events])


class TestSummary(unittest.TestCase):
    def test_score_gate_and_phases(self):
        text = summary(EMBEDDED, happened(*RUN), ExitCode.PASSED, 61.23)
        self.assertEqual(
            text,
            textwrap.dedent("""\
                main job on embedded: PASSED
                  engine                pdkit.engine
                  score                 0.985 of 200 examples (gate >0.95)
                  throughput            312 output tokens/s
                  launch prefill        4.3 s
                  teardown              5.1 s
                  imports and the rest  51.8 s
                  total                 61.2 s"""),
        )

    def test_a_failure_begins_with_why_and_where_to_look(self):
        requests = [[f"r-{n}", n, 1, 3, 0, None, 1 if n > 127 else None, 0.1] for n in (5, 127, 128, 129)]
        compared = {"kind": "compared", "condition": "alone", "requests": requests}
        compared["boundaries"] = {"128x compressor": 128}
        test = {
            "kind": "test",
            "id": "m.TestX.test_x",
            "state": "failed",
            "message": "2 of 4 differ\nmore",
            "details": "",
        }
        lines = summary(EMBEDDED, happened(compared, test), ExitCode.FAILED, 9).splitlines()
        self.assertEqual(lines[1].split(None, 1), ["failed", "TestX.test_x: 2 of 4 differ"])
        where = "only prompts of 128 tokens and more differ: look at the 128x compressor"
        self.assertEqual(lines[2].split(None, 1), ["hint", where])

    def test_a_phase_that_failed_is_named(self):
        launch = (phase("launch prefill", "begins"), phase("launch prefill", "failed", 1.0))
        text = summary(EMBEDDED, happened(*launch, phase("teardown", "passed", 2.0)), ExitCode.FAILED, 9)
        self.assertIn("\n  launch prefill        1.0 s, FAILED\n  teardown              2.0 s\n", text)


def write_test(test_dir, body, file=EMBEDDED.test_file):
    """A registered test below `test_dir` whose only method does `body`."""
    method = "def test_it(self):\n" + textwrap.indent(textwrap.dedent(body), "    ")
    write_tree(test_dir, {file.relative_to("registered"): source_of(method)})


class TestMain(FolderCase):
    def write_test(self, *events, then=""):
        emits = ["from pdkit.core.events import emit", *(f"emit(**{event!r})" for event in events)]
        write_test(self.root, "\n".join([*emits, then]))

    def setUp(self):
        super().setUp()
        lacks_mooncake = {"side_effect": NotReady("no Mooncake")}
        for patched in (
            patch.object(run, "TEST_DIR", self.root),
            patch("pdkit.deployment.cpu.requirements.require_machine", **lacks_mooncake),
            patch.object(tempfile, "tempdir", str(self.root)),
            patch.dict("os.environ", PDKIT_HISTORY=""),
        ):
            self.enterContext(patched)

    def main(self, *argv, gpus=()):
        self.out, self.err = io.TextIOWrapper(io.BytesIO(), write_through=True), io.StringIO()
        visible = patch("pdkit.core.gpus.visible_gpus", lambda: gpus)
        with visible, redirect_stdout(self.out), redirect_stderr(self.err):
            code = main(argv if argv[:1] == ("list",) else ("run", *argv))
        self.out.seek(0)
        self.printed = self.out.read()
        return code

    def test_a_scored_run_passes_and_says_where_it_ran(self):
        self.write_test(*RUN)
        self.assertEqual(self.main(), ExitCode.PASSED)
        first = [f"main job on embedded: {EMBEDDED.engine}", "  8xH200 needs 8 Hopper GPUs of 141 GB; found no GPU"]
        self.assertEqual(self.printed.splitlines()[:2], first)
        self.assertIn("\nmain job on embedded: PASSED\n", self.printed)

    def test_what_is_no_pass(self):
        for what, events, then, code in (
            ("it failed, though it was scored", RUN, "self.fail()", ExitCode.FAILED),
            ("a skip", [], "self.skipTest('no GPU')", ExitCode.NOTHING_RAN),
            ("the score of another target", [score("8xH200")], "", ExitCode.NOTHING_RAN),
        ):
            with self.subTest(what):
                self.write_test(*events, then=then)
                self.assertEqual(self.main(), code)

    def test_a_score_that_is_only_printed_is_no_pass(self):
        self.write_test(RUN[0], then=f"print({PRINTED!r})")
        self.assertEqual(self.main("-v"), ExitCode.NOTHING_RAN)
        self.assertIn(f"\n{PRINTED}\n", self.printed)
        self.assertIn("score                 none, the test did not get that far\n", self.printed)

    def test_a_test_that_does_not_name_its_target_is_scored_on_that_of_the_run(self):
        self.write_test(then="from pdkit.core import events; events.score('gsm8k', 0.985, 200)")
        self.assertEqual(self.main("-v"), ExitCode.PASSED, self.printed)
        self.assertIn("target=embedded gsm8k=0.985 examples=200\n", self.printed)

    def test_unavailable_target_runs_nothing(self):
        self.write_test(*RUN)
        self.assertEqual(self.main("--on", "8xH200"), ExitCode.NOT_READY)
        self.assertEqual(self.printed, "")

    def test_a_machine_that_lacks_something_starts_nothing(self):
        self.write_test(*RUN)
        path = self.root / EMBEDDED.test_file
        pair = "\n\nif not __name__:\n    from pdkit.deployment.embedded import EmbeddedServers\n\n\n"  # read, not imported
        pair += "class TestPair(EmbeddedServers):\n    def test_it(self): pass\n\n\nif __name__"
        path.write_text(path.read_text().replace("\n\nif __name__", pair))
        with patch("pdkit.preflight.environment.check.ASSETS", self.root):
            self.assertEqual(self.main(), ExitCode.NOT_READY)
        first, second = self.err.getvalue().splitlines()
        self.assertRegex(first, f"^pdkit run: error: model: {self.root}/nano-dsv4: no such directory; ")
        self.assertRegex(second, f"^pdkit run: error: data: {self.root}/gsm8k_nano.jsonl: No such file .*; ")
        self.assertEqual(len(self.printed.splitlines()), len(TARGETS), self.printed)
        with patch("pdkit.preflight.environment.check.ASSETS", self.root):
            self.assertEqual(self.main("--skip-environment-check"), ExitCode.FAILED)
        self.assertIn("NameError: name 'EmbeddedServers' is not defined", self.printed)

    def test_a_tree_without_the_test(self):
        write_test(self.root, "pass", file=Path("registered/test_other.py"))
        self.assertEqual(self.main(), ExitCode.NOT_READY)
        self.assertIn(f"no registered test at {self.root / EMBEDDED.test_file}", self.err.getvalue())

    def test_log_results_and_server_logs_are_kept_on_request_and_the_run_is_recorded(self):
        self.write_test(*RUN, then="import os; print('server logs:', os.environ['SGLANG_PD_LOG_DIR'])")
        report, history = self.root / "report", self.root / "history.jsonl"
        with patch.dict("os.environ"):
            os.environ.pop("SGLANG_PD_LOG_DIR", None)
            self.assertEqual(self.main("--report-dir", str(report), "--history", str(history)), ExitCode.PASSED)
        (log,) = report.glob("*.log")
        self.assertRegex(log.read_text(), rf"server logs: {report}/001-\w+\.1\n(.*\n)*Ran 1 test")
        self.assertTrue((report / "results.json").exists())
        (line,) = history.read_text().splitlines()
        self.assertEqual(json.loads(line)["measurements"][0]["correct"], 197)
        with patch.dict("os.environ", SGLANG_PD_LOG_DIR="/mine"):
            self.main("-v")
        self.assertIn("server logs: /mine\n", self.printed)

    def test_ctrl_c_before_the_test_starts(self):
        self.write_test(*RUN)
        with patch.object(evidence, "begin", lambda *_: signal.raise_signal(signal.SIGINT)):
            self.assertEqual(self.main(), ExitCode.INTERRUPTED)
        self.assertIn("score                 none, the test did not get that far", self.printed)

    def test_targets(self):
        self.assertEqual(self.main("list", "--targets", gpus=[Gpu("NVIDIA H200", 143_771, (9, 0))]), ExitCode.PASSED)
        rows = r"8xH200 +8 Hopper GPUs of 141 GB +not here\n(.*\n)*embedded +no GPU +runs here\n"
        self.assertRegex(self.printed, rows)
        self.assertIn("this machine has 1 GPU (NVIDIA H200, 140 GiB)", self.printed)


class TestInterrupt(unittest.TestCase):
    """A test that stops its servers when it is told to end is waited for, and the command says 130."""

    TEST = """
        import signal, time
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        from pdkit.core import events
        try:
            print("started", flush=True)
            time.sleep(60)
        finally:
            with events.phase("servers stopped"):
                time.sleep(0.3)
    """
    COMMAND = "import sys; from pathlib import Path; from pdkit.runner import run; from pdkit.cli.main import main; "
    COMMAND += "run.TEST_DIR = Path(sys.argv[1]); sys.exit(main(['run', '-v', '--on', 'embedded']))"

    def test_ctrl_c_and_sigterm(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            with self.subTest(number.name), tempfile.TemporaryDirectory() as directory:
                write_test(Path(directory), self.TEST)
                command = [sys.executable, "-c", self.COMMAND, directory]
                environment = {**os.environ, "TMPDIR": directory, "PDKIT_HISTORY": ""}
                with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
                    try:
                        next(line for line in process.stdout if "started" in line)
                        process.send_signal(number)
                        rest = process.stdout.read()
                        self.assertEqual(process.wait(timeout=30), ExitCode.INTERRUPTED)
                    finally:
                        process.kill()
                self.assertRegex(rest, r"main job on embedded: INTERRUPTED\n(.*\n)*  servers stopped +0.3 s\n")


REPEATED = """
import signal, sys, time
from pathlib import Path
from pdkit.core import events
from pdkit.core.processes import wait_until
directory = Path(sys.argv[sys.argv.index("--report-dir") + 1])
with open(directory.parent / "started", "a") as file:
    file.write(directory.name + " ")
ready, told = directory.parent / "ready", directory.parent / "told"
if directory.name == "run-001" and (directory.parent / "slow").exists():
    signal.signal(signal.SIGTERM, lambda *_: told.open("a").write("told "))
    ready.touch()
    wait_until(told.exists, 60)
    time.sleep(1)
if directory.name == "run-002" and (directory.parent / "slow").exists():
    wait_until(ready.exists, 60)
(directory / "001-test.1").mkdir(exist_ok=True)
events.append(directory / "001-test.1", "score", eval="gsm8k", score=0.985, examples=200, gate=0.95)
sys.exit(directory.name == "run-002" and (directory.parent / "bad").exists())
"""


class TestRepeat(FolderCase):
    def repeat(self, *words):
        command = (sys.executable, str(self.write("fake.py", REPEATED)))
        with patch.object(repeat, "COMMAND", command):
            code, self.printed, self.errors = pdkit("run", "--on", "embedded", "--report-dir", self.root, *words)
        return code

    @property
    def started(self):
        return (self.root / "started").read_text().split()

    def test_clean_runs(self):
        self.assertEqual(self.repeat("--repeat", "4", "--jobs", "2"), ExitCode.PASSED)
        self.assertIn("4 runs, 0 failures; a failure rate above 52.7% is refuted at 95 %\n", self.printed)
        self.assertIn("scores: 0.985 to 0.985\n", self.printed)
        self.assertRegex(self.printed, r"\n    3  passed +\d+\.\d s  0\.985  #")

    def test_it_goes_on_where_it_was_stopped(self):
        self.repeat("--repeat", "2")
        self.assertEqual(self.repeat("--repeat", "3"), ExitCode.PASSED)
        self.assertEqual(self.started, ["run-001", "run-002", "run-003"])
        self.assertIn("3 runs, 0 failures", self.printed)

    def test_a_failure_is_named_and_ends_it(self):
        (self.root / "bad").touch()
        self.assertEqual(self.repeat("--repeat", "4"), ExitCode.FAILED)
        self.assertIn(f"failed: run 2, exit code 1: {self.root}/run-002\n", self.printed)
        self.assertNotIn("run-004", self.started)
        self.assertEqual(self.repeat("--repeat", "4", "--keep-going"), ExitCode.FAILED)
        self.assertIn("4 runs, 1 failures\n", self.printed)

    def test_what_runs_beside_a_failure_is_told_to_end_once(self):
        """A second signal would have it drop its servers."""
        for name in ("bad", "slow"):
            (self.root / name).touch()
        with patch.object(repeat, "AGAIN_S", 0.1):
            self.assertEqual(self.repeat("--repeat", "2", "--jobs", "2"), ExitCode.FAILED)
        self.assertEqual((self.root / "told").read_text(), "told ")

    def test_runs_of_a_test_file(self):
        contents = {ExitCode.PASSED: "import sys; assert sys.argv[1:] == ['-f']", ExitCode.FAILED: "1 / 0"}
        for code, content in contents.items():
            words = ("--file", self.write(f"test_{code}.py", content), "--report-dir", self.root / str(code))
            self.assertEqual(self.repeat("--repeat", "2", *words), code)
        self.assertIn("ZeroDivisionError", (self.root / "1" / "run-001" / "output.log").read_text())
        self.assertEqual(self.repeat("--repeat", "2", "--file", "nowhere.py"), ExitCode.BAD_USAGE)
        self.assertIn("no such file", self.errors)


H200 = Gpu("NVIDIA H200", 143_771, (9, 0))
H100 = Gpu("NVIDIA H100 80GB HBM3", 81_559, (9, 0))
B200 = Gpu("NVIDIA B200", 183_359, (10, 0))


class TestLeftOut(unittest.TestCase):
    def test_each_target_names_what_asks_more(self):
        for target in TARGETS:
            lines = left_out(target.name)
            for part in PARTS:
                with self.subTest(target=target.name, part=part):
                    self.assertEqual(any(part in line for line in lines), part not in target.exercises)
            for file in target.beside.values():
                self.assertTrue((paths.TEST / DISTRIBUTED / f"{file}.py").is_file(), file)
        self.assertEqual(left_out("no target"), ())

    def test_the_nearest_target_is_named(self):
        first, second, *_ = left_out("embedded")
        self.assertRegex(first, "^SGLang's scheduler .*: pdkit run --on sglang-cpu ")
        self.assertRegex(second, "^SGLang's GPU kernels .*: pdkit run --on 1xHopper ")


def machine(lacks: str | None = None):
    """A machine that lacks what SGLang on CPU needs, or nothing."""
    effect = {"side_effect": NotReady(lacks)} if lacks else {"return_value": None}
    return patch("pdkit.deployment.cpu.requirements.require_machine", **effect)


class TestChoose(unittest.TestCase):
    def test_highest_target_that_the_machine_can_run(self):
        for gpus, target in (
            ((), SGLANG_CPU),
            ([H200] * 7, MIDDLE),
            ([H200] * 8, TOP),
            ([H200] * 9, TOP),
            ([H100] * 8, MIDDLE),
            ([H200] * 7 + [H100], MIDDLE),
            ([H100], MIDDLE),
            ([B200] * 8, SGLANG_CPU),
        ):
            with self.subTest(gpus=found(gpus)), machine():
                self.assertIs(choose(gpus), target)

    def test_a_machine_that_lacks_what_sglang_on_cpu_needs_takes_the_embedded_engine_and_says_what(self):
        with machine(lacks="no library\nno memory"):
            self.assertIs(choose(()), EMBEDDED)
            self.assertEqual(why(EMBEDDED, ()).splitlines()[-2:], ["no library", "no memory"])
            self.assertIs(choose((), wanted="sglang-cpu"), SGLANG_CPU)

    def test_looking_for_a_target_reports_nothing_of_a_working_tree(self):
        with machine(), patch("pdkit.runner.sglang_cpu.prepare", side_effect=AssertionError):
            self.assertIs(choose(()), SGLANG_CPU)
            self.assertEqual(SGLANG_CPU.lacks(), ())

    def test_a_target_can_be_asked_for(self):
        self.assertIs(choose([H200] * 8, wanted="embedded"), EMBEDDED)

    def test_a_working_tree_is_for_one_target_only(self):
        with self.assertRaisesRegex(UsageError, "not for target embedded; a working tree is tested on sglang-cpu"):
            EMBEDDED.prepare("/tree")
        EMBEDDED.prepare(None)

    def test_what_a_target_needs_beside_gpus_is_one_line_for_each_thing(self):
        with patch.dict("os.environ"), self.assertRaisesRegex(NotReady, "/nonexistent has no package sglang"):
            SGLANG_CPU.prepare("/nonexistent")

    def test_a_target_out_of_reach_is_refused_and_never_replaced(self):
        reason = r"8xH200 needs 8 Hopper GPUs .* has 2 GPUs \(NVIDIA H200, 140 GiB\)"
        with machine(), self.assertRaisesRegex(NotReady, reason):
            choose([H200] * 2, wanted="8xH200")

    def test_why_not_higher(self):
        self.assertEqual(why(TOP, [H200] * 8), "")
        lines = "^8xH200 needs 8 Hopper GPUs .*; found no GPU\n1xHopper needs 1 Hopper GPU .*; found no GPU$"
        with machine():
            self.assertRegex(why(EMBEDDED, ()), lines)

    def test_why_is_silent_on_a_lower_target_by_choice(self):
        with machine():
            self.assertEqual(why(EMBEDDED, [H200] * 8), "")


class TestAgreesWithTheTests(unittest.TestCase):
    """The test of the first target imports no pdkit, so it states its needs itself."""

    def test_first_target(self):
        source = (Path(__file__).parents[2] / TOP.test_file).read_text()
        self.assertIn(f"get_device_count() >= {TOP.gpus}", source)


if __name__ == "__main__":
    unittest.main()
