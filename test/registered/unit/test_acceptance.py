"""Acceptance length: read from what servers answer, gated, and never passed unchecked."""

import unittest

from pdkit.checks.acceptance import (
    Acceptance,
    AcceptanceError,
    AcceptanceGate,
    FirstDrafts,
    from_meta_info,
    measure,
)
from pdkit.checks.server_info import ServerInfoError
from pdkit.core.ci_register import register_cpu_ci
from stub_server import StubServer

register_cpu_ci(est_time=1, suite="stage-a-test-cpu")


def info(algorithm="EAGLE"):
    """`/server_info` as SGLang answers it."""
    return {"speculative_algorithm": algorithm, "tp_size": 4, "internal_states": [{"last_gen_throughput": 1.0}]}


def meta(tokens, steps):
    return {"completion_tokens": tokens, "spec_verify_ct": steps, "spec_accept_length": tokens / steps}


class ScriptedServer(StubServer):
    """Answers each path with its JSON, or with 404; `asked` holds (path, body or None) of each request."""

    def __init__(self, test, answers):
        self.answers, self.asked = answers, []
        super().__init__(test)

    def reply(self, path, body):
        self.asked.append((path, body))
        return (200, self.answers[path]) if path in self.answers else (404, {})


class TestMetaInfo(unittest.TestCase):
    def test_is_pooled_over_steps_not_over_requests(self):
        measured = from_meta_info("EAGLE", [meta(100, 50), meta(10, 10), {"completion_tokens": 1}])
        self.assertEqual(measured.length, 110 / 60)
        self.assertIn("2 requests, 60 steps", measured.source)
        self.assertEqual(measured.steps, (50, 10, 0))

    def test_speculation_without_a_verification_step_is_an_error(self):
        for metas in ([], [{"completion_tokens": 5}], [{"completion_tokens": 5, "spec_verify_ct": 0}]):
            with self.assertRaisesRegex(AcceptanceError, f"none of {len(metas)} requests"):
                from_meta_info("EAGLE", metas)

    def test_no_speculation_is_not_applicable(self):
        self.assertIsNone(from_meta_info(None, [{"completion_tokens": 5}]))


class TestGate(unittest.TestCase):
    def gate(self, length, reference=2.0, ratio=0.95):
        return AcceptanceGate(Acceptance("EAGLE", "test", length), reference, ratio)

    def test_must_reach_the_share_of_the_reference(self):
        for length, ratio in ((1.9, 0.95), (2.5, 0.95), (1.6, 0.8)):
            self.gate(length, ratio=ratio).assert_passed()
        for length, ratio in ((1.899, 0.95), (1.0, 0.95), (1.59, 0.8)):
            with self.assertRaises(AssertionError):
                self.gate(length, ratio=ratio).assert_passed()

    def test_the_failure_message_is_the_report(self):
        gate = self.gate(1.5)
        with self.assertRaises(AssertionError) as caught:
            gate.assert_passed()
        self.assertEqual(str(caught.exception), gate.report())
        self.assertIn("FAIL, 1.5000 (test; EAGLE), needs 1.9000 = 0.95 x 2; ratio 0.7500", gate.report())

    def test_no_reference_is_no_pass(self):
        with self.assertRaisesRegex(ValueError, "acceptance length 1.7000, but there is no reference"):
            self.gate(1.7, reference=None)

    def test_refuses_what_makes_no_sense(self):
        for reference, ratio in ((0.9, 0.95), (float("nan"), 0.95), (2.0, 0.0), (2.0, 1.1)):
            with self.subTest(reference=reference, ratio=ratio), self.assertRaises(ValueError):
                self.gate(1.7, reference=reference, ratio=ratio)


class TestFirstDrafts(unittest.TestCase):
    def gate(self, more, fewer=0, equal=40):
        theirs = (12,) * (more + fewer + equal)
        ours = (13,) * more + (11,) * fewer + (12,) * equal
        return FirstDrafts(*(Acceptance("EAGLE", "test", 25 * len(s) / sum(s), s) for s in (ours, theirs)))

    def test_more_steps_than_chance_explains(self):
        for more, fewer in ((0, 0), (14, 0), (0, 40), (20, 20), (24, 8)):
            self.gate(more, fewer).assert_passed()
        for more, fewer in ((15, 0), (30, 4), (60, 20)):
            with self.subTest(more=more, fewer=fewer), self.assertRaises(AssertionError):
                self.gate(more, fewer).assert_passed()

    def test_the_failure_message_is_the_report(self):
        gate = self.gate(15, equal=49)
        with self.assertRaises(AssertionError) as caught:
            gate.assert_passed()
        self.assertEqual(str(caught.exception), gate.report())
        numbers = "0 fewer", "2.0833 tokens", "3.1e-05, fails at <= 5e-05"
        for says in ("FAIL, 15 of 64 answers took more steps", *numbers):
            self.assertIn(says, gate.report())

    def test_a_decay_that_a_sign_test_of_all_does_not_show(self):
        even, late = (5, 7) * 16, (6,) * 18 + (7,) * 14
        for steps, passes in ((even, True), (late, False), (late[::-1], True)):
            gate = FirstDrafts(*(Acceptance("EAGLE", "test", 1.9, each) for each in (steps, (6,) * 32)), level=1e-9)
            self.assertEqual(gate.passed, passes)
        report = FirstDrafts(*(Acceptance("EAGLE", "test", 1.9, each) for each in (late, (6,) * 32))).report()
        decay = "more steps than the reference's by request number: 14 of 14 after the first 18, 0 of"
        self.assertRegex(report, rf"(?m)^  {decay}")

    def test_answers_that_do_not_pair_up(self):
        one, two = (Acceptance("EAGLE", "test", 2.0, steps) for steps in ((12,), (12, 12)))
        with self.assertRaises(ValueError):
            FirstDrafts(one, two).assert_passed()


class TestServers(unittest.TestCase):
    def test_measures_its_own_load_greedily(self):
        decode = ScriptedServer(self, {"/server_info": info()})
        lb = ScriptedServer(self, {"/generate": [{"meta_info": meta(30, 20)}, {"meta_info": meta(30, 10)}]})
        measured = measure(lb.url, decode.url, ["a", "b"], max_new_tokens=30)
        self.assertEqual(measured.length, 2.0)
        sampling = {"temperature": 0, "max_new_tokens": 30}
        self.assertEqual(lb.asked, [("/generate", {"text": ["a", "b"], "sampling_params": sampling})])

    def test_sends_nothing_where_nothing_can_be_measured(self):
        decode = ScriptedServer(self, {"/server_info": info(algorithm=None)})
        lb = ScriptedServer(self, {})
        self.assertIsNone(measure(lb.url, decode.url, ["a"]))
        self.assertEqual(lb.asked, [])

    def test_a_server_that_does_not_answer_is_one_clear_line(self):
        silent = ScriptedServer(self, {})
        broken = ScriptedServer(self, {"/server_info": info(), "/generate": {"error": "no"}})
        for url, decode_url, kind, message in (
            (silent.url, silent.url, ServerInfoError, "does not tell its /server_info: 404"),
            (silent.url, broken.url, AcceptanceError, "did not answer 1 prompts: .*404"),
            (broken.url, broken.url, AcceptanceError, "did not answer 1 prompts"),
        ):
            with self.assertRaisesRegex(kind, message) as caught:
                measure(url, decode_url, ["a"])
            self.assertNotIn("\n", str(caught.exception))


if __name__ == "__main__":
    unittest.main()
