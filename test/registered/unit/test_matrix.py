"""The detection matrix: verdicts from reports, results that survive an interruption, a goal that can be missed."""

import contextlib
import csv
import json
import os
import re
import unittest
from dataclasses import replace
from functools import partial
from unittest import mock

from cases import FolderCase, pdkit
from pdkit.checks.accounting.checks import OWN_RESULT
from pdkit.checks.accounting.invariants import CLIENT, SERVERS
from pdkit.checks.accounting.ledger import OK, HttpAttempt
from pdkit.core import processes
from pdkit.core.ci_register import register_cpu_ci
from pdkit.core.errors import ExitCode
from pdkit.core.events import Events
from pdkit.faults.library import LIBRARY
from pdkit.faults.matrix import report, truth
from pdkit.faults.matrix import session as session_module
from pdkit.faults.matrix.results import Results, ResultsError, Run, planned
from pdkit.faults.matrix.run import QUICK_FAULTS, chosen_faults, subjects_of
from pdkit.faults.matrix.session import Session, Subject, WorkerFailed
from pdkit.faults.matrix.truth import Truth
from pdkit.faults.matrix.verdicts import FIRST_LOOK, SEQUENTIAL, CheckVerdict, checks_of, merged, verdicts_of
from pdkit.faults.matrix.worker import LONGEST_SLEEP, PatientLedger, _sleep_less
from stub_server import StubServer

register_cpu_ci(est_time=6, suite="stage-a-test-cpu")

CHECKS = [FIRST_LOOK, CLIENT, "parity alone"]


def run_of(fault, index=0, caught=(), **more):
    verdicts = {check: CheckVerdict(check in caught, 1.5, "why") for check in CHECKS}
    return Run(fault, index, met=0 if fault is None else 9, seconds=4.0, verdicts=verdicts, **more)


def happened(test=None, **verdicts):
    """The events of a test that failed with the text `test`, or passed; of each check None if it passed, or its text."""
    names = {"client": CLIENT, "servers": SERVERS, "own": OWN_RESULT, "first_look": FIRST_LOOK}
    told = [{"check": names[name], "passed": text is None, "message": text or ""} for name, text in verdicts.items()]
    ended = {"kind": "test", "state": "failed" if test else "passed", "message": test or ""}
    return Events([*({"kind": "verdict", **each} for each in told), ended])


def caught(found):
    return {check for check, verdict in found.items() if verdict.caught}


class TestVerdicts(unittest.TestCase):
    def test_checks_come_in_the_order_of_the_matrix(self):
        tests = ["test_parity_alone", "test_gsm8k", "test_prefill_did_the_work"]
        expected = [FIRST_LOOK, SEQUENTIAL, CLIENT, SERVERS, "parity alone", "prefill did the work"]
        self.assertEqual(checks_of(tests), expected)
        self.assertEqual(checks_of(["test_parity_alone"]), [CLIENT, SERVERS, "parity alone"])

    def test_of_a_test_that_passed(self):
        found = verdicts_of("test_parity_alone", happened(client=None, servers=None, own=None), 2.0)
        self.assertEqual((found.keys(), caught(found)), ({"parity alone", CLIENT, SERVERS}, set()))

    def test_the_accounts_are_told_apart_from_the_test(self):
        accounts = "request accounting: FAIL\nclient: FAIL, 9 attempts"
        found = verdicts_of("test_parity_alone", happened(accounts, client="FAIL,\n9 attempts", own=None), 2.0)
        self.assertEqual((caught(found), found[CLIENT].message), ({CLIENT}, "FAIL, 9 attempts"))
        found = verdicts_of("test_parity_alone", happened(accounts, client="FAIL", own="token 3 is 7"), 2.0)
        self.assertEqual(caught(found), {CLIENT, "parity alone"})
        self.assertEqual(found["parity alone"].message, "token 3 is 7")

    def test_what_is_the_test_s_own(self):
        skipped = {"kind": "test", "state": "skipped", "message": "no cache"}
        for what, found, message in (
            ("its accounts in order", happened("token 3", client=None, servers=None, own="token 3"), "token 3"),
            ("no account explains it", happened("in tearDown", client=None, servers=None, own=None), "in tearDown"),
            ("a sub-test that fails", Events([*happened("token 3"), skipped]), "token 3"),
        ):
            with self.subTest(what):
                verdicts = verdicts_of("test_parity_alone", found, 2.0)
                self.assertEqual(caught(verdicts), {"parity alone"})
                self.assertEqual(verdicts["parity alone"].message, message)
        self.assertEqual(verdicts_of("test_parity_alone", Events([skipped]), 2.0), {}, "a skip says nothing")

    def test_the_first_look_is_judged_apart_from_the_gate(self):
        for first_look, test, expected in (
            (None, None, set()),
            ("0.94", None, {FIRST_LOOK}),
            (None, "gate", {SEQUENTIAL}),
        ):
            found = verdicts_of("test_gsm8k", happened(test, first_look=first_look, own=test), 2.0)
            self.assertEqual((caught(found), FIRST_LOOK in found), (expected, True))

    def test_without_an_event_nothing_has_passed(self):
        with self.assertRaisesRegex(ValueError, "test_parity_alone ran and left no event"):
            verdicts_of("test_parity_alone", Events(), 2.0)

    def test_a_check_that_several_tests_hold(self):
        passed, caught = CheckVerdict(False, 2.0), CheckVerdict(True, 3.0, "first")
        self.assertEqual(merged(passed, caught), CheckVerdict(True, 5.0, "first"))
        again = merged(merged(passed, caught), CheckVerdict(True, 9.0, "second"))
        self.assertEqual(again, CheckVerdict(True, 5.0, "first"))


