"""The engine as its users meet it: a monolithic server, a prefill and a decode server behind the real load balancer.

That a pair answers as the monolithic server does is asked by test_disaggregation_dsv4_integrity.py, to the bit; what
clients meet behind both load balancers by test_disaggregation_dsv4_protocol.py.
"""

import http.client
import random
import select
import signal
import socket
import sys
import tempfile
import threading
import time
import unittest
from concurrent.futures import ThreadPoolExecutor

import openai
import requests
from engine_servers import BOOTSTRAP_TIMEOUT, ENVIRONMENT, GREEDY, RANDOM, Server, engine, events, keep_logs
from pdkit.core import forked, ports, processes
from pdkit.core.ci_register import register_cpu_ci
from pdkit.core.errors import NotReady
from pdkit.engine.__main__ import bind, listen

register_cpu_ci(est_time=35, suite="stage-a-test-cpu")

CONTEXT = 4096
SPARE_KEEP_ALIVE = 1  # seconds; the others have SGLang's default


def prompt(length, seed=0):
    rng = random.Random(f"{length} {seed}")
    return [rng.randrange(10, 500) for _ in range(length)]


def setUpModule():
    global mono, prefill, decode, lb, spare, bootstrap_port, spare_bootstrap_port, free_port, other_free_port
    keep_logs()
    block = ports.claim()
    unittest.addModuleCleanup(block.release)
    one, two, three, four, five, bootstrap_port, spare_bootstrap_port, free_port, other_free_port = block.ports
    mono = engine("mono", one, "null", spawned=True)
    prefill = engine("prefill", two, "prefill", "--disaggregation-bootstrap-port", str(bootstrap_port))
    decode = engine("decode", three, "decode", "--disaggregation-bootstrap-port", str(bootstrap_port))
    spare = engine("spare", four, "prefill", "--disaggregation-bootstrap-port", str(spare_bootstrap_port),
                   SGLANG_TIMEOUT_KEEP_ALIVE=str(SPARE_KEEP_ALIVE))  # fmt: skip
    lb = Server("lb", five, "sglang_router.launch_router", "--pd-disaggregation", "--mini-lb",
                "--prefill", prefill.url, "--decode", decode.url)  # fmt: skip
    for server in (mono, prefill, decode, spare, lb):
        server.wait_until_ready()


class EngineTestCase(unittest.TestCase):
    maxDiff = 2000

    def assertIdle(self, within=5.0):
        """Both servers let go of every room and request."""
        self.eventually(lambda: (prefill.busy, decode.busy) == ((0, 0), (0, 0)), within)

    def eventually(self, condition, within=20.0):
        self.assertTrue(processes.wait_until(condition, within), "it did not happen in time")

    def assertRefused(self, response, status, pattern):
        self.assertEqual(response.status_code, status, response.text)
        body = response.json()
        message = body.get("message") or body.get("detail") or body["error"]["message"]
        self.assertRegex(message, pattern)
        self.assertNotIn("Traceback", response.text)
        return body


