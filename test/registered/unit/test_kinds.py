"""The checks of kinds by themselves: each fails for what it is about, and for nothing else."""

import json
import threading
import unittest
from functools import partial
from unittest import mock

from pdkit.checks import memory
from pdkit.checks.accounting.invariants import contradiction
from pdkit.checks.accounting.ledger import CONTRADICTS, OK, ClientAccount, HttpAttempt, judge
from pdkit.checks.age import Life
from pdkit.checks.crossed import covering_rows, crossed_probes
from pdkit.checks.latency import SecondMode
from pdkit.checks.length import lengths_up_to
from pdkit.checks.memory import Growth, MemoryChecks
from pdkit.checks.parity.answers import Answer
from pdkit.checks.parity.verdict import Parity
from pdkit.checks.seam import cut_probes
from pdkit.checks.streams import Streams, difference, rate_bound
from pdkit.checks.work import Withheld
from pdkit.core.ci_register import register_cpu_ci
from pdkit.deployment.one_token import silent_half
from pdkit.faults import messages
from pdkit.faults.driver import Observation
from pdkit.faults.fault import Injection
from pdkit.faults.kinds import FAMILIES, families
from pdkit.faults.library import LIBRARY
from stub_server import StubServer

register_cpu_ci(est_time=10, suite="stage-a-test-cpu")


def answer(*tokens, finish="length 3"):
    return Answer(tokens, tuple(-0.5 for _ in tokens), text="".join(map(chr, tokens)), finish=finish, prompt_tokens=4)


class TestAge(unittest.TestCase):
    def life(self, *wrong, control=False, blocks=3):
        parities = []
        for start in range(0, 2 * blocks, 2):
            names = tuple(f"request {start + i + 1} (length-5)" for i in range(2))
            right = [answer(65, 66), answer(67, 68)]
            got = [answer(65, 99) if start + i + 1 in wrong else each for i, each in enumerate(right)]
            parities.append(Parity(f"from {start}", names, right, got, right if control else None))
        return Life(tuple(parities))

    def test_a_life_without_a_difference_passes(self):
        self.life().assert_passed()
        self.assertIn("all of 6 requests", self.life().report())

    def test_the_first_difference_is_named_by_its_number(self):
        for wrong, until in (((1,), 0), ((2,), 1), ((4, 5), 3), ((6,), 5)):
            with self.assertRaisesRegex(AssertionError, f"until request {until} of 6" if until else "not even"):
                self.life(*wrong).assert_passed()
            self.assertEqual(self.life(*wrong).equal_until, until)