class TestPatientLedger(unittest.TestCase):
    def test_gives_up_early_only_on_servers_that_never_answer(self):
        ledger = PatientLedger(["http://127.0.0.1:1"])
        failed = HttpAttempt("/generate", "500", "error", 1, 0.1, 1)
        ledger.attempts += [failed] * 30
        self.assertLess(ledger.give_up_after, 30)
        ledger.attempts.append(replace(failed, outcome=OK, error=None))
        self.assertGreater(ledger.give_up_after, 30)


class TestResults(FolderCase):
    def setUp(self):
        super().setUp()
        self.path = self.root / "results.jsonl"
        self.results = Results.open(self.path, resume=False)
        self.results.set_checks(CHECKS)

    def fill(self, *runs, changes=True):
        for run in runs:
            self.results.add(run)
        self.results.add_truths(Truth(run.fault, changes, "logits") for run in runs if run.fault)

    def goal_of(self, *runs, changes=True):
        """What keeps these runs from the goal."""
        self.fill(*runs, changes=changes)
        return [problem.why for problem in self.results.problems([run.key for run in runs])]

    def test_come_back_as_they_were_written(self):
        caught = run_of("window-zeroed", caught=[FIRST_LOOK], first_caught=1.5, restarted="decode exited")
        self.fill(run_of(None), caught)
        self.assertEqual(Results.open(self.path, resume=True), self.results)

    def test_are_not_overwritten(self):
        with self.assertRaisesRegex(ResultsError, "--resume"):
            Results.open(self.path, resume=False)

    def test_a_line_that_was_cut_is_done_again(self):
        self.fill(run_of(None), run_of("window-zeroed"))
        self.path.write_text(self.path.read_text()[:-20])
        again = Results.open(self.path, resume=True)
        self.assertEqual(list(again.runs), [(None, 0), ("window-zeroed", 0)])
        self.assertEqual(again.truths, {})
        again.add(run_of(None, 1))
        self.assertEqual(len(Results.open(self.path, resume=True).runs), 3)

    def test_of_something_else_are_refused(self):
        self.path.write_text('{"kind": "run"}\n')
        with self.assertRaisesRegex(ResultsError, "not a file of this program"):
            Results.open(self.path, resume=True)
        self.path.write_text("")
        results = Results.open(self.path, resume=True)
        results.set_checks(CHECKS)
        with self.assertRaisesRegex(ResultsError, "other checks"):
            results.set_checks(CHECKS[1:])

    def test_the_goal_is_met(self):
        self.assertEqual(self.goal_of(run_of(None), run_of("window-zeroed", caught=[CLIENT])), [])
        self.assertEqual(self.goal_of(run_of("prefill-late"), changes=False), [])

    def test_the_goal_is_missed(self):
        late = run_of("prefill-late", caught=["parity alone"])
        for why, run, changes in (
            ("changes something and was not caught", run_of("window-zeroed"), True),
            ("failed: parity alone", run_of(None, caught=["parity alone"]), True),
            ("failed: decode exited", run_of(None, restarted="decode exited"), True),
            ("it met no request", replace(run_of("window-zeroed", caught=[CLIENT]), met=0), True),
            ("changes nothing, and nobody has said why", run_of("window-zeroed"), False),
            ("should change nothing, yet parity alone saw a difference", late, False),
        ):
            self.assertEqual(self.goal_of(run, changes=changes), [why])

    def test_a_headline_must_name_the_kind(self):
        for name, message, expected in (
            ("newest-1-lost-after-20", "age: FAIL, equal to the monolithic server's until request 21 of 40", []),
            ("newest-1-lost-after-20", "5 of 8 attempts failed", ["no headline names its kind"]),
            ("window-zeroed", "anything", []),
        ):
            verdicts = {"a": CheckVerdict(False, 1.0), "b": CheckVerdict(True, 1.0, message)}
            found = self.goal_of(Run(name, 0, 9, 2.0, verdicts=verdicts))
            self.assertEqual([why.partition(":")[0] for why in found], expected)

    def test_a_run_that_is_missing_misses_the_goal(self):
        self.fill(run_of(None))
        problems = self.results.problems([(None, 0), (None, 1), ("window-zeroed", 0)])
        self.assertEqual([problem.why for problem in problems], ["did not run"] * 2)

    def test_clean_runs_are_spread_between_the_faults(self):
        faults = list(LIBRARY)[:10]
        runs = planned(faults, 5)
        self.assertEqual(runs[0], (None, 0))
        self.assertEqual([index for fault, index in runs if fault is None], list(range(5)))
        self.assertEqual([fault for fault, _ in runs if fault], faults)
        self.assertEqual(runs[-1], (None, 4))
        self.assertEqual(planned([], 2), [(None, 0), (None, 1)])
        self.assertEqual(planned(faults[:1], 0), [(faults[0], 0)])
        self.assertEqual(len(planned(faults, 50)), 60)

    def test_the_table_says_what_was_caught(self):
        self.fill(run_of(None), run_of(None, 1), run_of("window-zeroed", caught=["parity alone"], first_caught=1.5))
        gone = {CLIENT: CheckVerdict(True, 1.0)}
        self.fill(replace(run_of("length-one-more"), verdicts=gone, restarted="decode exited"))
        problems = self.results.problems(list(self.results.runs))
        text = report.markdown(self.results, problems)
        self.assertIn("| no fault, 2 runs: failed | 0 | 0 | 0 |", text)
        self.assertIn("| window-zeroed | – | – | ● | yes | 1.5 | 4.0 |", text)
        self.assertIn("| length-one-more | · | ● | · |", text)
        self.assertIn("2 of 2 faults that change something were caught, 0 of them by the accuracy gate alone", text)
        self.assertIn("goal met", text)
        table = self.path.with_suffix(".csv")
        report.write_csv(self.results, table)
        with open(table, newline="") as file:
            rows = list(csv.DictReader(file))
        self.assertEqual(len(rows), 10)
        self.assertEqual([row["fault"] for row in rows if row["caught"] == "1"], ["window-zeroed", "length-one-more"])