class TestNative(EngineTestCase):
    def test_information(self):
        for path in ("/model_info", "/get_model_info"):
            info = requests.get(mono.url + path, timeout=30).json()
            self.assertEqual((info["model_path"], info["served_model_name"]), (str(RANDOM), "random"))
            self.assertEqual((info["is_generation"], info["model_type"]), (True, "deepseek_v4"))
        for path in ("/server_info", "/get_server_info"):
            for server, mode in ((mono, "null"), (prefill, "prefill"), (decode, "decode")):
                info = requests.get(server.url + path, timeout=30).json()
                self.assertEqual((info["disaggregation_mode"], info["model_path"]), (mode, str(RANDOM)))
        through = requests.get(lb.url + "/get_server_info", timeout=30).json()
        self.assertEqual(through["prefill"][0]["disaggregation_mode"], "prefill")
        self.assertEqual(through["decode"][0]["disaggregation_mode"], "decode")
        models = requests.get(lb.url + "/v1/models", timeout=30).json()
        self.assertEqual([(card["id"], card["max_model_len"]) for card in models["data"]], [("random", CONTEXT)])

    def test_the_shape_of_an_answer(self):
        result = lb.generate("12 plus 5", rid="my-id", return_logprob=True, top_logprobs_num=2)
        meta = result["meta_info"]
        self.assertEqual(set(result), {"text", "output_ids", "meta_info"})
        self.assertEqual((meta["id"], meta["finish_reason"]), ("my-id", {"type": "length", "length": 12}))
        self.assertEqual((meta["completion_tokens"], len(result["output_ids"])), (12, 12))
        self.assertEqual(meta["output_token_logprobs_length"], 12)
        rows = zip(meta["output_token_logprobs"], meta["output_top_logprobs"], result["output_ids"])
        for (logprob, token, text), top, output in rows:
            self.assertEqual((token, text, len(top)), (output, None, 2))
            self.assertEqual(top[0], [logprob, token, None])
        self.assertEqual(meta["input_token_logprobs"], [])
        self.assertNotIn("output_token_logprobs", lb.generate("12 plus 5")["meta_info"])

    def test_put_will_do(self):
        response = requests.put(mono.url + "/generate", json={"text": "1", "sampling_params": GREEDY}, timeout=30)
        self.assertEqual(response.status_code, 200)

    def test_text_and_its_ids_are_the_same(self):
        for server in (mono, lb):
            text = server.generate("Question: 12 plus 5", return_logprob=True, logprob_start_len=0)
            ids = [token for _, token, _ in text["meta_info"]["input_token_logprobs"]]
            self.assertEqual(server.generate(ids)["output_ids"], text["output_ids"])

    def test_batches(self):
        texts = ["1", "12 plus 5", "Question: " * 30]
        for server in (mono, lb):
            alone = [server.generate(text)["output_ids"] for text in texts]
            batch = server.generate(texts, rid=["a", "b", "c"])
            self.assertEqual([result["output_ids"] for result in batch], alone)
            self.assertEqual([result["meta_info"]["id"] for result in batch], ["a", "b", "c"])
            named = server.generate(texts, rid="job")
            self.assertEqual([result["meta_info"]["id"] for result in named], ["job_0", "job_1", "job_2"])
            params = [GREEDY | {"max_new_tokens": count} for count in (1, 2, 3)]
            sizes = [len(result["output_ids"]) for result in server.generate(texts, sampling_params=params)]
            self.assertEqual(sizes, [1, 2, 3])
            self.assertEqual(len(server.generate(["1"])), 1)
            twice = server.generate(texts, sampling_params=GREEDY | {"n": 2})
            self.assertEqual([result["output_ids"] for result in twice], [ids for ids in alone for _ in range(2)])
            body = {"text": texts, "sampling_params": GREEDY, "stream": True}
            chunks = events(server.post("/generate", body, stream=True))
            last = {chunk["index"]: chunk["output_ids"] for chunk in chunks}
            self.assertEqual([last[index] for index in range(3)], alone)

    def test_flush_cache(self):
        ids = prompt(300, seed="flush")
        for server, flushed in ((mono, mono), (lb, prefill)):
            self.assertEqual(server.generate(ids)["meta_info"]["cached_tokens"], 0)
            self.assertEqual(server.generate(ids)["meta_info"]["cached_tokens"], 256)
            self.assertEqual(server.generate(ids, extra_key="mine")["meta_info"]["cached_tokens"], 0)
            for call in (requests.get, requests.post):
                self.assertEqual(call(flushed.url + "/flush_cache", timeout=30).status_code, 200)
            self.assertEqual(server.generate(ids)["meta_info"]["cached_tokens"], 0)

    def test_flush_cache_while_serving(self):
        long = GREEDY | {"max_new_tokens": 1500}
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(mono.post, "/generate", {"text": "1", "sampling_params": long, "rid": "long"})
            self.eventually(lambda: mono.busy == (0, 1))
            self.assertEqual(mono.post("/flush_cache", None).status_code, 400)
            waiting = threading.Timer(0.3, mono.post, ("/abort_request", {"rid": "long"}))
            waiting.start()
            self.assertEqual(requests.post(mono.url + "/flush_cache?timeout=20", timeout=30).status_code, 200)
            self.assertEqual(running.result().json()["meta_info"]["finish_reason"]["type"], "abort")

    def test_abort(self):
        body = {"text": "1", "sampling_params": GREEDY | {"max_new_tokens": 3000}}
        for server, told in ((mono, mono), (lb, decode)):
            for abort in ({"rid": "one"}, {"abort_all": True}):
                with self.subTest(server=server.name, abort=abort), ThreadPoolExecutor(1) as pool:
                    running = pool.submit(server.post, "/generate", body | {"rid": "one"})
                    self.eventually(lambda told=told: told.busy[1] == 1)
                    # lets it decode for a while; without it the outcome is the same
                    time.sleep(0.1)
                    for other in ({}, {"rid": ""}, {"rid": "two"}):
                        self.assertEqual(told.post("/abort_request", other).status_code, 200)
                    self.assertEqual(told.busy[1], 1)
                    self.assertEqual(told.post("/abort_request", abort).status_code, 200)
                    meta = running.result(20).json()["meta_info"]
                    self.assertEqual(meta["finish_reason"]["type"], "abort")
                    self.assertLess(meta["completion_tokens"], 3000)
        self.assertIdle()