class TestInvariants(unittest.TestCase):
    GENERATED = {
        "text": "ab",
        "output_ids": [5, 6],
        "meta_info": {
            "prompt_tokens": 3,
            "completion_tokens": 2,
            "cached_tokens": 1,
            "finish_reason": {"type": "length", "length": 2},
            "output_token_logprobs": [[-1.0, 5, None], [-2.0, 6, None]],
        },
    }
    ASKED = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 2}}
    COMPLETED = {
        "choices": [{"text": "ab", "finish_reason": "length", "logprobs": {"token_logprobs": [-1.0, -2.0]}}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }
    COMPLETION = {"prompt": "x", "max_tokens": 2}

    def test_right_answers_hold_them(self):
        self.assertIsNone(contradiction("/generate", self.ASKED, self.GENERATED))
        self.assertIsNone(contradiction("/generate", None, self.GENERATED))
        self.assertIsNone(contradiction("/generate", self.ASKED, [self.GENERATED, self.GENERATED]))
        self.assertIsNone(contradiction("/v1/completions", self.COMPLETION, self.COMPLETED))
        stopped = {**self.GENERATED, "meta_info": {**self.GENERATED["meta_info"],
                                                  "finish_reason": {"type": "stop", "matched": 6}}}  # fmt: skip
        self.assertIsNone(contradiction("/generate", self.ASKED, stopped), "a stop may fall on the last token")

    def changed(self, path, change):
        whole = json.loads(json.dumps(self.GENERATED if path == "/generate" else self.COMPLETED))
        change(whole)
        return contradiction(path, self.ASKED if path == "/generate" else self.COMPLETION, whole)

    def test_each_is_missed_where_it_does_not_hold(self):
        def stop(whole, matched):
            whole["meta_info"]["finish_reason"] = {"type": "stop", "matched": matched}

        for change, says in (
            (lambda a: a["meta_info"].update(cached_tokens=4), "cached_tokens is 4"),
            (lambda a: a["meta_info"].update(completion_tokens=3), "completion_tokens is 3"),
            (lambda a: a["meta_info"].update(prompt_tokens=9), "prompt_tokens is 9, 3 were sent"),
            (lambda a: a["meta_info"]["output_token_logprobs"].pop(), "output_token_logprobs"),
            (lambda a: stop(a, 5), "goes on after token 5"),
            (lambda a: stop(a, 7), "was ended by 7"),
        ):
            with self.subTest(says=says):
                self.assertRegex(self.changed("/generate", change) or "nothing", says)
        asked, bare = {**self.ASKED, "return_logprob": True}, json.loads(json.dumps(self.GENERATED))
        bare["meta_info"]["output_token_logprobs"] = []
        self.assertIsNone(contradiction("/generate", self.ASKED, bare), "none were asked for")
        self.assertRegex(contradiction("/generate", asked, bare) or "nothing", "output_token_logprobs is of 0 other")
        short = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 8}}
        self.assertRegex(contradiction("/generate", short, self.GENERATED), "length after 2 of 8")
        stops = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 2, "stop": "b"}}
        self.assertRegex(contradiction("/generate", stops, self.GENERATED), "after the stop 'b'")

    def test_of_completions(self):
        for change, says in (
            (lambda a: a["usage"].update(completion_tokens=3, total_tokens=6), "3 tokens came in 1 choices"),
            (lambda a: a["usage"].update(total_tokens=6), "total_tokens is 6"),
            (lambda a: a["usage"].update(completion_tokens=1, total_tokens=4), "1 choices end by length"),
            (lambda a: a["usage"].update(prompt_tokens_details={"cached_tokens": 4}), "cached_tokens is 4"),
            (lambda a: a["choices"][0]["logprobs"]["token_logprobs"].pop(), "there are 1 logprobs"),
        ):
            with self.subTest(says=says):
                self.assertRegex(self.changed("/v1/completions", change) or "nothing", says)

    def test_a_contradiction_is_a_failed_attempt_and_the_headline(self):
        wrong = json.loads(json.dumps(self.GENERATED))
        wrong["meta_info"]["cached_tokens"] = 9
        outcome, error = judge("/generate", 200, json.dumps(wrong).encode(), json.dumps(self.ASKED))
        self.assertEqual(outcome, CONTRADICTS)
        attempts = (HttpAttempt("/generate", outcome, error, 1, 0.1, 1), HttpAttempt("/generate", OK, None, 1, 0.1, 2))
        (problem,) = ClientAccount(attempts, tolerated_rate=0.9).problems
        self.assertIn("1 of 2 answers contradict themselves, the first: cached_tokens is 9", problem)

    def test_each_contradiction_of_the_library_is_one(self):
        for name, change in messages.CONTRADICTIONS.items():
            if name in ("reason-exchanged",):
                continue  # whether that contradicts the request, the tokens say: see the seam
            found = contradiction("/generate", self.ASKED, messages.of_each(self.GENERATED, change))
            other = contradiction("/v1/completions", self.COMPLETION, messages.of_each(self.COMPLETED, change))
            self.assertTrue(found, f"{name}: {found}, {other}")