class TestTruth(unittest.TestCase):
    def test_of_a_balancer_is_what_it_does_unless_it_says_why_not(self):
        self.assertTrue(truth.by_construction("seed-lost").changes)
        self.assertFalse(truth.by_construction("prefill-late").changes)
        self.assertIn("waits", truth.by_construction("prefill-late").evidence)


SUBJECT = """
import unittest, subprocess, sys

class Switch:
    fault = None
    def turn(self, fault):
        Switch.fault = fault
    def met(self):
        return 3

class Process:
    def __init__(self):
        self.returncode = None
    def poll(self):
        return self.returncode

class Tests(unittest.TestCase):
    switch = Switch()
    starts = 0

    @classmethod
    def setUpClass(cls):
        cls.starts += 1
        print("servers started", cls.starts, flush=True)
        cls.process_prefill, cls.process_decode, cls.process_lb = Process(), Process(), Process()
        cls.prefill_url = cls.decode_url = cls.lb_url = "{url}"

    @classmethod
    def tearDownClass(cls):
        print("servers stopped", flush=True)

    def test_parity_alone(self):
        if Switch.fault == "length-one-more":
            type(self).process_decode.returncode = 1
        self.assertNotIn(Switch.fault, ("window-zeroed", "length-one-more"))

    def test_rooms(self):
        for i in range(2):
            with self.subTest(i=i):
                self.assertFalse(Switch.fault == "rooms-swapped" and i)
        if Switch.fault == "exit":
            raise SystemExit(9)
"""