class TestOpenAI(EngineTestCase):
    def setUp(self):
        self.clients = []
        for server in (mono, lb):
            self.clients.append(openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0))
            self.addCleanup(self.clients[-1].close)

    def test_completions_of_several_prompts_and_samples_and_echo(self):
        prompts = ["1", "12 plus 5"]
        for client in self.clients:
            ask = {"model": "random", "max_tokens": 6, "temperature": 0}
            alone = [client.completions.create(prompt=prompt, **ask).choices[0].text for prompt in prompts]
            both = client.completions.create(prompt=prompts, n=2, **ask)
            self.assertEqual([choice.text for choice in both.choices], [alone[0], alone[0], alone[1], alone[1]])
            self.assertEqual([choice.index for choice in both.choices], [0, 1, 2, 3])
            self.assertEqual(both.usage.completion_tokens, 24)
            echo = client.completions.create(prompt=prompts[1], echo=True, **ask)
            self.assertEqual(echo.choices[0].text, prompts[1] + alone[1])
            streamed = client.completions.create(prompt=prompts[1], echo=True, stream=True, **ask)
            self.assertEqual("".join(chunk.choices[0].text for chunk in streamed), echo.choices[0].text)
            ids = client.completions.create(prompt=prompt(5), **ask)
            self.assertEqual(ids.usage.prompt_tokens, 5)

    def test_chat_logprobs_carry_the_bytes_of_each_token(self):
        ask = {"model": "random", "messages": [{"role": "user", "content": "1"}], "max_tokens": 40, "temperature": 2.0,
               "logprobs": True, "seed": 3, "extra_body": {"ignore_eos": True}}  # fmt: skip
        choice = self.clients[0].chat.completions.create(**ask).choices[0]
        spelled = b"".join(bytes(token.bytes) for token in choice.logprobs.content if not token.token.startswith("<"))
        self.assertEqual(spelled.decode(errors="replace"), choice.message.content)
        self.assertIn("\ufffd", choice.message.content)

    def test_a_streamed_chat_begins_with_its_role_and_ends_all_choices_together(self):
        """As `OpenAIServingChat._generate_chat_stream` of SGLang."""
        ask = {"model": "random", "messages": [{"role": "user", "content": "1"}], "max_tokens": 5, "temperature": 0, "n": 2,
               "stream": True, "stop_token_ids": [], "ignore_eos": True}  # fmt: skip
        for server in (mono, lb):
            choices = [chunk["choices"][0] for chunk in events(server.post("/v1/chat/completions", ask, stream=True))]
            for index in (0, 1):
                mine = [choice for choice in choices if choice["index"] == index]
                self.assertEqual(mine[0]["delta"], {"role": "assistant", "content": "", "reasoning_content": None})
                self.assertEqual(mine[-1]["delta"], {"reasoning_content": None})
                self.assertEqual({choice["finish_reason"] for choice in mine[:-1]}, {None})
                deltas = [choice["delta"] for choice in mine[1:-1]]
                self.assertTrue(all(delta["content"] and not delta.get("role") for delta in deltas))
            self.assertEqual([(c["index"], c["finish_reason"]) for c in choices[-2:]], [(0, "length"), (1, "length")])

    def test_usage_has_cached_tokens_only_where_they_are_asked_for(self):
        """`--enable-cache-report`, as in SGLang's `UsageProcessor`."""
        for client in self.clients:
            usage = client.completions.create(model="random", prompt="1", max_tokens=1).usage
            self.assertIsNone(usage.prompt_tokens_details)

    def test_chat_content_may_be_parts_and_its_options_null(self):
        for client in self.clients:
            ask = {"model": "random", "max_tokens": 6, "temperature": 0}
            text = client.chat.completions.create(messages=[{"role": "user", "content": "12 plus 5"}], **ask)
            parts = [{"type": "text", "text": "12 plus"}, {"type": "text", "text": "5"}]
            joined = client.chat.completions.create(messages=[{"role": "user", "content": parts}], **ask)
            self.assertEqual(joined.choices[0].message.content, text.choices[0].message.content)
            nulls = client.chat.completions.create(
                messages=[{"role": "user", "content": "1"}], max_tokens=2, model="random",
                extra_body=dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "stop", "seed")),
            )  # fmt: skip
            self.assertEqual(nulls.usage.completion_tokens, 2)


