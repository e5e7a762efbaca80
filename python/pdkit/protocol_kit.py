"""A mixin with one test a scenario of what clients of a prefill/decode deployment meet, through both load balancers.

    class TestDisaggregationDSV4Protocol(ProtocolMixin, RustRouterBesideMixin, TestDisaggregationDSV4):
        pass

What is asserted is what SGLang's servers say that they answer (sglang/srt/entrypoints), at the places named. After
each test both servers must be idle, which SGLang's /flush_cache tells: it refuses while a request is queued, running
or being handed over.
"""

import json
import re
import time
import unittest
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait
from functools import wraps
from itertools import cycle, islice

import openai
import requests

from pdkit.protocol import MINI_LB, RUST_ROUTER, Client, Streamed, ask_reference, counting_prompts, is_best
from pdkit.relay import Relay
from pdkit.router_kit import is_ready

MALFORMED = (b"", b"{", b"[]", b"5", b"null", b'"text"', b'{"prompt": "1"', b"\xff")
WRONG_COMPLETIONS = (
    {}, {"prompt": 5}, {"prompt": {"a": 1}}, {"prompt": "1", "max_tokens": 0}, {"prompt": "1", "max_tokens": -1},
    {"prompt": "1", "max_tokens": "many"}, {"prompt": "1", "temperature": "hot"}, {"prompt": "1", "temperature": -1},
    {"prompt": "1", "top_p": 2}, {"prompt": "1", "stop": 5},
)  # fmt: skip
SAY = [{"role": "user", "content": "1"}]
WRONG_CHATS = (
    {}, {"messages": []}, {"messages": "hello"}, {"messages": [{}]}, {"messages": [{"role": "user", "content": 5}]},
    {"messages": SAY, "temperature": -1}, {"messages": SAY, "max_tokens": "many"},
)  # fmt: skip
WRONG_GENERATES = (
    {}, {"text": {"a": 1}}, {"text": "1", "sampling_params": "x"}, {"text": "1", "sampling_params": {"temperature": -1}},
    {"text": "1", "sampling_params": {"max_new_tokens": -1}}, {"text": "1", "sampling_params": {"top_p": 0}},
)  # fmt: skip
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}


def through_each_load_balancer(test):
    """`test(self, client)` as a test method: once a load balancer; skipped if it skips through all of them."""

    @wraps(test)
    def method(self):
        skips = []
        for client in self.clients:
            with self.subTest(load_balancer=client.name):
                try:
                    test(self, client)
                except unittest.SkipTest as skip:
                    skips.append(str(skip))
                    print(f"not through the {client.name}: {skip}", flush=True)
        if len(skips) == len(self.clients):
            self.skipTest(skips[0])

    method.scenario = test
    return method


