"""The gate's checks as a test uses them: the real `run_eval` client against a server that answers by the book."""

import ast
import json
import os
import tempfile
import threading
import unittest
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pdkit
from cases import FolderCase, printed
from pdkit.checks.acceptance import AcceptanceLengthChecks, FirstDraftsChecks
from pdkit.checks.accuracy.checks import FIRST_LOOK, AccuracyGateChecks, GSM8KChecks
from pdkit.checks.accuracy.gate import GateOptions, Verdict
from pdkit.checks.accuracy.gsm8k import (
    DatasetError,
    ScoreError,
    few_shot_prompts,
    gsm8k_args,
    gsm8k_gate,
    paired_gate,
    read_dataset,
    recover_correct,
)
from pdkit.core import events
from pdkit.core.ci_register import register_cpu_ci
from pdkit.deployment.transcript import EvalLost, Transcript
from pdkit.runner.report.facts import acceptance_length_of
from sglang.test import simple_eval_common
from stub_server import StubServer

register_cpu_ci(est_time=16, suite="stage-a-test-cpu")

MAIN_TEST = Path(__file__).resolve().parents[1] / "distributed" / "test_disaggregation_dsv4.py"
ROWS = 1205


class BookServer(StubServer):
    """Knows the answers of a GSM8K file and gets the rows in `wrong` (counted after the shots) wrong.

    Speculates with so many accepted tokens a step where `acceptance` is given.
    """

    request_queue_size = 256

    def __init__(self, test, path, wrong=(), acceptance=None, steps=10):
        answers = {
            prompt: " no idea" if row in wrong else f" It is {row + 5}.\n#### {row + 5}"
            for row, prompt in enumerate(few_shot_prompts(path, ROWS))
        }
        prompts = self.prompts = []

        def reply(path, request):
            if request is None:
                return 200, {"speculative_algorithm": "EAGLE" if acceptance else None, "data": [{"id": "book"}]}
            if path == "/generate":
                meta = {"completion_tokens": acceptance * steps, "spec_verify_ct": steps}
                return 200, [{"text": answers[text], "meta_info": meta} for text in request["text"]]
            if request["prompt"] not in answers:
                return 400, {"error": "not a prompt of this data set"}  # run_eval does not retry these
            prompts.append(request["prompt"])
            choice = {"index": 0, "text": answers[request["prompt"]], "finish_reason": "stop"}
            usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
            return 200, {"id": "1", "object": "text_completion", "created": 0, "choices": [choice], "usage": usage}

        super().__init__(test, reply=reply)


