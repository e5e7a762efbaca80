"""Parity: what counts as a difference, which differences fail, what is sent, and that no check can pass unasked."""

import math
import random
import unittest
from dataclasses import replace
from types import SimpleNamespace

from cases import printed
from pdkit.checks.http import RequestFailed
from pdkit.checks.parity.answers import Answer, AnswerError
from pdkit.checks.parity.checks import ParityChecks
from pdkit.checks.parity.plan import (
    Geometry,
    PlanOptions,
    Prompts,
    Round,
    a_stop,
    completion_variations,
    generate_probe,
    generate_variations,
    lengths_of,
    make_plan,
)
from pdkit.checks.parity.references import References, collect
from pdkit.checks.parity.verdict import FLOAT_ROUNDING, LEVEL, RESOLUTION, Differences, Parity, compare
from pdkit.checks.races import RaceChecks
from pdkit.core.ci_register import register_cpu_ci
from pdkit.core.quantile import quantile
from stub_server import StubServer

register_cpu_ci(est_time=3, suite="stage-a-test-cpu")

NANO = {
    "vocab_size": 520,
    "sliding_window": 32,
    "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128},
    "max_position_embeddings": 4096,
}
NANO_INFO = {"chunked_prefill_size": 128, "context_length": 4096}


def answer(tokens=(5, 6, 7), logprobs=None, **fields):
    logprobs = tuple(-0.5 - 0.1 * i for i in range(len(tokens))) if logprobs is None else tuple(logprobs)
    alternatives = tuple(((p, t), (-2.0, 100), (-3.0, 101)) for p, t in zip(logprobs, tokens))
    return Answer(tuple(tokens), logprobs, alternatives, **{"text": str(tokens), "finish": "length 3", **fields})


def generate_body(tokens=(5, 6), logprobs=(-0.5, -0.6), **meta):
    info = {
        "finish_reason": {"type": "length", "length": 2},
        "prompt_tokens": 4,
        "cached_tokens": 0,
        "output_token_logprobs": [[p, t, None] for p, t in zip(logprobs, tokens)],
        "output_top_logprobs": [[[p, t, None], [-9.0, 1, None]] for p, t in zip(logprobs, tokens)],
        "input_token_logprobs": [],
    }
    return {"text": "x", "output_ids": list(tokens), "meta_info": {**info, **meta}}


