"""One sequence: what its parameters allow, which token comes next, when it ends and what its text is.

And which sequences a body asks for, and their streams while the torch thread goes on.
"""

import asyncio
import math
import unittest
from collections import Counter
from types import SimpleNamespace

import torch
from fastapi import HTTPException
from pdkit.core.ci_register import register_cpu_ci
from pdkit.core.paths import ASSETS
from pdkit.engine.fields import BadRequest
from pdkit.engine.request import Request, SamplingParams
from pdkit.engine.sequences import ROOMS, fan_out
from pdkit.engine.service import Service as EngineService
from pdkit.engine.streams import interleave, raise_if_failed
from transformers import AutoTokenizer

register_cpu_ci(est_time=2, suite="stage-a-test-cpu")

RANDOM = ASSETS / "random-dsv4"
EOS = 1
NOT_FINITE = "logits at output token {} are not finite: model or state is corrupt"

tokenizer = AutoTokenizer.from_pretrained(RANDOM, local_files_only=True)


def ids_of(text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def bytes_of(text):
    """One token a byte: how a model may spell what the tokenizer would not split so."""
    pieces = [tokenizer.convert_ids_to_tokens(token) for token in range(tokenizer.vocab_size)]
    alphabet = {piece: token for token, piece in enumerate(pieces)}
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return [alphabet[bytes_to_unicode()[byte]] for byte in text.encode()]


def request(ids=(10, 11, 12), return_logprob=False, top_logprobs_num=0, logprob_start_len=None, **params):
    return Request(
        ids=list(ids),
        params=SamplingParams.parse({"temperature": 0, "max_new_tokens": 100} | params),
        tokenizer=tokenizer,
        eos_ids=frozenset({EOS}),
        return_logprob=return_logprob,
        top_logprobs_num=top_logprobs_num,
        logprob_start_len=logprob_start_len,
    )


def feed(request, tokens):
    """Give it tokens until it has enough; returns its text after each."""
    texts = []
    for token in tokens:
        request.add_output(token)
        texts.append(request.text)
        if request.finish_reason is not None:
            break
    return texts


class TestFinish(unittest.TestCase):
    def test_length(self):
        one = request(max_new_tokens=3)
        feed(one, ids_of("1234567"))
        self.assertEqual(one.finish_reason, {"type": "length", "length": 3})
        self.assertEqual((one.text, len(one.output_ids)), ("123", 3))

    def test_no_new_tokens_at_all(self):
        for token in (ids_of("1")[0], EOS):
            with self.subTest(token=token):
                one = request(max_new_tokens=0, return_logprob=True)
                one.add_output(token, -0.5)
                self.assertEqual(one.finish_reason, {"type": "length", "length": 0})
                self.assertEqual((one.text, one.output_ids, one.output_logprobs), ("", [], [(-0.5, token)]))

    def test_what_ends_it(self):
        """An empty stop string stops at once, as `Req._check_str_based_finish` of SGLang always finds it."""
        four, eos = ids_of("4")[0], {"type": "stop", "matched": EOS}
        by_four, by_text = {"type": "stop", "matched": four}, {"type": "stop", "matched": "4"}
        both = {"stop": "34", "stop_token_ids": [four], "max_new_tokens": 4}
        before_length = {"stop_token_ids": [four], "max_new_tokens": 4}
        for what, params, tokens, text, reason in (
            ("end of text is not text but counts", {}, [*ids_of("12"), EOS], "12", eos),
            ("end of text first", {}, [EOS], "", eos),
            ("a stop token", {"stop_token_ids": [four, 499]}, ids_of("12345"), "123", by_four),
            ("an untrimmed one", {"stop_token_ids": [four], "no_stop_trim": True}, ids_of("12345"), "1234", by_four),
            ("ignore_eos keeps stop strings", {"ignore_eos": True, "stop": "4"}, ids_of("12345"), "123", by_text),
            ("an empty stop string", {"stop": ["", "2"]}, ids_of("12"), "", {"type": "stop", "matched": ""}),
            ("a stop string before a token", both, ids_of("1234"), "12", {"type": "stop", "matched": "34"}),
            ("a stop token before length", before_length, ids_of("1234"), "123", by_four),
        ):
            with self.subTest(what):
                one = request(**params)
                feed(one, tokens)
                self.assertEqual((one.text, one.finish_reason), (text, reason))
                self.assertEqual(one.output_ids, tokens[: len(one.output_ids)])

    def test_ignore_eos_ignores_stop_tokens_too(self):
        one = request(ignore_eos=True, stop_token_ids=ids_of("4"), max_new_tokens=6)
        feed(one, [*ids_of("34"), EOS, *ids_of("567")])
        self.assertEqual((one.text, one.finish_reason["type"]), ("34567", "length"))

    def test_stop_string_over_several_tokens_and_in_the_middle_of_one(self):
        self.assertGreater(len(ids_of("\n\nQuestion: 7")), 3)
        for stop in ("\n\nQ", "uestion: 7", "Question", "n:"):
            with self.subTest(stop=stop):
                one = request(stop=stop)
                feed(one, ids_of("It is 12.\n\nQuestion: 7 and more"))
                self.assertEqual(one.finish_reason, {"type": "stop", "matched": stop})
                self.assertEqual(one.text, "It is 12.\n\nQuestion: 7 and more".split(stop)[0])

    def test_the_rest_of_the_token_that_completes_a_stop_string_is_cut_off(self):
        piece = next(token for token in range(300, tokenizer.vocab_size) if len(tokenizer.decode([token]).strip()) >= 4)
        text = tokenizer.decode([piece])
        for untrimmed, left in ((False, text[:1]), (True, text[:3])):
            one = request(stop=text[1:3], no_stop_trim=untrimmed)
            feed(one, [piece])
            self.assertEqual(one.text, left)

    def test_of_several_stop_strings_the_first_of_the_list_wins(self):
        for stop, text in ((["never", "3", "23"], "12"), (["23", "3"], "1")):
            one = request(stop=stop)
            feed(one, ids_of("1234"))
            self.assertEqual((one.finish_reason["matched"], one.text), (stop[-2], text))

    def test_a_special_token_can_be_a_stop_string(self):
        special = tokenizer.convert_ids_to_tokens(2)
        one = request(stop=special)
        feed(one, [*ids_of("12"), 2, *ids_of("34")])
        self.assertEqual((one.text, one.finish_reason), ("12", {"type": "stop", "matched": special}))

    def test_a_stop_string_in_the_prompt_does_not_count(self):
        one = request(ids=ids_of("1 stop 2"), stop="stop", max_new_tokens=2)
        feed(one, ids_of("34"))
        self.assertEqual(one.finish_reason["type"], "length")

    def test_abort_is_told_once_and_changes_nothing_that_is_finished(self):
        news, one = [], request()
        one.notify = lambda: news.append(1)
        feed(one, ids_of("12"))
        one.abort("gone", 500)
        one.abort("again")
        self.assertEqual(one.finish_reason, {"type": "abort", "message": "gone", "status_code": 500})
        self.assertEqual((one.text, len(news)), ("12", 3))
        done = request(max_new_tokens=1)
        feed(done, ids_of("1"))
        done.abort("late")
        self.assertEqual(done.finish_reason["type"], "length")

    def test_nothing_comes_after_the_end(self):
        one = request(max_new_tokens=1)
        feed(one, ids_of("1"))
        with self.assertRaises(AssertionError):
            one.add_output(ids_of("2")[0])


class TestStreamedText(unittest.TestCase):
    def test_only_grows_and_ends_as_the_whole(self):
        for text, params in (
            ("It is 12.\n\nQuestion: 7", {"stop": ["\n\nQuestion", "never"]}),
            ("It is 12.\n\nQuest 7.", {"stop": ["\n\nQuestion", "Questio"]}),
            ("naïve 東京 🙂 end", {}),
            ("🙂🙂", {"stop": ["🙂🙂🙂"]}),
        ):
            for tokens in (ids_of(text), bytes_of(text)):
                with self.subTest(text=text, tokens=len(tokens)):
                    one = request(max_new_tokens=len(tokens), **params)
                    texts = feed(one, tokens)
                    for earlier, later in zip(texts, texts[1:]):
                        self.assertTrue(later.startswith(earlier), (earlier, later))
                    self.assertNotIn("\ufffd", "".join(texts))
                    self.assertEqual(one.text, text.split(*params.get("stop", ["none"])[:1])[0])

    def test_holds_back_what_may_become_a_stop_string_and_gives_it_back(self):
        one = request(stop="345")
        self.assertEqual(feed(one, ids_of("123468")), ["1", "12", "12", "12", "12346", "123468"])

    def test_an_unfinished_character_waits_for_its_bytes_and_at_the_end_it_is_shown(self):
        self.assertEqual(feed(request(), bytes_of("1é2")), ["1", "1", "1é", "1é2"])
        one = request(max_new_tokens=2)
        feed(one, bytes_of("1é")[:2])
        self.assertEqual(one.text, "1\ufffd")

    def test_special_tokens_are_hidden_unless_asked_for(self):
        special = tokenizer.convert_ids_to_tokens(2)
        for skip, expected in ((True, "12"), (False, f"1{special}2")):
            one = request(skip_special_tokens=skip, max_new_tokens=3)
            feed(one, [*ids_of("1"), 2, *ids_of("2")])
            self.assertEqual(one.text, expected)


class TestSampling(unittest.TestCase):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0, -20.0])

    def draw(self, count=400, **params):
        drawn = Counter()
        for seed in range(count):
            one = request(sampling_seed=seed, **params)
            one.add_output_logits(self.logits)
            drawn[one.output_ids[0]] += 1
        return drawn

    def test_greedy_takes_the_likeliest(self):
        for temperature in (0, 0.0, 1e-40, 1e-9):
            self.assertEqual(self.draw(5, temperature=temperature), {4: 5})

    def test_frequencies_are_the_softmax(self):
        for temperature in (1.0, 0.5, 2.0):
            drawn = self.draw(2000, temperature=temperature)
            for token, probability in enumerate((self.logits / temperature).softmax(-1).tolist()):
                self.assertAlmostEqual(drawn[token] / 2000, probability, delta=0.045)

    def test_top_k(self):
        for count, top_k, kept in (
            (400, 1, {4}),
            (400, 3, {4, 0, 1}),
            (2000, -1, {*range(6)}),
            (2000, 99, {*range(6)}),
        ):
            self.assertEqual(set(self.draw(count, temperature=5, top_k=top_k)), kept)

    def test_top_p_keeps_the_least_set_that_reaches_it(self):
        likeliest = self.logits.softmax(-1).sort(descending=True)[0].cumsum(-1).tolist()
        below, above, next_above = likeliest[0] - 1e-3, likeliest[0] + 1e-3, likeliest[1] + 1e-3
        for top_p, kept in ((below, {4}), (above, {4, 0}), (next_above, {4, 0, 1}), (1e-9, {4})):
            self.assertEqual(set(self.draw(temperature=1, top_p=top_p)), kept)

    def test_the_same_seed_draws_the_same_and_goes_on_elsewhere(self):
        def sequence(one, count):
            while len(one.output_ids) < count:
                one.add_output_logits(torch.zeros(6))
            return one.output_ids

        def drawn(**seed):
            return request(temperature=1, ignore_eos=True, **seed)

        whole = sequence(drawn(sampling_seed=5), 30)
        self.assertEqual(sequence(drawn(sampling_seed=5), 30), whole)
        self.assertGreater(len(set(whole)), 1)
        self.assertNotEqual(sequence(drawn(sampling_seed=6), 30), whole)
        self.assertNotEqual(sequence(drawn(), 30), sequence(drawn(), 30))
        elsewhere = drawn(sampling_seed=5)
        elsewhere.add_output(whole[0])
        self.assertEqual(sequence(elsewhere, 30), whole)

    def test_any_seed_will_do(self):
        for seed in (0, -1, 2**63 - 1, -(2**63)):
            self.draw(1, temperature=1)
            one = request(temperature=1, sampling_seed=seed)
            one.add_output_logits(self.logits)

    def test_logprobs_are_those_of_the_distribution_drawn_from(self):
        for temperature in (0, 1.0, 2.0):
            one = request(temperature=temperature, sampling_seed=1, return_logprob=True, top_logprobs_num=2)
            one.add_output_logits(self.logits)
            expected = (self.logits / (temperature or 1.0)).log_softmax(-1)
            (logprob, token), top = one.output_logprobs[0], one.output_top_logprobs[0]
            self.assertEqual((logprob, token), (expected[one.output_ids[0]].item(), one.output_ids[0]))
            self.assertEqual(top, [(expected[4].item(), 4), (expected[0].item(), 0)])

    def test_logits_that_are_not_finite_end_a_request_that_needs_their_probabilities(self):
        corrupt = {"type": "abort", "message": NOT_FINITE.format(1), "status_code": 500}
        for bad in (math.nan, math.inf, -math.inf):
            logits = torch.tensor([2.0, bad, 0.0])
            for options in ({"return_logprob": True}, {"temperature": 1}, {"temperature": 1, "return_logprob": True}):
                with self.subTest(bad=bad, **options):
                    one = request(ignore_eos=True, **options)
                    one.add_output_logits(self.logits)
                    one.add_output_logits(logits)
                    self.assertEqual((one.finish_reason, len(one.output_ids)), (corrupt, 1))
                    with self.assertRaises(HTTPException) as raised:
                        raise_if_failed(one)
                    self.assertIn(corrupt["message"], str(raised.exception))
                    self.assertEqual(raised.exception.status_code, 500)
            one = request()
            one.add_output_logits(logits)
            self.assertEqual((one.is_aborted, len(one.output_ids)), (False, 1))

    def test_prompt_logits_that_are_not_finite_end_a_request_that_wants_them_told(self):
        for wanted, finish in ((0, "abort"), (None, None)):
            one = request(return_logprob=True, logprob_start_len=wanted)
            one.add_prompt_logits(0, torch.full((3, 6), math.nan))
            self.assertEqual(one.finish_reason and one.finish_reason["type"], finish)
        one = request(return_logprob=True, logprob_start_len=0)
        one.add_prompt_logits(0, torch.full((3, 6), math.nan))
        one.add_output_logits(torch.zeros(6))
        self.assertEqual((one.input_logprobs, one.output_ids), ([], []))

    def test_no_more_alternatives_than_tokens(self):
        one = request(return_logprob=True, top_logprobs_num=99)
        one.add_output_logits(self.logits)
        self.assertEqual(len(one.output_top_logprobs[0]), 6)