class TestBadRequests(EngineTestCase):
    """A clear 4xx from whoever is asked, and nothing left behind."""

    @classmethod
    def setUpClass(cls):
        cls.room = {"bootstrap_host": "127.0.0.1", "bootstrap_port": bootstrap_port, "bootstrap_room": 77}

    def tearDown(self):
        self.assertIdle()
        self.assertEqual(mono.busy, (0, 0))
        self.assertEqual(lb.generate("1")["meta_info"]["completion_tokens"], 12)

    def test_no_room(self):
        for server, missing in ((prefill, "bootstrap_room"), (decode, "bootstrap_host and bootstrap_room")):
            for path, body in (
                ("/generate", {"text": "1"}),
                ("/v1/completions", {"model": "random", "prompt": "1"}),
                ("/v1/chat/completions", {"model": "random", "messages": [{"role": "user", "content": "1"}]}),
            ):
                self.assertRefused(server.post(path, body), 400, f"needs a? ?{missing}.*load balancer")

    def test_malformed(self):
        for path in ("/generate", "/v1/completions", "/v1/chat/completions"):
            for server in (mono, prefill, decode):
                for data in (b"", b"{", b"[]", b"5", b"null", b"\xff", b'{"text": "1"'):
                    headers = {"Content-Type": "application/json"}
                    response = requests.post(server.url + path, data=data, headers=headers, timeout=30)
                    self.assertRefused(response, 400, "body")
        self.assertRefused(requests.post(mono.url + "/v1/completions", data="{}", timeout=30), 400, "body")

    def test_wrong_values_of_generate(self):
        for body, pattern in (
            ({}, "text or input_ids"),
            ({"text": "1", "input_ids": [1]}, "text or input_ids"),
            ({"text": ""}, "prompt is empty"),
            ({"text": []}, "batch is empty"),
            ({"input_ids": []}, "batch is empty"),
            ({"text": ["1", ""]}, "prompt is empty"),
            ({"input_ids": [520]}, "token ids from 0 to 519"),
            ({"input_ids": [-1]}, "token ids from 0 to 519"),
            ({"input_ids": ["a"]}, "input_ids"),
            ({"text": 5}, "text"),
            ({"text": "1", "sampling_params": []}, "sampling_params"),
            ({"text": "1", "sampling_params": "x"}, "sampling_params"),
            ({"text": "1", "sampling_params": {"temperature": "hot"}}, "temperature: .* got .hot."),
            ({"text": "1", "sampling_params": {"top_k": 2.5}}, "top_k: .*got 2.5"),
            ({"text": "1", "sampling_params": {"stop_token_ids": ["a"]}}, "stop_token_ids: "),
            ({"text": "1", "sampling_params": {"json_schema": "{}"}}, "does not support.*json_schema"),
            ({"text": "1", "sampling_params": {"max_tokens": 5}}, "unknown sampling parameter 'max_tokens'"),
            ({"text": "1", "return_logprob": True, "top_logprobs_num": -1}, "top_logprobs_num"),
            ({"text": "1", "return_logprob": True, "logprob_start_len": -2}, "logprob_start_len"),
            ({"text": "1", "return_logprob": True, "logprob_start_len": 99}, "logprob_start_len"),
            ({"text": ["1", "2"], "rid": ["a", "a"]}, "rid"),
            ({"text": ["1", "2"], "rid": ["a"]}, "rid"),
            ({"text": "1", "rid": ["a", "b"]}, "rid"),
            ({"text": ["1", "2"], "sampling_params": [{}]}, "sampling_params"),
            ({"text": ["1", "2"], "sampling_params": [{"n": 1}, {"n": 2}]}, "n must be the same"),
            ({"text": "1", "bootstrap_room": "a"}, "bootstrap_room"),
            ({"text": "1", "bootstrap_room": [77, 78]}, "bootstrap_room"),
        ):
            with self.subTest(body=body):
                for server in (mono, prefill, decode):
                    self.assertRefused(server.post("/generate", self.room | body), 400, pattern)

    def test_a_stream_of_generate_that_is_refused_says_so_in_its_only_event(self):
        """SGLang has answered 200 before it looks at the request (`serve_generate_request`)."""
        for body, pattern in (
            ({"input_ids": [5] * CONTEXT}, "longer than"),
            ({"text": "1", "rid": []}, "rid"),
            ({}, "text"),
        ):
            response = mono.post("/generate", body | {"stream": True}, stream=True)
            self.assertEqual(response.status_code, 200)
            (event,) = events(response)
            self.assertEqual((event["error"]["code"], event["error"]["retryable"]), (400, False))
            self.assertRegex(event["error"]["message"], pattern)

    def test_too_long(self):
        for server in (mono, lb, prefill, decode):
            for body, pattern in (
                ({"input_ids": [5] * CONTEXT}, rf"{CONTEXT} tokens\) is longer than.*{CONTEXT}"),
                ({"input_ids": [5] * 10, "sampling_params": {"max_new_tokens": CONTEXT - 9}}, "10.*4087"),
            ):
                body = body if server is lb else self.room | body
                self.assertRefused(server.post("/generate", body), 400, pattern)

    def test_wrong_values_of_openai(self):
        chat = {"model": "random", "messages": [{"role": "user", "content": "1"}]}
        completion = {"model": "random", "prompt": "1"}
        schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
        image = {"role": "user", "content": [{"type": "image_url"}]}
        for server in (mono, lb):
            for path, body, pattern in (
                ("completions", {"model": "random"}, "prompt"),
                ("completions", completion | {"prompt": ""}, "Prompt cannot be empty"),
                ("completions", completion | {"prompt": []}, "Prompt cannot be empty"),
                ("completions", completion | {"prompt": [[]]}, "Prompt cannot be empty"),
                ("completions", completion | {"max_tokens": 0}, "max_tokens"),
                ("completions", completion | {"max_tokens": -1}, "max_tokens"),
                ("completions", completion | {"max_tokens": CONTEXT}, "context length"),
                ("completions", completion | {"temperature": -1}, "temperature: .*got -1"),
                ("completions", completion | {"logprobs": -1}, "top_logprobs_num"),
                ("completions", completion | {"n": 0}, "n: .*got 0"),
                ("completions", completion | {"response_format": schema}, "response_format"),
                ("completions", completion | {"json_schema": "{}"}, "json_schema"),
                ("chat/completions", {"model": "random"}, "messages"),
                ("chat/completions", chat | {"messages": []}, "essages"),
                ("chat/completions", chat | {"messages": [{}]}, "role|content"),
                ("chat/completions", chat | {"messages": [{"role": "user"}]}, "content"),
                ("chat/completions", chat | {"messages": [{"role": "user", "content": 5}]}, "content"),
                ("chat/completions", chat | {"messages": [image]}, "content"),
                ("chat/completions", chat | {"response_format": schema}, "response_format"),
                ("chat/completions", chat | {"stop": 5}, "stop"),
            ):
                with self.subTest(server=server.name, path=path, body=body):
                    error = self.assertRefused(server.post("/v1/" + path, body), 400, pattern)
                    self.assertEqual((error["object"], error["code"]), ("error", 400))
                    error = self.assertRefused(mono.post("/v1/" + path, body | {"stream": True}), 400, pattern)

    def test_the_prompts_logprobs_are_not_left_out_of_a_completion(self):
        body = {"model": "random", "prompt": "1", "echo": True, "logprobs": 1}
        for server in (prefill, decode, lb):
            self.assertRefused(server.post("/v1/completions", body), 400, "echo with logprobs.*use /generate")

    def test_a_field_that_is_not_served_is_named_in_sglangs_error_shapes(self):
        named = "does not support return_hidden_states=True; the target sglang-cpu"
        completion = {"model": "random", "prompt": "1", "return_hidden_states": True}
        for server in (mono, lb):
            response = server.post("/v1/completions", completion)
            error = self.assertRefused(response, 400, named)
            wanted = {"object": "error", "type": "BadRequestError", "param": "return_hidden_states", "code": 400}
            self.assertEqual(error, wanted | {"message": error["message"]})
        error = self.assertRefused(mono.post("/generate", {"text": "1", "return_hidden_states": True}), 400, named)
        self.assertEqual((list(error), list(error["error"])), (["error"], ["message"]))
        streamed = mono.post("/generate", {"text": "1", "return_hidden_states": True, "stream": True}, stream=True)
        self.assertRegex(events(streamed)[0]["error"]["message"], named)

    def test_an_id_or_a_room_in_use(self):
        long = {"text": "1", "sampling_params": GREEDY | {"max_new_tokens": 3000}, "rid": "taken"}
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(mono.post, "/generate", long)
            self.eventually(lambda: mono.busy == (0, 1))
            self.assertRefused(mono.post("/generate", {"text": "1", "rid": "taken"}), 400, "'taken' is already running")
            mono.post("/abort_request", {"rid": "taken"})
            running.result(20)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(prefill.post, "/generate", self.room | {"text": "1", "rid": "first"})
            self.eventually(lambda: prefill.busy[0] == 1)
            for second in ({"text": "1"}, {"text": ["1", "2"]}):
                self.assertRefused(prefill.post("/generate", self.room | second), 400, "room 77 is in use")
            self.assertEqual(prefill.busy, (1, 1))
            prefill.post("/abort_request", {"rid": "first"})
            waiting.result(20)