class TestAnswer(unittest.TestCase):
    def test_of_generate(self):
        prompt = [[None, 1, None], [-1.0, 2, None]]
        found = Answer.of_generate(generate_body(cached_tokens=3, input_token_logprobs=prompt))
        self.assertEqual((found.tokens, found.logprobs), ((5, 6), (-0.5, -0.6)))
        self.assertEqual(found.alternatives[0], ((-0.5, 5), (-9.0, 1)))
        self.assertEqual((found.prompt_logprobs, found.cached_tokens), ((None, -1.0), 3))
        self.assertEqual(found.finish, "length 2")

    def test_logprobs_that_are_missing_or_of_other_tokens_are_an_error(self):
        for body in (
            generate_body(output_token_logprobs=[]),
            generate_body(output_token_logprobs=[[-0.5, 5, None], [-0.6, 7, None]]),
            {"text": "x"},
            {"error": {"message": "no"}},
            [],
        ):
            with self.subTest(body=body), self.assertRaises(AnswerError):
                Answer.of_generate(body)
        unasked = Answer.of_generate(generate_body(output_token_logprobs=[]), asked_logprobs=False)
        self.assertEqual(unasked.tokens, (5, 6))

    def test_of_completion(self):
        choice = {"text": "4", "finish_reason": "stop", "matched_stop": "\n"}
        body = {"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
        found = Answer.of_completion(body)
        self.assertEqual((found.text, found.finish, found.prompt_tokens), ("4", "stop \n after 2 tokens", 3))
        for broken in ({}, {**body, "choices": []}, {**body, "choices": [choice, choice]}, {"choices": [choice]}):
            with self.assertRaises(AnswerError):
                Answer.of_completion(broken)

    def test_of_stream(self):
        meta = {"finish_reason": None, "prompt_tokens": 3}
        events = [{"text": text, "meta_info": meta} for text in ("a", "ab", "abc")]
        self.assertEqual(Answer.of_stream(events).text, "abc")
        for broken in ([], events[::-1], [{"error": {}}]):
            with self.assertRaises(AnswerError):
                Answer.of_stream(broken)


class TestCompare(unittest.TestCase):
    def test_equal(self):
        self.assertTrue(compare(answer(), answer(cached_tokens=128)).is_none)

    def test_the_last_bit_of_a_logprob_is_a_difference(self):
        other = replace(answer(), logprobs=(-0.5, math.nextafter(-0.6, 0), -0.7))
        self.assertFalse(compare(answer(), other).is_none)
        rows = list(answer().alternatives)
        rows[2] = (rows[2][0], (math.nextafter(-2.0, 0), 100), rows[2][2])
        self.assertFalse(compare(answer(), replace(answer(), alternatives=tuple(rows))).is_none)

    def test_positions_after_the_first_other_token_are_not_compared(self):
        difference = compare(answer((5, 6, 7)), answer((5, 9, 7), (-0.5, -0.8, -99.0)))
        self.assertEqual((difference.diverged, len(difference.deltas)), (1, 2))
        self.assertAlmostEqual(difference.largest, 3.0 - 0.6)

    def test_a_shorter_answer_diverges_where_it_ends(self):
        self.assertEqual(compare(answer((5, 6, 7)), answer((5, 6))).diverged, 2)
        self.assertEqual(compare(answer(()), answer((5,))).diverged, 0)

    def test_everything_else_that_differs_is_named(self):
        for change in ({"text": "no"}, {"finish": "stop 5"}, {"prompt_tokens": 9}, {"prompt_logprobs": (None, -1.0)}):
            self.assertEqual(compare(answer(), answer(**change)).other, tuple(change))
        for fewer in ({"alternatives": ()}, {"logprobs": (), "alternatives": ()}):
            self.assertEqual(compare(answer(), replace(answer(), **fewer)).other, ("number of logprobs",))

    def test_nan_is_infinitely_far(self):
        for ours, theirs in ((-0.5, math.nan), (math.nan, -0.5), (math.nan, math.nan)):
            difference = compare(answer((5,), (ours,)), answer((5,), (theirs,)))
            self.assertEqual(difference.largest, math.inf)

    def test_quantile(self):
        values = [float(i) for i in range(1, 101)]
        self.assertEqual([quantile(values, share) for share in (0.0, 0.5, 0.99, 1.0)], [1.0, 50.0, 99.0, 100.0])
        self.assertEqual(quantile([], 0.5), 0.0)


class TestEqualRule(unittest.TestCase):
    def parity(self, candidate, rounding=0.0):
        return Parity("test", ("a", "b"), [answer(), answer((8, 9, 10))], candidate, rounding=rounding)

    def test_equal_passes(self):
        self.parity([answer(), answer((8, 9, 10))]).assert_passed()

    def test_each_difference_fails_and_is_told(self):
        for changed, told in (
            (answer((8, 9, 11)), "b: token 2 is 11, expected 10"),
            (answer((8, 9)), "b: token 2 is end, expected 10"),
            (answer((8, 9, 10), (-0.5, -0.6, -0.75)), "b: logprobs differ first at token 2, by up to 0.05"),
            (answer((8, 9, 10), finish="stop 3"), "b: finish is 'stop 3', expected 'length 3'"),
            (answer((8, 9, 10), text="no"), "b: text is 'no'"),
            (replace(answer((8, 9, 10)), alternatives=()), "b: another number of logprobs"),
        ):
            with self.subTest(told=told), self.assertRaises(AssertionError) as caught:
                self.parity([answer(), changed]).assert_passed()
            self.assertIn(told, str(caught.exception))
            self.assertIn("1 of 2 equal to the bit", str(caught.exception))

    def test_swapped_answers_fail(self):
        self.assertEqual(len(self.parity([answer((8, 9, 10)), answer()]).problems), 2)

    def test_rounding_covers_logprobs_and_no_token(self):
        nearly = answer((8, 9, 10), (-0.5, -0.6, -0.7 + FLOAT_ROUNDING / 2))
        self.assertTrue(self.parity([answer(), nearly]).problems)
        self.assertEqual(self.parity([answer(), nearly], FLOAT_ROUNDING).problems, ())
        further = answer((8, 9, 10), (-0.5, -0.6, -0.7 + 2 * FLOAT_ROUNDING))
        self.assertTrue(self.parity([answer(), further], FLOAT_ROUNDING).problems)
        self.assertTrue(self.parity([answer(), answer((8, 9, 11))], FLOAT_ROUNDING).problems)

    def test_arms_must_pair_up_and_hold_something(self):
        for names, arm in (((), []), (("a",), []), (("a",), [answer(), answer()])):
            with self.assertRaises(ValueError):
                Parity("test", names, arm, arm)


class TestControlRule(unittest.TestCase):
    """Arms of 60 requests: each logprob is off by noise, and a token flips in one request of ten."""

    SIZE = 60

    def arm(self, rng, noise=0.01, flips=0.1):
        def noisy(index):
            rows = []
            for token in (index, index + 1, index + 2):
                tie = -0.7 if token == index + 2 else -2.0
                rows.append([(-0.69 + rng.gauss(0, noise), token), (tie + rng.gauss(0, noise), token + 50), (-3.0, 1)])
            if rng.random() < flips:
                rows[2][:2] = rows[2][1::-1]
            firsts = [row[0] for row in rows]
            alternatives = tuple(map(tuple, rows))
            return Answer(tuple(token for _, token in firsts), tuple(p for p, _ in firsts), alternatives)

        return [noisy(index) for index in range(self.SIZE)]

    def parity(self, seed, **candidate):
        rng = random.Random(seed)
        names = tuple(f"p{i}" for i in range(self.SIZE))
        reference = self.arm(rng, noise=0, flips=0)
        control = self.arm(rng)
        return Parity("test", names, reference, self.arm(rng, **candidate), control)

    def test_a_decay_is_seen_that_all_requests_together_do_not_show(self):
        def off(by):
            return answer(logprobs=(-1.0 - by, -1.0, -1.0))

        reference, control, candidate = [off(0)] * 80, [off(0.3)] * 80, [off(0.2)] * 40 + [off(0.6)] * 40
        names = tuple(f"p{index}" for index in range(80))
        by_number, by_load = ("candidate further off by " + order for order in ("request number", "requests in flight"))
        for loads, found in (((), [by_number]), ((1,) * 40 + (32,) * 40, [by_number, by_load])):
            problems = Parity("test", names, reference, candidate, control, loads=loads).problems
            self.assertEqual([each.split(":")[0] for each in problems], found)
        self.assertEqual(Parity("test", names, reference, candidate[::-1], control).problems, ())

    def test_two_draws_of_the_same_thing_pass(self):
        failed = sum(bool(self.parity(seed).problems) for seed in range(200))
        self.assertEqual(failed, 0, f"level {LEVEL}")

    def test_more_noise_in_every_answer_fails_by_the_sign_test(self):
        (problem,) = self.parity(1, noise=0.2).problems
        self.assertIn("exact sign test", problem)

    def test_more_flipped_tokens_fail_by_mcnemar(self):
        problems = self.parity(1, noise=0.01, flips=0.6).problems
        self.assertTrue(any("McNemar" in problem for problem in problems), problems)

    def test_one_answer_of_another_request_fails(self):
        parity = self.parity(2)
        candidate = list(parity.candidate)
        candidate[7] = answer((400, 401, 402))
        (problem,) = replace(parity, candidate=candidate).problems
        self.assertIn("p7: a logprob is off by", problem)

    def test_differences_below_the_resolution_say_nothing(self):
        parity = self.parity(3, noise=0.0, flips=0.0)
        control = parity.reference
        slightly, beyond = (
            [replace(each, logprobs=tuple(p + off * RESOLUTION for p in each.logprobs)) for each in control]
            for off in (0.9, 1.1)
        )
        self.assertEqual(replace(parity, control=control, candidate=slightly).problems, ())
        self.assertIn("sign test", replace(parity, control=control, candidate=beyond).problems[0])

    def test_rounds_are_judged_together(self):
        parities = [self.parity(seed, noise=0.2) for seed in range(3)]
        arms = ("names", "reference", "candidate", "control")
        few = [replace(each, **{name: getattr(each, name)[:6] for name in arms}) for each in parities]
        self.assertEqual([each.problems for each in few], [()] * 3)
        pooled = Parity.pool("three rounds", few)
        self.assertIn("sign test", pooled.problems[0])
        self.assertEqual(len(pooled.names), 18)

    def test_another_finish_reason_of_the_same_tokens_fails(self):
        parity = self.parity(2)
        kept = next(i for i, same in enumerate(parity.candidate_distribution.same_tokens) if same)
        candidate = list(parity.candidate)
        candidate[kept] = replace(candidate[kept], finish="abort")
        self.assertEqual(replace(parity, candidate=candidate).problems, (f"p{kept}: another finish",))

    def test_an_answer_that_goes_on_where_it_should_end_fails(self):
        """And one of other tokens does not: noise may end it elsewhere."""
        parity = self.parity(2)
        at = next(i for i, same in enumerate(parity.candidate_distribution.same_tokens) if same)

        def with_(**fields):
            arm = list(parity.candidate)
            arm[at] = replace(arm[at], finish="length 9", logprobs=(), alternatives=(), **fields)
            return replace(parity, candidate=arm).problems

        tokens = parity.reference[at].tokens
        self.assertEqual(with_(tokens=(*tokens, 77)), (f"p{at}: another finish",))
        self.assertEqual(with_(tokens=(*tokens[:-1], 77, 78)), ())
        reference = list(parity.reference)
        reference[at] = replace(reference[at], tokens=(), logprobs=(), alternatives=(), text="8 9")
        parity = replace(parity, reference=reference)
        self.assertEqual(with_(tokens=(), text="8 9 10"), (f"p{at}: another finish",))
        self.assertEqual(with_(tokens=(), text="8 10 11"), ())

    def test_the_report_shows_both_distributions(self):
        report = self.parity(1, noise=0.2).report()
        self.assertIn("not further from the reference than the control arm", report)
        for part in ("FAIL", "candidate  ", "control    ", "p99"):
            self.assertIn(part, report)


class TestPlan(unittest.TestCase):
    geometry = Geometry.of(NANO, NANO_INFO)

    def test_geometry_of_both_kinds_of_config(self):
        self.assertEqual(self.geometry, Geometry(520, 32, (4, 128), 128, 128, 4096))
        deepseek = {"vocab_size": 9, "sliding_window": 128, "compress_ratios": [0, 4, 128, 4], "index_topk": 512}
        deepseek["max_position_embeddings"] = 10**6
        found = Geometry.of(deepseek, {"chunked_prefill_size": 8192, "page_size": 256, "context_length": None})
        self.assertEqual(found, Geometry(9, 128, (4, 128), 8192, 256, 10**6, 2048))
        self.assertEqual(Geometry.of({"vocab_size": 9}, {}).ratios, ())

    def test_lengths_are_around_every_edge(self):
        found = lengths_of(self.geometry, PlanOptions())
        wanted = [1, 3, 4, 5, 31, 32, 33, 127, 128, 129, 255, 256, 257, 511, 512, 513, 700, 1000]
        self.assertEqual(list(found), wanted)

    def test_lengths_leave_room_in_a_short_context(self):
        short = Geometry.of(NANO, {**NANO_INFO, "context_length": 600})
        self.assertLessEqual(max(lengths_of(short, PlanOptions())), 600 - 8 * PlanOptions().tokens)
        for round_ in make_plan(short, self.prompts()).rounds:
            for probe in round_.probes:
                new = probe.request["sampling_params"]["max_new_tokens"]
                self.assertLessEqual(probe.prompt_length + new, 600, probe.name)

    def prompts(self, seed=0):
        natural = random.Random(7).choices(range(5, 520), k=9000)
        return Prompts(range(5, 520), natural, seed)

    def plan(self):
        return make_plan(self.geometry, self.prompts())

    def test_no_two_prompts_are_the_same_but_where_they_share_a_prefix(self):
        plan = self.plan()
        ids = [tuple(p.request["input_ids"]) for r in (*plan.alone, *plan.concurrent, *plan.rooms) for p in r.probes]
        ids = [each for each in ids if len(each) > 8]
        beginnings = {each[:8] for each in ids}
        self.assertEqual(len(ids), len(beginnings))

    def test_both_kinds_of_prompts_in_each_condition(self):
        plan = self.plan()
        for round_ in (*plan.alone, *plan.cached, *plan.concurrent):
            kinds = {probe.name.split("-")[0] for probe in round_.probes}
            self.assertEqual(kinds, {"random", "natural"}, round_.condition)

    def test_the_same_seed_gives_the_same_plan(self):
        self.assertEqual(self.plan(), self.plan())
        self.assertNotEqual(self.plan(), make_plan(self.geometry, self.prompts(seed=1)))

    def test_a_longest_compressed_entry_fills_during_decode(self):
        probes = [probe for round_ in self.plan().concurrent for probe in round_.probes]
        crossed = [(p.prompt_length, p.prompt_length + p.request["sampling_params"]["max_new_tokens"]) for p in probes]
        self.assertTrue(any(stop // 128 - -(-start // 128) >= 1 for start, stop in crossed), crossed)

    def test_prompts_are_cached_where_the_plan_says_so(self):
        before, cached, after = self.plan().cached
        self.assertTrue(cached.cached)
        self.assertEqual(cached.cached, {probe.name for probe in cached.probes})
        self.assertTrue(before.cold and after.cold and before.flush and after.flush and not cached.flush)
        self.assertTrue(all(probe.prompt_length > 128 for probe in cached.probes))

    def test_shared_prefixes_part_at_the_same_length(self):
        together = {probe.name: probe.request["input_ids"] for r in self.plan().shared_prefix for probe in r.probes}
        for prefix in (32, 64, 256, 320):
            a, b, c = (together[f"prefix-{prefix}-{name}"] for name in "abc")
            self.assertEqual(len(a), len(b))
            self.assertNotEqual(len(a), len(c))
            self.assertTrue(a[:prefix] == b[:prefix] == c[:prefix])
            self.assertNotEqual(a[prefix], b[prefix])
        self.assertGreater(len(together["prefix-64-a"]), 128, "a page that the prefix does not fill")

    def test_long_prompts_make_the_indexer_choose(self):
        large = Geometry(vocab_size=520, ratios=(4, 128), context=8192, chosen=2048)
        (round_,) = make_plan(large, self.prompts(), PlanOptions(indexed=24)).indexed
        lengths = [probe.prompt_length for probe in round_.probes]
        self.assertEqual((len(set(lengths)), min(lengths), max(lengths), round_.in_flight), (24, 3072, 6144, 1))
        for geometry in (replace(large, context=3000), replace(large, chosen=None)):
            self.assertEqual(make_plan(geometry, self.prompts()).indexed, ())

    def test_a_model_without_window_compression_or_known_pages(self):
        plan = make_plan(Geometry(vocab_size=100), self.prompts())
        self.assertEqual(plan.cached, ())
        self.assertTrue(plan.alone[0].probes and plan.shared_prefix[0].probes)

    def test_a_text_that_is_too_short_is_an_error(self):
        with self.assertRaisesRegex(ValueError, "natural text has 3 tokens"):
            Prompts(range(9), [1, 2, 3]).natural_ids(4)


class TestVariations(unittest.TestCase):
    def test_each_parameter_has_a_probe_of_its_own(self):
        greedy = Answer(tuple(range(24)), text="abc def ghi jkl mno pqr")
        varied = generate_variations((1, 2, 3), 24, greedy, seeded=True)
        self.assertEqual(len({each.probe.key for each in varied}), len(varied))
        self.assertTrue(all(each.probe.key != each.without.key for each in varied))
        texts = " ".join(each.probe.body for each in varied)
        for name in "max_new_tokens stop_token_ids ignore_eos top_p top_k sampling_seed no_stop_trim".split():
            self.assertIn(f'"{name}"', texts)
        self.assertFalse(any("seed" in v.probe.name for v in generate_variations((1,), 24, greedy, seeded=False)))
        without = generate_variations((1, 2, 3), 24, greedy, seeded=True, prompt_logprobs=False)
        left_out = {each.probe.name for each in varied} - {each.probe.name for each in without}
        self.assertEqual(left_out, {"logprob_start_len"})
        completions = completion_variations("a", 24, greedy, seeded=True)
        self.assertTrue(all(each.probe.path == "/v1/completions" for each in completions))

    def test_a_stop_appears_first_where_it_stops(self):
        text = "abcabc\x00defghi"
        stop = a_stop(text)
        self.assertEqual(text.find(stop), text.index("def"))
        self.assertIsNone(a_stop("\x00" * 30))
        self.assertIsNone(a_stop("aaaaaaaaaaaa"))


class StubEngine(StubServer):
    """An engine whose answer to a prompt is the prompt's last ids; `change(ids, tokens)` makes it another one."""

    def __init__(self, test, change=lambda ids, tokens: tokens, status=200):
        self.change, self.status, self.asked, self.cached, self.noise = change, status, [], 0, 0.0
        self.told, self.flushed, self.samples = 0, 0, lambda results: results
        super().__init__(test)

    def reply(self, path, body):
        if body is None:
            self.told += 1
            return 200, {"chunked_prefill_size": 128, "context_length": 4096, "disable_radix_cache": False}
        if path.startswith("/flush_cache"):
            self.flushed += 1
            return 200, {}
        self.asked.append(body)
        if self.status != 200:
            return self.status, {"error": {"message": "KV transfer failed"}}
        ids, params = body["input_ids"], body["sampling_params"]
        if isinstance(ids[0], list):
            return 200, [self.result(*each) for each in zip(ids, params)]
        if "n" not in params:
            return 200, self.result(ids, params)
        return 200, self.samples([self.result(ids, params) for _ in range(params["n"])])

    def result(self, ids, params):
        tokens = self.change(ids, [ids[-1 - i % len(ids)] for i in range(params["max_new_tokens"])])
        body = generate_body(tokens, [self.noise - 0.1 * (token % 30) for token in tokens])
        body["meta_info"]["cached_tokens"] = self.cached
        return body


def rounds(count=6, **options):
    probes = tuple(generate_probe(f"p{i}", (i + 1, i + 2, i + 3), 4) for i in range(count))
    return Round("test", probes, **{"in_flight": 3, **options})


class TestCollect(unittest.TestCase):
    def test_answers_come_in_the_order_of_the_probes(self):
        for round_ in (rounds(), rounds(in_flight=1), rounds(batch=True)):
            arm = collect(StubEngine(self).url, round_, timeout=5)
            self.assertEqual([each.tokens[0] for each in arm], [3, 4, 5, 6, 7, 8])

    def test_a_failed_request_is_told_and_ends_the_round(self):
        engine = StubEngine(self, status=500)
        first = r"requests to .* failed .*the first: p\d: status 500: .*KV transfer"
        with self.assertRaisesRegex(RequestFailed, first):
            collect(engine.url, rounds(60, in_flight=2), timeout=5)
        self.assertLess(len(engine.asked), 60)
        with self.assertRaisesRegex(RequestFailed, "batch of 6 from p0: status 500"):
            collect(engine.url, rounds(batch=True), timeout=5)

    def test_a_server_that_is_gone_is_told(self):
        engine = StubEngine(self)
        url = engine.url.replace(str(engine.server_port), "9")
        with self.assertRaisesRegex(RequestFailed, "ConnectionError"):
            collect(url, rounds(), timeout=5)


class TestReferences(unittest.TestCase):
    def test_bitwise_asks_each_request_once(self):
        engine = StubEngine(self)
        references = References(bitwise=True, timeout=5)
        reference, control = references.take(engine.url, rounds())
        again, _ = references.take(None, rounds(in_flight=1))
        self.assertEqual((len(engine.asked), control), (6, None))
        self.assertEqual(reference, again)

    def test_otherwise_each_request_is_asked_alone_and_each_round_as_it_stands(self):
        engine = StubEngine(self)
        references = References(bitwise=False, timeout=5)
        reference, control = references.take(engine.url, rounds(batch=True))
        self.assertEqual([isinstance(body["input_ids"][0], list) for body in engine.asked], [False] * 6 + [True])
        self.assertEqual(len(control), 6)
        self.assertIs(references.take(None, rounds(batch=True))[0], reference)
        references.take(engine.url, rounds())
        self.assertEqual(len(engine.asked), 7 + 6, "what is known from being alone is not asked again")

    def test_the_control_arm_may_be_asked_of_another_server(self):
        one, two = StubEngine(self), StubEngine(self)
        References(bitwise=False, timeout=5, control_url=two.url).take(one.url, rounds())
        self.assertEqual((len(one.asked), len(two.asked)), (6, 6))

    def test_without_a_server_and_without_answers_nothing_passes(self):
        for bitwise in (True, False):
            with self.assertRaisesRegex(RequestFailed, "no monolithic answers were taken"):
                References(bitwise, timeout=5).take(None, rounds())

    def test_rounding_is_granted_only_where_batching_changes_bits(self):
        engine = StubEngine(self)
        references = References(bitwise=True, timeout=5)
        references.measure_rounding(engine.url, rounds(), 3)
        self.assertEqual(references.rounding, 0.0)
        references.take(engine.url, rounds())
        engine.change = lambda ids, tokens: tokens[:-1] + [tokens[-1] + 1]
        references.measure_rounding(engine.url, rounds(), 3)
        self.assertEqual(references.rounding, FLOAT_ROUNDING)


def case_of(test, checks, lb, **more):
    """A test class of `checks`, of a pair that is `lb`, beside a monolithic server that is sound."""
    urls = {"monolithic_url": StubEngine(test).url, **dict.fromkeys(("lb_url", "prefill_url", "decode_url"), lb.url)}
    settings = {"model": "m", "gsm8k_data_path": None, "bitwise": True, "request_timeout": 5}
    return type("Case", (checks, unittest.TestCase), {**urls, **settings, **more})


class TestMixin(unittest.TestCase):
    """check_parity of a pair whose answers are those of a stub, against another stub."""

    def case(self, cached=0, noise=0.0, rounding=0.0, **pair):
        self.lb = StubEngine(self, **pair)
        self.lb.cached, self.lb.noise = cached, noise
        return case_of(self, ParityChecks, self.lb, references=References(True, 5, rounding))

    def check(self, *rounds, case=None, **options):
        printed((case or self.case(**options))("test_parity_alone").check_parity, rounds)

    def test_equal_answers_pass(self):
        self.check(rounds())

    def test_one_other_token_fails(self):
        with self.assertRaisesRegex(AssertionError, "p3: token 3 is 99"):
            self.check(rounds(), change=lambda ids, tokens: tokens[:3] + [99] if ids[0] == 4 else tokens)

    def test_float_rounding_is_granted_only_to_requests_that_are_served_together(self):
        noise = FLOAT_ROUNDING / 2
        self.check(rounds(), noise=noise, rounding=FLOAT_ROUNDING)
        self.check(rounds(batch=True, in_flight=1), noise=noise, rounding=FLOAT_ROUNDING)
        for round_, rounding in ((rounds(in_flight=1), FLOAT_ROUNDING), (rounds(), 0.0)):
            with self.assertRaisesRegex(AssertionError, "logprobs differ first at token 0"):
                self.check(round_, noise=noise, rounding=rounding)

    def test_a_prefix_that_did_not_come_from_the_cache_fails(self):
        cached = rounds(cached=frozenset({"p2"}))
        self.check(cached, cached=2)
        with self.assertRaisesRegex(AssertionError, "0 of 3 tokens of p2 came from prefill's cache"):
            self.check(cached)

    def test_prefill_is_asked_once_whether_it_caches_prefixes(self):
        self.check(rounds(), rounds(2), cached=2)
        self.assertEqual(self.lb.told, 1)

    def test_of_several_prefill_servers_any_is_asked_next_and_each_is_flushed(self):
        case, other = self.case(), StubEngine(self)
        case.prefill_urls = [case.prefill_url, other.url]
        self.check(rounds(flush=True, cached=frozenset({"p2"})), case=case)
        self.assertEqual(other.flushed, 1)

    def test_where_nothing_came_from_the_cache_it_is_not_said_to_be_checked(self):
        for cached, outcome in ((2, "passed"), (0, "skipped")):
            case = self.case(cached=cached)
            case.parity_plan = classmethod(lambda cls: SimpleNamespace(cached=(rounds(),)))
            result = printed(case("test_parity_prefix_cached").run).returned
            self.assertTrue(result.wasSuccessful(), result.failures + result.errors)
            self.assertEqual("skipped" if result.skipped else "passed", outcome)

    def test_a_cache_that_flush_left_full_fails(self):
        with self.assertRaisesRegex(AssertionError, "2 of 3 tokens of p0 came from a cache that is empty"):
            self.check(rounds(cold=True), cached=2)


class TestParallelSamples(unittest.TestCase):
    """Requests with n > 1 in flight at once, of a pair whose answers are a stub's."""

    def check(self, samples):
        lb = StubEngine(self)
        lb.samples = samples
        case = case_of(self, RaceChecks, lb, parallel_samples=True)
        printed(case("test_parallel_samples_in_flight").test_parallel_samples_in_flight)
        return lb

    def test_each_sample_is_compared(self):
        self.assertEqual(len(self.check(lambda results: results).asked), RaceChecks.sample_requests)
        other = generate_body([1] * 6, [0.0] * 6)
        for samples, message in (
            (lambda results: [*results[:-1], other], "request 0, sample 2: token 0 is 1"),
            (lambda results: results[:-1], r"2 != 3 : races: parallel samples in flight: request \d"),
            (lambda results: results[0], r"parallel samples in flight: request \d+ with n = 3"),
        ):
            with self.assertRaisesRegex(AssertionError, message):
                self.check(samples)


class TestDistribution(unittest.TestCase):
    def test_report(self):
        reference = [answer(), answer(), answer()]
        arm = [answer(), answer((5, 6, 9)), answer((5, 6, 7), (-0.5, -0.6, -0.8))]
        report = Differences.of(reference, arm).report()
        self.assertIn("1 of 3 equal to the bit, 2 of 3 with the same tokens", report)
        self.assertIn("others differ first at token 2, median 2", report)
        self.assertIn("over 9 positions", report)


if __name__ == "__main__":
    unittest.main()