class TestPromptLogprobs(unittest.TestCase):
    def test_the_first_has_none_and_the_others_are_scored_by_the_position_before(self):
        one = request(ids=[3, 1, 2], return_logprob=True, logprob_start_len=0, top_logprobs_num=1)
        logits = torch.tensor([[0.0, 5, 0, 0], [0, 0, 0, 7], [1, 0, 0, 0]])
        one.add_prompt_logits(0, logits)
        expected = logits.log_softmax(-1)
        self.assertEqual(one.input_logprobs, [(None, 3), (expected[0, 1].item(), 1), (expected[1, 2].item(), 2)])
        self.assertEqual(one.input_top_logprobs, [None, [(expected[0, 1].item(), 1)], [(expected[1, 3].item(), 3)]])

    def test_what_is_computed_and_what_may_come_from_a_cache(self):
        for asked, start, keep_from in ((False, 0, 9), (True, None, 9), (True, 10, 9), (True, 4, 4)):
            one = request(ids=range(10), return_logprob=asked, logprob_start_len=start)
            self.assertEqual(one.keep_from, keep_from)


class TestParse(unittest.TestCase):
    def test_defaults(self):
        for given in (None, {}):
            self.assertEqual(SamplingParams.parse(given), SamplingParams())
        self.assertEqual((SamplingParams().max_new_tokens, SamplingParams().temperature), (128, 1.0))

    def test_null_is_the_default_but_for_the_number_of_tokens_that_is_open(self):
        names = ("temperature", "top_p", "top_k", "stop", "stop_token_ids", "ignore_eos", "n", "sampling_seed", "regex")
        self.assertEqual(SamplingParams.parse(dict.fromkeys(names)), SamplingParams())
        self.assertIsNone(SamplingParams.parse({"max_new_tokens": None}).max_new_tokens)

    def test_what_sglang_takes(self):
        params = SamplingParams.parse({
            "max_new_tokens": 0, "temperature": 0, "top_p": 1, "top_k": -1, "stop": ["a", "b"], "stop_token_ids": [5],
            "ignore_eos": True, "skip_special_tokens": False, "no_stop_trim": True, "n": 2, "sampling_seed": -3,
            "spaces_between_special_tokens": True, "stream_interval": 1, "custom_params": {},
        })  # fmt: skip
        self.assertEqual((params.stop, params.stop_token_ids, params.n), (("a", "b"), frozenset({5}), 2))

    def test_each_wrong_value_is_named(self):
        nan, inf = float("nan"), float("inf")
        for name, values in {
            "temperature": (-1, nan, inf, "1", True, [1]),
            "top_p": (0, -1, 1.1, nan, "1", True),
            "top_k": (0, -2, 2.5, "5", True),
            "max_new_tokens": (-1, 1.5, "5", True, [5]),
            "n": (0, -1, 1.5, "2", True),
            "stop": (5, [5], [["a"]], {"a": 1}, True, ["a"] * 33),
            "stop_token_ids": (5, ["a"], [1.5], [True], "12", {"a": 1}),
            "sampling_seed": ("a", 1.5, True, 2**63, -(2**63) - 1),
            "ignore_eos": ("no", 1),
            "skip_special_tokens": ("no", 0),
            "no_stop_trim": ("no", 1),
        }.items():
            for value in values:
                with self.subTest(name=name, value=value):
                    with self.assertRaisesRegex(BadRequest, rf"\A{name}: .*, got .*\Z"):
                        SamplingParams.parse({name: value})


