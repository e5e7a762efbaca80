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

from cases import FolderCase, printed
from pdkit.checks.acceptance import AcceptanceLengthChecks, FirstDraftsChecks
from pdkit.checks.accuracy.checks import FIRST_LOOK, AccuracyGateChecks, GSM8KChecks
from pdkit.checks.accuracy.gsm8k import few_shot_prompts, gsm8k_args
from pdkit.core import events
from pdkit.core.ci_register import register_cpu_ci
from pdkit.deployment.transcript import EvalLost, Transcript
from pdkit.runner.report.facts import acceptance_length_of
from sglang.test import simple_eval_common
from stub_server import JsonHandler, StubServer

register_cpu_ci(est_time=35, suite="stage-a-test-cpu")

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

        class Handler(JsonHandler):
            def do_GET(self):
                algorithm = "EAGLE" if acceptance else None
                self.answer(200, {"speculative_algorithm": algorithm, "data": [{"id": "book"}]})

            def do_POST(self):
                request = self.body()
                if self.path == "/generate":
                    meta = {"completion_tokens": acceptance * steps, "spec_verify_ct": steps}
                    return self.answer(200, [{"text": answers[text], "meta_info": meta} for text in request["text"]])
                if request["prompt"] not in answers:
                    return self.answer(400, {"error": "not a prompt of this data set"})  # run_eval does not retry these
                prompts.append(request["prompt"])
                choice = {"index": 0, "text": answers[request["prompt"]], "finish_reason": "stop"}
                usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
                completion = {"id": "1", "object": "text_completion", "created": 0, "choices": [choice], "usage": usage}
                self.answer(200, completion)

        super().__init__(test, Handler)


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


if __name__ == "__main__":
    unittest.main()