class TestSession(FolderCase):
    """Real workers, whose servers are one that only answers to health checks."""

    def setUp(self):
        super().setUp()
        self.source = SUBJECT.replace("{url}", StubServer(self, reply=lambda path, body: (200, b"")).url)
        self.file, self.logs = self.write("subjects.py", self.source), self.root / "logs"

    def session(self, *tests, **options):
        return Session([Subject("one", self.file, "Tests", tests, **options)], self.logs)

    def log(self):
        return (self.logs / "one.log").read_text()

    def test_runs_fault_after_fault_on_the_same_servers(self):
        with self.session() as session:
            self.assertEqual(session.tests, {"one": ["test_parity_alone", "test_rooms"]})
            clean, faulty, after = (session.run(fault) for fault in (None, "window-zeroed", None))
        self.assertEqual([run.caught_by for run in (clean, faulty, after)], [[], ["parity alone"], []])
        self.assertEqual(faulty.verdicts.keys(), {"parity alone", "rooms"})
        self.assertIsNone(clean.first_caught)
        self.assertLessEqual(faulty.first_caught, faulty.seconds)
        self.assertEqual((faulty.met, faulty.restarted), (3, ""))
        self.assertEqual([self.log().count(f"servers {what}") for what in ("started", "stopped")], [1, 1])

    def test_what_is_printed_is_no_verdict(self):
        begins = "    def test_rooms(self):\n"
        self.file.write_text(self.source.replace(begins, f"{begins}        print('client: FAIL, 9 attempts')\n"))
        with self.session("test_rooms") as session:
            self.assertEqual(session.run(None).verdicts.keys(), {"rooms"})
        self.assertIn("client: FAIL, 9 attempts", self.log())

    def test_a_sub_test_and_an_exit_are_caught(self):
        with self.session("test_rooms") as session:
            for fault in ("rooms-swapped", "exit"):
                self.assertEqual(session.run(fault).caught_by, ["rooms"])

    def test_servers_that_a_fault_ended_are_started_again(self):
        with self.session() as session:
            dead, after = (session.run(fault) for fault in ("length-one-more", None))
        self.assertEqual(dead.restarted, "decode exited with code 1")
        self.assertEqual(dead.verdicts.keys(), {"parity alone"}, "what comes after it did not run")
        self.assertEqual((after.caught_by, after.restarted), ([], ""))
        self.assertIn("servers started 2", self.log())

    def test_a_fault_that_has_a_test_of_its_own_meets_no_other(self):
        with self.session(test_of={"window-zeroed": "test_rooms"}) as session:
            faulty, clean = (session.run(fault) for fault in ("window-zeroed", None))
        self.assertEqual((faulty.verdicts.keys(), faulty.caught_by), ({"rooms"}, []))
        self.assertEqual(clean.verdicts.keys(), {"parity alone", "rooms"})

    def test_only_the_tests_named_are_run(self):
        with self.session("test_rooms") as session:
            self.assertEqual(session.run("window-zeroed").caught_by, [])

    def test_servers_of_a_worker_that_had_to_be_killed_are_ended(self):
        """A server has a session of its own; the worker is killed, or ended for lack of time by us."""
        server = "process_lb = subprocess.Popen(['sleep', '300'], start_new_session=True); print('pid', process_lb.pid, flush=True)"
        hangs = 'print("servers stopped", flush=True); import time; time.sleep(300)'
        source = self.source.replace("    starts = 0\n", f"    starts = 0\n    {server}\n")
        self.file.write_text(source.replace('print("servers stopped", flush=True)', hangs))
        for how in ("killed", "hangs"):
            with self.subTest(how), mock.patch.object(session_module, "STOP_TIMEOUT", 1.0), self.session() as session:
                pid = int(re.findall(r"pid (\d+)", self.log())[-1])
                self.assertTrue(processes.is_pid_alive(pid))
                if how == "killed":
                    session.workers[0].process.kill()
            self.assertFalse(processes.is_pid_alive(pid), how)

    def test_a_worker_that_does_not_start_is_named(self):
        self.file.write_text("raise RuntimeError('no')")
        with self.assertRaisesRegex(WorkerFailed, "the worker of one ended on its own; its log: .*one.log"):
            self.session().__enter__()