class TestMemory(unittest.TestCase):
    def test_what_grows_fails_and_what_wavers_does_not(self):
        base = 900 << 20
        for series, fails in (
            ([base + (i << 21) for i in range(10)], True),
            ([base + (i << 21) + (i % 2) * (1 << 20) for i in range(10)], True),
            ([base] * 10, False),
            ([base + (i % 3) * (4 << 20) for i in range(10)], False),
            ([base + i * 4096 for i in range(10)], False),
            ([base - (i << 21) for i in range(10)], False),
        ):
            growth = Growth("decode", tuple(series), 20)
            self.assertEqual(bool(growth.problems), fails, growth.report())

    def test_the_slope_is_that_of_a_request(self):
        growth = Growth("decode", tuple((1 << 20) * 20 * i for i in range(10)), 20)
        self.assertAlmostEqual(growth.slope, 1 << 20)
        with self.assertRaisesRegex(AssertionError, "memory of decode grows by 1024 KiB a request"):
            growth.assert_passed()

    def run_of(self, *resident):
        """The check, where a server has so many MiB after each round; how many rounds it took."""
        series, rounds = iter(resident), []

        class Check(MemoryChecks, unittest.TestCase):
            memory_warm_up = 0
            memory_rounds = 10
            memory_patience = len(resident)
            lb_url = prefill_url = decode_url = base_host = bootstrap_port = None
            process_prefill = process_decode = None

            def _processes(self):
                return {"decode": mock.Mock(pid=0)}

            def _round(self):
                rounds.append(1)

        with mock.patch.object(memory, "resident_bytes", lambda pid: next(series) << 20):
            Check("test_memory_does_not_grow").test_memory_does_not_grow()
        return len(rounds)

    def test_a_rise_that_ends_is_none(self):
        self.assertEqual(self.run_of(*[500] * 12), 10)
        self.assertIn(self.run_of(*range(500, 600, 10), *[600] * 10), range(11, 20))
        with self.assertRaisesRegex(AssertionError, "memory of decode grows by"):
            self.run_of(*range(500, 640, 10))


class TestLatency(unittest.TestCase):
    def test_a_second_mode_is_rejected_and_a_slow_machine_is_not(self):
        fast = [1.0 + 0.01 * (i % 7) for i in range(500)]
        retried = [2 * each if i % 33 == 0 else each for i, each in enumerate(fast)]
        with self.assertRaisesRegex(AssertionError, "second mode: 16 of 500"):
            SecondMode(retried, fast).assert_passed()
        for through, past in ((fast, fast), (retried, retried), (fast, retried), ([3 * each for each in fast], fast)):
            SecondMode(through, past).assert_passed()


class TestStreams(unittest.TestCase):
    USAGE = {"prompt_tokens": 3, "completion_tokens": 3}
    WHOLE = {"choices": [{"text": "abc", "finish_reason": "length"}], "usage": USAGE}

    def events(self, pieces=("a", "b", "c"), reasons=("length",), usage=USAGE):
        said = [*((piece, None) for piece in pieces), *(("", reason) for reason in reasons)]
        events = [{"choices": [{"text": text, "finish_reason": reason}]} for text, reason in said]
        return [*events, {"choices": [], "usage": usage}]

    def test_differences(self):
        self.assertIsNone(difference(self.WHOLE, self.events()))
        for events, says in (
            (self.events(pieces=("a", "c")), "text is 'ac'"),
            (self.events(reasons=()), "finish reasons"),
            (self.events(reasons=("length", "length")), "finish reasons"),
            (self.events(usage={"prompt_tokens": 3, "completion_tokens": 2}), "usage is"),
            (self.events()[:-1], "no usage"),
            ([], "text is ''"),
        ):
            self.assertRegex(difference(self.WHOLE, events) or "nothing", says)

    def test_texts_that_differ_late_are_shown_where_they_do(self):
        whole = {**self.WHOLE, "choices": [{"text": "x" * 200 + "right", "finish_reason": "length"}]}
        said = difference(whole, self.events(pieces=("x" * 200, "wrong")))
        self.assertIn("xwrong'", said)
        self.assertIn("xright'", said)

    def test_the_bound(self):
        self.assertAlmostEqual(rate_bound(300), 0.00994, 4)
        self.assertAlmostEqual((1 - rate_bound(59)) ** 59, 0.05)
        self.assertIn("all 300", Streams((None,) * 300).report())
        with self.assertRaisesRegex(AssertionError, "streams: FAIL, 1 of 3 do not equal"):
            Streams((None, "its text is 'x'", None)).assert_passed()