def rooms(prompts, room, n=1, **fields):
    asks = fan_out(prompts, SamplingParams(n=n), len(prompts) > 1, bootstrap_room=room, **fields)
    return [ask.bootstrap_room for ask in asks]


class TestFanOut(unittest.TestCase):
    def test_rooms_of_a_batch(self):
        self.assertEqual(rooms(["a", "b"], [7, 9]), [7, 9])
        self.assertEqual(rooms(["a", "b"], 7), [7, 8], "a mini LB sends one room for all prompts of a completion")

    def test_samples_of_a_prompt_have_rooms_of_their_own(self):
        self.assertEqual(rooms(["a"], 7, n=2), [7, 7 + ROOMS])
        self.assertEqual(rooms(["a", "b"], [7, 9], n=2), [7, 7 + ROOMS, 9, 9 + ROOMS])

    def test_bootstrap_fields_of_each_sample(self):
        """The Rust router counts the samples of a chat as a batch."""
        fields = {"bootstrap_host": ["h", "h"], "bootstrap_port": [5, 5]}
        self.assertEqual(rooms(["a"], [7, 9], n=2, **fields), [7, 7 + ROOMS])

    def test_fields_that_do_not_fit(self):
        for prompts, n, fields in (
            (["a"], 2, {"rid": ["x", "y"]}),
            (["a"], 2, {"bootstrap_host": ["h"] * 3}),
            (["a", "b"], 1, {"bootstrap_host": ["h"]}),
        ):
            with self.subTest(fields=fields), self.assertRaisesRegex(BadRequest, "entries for"):
                rooms(prompts, 7, n, **fields)
        for prompts, n, fields in (
            (["a"], 2, {"return_logprob": [True]}),
            (["a"], 2, {"top_logprobs_num": [1]}),
            (["a"], 1, {"extra_key": ["k"]}),
        ):
            (name,) = fields
            with self.subTest(fields=fields), self.assertRaisesRegex(BadRequest, f"{name} must be one value"):
                rooms(prompts, 7, n, **fields)
        with self.assertRaisesRegex(BadRequest, "bootstrap_room has 3 entries for 1 prompts"):
            rooms(["a"], [1, 2, 3], n=2)