class ProtocolMixin:
    """Needs `lb_url`, `router_url`, `prefill_url`, `decode_url` and `model` of the class that launches.

    bitwise                   an answer is the same to the bit whoever else is served; else near ties are left out
    near_tie                  log-odds below which two tokens are near a tie
    parallel_samples          n > 1 works. In SGLang, `TokenizerManager._handle_batch_request` gives all samples of a
                              prompt its bootstrap room, so that only one of them can be handed over
    json_schema               the engine has constrained decoding; else it must refuse
    prefix_cache_tokens       shared prefixes of this many tokens are kept by the prefill server; None: it has no cache
    rendered_chat             text that the chat template makes of a user's message, with {}; None: not known
    request_timeout           seconds for one answer
    settle_seconds            within which a server has forgotten a request that ended or was left
    unending_tokens           more than a server generates in twice `settle_seconds`
    sustained_seconds         how long the sustained load lasts
    sustained_clients         how many clients it has
    idle_seconds              how long nobody asks before the first request after it
    """

    bitwise = False
    near_tie = 2.0
    parallel_samples = False
    json_schema = True
    prefix_cache_tokens = 1024
    rendered_chat = None
    request_timeout = 120
    settle_seconds = 15
    unending_tokens = 8192
    sustained_seconds = 60
    sustained_clients = 16
    idle_seconds = 60

    prompts = staticmethod(counting_prompts)

    @classmethod
    def launch_lb(cls):
        cls.lone_router_url = f"http://{cls.base_host}:{next(cls._free_ports)}"
        cls.late_decode = (cls.base_host, next(cls._free_ports))
        cls.launch_router("router without decode", cls.lone_router_url, "http://{}:{}".format(*cls.late_decode))
        super().launch_lb()
        cls.clients = [
            Client(MINI_LB, cls.lb_url, cls.model, cls.request_timeout),
            Client(RUST_ROUTER, cls.router_url, cls.model, cls.request_timeout),
        ]
        for client in cls.clients:
            cls.addClassCleanup(client.close)
        cls._references = {}

    def tearDown(self):
        self.assertIdle()
        super().tearDown()

    # What is compared with what.

    def reference(self, prompt, max_tokens=24):
        """How the servers go on after `prompt` when nobody else asks."""
        key = prompt, max_tokens
        if key not in self._references:
            margin = 0 if self.bitwise else self.near_tie
            alone = Client(MINI_LB, self.lb_url, self.model, self.request_timeout)
            self._references[key] = ask_reference(alone, prompt, max_tokens, margin)
            alone.close()
            self.assertGreater(self._references[key].certain, 0, f"nothing is certain after {prompt!r}")
        return self._references[key]

    def assertGoesOn(self, text, reference):
        """`text` is the answer to the prompt of `reference`."""
        self.assertEqual(text[: len(reference.certain_text)], reference.certain_text, reference.prompt[-60:])
        if self.bitwise:
            self.assertEqual(text, reference.text)

    def assertBest(self, taken, tops):
        self.assertTrue(is_best(taken, tops), f"greedy takes the best, not {taken} of {tops}")

    def assertRefused(self, response, pattern="."):
        """A 4xx with a short message, and nothing that looks like an answer."""
        self.assertIn(response.status_code, range(400, 500), response.text)
        self.assertTrue(response.text, "the refusal says nothing")
        self.assertRegex(response.text, pattern)
        for word in ("Traceback", '"choices"', '"output_ids"'):
            self.assertNotIn(word, response.text)

    def assertIdle(self):
        """Prefill and decode have let go of every request, and of what they kept for it."""
        begin = time.monotonic()
        for name, url in (("prefill", self.prefill_url), ("decode", self.decode_url)):
            while (status := requests.post(f"{url}/flush_cache", timeout=self.request_timeout).status_code) != 200:
                waited = time.monotonic() - begin
                self.assertLess(
                    waited, self.settle_seconds, f"{name} still holds a request: /flush_cache says {status}"
                )
                time.sleep(0.1)
        info = requests.get(f"{self.prefill_url}/get_server_info", timeout=self.request_timeout).json()
        self.assertEqual(info.get("rooms", 0), 0, "bootstrap rooms that prefill still holds")

    # Answers.

    @through_each_load_balancer
    def test_streamed_equals_whole(self, client):
        prompt = self.prompts(1)[0]
        for ask in (client.complete, client.chat):
            whole, streamed = ask(prompt, 24), ask(prompt, 24, stream=True)
            choice = whole.choices[0]
            text = choice.text if hasattr(choice, "text") else choice.message.content
            self.assertEqual(streamed.text, text)
            self.assertGreater(len(streamed.texts), 4, "a stream that comes in few pieces")
            self.assertEqual(len(streamed.ids), 1)
            self.assertEqual(streamed.finish_reasons, [choice.finish_reason], "a stream ends once")
            self.assertEqual(choice.finish_reason, "length")
            self.assertEqual(streamed.usage, whole.usage)
        self.assertGoesOn(client.complete(prompt, 24).choices[0].text, self.reference(prompt))

    @through_each_load_balancer
    def test_chat_equals_completion_of_its_template(self, client):
        if self.rendered_chat is None:
            self.skipTest("the chat template is not known; set rendered_chat")
        prompt = self.prompts(1)[0]
        chat, completion = client.chat(prompt, 24), client.complete(self.rendered_chat.format(prompt), 24)
        self.assertEqual(chat.choices[0].message.content, completion.choices[0].text)
        self.assertEqual(chat.usage, completion.usage)

    @through_each_load_balancer
    def test_usage_counts(self, client):
        prompt, other = self.prompts(2)
        one, two = client.complete(prompt, 5).usage, client.complete(other, 5).usage
        both = client.complete([prompt, other], 5).usage
        counted = client.generate(text=prompt, sampling_params={"max_new_tokens": 1})["meta_info"]["prompt_tokens"]
        self.assertEqual((one.prompt_tokens, one.completion_tokens, one.total_tokens), (counted, 5, counted + 5))
        self.assertEqual((both.prompt_tokens, both.completion_tokens), (counted + two.prompt_tokens, 10))
        self.assertEqual(client.complete(prompt, 5, stream=True).usage, one)
        self.assertEqual(client.chat(prompt, 7).usage.completion_tokens, 7)
        if client.balancer.token_prompts:
            self.assertEqual(client.complete([11, 12, 13], 4).usage.prompt_tokens, 3)

    @through_each_load_balancer
    def test_stop_strings(self, client):
        reference = self.reference(self.prompts(1)[0])
        for stop in self._stop_strings(reference):
            before = reference.text[: reference.text.index(stop)]
            for given in (stop, ["never said", stop]):
                whole = client.complete(reference.prompt, 24, stop=given).choices[0]
                streamed = client.complete(reference.prompt, 24, stop=given, stream=True)
                said = f"stop {given!r} in {reference.text!r}"
                self.assertEqual((whole.text, whole.finish_reason, whole.matched_stop), (before, "stop", stop), said)
                self.assertEqual((streamed.text, streamed.finish_reasons, streamed.matched_stop),
                                 (before, ["stop"], stop), said)  # fmt: skip
        unstopped = client.complete(reference.prompt, 24, stop=["never said"]).choices[0]
        self.assertEqual((unstopped.finish_reason, unstopped.matched_stop), ("length", None))
        self.assertGoesOn(unstopped.text, reference)

    def _stop_strings(self, reference):
        """One across two tokens and one of a whole token; neither stands earlier in the text."""
        tokens, found = reference.tokens[: reference.certain], {}
        for index in range(2, len(tokens) - 1):
            end, token = len("".join(tokens[: index + 1])), tokens[index]
            across = token[-2:] + tokens[index + 1][:2]
            if reference.text.find(across) == end - len(token[-2:]):
                found.setdefault("across", across)
            if reference.text.find(token) == end - len(token):
                found.setdefault("whole", token)
        self.assertEqual(len(found), 2, f"no stop strings in {tokens}")
        return list(found.values())

    @through_each_load_balancer
    def test_stop_tokens(self, client):
        reference = self.reference(self.prompts(1)[0])
        place = next(i for i in range(2, reference.certain) if reference.ids.index(reference.ids[i]) == i)
        stop, before = reference.ids[place], "".join(reference.tokens[:place])
        ask = {"ignore_eos": False, "extra": {"stop_token_ids": [stop]}}
        whole = client.complete(reference.prompt, 24, **ask)
        choice = whole.choices[0]
        self.assertEqual((choice.text, choice.finish_reason, choice.matched_stop), (before, "stop", stop))
        self.assertEqual(whole.usage.completion_tokens, place + 1)
        streamed = client.complete(reference.prompt, 24, stream=True, **ask)
        self.assertEqual((streamed.text, streamed.finish_reasons), (before, ["stop"]))

    @through_each_load_balancer
    def test_first_token_is_the_last(self, client):
        """What prefill makes is all there is: decode must not add to it."""
        reference = self.reference(self.prompts(1)[0])
        first = reference.tokens[0]
        for options, text, reason in (
            ({"max_tokens": 1}, first, "length"),
            ({"max_tokens": 24, "stop": first}, "", "stop"),
            ({"max_tokens": 24, "ignore_eos": False, "extra": {"stop_token_ids": [reference.ids[0]]}}, "", "stop"),
        ):
            whole = client.complete(reference.prompt, **options)
            choice = whole.choices[0]
            self.assertEqual((choice.text, choice.finish_reason), (text, reason), options)
            self.assertEqual(whole.usage.completion_tokens, 1, options)
            streamed = client.complete(reference.prompt, stream=True, **options)
            self.assertEqual((streamed.text, streamed.finish_reasons), (text, [reason]), options)

    @through_each_load_balancer
    def test_first_token_is_the_end_of_text(self, client):
        params = {"temperature": 0, "max_new_tokens": 96}
        ask = {"sampling_params": params, "return_logprob": True, "logprob_start_len": 0}
        answer = client.generate(text=(self.rendered_chat or "{}").format(self.prompts(1)[0]), **ask)
        if answer["meta_info"]["finish_reason"]["type"] != "stop":
            self.skipTest("the model does not end its answer")
        prompt = [token for _, token, _ in answer["meta_info"]["input_token_logprobs"]]
        *said, end = answer["output_ids"]
        result = client.generate(input_ids=prompt + said, sampling_params=params)
        self.assertEqual(result["meta_info"]["finish_reason"], {"type": "stop", "matched": end})
        self.assertEqual((result["text"], result["meta_info"]["completion_tokens"]), ("", 1))

    @through_each_load_balancer
    def test_logprobs_of_completions_and_chat(self, client):
        prompt = self.prompts(1)[0]
        whole = client.complete(prompt, 12, logprobs=3).choices[0]
        tokens, chosen, tops = whole.logprobs.tokens, whole.logprobs.token_logprobs, whole.logprobs.top_logprobs
        self.assertEqual([len(tokens), len(chosen), len(tops)], [12] * 3)
        self.assertEqual("".join(tokens), whole.text)
        for token, logprob, top in zip(tokens, chosen, tops):
            self.assertLessEqual(logprob, 0)
            self.assertIn(len(top), range(2, 4), "of 3 alternatives two may read the same")
            if len(top) == 3:
                self.assertBest((logprob, token), [(p, t) for t, p in top.items()])
            else:
                self.assertGreaterEqual(logprob, max(top.values()), "greedy takes the best")
        streamed = client.complete(prompt, 12, logprobs=3, stream=True)
        self.assertEqual(streamed.tokens, tokens)
        self.assertIsNone(client.complete(prompt, 2).choices[0].logprobs)

        content = client.chat(prompt, 12, logprobs=True, top_logprobs=3).choices[0].logprobs.content
        self.assertEqual(len(content), 12)
        for entry in content:
            self.assertEqual(len(entry.top_logprobs), 3)
            self.assertBest((entry.logprob, entry.token), [(top.logprob, top.token) for top in entry.top_logprobs])

    @through_each_load_balancer
    def test_input_logprobs_are_merged(self, client):
        """Prefill has those of the prompt, decode those of the output; the client gets both."""
        params = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
        ask = {"text": self.prompts(1)[0], "sampling_params": params, "return_logprob": True, "top_logprobs_num": 3}
        whole = client.generate(**ask, logprob_start_len=0)
        answers = [whole["meta_info"]]
        if client.balancer.merges_streams:
            answers.append(client.generate_stream(**ask, logprob_start_len=0)[-1]["meta_info"])
        for meta in answers:
            inputs, outputs = meta["input_token_logprobs"], meta["output_token_logprobs"]
            self.assertEqual((len(inputs), len(outputs)), (meta["prompt_tokens"], 6))
            self.assertIsNone(inputs[0][0], "nothing precedes the first token")
            self.assertTrue(all(logprob <= 0 for logprob, *_ in inputs[1:] + outputs))
            self.assertEqual([token for _, token, _ in outputs], whole["output_ids"])
            self.assertEqual([len(top) for top in meta["output_top_logprobs"]], [3] * 6)
            for tops, taken in zip(meta["output_top_logprobs"], outputs):
                self.assertBest(tuple(taken[:2]), [tuple(top[:2]) for top in tops])
        tail = client.generate(**ask, logprob_start_len=whole["meta_info"]["prompt_tokens"] - 4)["meta_info"]
        ids = [token for _, token, _ in whole["meta_info"]["input_token_logprobs"]]
        self.assertEqual([token for _, token, _ in tail["input_token_logprobs"]], ids[-4:])

    @through_each_load_balancer
    def test_several_samples(self, client):
        if not self.parallel_samples:
            self.skipTest("this engine gives the samples of a prompt one bootstrap room")
        reference = self.reference(self.prompts(1)[0])
        one, three = client.complete(reference.prompt, 24), client.complete(reference.prompt, 24, n=3)
        self.assertEqual([choice.index for choice in three.choices], [0, 1, 2])
        for choice in three.choices:
            self.assertGoesOn(choice.text, reference)
        self.assertEqual(three.usage.prompt_tokens, one.usage.prompt_tokens)
        self.assertEqual(three.usage.completion_tokens, 3 * one.usage.completion_tokens)
        chats = client.chat(reference.prompt, 24, n=2).choices
        self.assertEqual(len(chats), 2)
        self.assertEqual(chats[0].message, chats[1].message)

    @through_each_load_balancer
    def test_batch_of_mixed_lengths(self, client):
        texts = self.prompts(3)
        prompts = [texts[0], " ".join(texts), texts[1], " ".join(texts * 2), texts[2]]
        batch = client.complete(prompts, 8)
        self.assertEqual([choice.index for choice in batch.choices], list(range(len(prompts))))
        for choice, prompt in zip(batch.choices, prompts):
            self.assertGoesOn(choice.text, self.reference(prompt, 8))
        self.assertEqual(batch.usage.completion_tokens, 8 * len(prompts))

    @through_each_load_balancer
    def test_json_schema(self, client):
        format_ = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
        if not self.json_schema:
            with self.assertRaisesRegex(openai.BadRequestError, "response_format|json_schema"):
                client.chat("Who?", 64, response_format=format_)
            return
        choice = client.chat("Who are you?", 256, ignore_eos=False, response_format=format_).choices[0]
        person = json.loads(choice.message.content)
        self.assertEqual((type(person["name"]), type(person["age"])), (str, int))

    @through_each_load_balancer
    def test_greedy_is_deterministic(self, client):
        reference = self.reference(self.prompts(1)[0])
        choices = [client.complete(reference.prompt, 24, logprobs=1).choices[0] for _ in range(4)]
        for choice in choices:
            self.assertGoesOn(choice.text, reference)
        if self.bitwise:
            logprobs = {tuple(choice.logprobs.token_logprobs) for choice in choices}
            self.assertEqual(len(logprobs), 1, "logprobs of one prompt asked again and again")

    # Refusals.

    @through_each_load_balancer
    def test_too_long(self, client):
        """sglang/srt/managers/tokenizer_manager.py, `_validate_one_request`."""
        card = requests.get(f"{self.prefill_url}/v1/models", timeout=self.request_timeout).json()["data"][0]
        limit = card["max_model_len"]
        prompt = self.prompts(1)[0]
        long = {"input_ids": [11] * (limit + 1), "sampling_params": {"max_new_tokens": 1}}
        much = {"model": self.model, "prompt": prompt, "max_tokens": limit, "temperature": 0}
        self.assertRefused(client.post("/generate", long), "longer than.*context length")
        self.assertRefused(client.post("/v1/completions", much), "context length")
        chat = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "max_tokens": limit}
        self.assertRefused(client.post("/v1/chat/completions", chat), "context length")
        streamed = client.post("/v1/completions", much | {"stream": True})
        if client.balancer.keeps_status:
            self.assertIn(streamed.status_code, range(400, 500), streamed.text)
        self.assertIn("context length", streamed.text)
        self.assertNotIn('"choices"', streamed.text)
        self._assertServes(client)

    @through_each_load_balancer
    def test_malformed_bodies(self, client):
        for path, wrong in (
            ("/v1/completions", WRONG_COMPLETIONS),
            ("/v1/chat/completions", WRONG_CHATS),
            ("/generate", WRONG_GENERATES),
        ):
            model = {} if path == "/generate" else {"model": self.model}
            for body in (*MALFORMED, *(model | each for each in wrong)):
                self.assertRefused(client.post(path, body))
        self._assertServes(client)

    @through_each_load_balancer
    def test_empty_prompt(self, client):
        """Completions refuse it (`_validate_request`). /generate does unless the tokenizer makes a token of nothing."""
        for prompt in ("", [], [""]):
            refusal = client.post("/v1/completions", {"model": self.model, "prompt": prompt, "max_tokens": 4})
            self.assertRefused(refusal, "empty")
        native = client.post("/generate", {"text": "", "sampling_params": {"max_new_tokens": 2}})
        if native.status_code != 200:
            self.assertRefused(native, "empty")
        self._assertServes(client)

    def _assertServes(self, client):
        reference = self.reference(self.prompts(1)[0])
        self.assertGoesOn(client.complete(reference.prompt, 24).choices[0].text, reference)

    # Clients that leave.

    @through_each_load_balancer
    def test_stream_that_is_left(self, client):
        stream = client.open_stream(self.prompts(1)[0], self.unending_tokens)
        self.assertEqual(len(list(islice(stream, 3))), 3)
        self.assertEqual(self._flush(self.decode_url), 400, "decode is at work")
        stream.close()
        self.assertIdle()
        self._assertServes(client)

    @through_each_load_balancer
    def test_abort_by_id(self, client):
        stream = client.open_stream(self.prompts(1)[0], self.unending_tokens)
        first, told = next(iter(stream)), time.monotonic()
        requests.post(f"{self.decode_url}/abort_request", json={"rid": first.id}, timeout=self.request_timeout)
        rest = []
        for chunk in stream:
            self.assertLess(time.monotonic() - told, self.settle_seconds, "the stream goes on: it was not aborted")
            rest.append(chunk)
        self.assertEqual(Streamed.of(rest).finish_reasons, ["abort"])
        self.assertIdle()

    @through_each_load_balancer
    def test_whole_answer_that_is_not_waited_for(self, client):
        if not client.balancer.tells_of_leaving:
            self.skipTest(f"{client.name} goes on for clients that left")
        with self.assertRaises(openai.APITimeoutError):
            client.openai.with_options(timeout=1.0).completions.create(
                model=self.model, prompt=self.prompts(1)[0], max_tokens=self.unending_tokens, temperature=0,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
        self.assertIdle()

    # Load.

    @through_each_load_balancer
    def test_32_at_once(self, client):
        self._ask_at_once(client, 32)

    @through_each_load_balancer
    def test_128_at_once(self, client):
        self._ask_at_once(client, 128)

    def _ask_at_once(self, client, count):
        references = [self.reference(prompt) for prompt in self.prompts(8)]
        asked = list(islice(cycle(references), count))
        with ThreadPoolExecutor(count) as pool:
            answers = [pool.submit(client.complete, each.prompt, 24) for each in asked]
            if late := wait(answers, self.request_timeout * 0.75).not_done:
                self.fail(f"{len(late)} of {count} wait for an answer, and the servers say: {self._held()}")
            for reference, answer in zip(asked, answers):
                whole = answer.result()
                self.assertGoesOn(whole.choices[0].text, reference)
                self.assertEqual(whole.usage.completion_tokens, 24)

    def _held(self):
        """What prefill and decode tell of themselves, but for their settings."""
        told = ("rooms", "sending", "internal_states", "engine", "transfer")
        held = []
        for url in (self.prefill_url, self.decode_url):
            try:
                info = requests.get(f"{url}/server_info", timeout=10).json()
                held.append({name: info.get(name) for name in told})
            except (requests.RequestException, ValueError) as error:
                held.append(f"{url}: {error}")
        return held

    @through_each_load_balancer
    def test_one_prefix_from_many_clients(self, client):
        """A tail of its own each; the prefix is computed once, and nobody gets another's tail."""
        tails = self.prompts(8)
        prefix = self._prefix()
        references = [self.reference(f"{prefix} {tail}", 8) for tail in tails]
        self.assertIdle()
        with ThreadPoolExecutor(32) as pool:
            asked = list(islice(cycle(references), 32))
            for reference, whole in zip(asked, pool.map(lambda each: client.complete(each.prompt, 8), asked)):
                self.assertGoesOn(whole.choices[0].text, reference)
        if self.prefix_cache_tokens:
            meta = client.generate(text=f"{prefix} 1", sampling_params={"max_new_tokens": 1})["meta_info"]
            self.assertGreater(meta["cached_tokens"], 0, "prefill computed the shared prefix again")

    def _prefix(self):
        one = self.clients[0].complete(self.prompts(1)[0], 1).usage.prompt_tokens
        return " ".join(self.prompts(-(-(self.prefix_cache_tokens or 256) // one) + 1))

    def test_sustained_load(self):
        """Completions and chat, whole and streamed, clients that leave and bad requests, all at once."""
        references = [self.reference(prompt) for prompt in self.prompts(8)]
        chats = {each.prompt: self.clients[0].chat(each.prompt, 8).choices[0].message.content for each in references}
        began, served = time.monotonic(), Counter()

        def chat(client, reference, **options):
            return client.chat(reference.prompt, 8, **options)

        def whole_chat(client, reference):
            self._assertSays(chat(client, reference).choices[0].message.content, chats[reference.prompt])

        def streamed_chat(client, reference):
            self._assertSays(chat(client, reference, stream=True).text, chats[reference.prompt])

        def whole(client, reference):
            self.assertGoesOn(client.complete(reference.prompt, 24).choices[0].text, reference)

        def streamed(client, reference):
            self.assertGoesOn(client.complete(reference.prompt, 24, stream=True).text, reference)

        def left(client, reference):
            with client.open_stream(reference.prompt, self.unending_tokens) as stream:
                next(iter(stream))

        def refused(client, reference):
            with self.assertRaises(openai.BadRequestError):
                client.complete("", 4)

        kinds = (whole, streamed, whole_chat, streamed_chat, left, refused)

        def client_of_many(number):
            for step in range(number, 1_000_000):
                after = time.monotonic() - began
                if after > self.sustained_seconds:
                    return
                kind, client = kinds[step % len(kinds)], self.clients[(step + step // len(kinds)) % len(self.clients)]
                try:
                    kind(client, references[step % len(references)])
                except openai.APITimeoutError as error:
                    what = f"{kind.__name__} through the {client.name}, sent {after:.1f} s after the load began"
                    raise AssertionError(f"{what}: no answer in {self.request_timeout} s") from error
                served[kind.__name__, client.name] += 1

        with ThreadPoolExecutor(self.sustained_clients) as pool:
            list(pool.map(client_of_many, range(self.sustained_clients)))
        print(
            f"sustained load: {sum(served.values())} requests in {self.sustained_seconds} s, {dict(served)}", flush=True
        )
        self.assertEqual(len(served), len(kinds) * len(self.clients), "each kind through each load balancer")

    def _assertSays(self, text, expected):
        if self.bitwise:
            self.assertEqual(text, expected)
        self.assertTrue(text)

    def test_first_request_after_idle(self):
        reference = self.reference(self.prompts(1)[0])
        for client in self.clients:
            self._assertServes(client)
        time.sleep(self.idle_seconds)
        for client in self.clients:
            self.assertGoesOn(client.complete(reference.prompt, 24).choices[0].text, reference)

    # Operation.

    @through_each_load_balancer
    def test_flush_cache_while_serving(self, client):
        """It is refused where a request is, and harms nobody (`Scheduler.flush_cache`)."""
        reference = self.reference(self.prompts(1)[0], 192)
        stream = client.open_stream(reference.prompt, 192)
        chunks = list(islice(stream, 2))
        self.assertEqual(self._flush(self.decode_url), 400, "decode is at work")
        self.assertLess(self._flush(client.url), 500)
        text = "".join(chunk.choices[0].text for chunk in (*chunks, *stream) if chunk.choices)
        self.assertGoesOn(text, reference)
        self.assertIdle()
        if self.prefix_cache_tokens:
            ask = {"text": self._prefix(), "sampling_params": {"max_new_tokens": 1}}
            client.generate(**ask)
            self.assertGreater(client.generate(**ask)["meta_info"]["cached_tokens"], 0)
            deadline = time.monotonic() + self.settle_seconds
            while self._flush(client.url) != 200 or client.generate(**ask)["meta_info"]["cached_tokens"]:
                self.assertLess(time.monotonic(), deadline, "the cache was not flushed through the load balancer")

    def _flush(self, url):
        return requests.post(f"{url}/flush_cache", timeout=self.request_timeout).status_code

    def test_health_and_readiness(self):
        """A Rust router without decode is alive but not ready and refuses; it becomes ready when decode appears.

        The mini LB knows no readiness: its /health is 200 as soon as it listens.
        """
        lone = Client(RUST_ROUTER, self.lone_router_url, self.model, self.request_timeout)
        self.addCleanup(lone.close)
        for url in (self.prefill_url, self.decode_url, self.lb_url, self.router_url):
            for path in ("/health", "/health_generate"):
                self.assertEqual(
                    requests.get(f"{url}{path}", timeout=self.request_timeout).status_code, 200, url + path
                )
        self.assertTrue(is_ready(self.router_url))

        self.assertEqual(requests.get(f"{lone.url}/liveness", timeout=10).status_code, 200)
        self.assertFalse(is_ready(lone.url), "a router that has no decode server says that it is ready")
        refusal = lone.post("/v1/completions", {"model": self.model, "prompt": "1", "max_tokens": 1})
        self.assertEqual(refusal.status_code, 503, refusal.text)
        decode = re.fullmatch(r"http://(.+):(\d+)", self.decode_url)
        with Relay(self.late_decode, (decode[1], int(decode[2]))):
            deadline = time.monotonic() + self.request_timeout
            while not is_ready(lone.url):
                self.assertLess(time.monotonic(), deadline, "decode appeared, and the router is not ready")
                time.sleep(0.2)
            self._assertServes(lone)