class TestFailures(EngineTestCase):
    """The side that waits gets an error that says why, the room is free, the server serves on."""

    def ask(self, room, port=None, **body):
        address = {"bootstrap_host": "127.0.0.1", "bootstrap_port": port or bootstrap_port, "bootstrap_room": room}
        return {"text": "12 plus 5", "sampling_params": GREEDY} | address | body

    def tearDown(self):
        self.assertIdle()
        self.assertEqual(lb.generate("1")["meta_info"]["completion_tokens"], 12)

    def test_decode_whose_prefill_is_gone(self):
        start = time.monotonic()
        response = decode.post("/generate", self.ask(1, free_port))
        failed = f"room 1 from 127.0.0.1:{free_port} failed.*refused|Connect call failed"
        error = self.assertRefused(response, 500, failed)
        self.assertEqual((error["object"], error["code"]), ("error", 500))
        self.assertLess(time.monotonic() - start, 2)
        chunks = events(decode.post("/generate", self.ask(1, free_port, stream=True), stream=True))
        self.assertEqual(chunks[-1]["meta_info"]["finish_reason"]["status_code"], 500)
        chat = self.ask(1, free_port) | {"model": "random", "messages": [{"role": "user", "content": "1"}]}
        self.assertRefused(decode.post("/v1/chat/completions", chat), 500, "room 1")
        chunks = events(decode.post("/v1/chat/completions", chat | {"stream": True}, stream=True))
        self.assertRegex(chunks[-1]["error"]["message"], "room 1")

    def test_the_first_of_a_batch_that_fails_ends_the_others_and_all_may_fail_at_once(self):
        for rooms, first_port, says in (([21, 22], bootstrap_port, "room 22"), ([23, 24], free_port, "room 2[34]")):
            hosts, ports = ["127.0.0.1"] * 2, [first_port, free_port]
            body = self.ask(rooms, ports, text=["12 plus 5", "1"], bootstrap_host=hosts)
            self.assertRefused(decode.post("/generate", body), 500, says)
            self.assertIdle(BOOTSTRAP_TIMEOUT / 2)
        self.assertNotIn("never retrieved", decode.log.read_text())

    def test_a_room_that_no_decode_asks_for(self):
        start = time.monotonic()
        pattern = f"no decode server asked for bootstrap room 2 within {BOOTSTRAP_TIMEOUT} s"
        self.assertRefused(prefill.post("/generate", self.ask(2)), 500, pattern)
        self.assertLess(time.monotonic() - start, BOOTSTRAP_TIMEOUT + 2)

    def test_a_place_that_is_no_place(self):
        for place in ({"bootstrap_host": "host.invalid"}, {"bootstrap_port": 99999}, {"bootstrap_host": "x" * 100}):
            self.assertRefused(decode.post("/generate", self.ask(3) | place), 500, "room 3")

    def test_the_prompts_differ(self):
        with ThreadPoolExecutor(1) as pool:
            sending = pool.submit(prefill.post, "/generate", self.ask(4))
            response = decode.post("/generate", self.ask(4, text="1"))
            self.assertRefused(response, 500, "prompt of .* tokens, this one has 1")
            self.assertRefused(sending.result(), 500, "decode refused bootstrap room 4")

    def test_prefill_is_aborted_before_decode_comes(self):
        before = prefill.info()["engine"]["prefill_tokens"]
        with ThreadPoolExecutor(2) as pool:
            sending = pool.submit(prefill.post, "/generate", self.ask(5, rid="early"))
            self.eventually(lambda: prefill.info()["engine"]["prefill_tokens"] > before)
            prefill.post("/abort_request", {"rid": "early"})
            self.assertRefused(sending.result(10), 500, "aborted")

    def test_decode_is_aborted_while_it_waits(self):
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(decode.post, "/generate", self.ask(6, rid="waits"))
            self.eventually(lambda: decode.busy[1] == 1)
            decode.post("/abort_request", {"rid": "waits"})
            self.assertEqual(waiting.result(2).json()["meta_info"]["finish_reason"]["type"], "abort")

    def test_the_client_goes_away(self):
        for server, room in ((prefill, 7), (decode, 8)):
            with self.assertRaises(requests.Timeout):
                server.post("/generate", self.ask(room), timeout=0.5)
            self.assertIdle(2)
        body = {"text": "1", "sampling_params": GREEDY | {"max_new_tokens": 3000}, "stream": True}
        with lb.post("/generate", body, stream=True) as response:
            lines = response.iter_lines(chunk_size=1)
            next(lines)
            self.assertEqual(decode.busy[1], 1)
        self.assertIdle(5)
        with self.assertRaises(requests.Timeout):
            mono.post("/generate", body | {"stream": False}, timeout=0.5)
        self.eventually(lambda: mono.busy == (0, 0), 2)

    def test_strangers_on_the_bootstrap_port(self):
        for words in (b"GET / HTTP/1.1\r\n\r\n", b'{"room": []}\n', b"x" * 100_000, b""):
            with socket.create_connection(("127.0.0.1", bootstrap_port)) as stranger:
                stranger.sendall(words)
                stranger.shutdown(socket.SHUT_WR)
        self.assertNotIn("Traceback", prefill.log.read_text())

    def test_sigterm_ends_a_server_and_decode_hears_of_it(self):
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(decode.post, "/generate", self.ask(9, spare_bootstrap_port))
            self.eventually(lambda: decode.busy[1] == 1)
            # lets the KV transfer begin; without it the outcome is the same
            time.sleep(0.2)
            spare.process.send_signal(signal.SIGTERM)
            start = time.monotonic()
            self.assertRefused(waiting.result(10), 500, "room 9")
            spare.process.wait(10)
            self.assertLess(time.monotonic() - start, 6)
        self.assertNotIn("Traceback", spare.log.read_text())