class Service:
    """Yields `steps` times for each request, then finishes it; `ahead` steps before anybody can look."""

    def __init__(self, steps, error=None):
        self.steps, self.error = steps, error

    async def generate(self, request, ask):
        for _ in range(self.steps):
            yield
        if self.error is not None:
            raise self.error
        request.finish_reason = {"type": "length", "length": 1}
        yield


class TestInterleave(unittest.IsolatedAsyncioTestCase):
    async def collect(self, service, requests):
        def render(index):
            self.assertTrue(requests[index].lock.locked())
            return index, requests[index].finish_reason

        return [event async for event in interleave(service, requests, requests, render)]

    async def test_a_finished_request_is_shown_once(self):
        for steps in (0, 1, 5):
            requests = [request(), request()]
            events = await self.collect(Service(steps), requests)
            last = {"type": "length", "length": 1}
            self.assertEqual([event for event in events if event[1] is not None], [(0, last), (1, last)])
            self.assertEqual(len(events), 2, "the consumer never ran before both had finished")
            self.assertFalse(any(each.lock.locked() for each in requests))

    async def test_an_error_reaches_the_client(self):
        with self.assertRaisesRegex(BadRequest, "room 1 is in use"):
            await self.collect(Service(0, BadRequest("room 1 is in use")), [request()])


class TestLock(unittest.TestCase):
    def test_a_request_is_locked_while_it_takes_a_token(self):
        one, seen = request(), []
        one.notify = lambda: seen.append(one.lock.locked())
        one.add_output(5)
        one.abort("gone")
        self.assertEqual(seen, [True, True])
        self.assertFalse(one.lock.locked())


class TestAbort(unittest.IsolatedAsyncioTestCase):
    async def test_many_end_at_one_step_and_nobody_waits_for_it(self):
        """As in SGLang, whose /abort_request answers at once: its kit gives it 10 s for 32 requests."""
        steps, closed = [], []
        requests = [Request([1], SamplingParams(), tokenizer, frozenset(), room=room) for room in (7, 8)]
        service = EngineService.__new__(EngineService)
        service.scheduler = SimpleNamespace(call=lambda action, done: steps.append(lambda: done(action())))
        service.sender = SimpleNamespace(close=lambda room, why: closed.append(room))
        service.abort(requests)
        self.assertEqual((len(steps), closed), (1, []))
        steps[0]()
        self.assertEqual([each.finish_reason["type"] for each in requests], ["abort"] * 2)
        await asyncio.sleep(0)
        self.assertEqual(closed, [7, 8])


if __name__ == "__main__":
    unittest.main()