class KitTest(FolderCase):
    def setUp(self):
        super().setUp()
        rows = [{"question": f"What is {i} plus 0?", "answer": f"It is {i}.\n#### {i}"} for i in range(ROWS)]
        self.path = self.write("test.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def serve(self, **kwargs):
        return BookServer(self, self.path, **kwargs)

    def run_kit(self, check, server, **attributes):
        """Runs what `check` adds to a test of `server` as unittest would; returns the result and what was printed."""
        settings = {"lb_url": server.url, "decode_url": server.url, "model": "book", "gsm8k_data_path": str(self.path)}
        settings |= {"monolithic_url": None}
        kind = type("TestOfBookServer", (check, unittest.TestCase), {**settings, **attributes})
        self.channel = Path(tempfile.mkdtemp(dir=self.root))
        with mock.patch.dict(os.environ, {events.VARIABLE: str(self.channel)}):
            suite = unittest.defaultTestLoader.loadTestsFromTestCase(kind)
            result, out, _ = printed(suite.run, unittest.TestResult())
        self.assertEqual((result.testsRun, result.errors), (1, []))
        return result, out

    def message(self, result):
        ((_, traceback),) = result.failures
        return traceback


class TestAccuracyGate(KitTest):
    def assert_first_look(self, passed, score):
        """What the first look alone decides is an event."""
        (verdict,) = events.read(self.channel).of("verdict")
        self.assertEqual((verdict["check"], verdict["passed"]), (FIRST_LOOK, passed))
        self.assertRegex(verdict["message"], rf"the first look alone \(200 examples, score > 0.9\d*\): {score:.4f}")

    def test_a_good_engine_passes_at_the_first_look(self):
        server = self.serve(wrong={7})
        result, shown = self.run_kit(AccuracyGateChecks, server)
        self.assertTrue(result.wasSuccessful())
        self.assert_first_look(True, 0.995)
        self.assertIn("PASS at look 1 of 11, 199 of 200 correct", shown)
        self.assertEqual(sorted(server.prompts), sorted(few_shot_prompts(self.path, 200)))

    def test_an_unclear_engine_is_scored_on_and_the_failure_is_the_report(self):
        server = self.serve(wrong=range(0, 1200, 14))
        result, shown = self.run_kit(AccuracyGateChecks, server)
        self.assert_first_look(False, 0.925)
        self.assertIn("UNDECIDED, scoring 100 more", shown)
        self.assertIn("accuracy gate: FAIL at look", self.message(result))
        scored = len(server.prompts)
        self.assertEqual(sorted(server.prompts), sorted(few_shot_prompts(self.path, scored)), "an example scored twice")
        self.assertIn(f"{scored - len(range(0, scored, 14))} of {scored} correct", self.message(result))

    def test_the_first_look_alone_is_strict_and_policy_and_threshold_are_attributes(self):
        for wrong, threshold, passes in ((9, 0.95, True), (10, 0.95, False), (19, 0.9, True)):
            server = self.serve(wrong=range(3, 3 + 10 * wrong, 10))
            attributes = {"gsm8k_gate_policy": "first-look", "min_score": threshold}
            result, _ = self.run_kit(AccuracyGateChecks, server, **attributes)
            self.assertEqual((result.wasSuccessful(), len(server.prompts)), (passes, 200))
            self.assert_first_look(passes, 1 - wrong / 200)

    def test_a_decay_after_the_150th_example_fails_though_the_gate_passes(self):
        server = self.serve(wrong=range(151, 200, 6))
        result, shown = self.run_kit(AccuracyGateChecks, server, gsm8k_gate_policy="first-look")
        self.assertRegex(shown, r"accuracy gate: PASS|the first look alone .* PASS")
        decay = "wrong answers by request number: 9 of 49 after the first 151, 0 of 151 before"
        self.assertIn(decay, self.message(result))

    def test_a_baseline_is_asked_the_same_and_compared(self):
        for wrong, passes in ((0, True), (3, False)):
            baseline, engine = self.serve(wrong={50}), self.serve(wrong=range(30, 30 + wrong))
            result, shown = self.run_kit(AccuracyGateChecks, engine, monolithic_url=baseline.url)
            gained = int(passes)  # 50 is not among the first 44
            self.assertRegex(shown, f"paired gate: .* {wrong} right with the baseline only, {gained} right")
            self.assertEqual(result.wasSuccessful(), passes)
            self.assertEqual(sorted(engine.prompts), sorted(baseline.prompts))
            self.assertEqual(len(engine.prompts), 132 if passes else 44)

    def test_asks_run_eval_for_what_the_main_test_asks(self):
        gate = type("TestKit", (AccuracyGateChecks,), {"model": "m", "gsm8k_data_path": None})().gsm8k_args("url")
        calls = [node for node in ast.walk(ast.parse(MAIN_TEST.read_text())) if isinstance(node, ast.Call)]
        (call,) = [each for each in calls if "eval_name" in {keyword.arg for keyword in each.keywords}]
        literal = {word.arg: word.value.value for word in call.keywords if isinstance(word.value, ast.Constant)}
        once = gsm8k_args("url", "m", None, GSM8KChecks.gsm8k_examples)
        self.assertEqual({name: getattr(once, name) for name in literal}, literal)
        self.assertEqual(literal.pop("num_examples"), 200)
        self.assertGreaterEqual(set(literal), {"eval_name", "api", "max_tokens", "num_threads"})
        self.assertEqual({name: getattr(gate, name) for name in literal}, literal)


class TestLost(FolderCase):
    """An eval whose gate is out of reach ends, whatever else is still being answered."""

    def run_eval(self, wrong, gate, answered):
        """Scores 200 examples, of which the first `wrong` are wrong, and those from `answered` on wait for ever."""
        released = threading.Event()
        self.addCleanup(released.set)

        def score(example):
            if example >= answered:
                released.wait()
            convo = [{"content": "a prompt"}, {"content": "an answer"}]
            return SimpleNamespace(score=float(example >= wrong), convo=convo, html="")

        with Transcript(str(self.root / "gsm8k.jsonl"), gate=gate).open() as self.transcript:
            return simple_eval_common.map_with_progress(score, range(200), 128)

    def test_it_stops_once_it_is_lost(self):
        lost = "^score at most 0.900 of 200 examples, must be greater than 0.9: stopped"
        with self.assertRaisesRegex(EvalLost, lost):
            self.run_eval(wrong=20, gate=0.9, answered=20)

    def test_it_goes_on_while_it_can_be_won(self):
        for gate, wrong in ((0.95, 9), (None, 200)):
            self.assertEqual(len(self.run_eval(wrong=wrong, gate=gate, answered=200)), 200)

    def test_the_last_few_are_waited_for(self):
        results = self.run_eval(wrong=200, gate=0.05, answered=200)
        self.assertEqual((len(results), len(self.transcript.scores)), (200, 200))


class TestAcceptanceLength(KitTest):
    def test_no_speculation_is_a_skip_that_says_so(self):
        result, _ = self.run_kit(AcceptanceLengthChecks, self.serve(), acceptance_length_reference=1.8)
        ((_, reason),) = result.skipped
        self.assertIn("does not speculate", reason)

    def test_against_a_reference(self):
        for acceptance, passes in ((1.8, True), (1.8 * 0.96, True), (1.6, False), (1.0, False)):
            server = self.serve(acceptance=acceptance)
            result, shown = self.run_kit(AcceptanceLengthChecks, server, acceptance_length_reference=1.8)
            with self.subTest(acceptance=acceptance):
                self.assertEqual(result.wasSuccessful(), passes)
                self.assertIn(f"{acceptance:.4f} (meta_info of 64 requests", shown)
                self.assertAlmostEqual(acceptance_length_of(events.read(self.channel)), acceptance, 3)

    def test_against_a_baseline(self):
        baseline = self.serve(acceptance=1.8)
        for acceptance, passes in ((1.75, True), (1.6, False)):
            server = self.serve(acceptance=acceptance)
            result, _ = self.run_kit(AcceptanceLengthChecks, server, monolithic_url=baseline.url)
            self.assertEqual(result.wasSuccessful(), passes)

    def test_a_baseline_that_does_not_speculate_is_a_failure(self):
        attributes = {"monolithic_url": self.serve().url}
        result, _ = self.run_kit(AcceptanceLengthChecks, self.serve(acceptance=1.8), **attributes)
        self.assertIn("does not speculate", self.message(result))


class TestFirstDrafts(KitTest):
    def test_against_a_baseline(self):
        baseline = self.serve(acceptance=2.0)
        for steps, passes in ((10, True), (9, True), (11, False)):
            server = self.serve(acceptance=20 / steps, steps=steps)
            result, shown = self.run_kit(FirstDraftsChecks, server, monolithic_url=baseline.url)
            with self.subTest(steps=steps):
                self.assertEqual(result.wasSuccessful(), passes)
                self.assertIn(f"{0 if passes else 64} of 64 answers took more steps", shown)

    def test_no_speculation_is_a_skip_and_a_baseline_without_is_a_failure(self):
        result, _ = self.run_kit(FirstDraftsChecks, self.serve(), monolithic_url=self.serve().url)
        ((_, reason),) = result.skipped
        self.assertIn("does not speculate", reason)
        result, _ = self.run_kit(FirstDraftsChecks, self.serve(acceptance=2.0), monolithic_url=self.serve().url)
        self.assertIn("does not speculate", self.message(result))


NANO = Path(pdkit.__file__).parent / "assets" / "gsm8k_nano.jsonl"


class DataSetTest(FolderCase):
    def setUp(self):
        super().setUp()
        self.write_rows(1000)

    def write_rows(self, scored, shots=5):
        rows = [{"question": f"row {i}\u2028", "answer": f"#### {i}"} for i in range(-shots, scored)]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self.path = self.write("test.jsonl", f"# a comment\n{lines}")

    def args(self, **more):
        return SimpleNamespace(gsm8k_data_path=str(self.path), num_threads=128, **more)


class Engine:
    """Behaves like `run_eval` against an engine that gets the rows in `wrong` wrong; notes what it was asked."""

    def __init__(self, wrong=(), outcomes=True, tamper=None):
        self.wrong, self.outcomes, self.tamper = frozenset(wrong), outcomes, tamper
        self.asked, self.shots, self.settings = [], [], []

    def __call__(self, args):
        with open(args.gsm8k_data_path, encoding="utf-8") as file:
            rows = [int(json.loads(line)["answer"].removeprefix("#### ")) for line in file if line[0] != "#"]
        shots, scored = rows[: args.num_shots], rows[args.num_shots :][: args.num_examples]
        self.settings.append(args)
        self.shots.append(shots)
        self.asked.append(scored)
        outcomes = tuple(row not in self.wrong for row in scored)
        metrics = {"score": np.mean([float(right) for right in outcomes]), "score:std": 0.1}
        if self.outcomes:
            metrics["outcomes"] = outcomes
        return {**metrics, **(self.tamper or {})}


class TestSlices(DataSetTest):
    """What a test sees of it stands in test_gate_kit."""

    def test_it_ends_with_the_data_set(self):
        engine = Engine(wrong=range(0, 1000, 20))
        gate = gsm8k_gate(self.args(), run=engine, progress=str)
        self.assertEqual(sum(engine.asked, []), list(range(1000)))
        self.assertNotEqual(gate.verdict, Verdict.UNDECIDED)
        self.assertEqual(gate.outcomes, tuple(row % 20 != 0 for row in range(1000)))

    def test_settings_of_the_eval_are_kept_and_those_of_the_slice_are_set(self):
        engine = Engine()
        gsm8k_gate(self.args(max_tokens=512, num_examples=7, repeat=3, return_latency=True), run=engine, progress=str)
        (settings,) = engine.settings
        self.assertEqual((settings.num_threads, settings.max_tokens), (128, 512))
        self.assertEqual((settings.eval_name, settings.num_examples, settings.num_shots), ("gsm8k", 200, 5))
        self.assertEqual((settings.repeat, settings.return_latency), (1, False))
        self.assertFalse(Path(settings.gsm8k_data_path).exists(), "the slice's file is left behind")

    def test_number_of_shots_is_followed(self):
        self.write_rows(1000, shots=8)
        engine = Engine()
        gsm8k_gate(self.args(num_shots=8), run=engine, progress=str)
        self.assertEqual((engine.shots, engine.asked), ([list(range(-8, 0))], [list(range(200))]))

    def test_too_small_a_data_set_is_refused_before_anything_is_scored(self):
        for scored, options, message in (
            (300, GateOptions(), "861 can"),
            (150, GateOptions(policy="first-look"), "150 scored examples, the first look needs 200"),
        ):
            self.write_rows(scored)
            engine = Engine()
            with self.assertRaisesRegex(ValueError, message):
                gsm8k_gate(self.args(), options, run=engine)
            self.assertEqual(engine.asked, [])

    def test_a_score_that_does_not_add_up_is_an_error(self):
        for tamper, message in (
            ({"score": 0.9512}, "no whole number of right answers among 200"),
            ({"score": float("nan")}, "nan"),
            ({"score": None}, "None"),
            ({"score": 0.5}, "100 of 200, but scored 200 examples, 200 of them right"),
            ({"outcomes": (True,) * 199, "score": 199 / 200}, "but scored 199 examples"),
        ):
            with self.subTest(tamper=tamper), self.assertRaisesRegex(ScoreError, message):
                gsm8k_gate(self.args(), run=Engine(tamper=tamper))


class TestRecoverCorrect(unittest.TestCase):
    def test_every_count_survives_the_division(self):
        for examples in (1, 3, 7, 100, 200, 1314):
            for correct in range(examples + 1):
                outcomes = [1.0] * correct + [0.0] * (examples - correct)
                self.assertEqual(recover_correct(np.mean(outcomes), examples), correct)

    def test_what_is_no_share_is_refused(self):
        for score in (None, float("nan"), float("inf"), -0.005, 1.005, 0.9524):
            with self.subTest(score=score), self.assertRaises(ScoreError):
                recover_correct(score, 200)


class TestPairedSlices(DataSetTest):
    def test_counts_without_outcomes_cannot_be_paired(self):
        for outcomes in ((True, False), (False, True)):
            engines = map(Engine, ((), ()), outcomes)  # the baseline is asked first
            with self.assertRaisesRegex(ScoreError, "no outcomes of single examples"):
                paired_gate(self.args(), self.args(), run=lambda args, of=engines: next(of)(args), progress=str)


class TestDataset(DataSetTest):
    def test_nano_data_set_is_large_enough_for_every_policy(self):
        data = read_dataset(NANO)
        self.assertEqual(len(data.shots), 5)
        for policy in ("first-look", "sequential", "auto"):
            GateOptions(policy=policy).plan(len(data.rows))

    def test_prompts_hold_the_shots_and_one_open_question(self):
        first, second = few_shot_prompts(self.path, 2)
        self.assertTrue(first.startswith("Question: row -5\u2028\nAnswer: #### -5\n\nQuestion: row -4"))
        self.assertTrue(first.endswith("Answer: #### -1\n\nQuestion: row 0\u2028\nAnswer:"))
        self.assertTrue(second.endswith("Question: row 1\u2028\nAnswer:"))

    def test_bad_files_are_one_clear_line(self):
        """More of them in test_robustness."""
        for content, message in (
            ('{"question": "a", "answer": "#### 1"}\n{"question": "a", "ans', "line 2 is not JSON .*complete"),
            ('{"question": "a", "answer": "#### 1"}\n' * 5, "has 5 rows, of which 5 are shots"),
        ):
            self.path.write_text(content)
            with self.subTest(message=message), self.assertRaisesRegex(DatasetError, message) as caught:
                read_dataset(self.path)
            self.assertNotIn("\n", str(caught.exception))


if __name__ == "__main__":
    unittest.main()