class TestOthers(unittest.TestCase):
    def test_each_pair_of_levels_occurs_in_a_covering(self):
        sizes = [3, 2, 2, 3, 2]
        rows = covering_rows(sizes)
        self.assertEqual(rows[0], (0,) * 5)
        for one in range(5):
            for other in range(one):
                pairs = {(row[one], row[other]) for row in rows}
                self.assertEqual(len(pairs), sizes[one] * sizes[other])
        self.assertLess(len(rows), 16)
        probes = crossed_probes([1, 2, 3], 8)
        self.assertEqual(len({probe.name for probe in probes}), len(probes))
        for name, beside in (("top_p", "return_logprob"), ("top_k", "stop"), ("sampling_seed", "stop")):
            bodies = [probe.request | probe.request["sampling_params"] for probe in probes]
            meet = [body for body in bodies if body.get(name) and body.get(beside)]
            self.assertTrue(any(body["temperature"] for body in meet), f"{name} does nothing beside {beside}")
        self.assertTrue(any(probe.streams for probe in probes) and any(probe.asks_logprobs for probe in probes))

    def test_lengths_reach_the_context_limit(self):
        self.assertEqual(lengths_up_to(4096, 3, 1200, 4)[-1], 4092)
        self.assertEqual(len(lengths_up_to(4096, 3, 1200, 4)), 4)
        self.assertEqual(lengths_up_to(512, 3, 1200, 4), [508])

    def test_answers_are_cut_at_each_position(self):
        probes = cut_probes([1, 2], answer(65, 66, 65, 67), ["A", "B", "A", "C"], 4)
        names = [probe.name for probe in probes]
        self.assertIn("stop at token 2", names)
        self.assertNotIn("stop at token 3", names, "it would end the answer at token 1")
        self.assertEqual(sum(name.startswith("max_new_tokens") for name in names), 4)
        limits = {probe.name: probe.request["sampling_params"]["max_new_tokens"] for probe in probes}
        self.assertEqual((limits["max_new_tokens at token 2"], limits["stop at token 2"]), (2, 4))

    def test_a_right_answer_without_its_transfer_is_the_failure(self):
        right = answer(65, 66)
        Withheld({8: (right, answer(65, 99)), 62: (right, None)}).assert_passed()
        with self.assertRaisesRegex(AssertionError, "prompts of 62 tokens are answered rightly"):
            Withheld({8: (right, answer(65, 99)), 62: (right, right)}).assert_passed()

    def test_families_have_parameters_and_tests(self):
        names = [fault.name for fault in families()]
        self.assertEqual(len(names), len(set(names)))
        self.assertLessEqual(set(names), LIBRARY.keys())
        self.assertTrue(all(fault.asks for fault in families()))
        for family in FAMILIES:
            self.assertGreaterEqual(len(list(families(family))), 2, family)

    def test_a_fault_begins_after_so_many_requests(self):
        injection = Injection(LIBRARY["newest-1-lost-after-20"])
        self.assertEqual([injection.is_met() for _ in range(22)], [False] * 20 + [True] * 2)

    def test_a_fault_that_met_nothing_is_not_one_that_was_not_seen(self):
        self.assertIsNone(Observation("window-zeroed", 3, {"parity": "why"}).shortfall(True))
        self.assertIn("not seen", Observation("window-zeroed", 3, {"parity": None}).shortfall(True))
        self.assertIn("met no request", Observation("window-zeroed", 0, {"parity": "why"}).shortfall(True))
        self.assertIn("nothing to see", Observation(None, 0, {"parity": "why"}).shortfall(False))


class TestSilentHalf(unittest.TestCase):
    def half(self, prefill, decode, computes=True):
        """Which half is found silent; a server that does not answer is one that takes longer than anybody waits."""
        state, ended = {"tokens": 0}, threading.Event()

        def reply(answers, path, body):
            if body is None:
                return 200, {"engine": {"prefill_tokens": state["tokens"]}}
            state["tokens"] += computes
            if answers:
                return 200, {"text": "1"}
            ended.wait()

        halves = {"prefill": prefill, "decode": decode}.items()
        urls = {name: StubServer(self, reply=partial(reply, answers)).url for name, answers in halves}
        self.addCleanup(ended.set)
        return silent_half(urls, "127.0.0.1", 1, 30.0 if decode else 3.0)

    def test_the_silent_half_is_named(self):
        self.assertIsNone(self.half(True, True))
        self.assertEqual(self.half(True, False)[0], "decode")
        self.assertEqual(self.half(False, False)[0], "decode", "prefill computed, and nobody fetched")
        self.assertEqual(self.half(False, False, computes=False)[0], "prefill")


if __name__ == "__main__":
    unittest.main()