class TestCommand(FolderCase):
    def command(self, *args):
        """(exit code, what it printed)."""
        ran = pdkit("matrix", *args)
        return ran.returned, ran.out + ran.err

    def test_lists_the_library(self):
        code, text = self.command("--list")
        self.assertEqual(code, ExitCode.PASSED)
        self.assertEqual(len(text.splitlines()), len(LIBRARY))

    def test_bad_usage_is_one_line(self):
        self.write("results.jsonl")
        for args, message in (
            (["--faults", "window"], "unknown fault 'window'; nearest known: window-"),
            (["--clean-runs", "-1"], "--clean-runs: invalid number value: '-1'"),
            (["--resume"], "--resume needs --out"),
            (["--out", str(self.root)], "holds results of an earlier matrix; go on with --resume"),
            (["--out", "/proc/nothing"], "choose another --out"),
        ):
            code, text = self.command(*args)
            self.assertEqual(code, ExitCode.BAD_USAGE, text)
            self.assertIn(message, text)
            self.assertNotIn("Traceback", text)

    def test_goes_on_where_it_was_interrupted(self):
        ran = []

        class OneByOne(contextlib.nullcontext):
            def __init__(self, subjects, log_dir, progress):
                super().__init__(self)
                self.tests = {"one": ["test_parity_alone"]}

            def run(self, fault, index):
                if len(ran) == 2:
                    raise KeyboardInterrupt
                ran.append((fault, index))
                return Run(fault, index, 1, 1.0, "", {"parity alone": CheckVerdict(fault is not None, 1.0)}, 1.0)

        args = ["--out", str(self.root), "--faults", "seed-lost,top-p-lost", "--clean-runs", "2"]
        with mock.patch("pdkit.faults.matrix.run.Session", OneByOne):
            code, text = self.command(*args)
            self.assertEqual(code, ExitCode.INTERRUPTED, text)
            first, ran = ran, []
            code, text = self.command(*args, "--resume")
        self.assertEqual(code, ExitCode.PASSED, text)
        self.assertEqual(sorted(map(str, first + ran)), sorted(map(str, planned(["seed-lost", "top-p-lost"], 2))))
        self.assertIn("goal met", text)
        self.assertTrue((self.root / "matrix.md").read_text().startswith("# Detection matrix"))
        records = [json.loads(line)["kind"] for line in (self.root / "results.jsonl").read_text().splitlines()]
        self.assertEqual(sorted(records), ["checks"] + ["run"] * 4 + ["truth"] * 2)

    def test_subjects_are_there(self):
        for subject in subjects_of(quick=False):
            self.assertTrue(os.path.isfile(subject.file))
            self.assertIn(f"class {subject.cls}(", subject.file.read_text())
        for name in QUICK_FAULTS:
            self.assertIn(name, LIBRARY)

    def test_each_subject_s_servers_have_the_switch(self):
        """Of a flag that is given twice the last one counts."""
        from pdkit.faults.matrix import subjects

        for subject in subjects_of(quick=False):
            cls = getattr(subjects, subject.cls)
            with mock.patch.object(cls, "bootstrap_port", "1", create=True):
                for args in (cls.prefill_args(), cls.decode_args()):
                    last = len(args) - 1 - args[::-1].index("--disaggregation-transfer-backend")
                    self.assertEqual(args[last + 1], "pdkit.faults.transfer:FaultyTransfer", subject.name)

    def test_only_subjects_that_faults_are_put_before_are_started(self):
        kinds = [fault.name for fault in LIBRARY.values() if fault.asks]
        self.assertEqual(chosen_faults("kinds", quick=False), kinds)
        kind = kinds[0]
        for faults, expected in (
            ((kind,), ["kinds"]),
            (("seed-lost",), ["trained", "random"]),
            ((kind, "seed-lost"), ["trained", "random", "kinds"]),
        ):
            self.assertEqual([subject.name for subject in subjects_of(False, faults)], expected)

    def test_a_client_s_backoff_is_cut_short_and_a_check_s_own_wait_is_not(self):
        slept = []
        wait = partial(_sleep_less, slept.append)
        wait(9)
        exec("wait(1.0)", {"__name__": "pdkit.checks.memory", "wait": wait})
        self.assertEqual(slept, [LONGEST_SLEEP, 1.0])


if __name__ == "__main__":
    unittest.main()