class TestConnections(EngineTestCase):
    def test_an_idle_connection_stays_open_as_long_as_the_environment_says(self):
        connections = [http.client.HTTPConnection("127.0.0.1", server.port, timeout=30) for server in (mono, spare)]
        for connection in connections:
            self.addCleanup(connection.close)
            connection.request("GET", "/health")
            connection.getresponse().read()
        long, short = (connection.sock for connection in connections)
        self.assertTrue(select.select([short], [], [], 4 * SPARE_KEEP_ALIVE)[0], "what the server closed can be read")
        self.assertFalse(select.select([long], [], [], 0)[0], "SGLang keeps it for 5 s")


class TestCommandLine(EngineTestCase):
    """One line and a named exit code; of flags in test_robustness."""

    def assertEnds(self, code, pattern, *arguments, **environment):
        command = [sys.executable, "-m", "pdkit.engine", *arguments]
        process = forked.run(command, timeout=120, env=ENVIRONMENT | environment)
        self.assertEqual(process.returncode, code, process.stderr)
        self.assertRegex(process.stderr, pattern)
        self.assertEqual(len(process.stderr.splitlines()), 1, process.stderr)
        self.assertEqual(process.stdout, "")

    def test_busy_ports(self):
        for arguments, port in (
            (("--port", str(mono.port)), mono.port),
            (("--port", str(free_port), "--disaggregation-mode", "prefill",
              "--disaggregation-bootstrap-port", str(bootstrap_port)), bootstrap_port),
        ):  # fmt: skip
            self.assertEnds(3, f"127.0.0.1:{port}.*in use.*choose another", "--model-path", str(RANDOM), *arguments)
        elsewhere = ("--host", "192.0.2.1", "--port", str(free_port))
        self.assertEnds(3, "cannot be bound", "--model-path", str(RANDOM), *elsewhere)

    def test_two_that_bind_one_port_before_either_listens(self):
        first, second = (bind("127.0.0.1", free_port, "--port") for _ in range(2))
        self.addCleanup(first.close)
        self.addCleanup(second.close)
        listen(first)
        with self.assertRaisesRegex(NotReady, f"127.0.0.1:{free_port} was taken meanwhile.*choose another port"):
            listen(second)

    def test_wrong_models(self):
        with tempfile.TemporaryDirectory() as empty, ThreadPoolExecutor(2) as pool:
            jobs = [
                pool.submit(self.assertEnds, 2, says, "--model-path", path, "--port", str(port))
                for says, path, port in (
                    ("config.json is missing", empty, free_port),
                    ("model.safetensors", str(RANDOM), other_free_port),
                )
            ]
            for job in jobs:
                job.result()


if __name__ == "__main__":
    unittest.main()
