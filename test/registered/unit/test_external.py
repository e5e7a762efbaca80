"""A deployment that somebody else runs: where it is, where its key goes and does not go, what is found wrong with it."""

import itertools
import json
import os
import re
import unittest
import zlib
from types import SimpleNamespace
from unittest import mock

import requests
from cases import FolderCase, pdkit, printed, without
from pdkit.checks.accounting.counters import PairCounters, ServerCounters
from pdkit.checks.accounting.ledger import OK, ClientAccount, HttpAttempt
from pdkit.checks.accuracy import client, gsm8k
from pdkit.checks.external import checks, command, parity
from pdkit.checks.external.checks import State
from pdkit.checks.http import RequestFailed
from pdkit.core.ci_register import register_cpu_ci
from pdkit.core.errors import ExitCode, NotReady, UsageError
from pdkit.core.gsm8k import read_dataset
from pdkit.deployment import external
from pdkit.deployment.external import Deployment, Servers
from pdkit.preflight.environment.dataset import default_url
from stub_server import JsonHandler, StubServer

register_cpu_ci(est_time=11, suite="stage-a-test-cpu")

KEY = "sk-0123456789"


class Talkative(JsonHandler):
    """Refuses each request and repeats the key that came with it."""

    def do_GET(self):
        self.server.keys.append(self.headers.get("Authorization"))
        self.answer(500, f"no such user: {self.headers.get('Authorization')}".encode())


class TestUrls(unittest.TestCase):
    def test_what_is_no_url_is_one_line(self):
        for url in ("http://[::1", "http://[::1]:x", "localhost:80", "http://", "http://h:0"):
            with self.subTest(url), self.assertRaisesRegex(UsageError, r"is not a URL like http://host:port"):
                Deployment.of(url)

    def test_what_may_be_secret_is_not_repeated(self):
        for url in (f"http://me:{KEY}@h", f"me:{KEY}@h:80", f"http://h?key={KEY}", f"http://h#{KEY}"):
            with self.subTest(url), self.assertRaisesRegex(UsageError, "SGLANG_PD_API_KEY") as caught:
                Deployment.of(url)
            self.assertNotIn(KEY, str(caught.exception))

    def test_one_server_has_one_address(self):
        for url, other in (
            ("http://127.0.0.1:81", "http://127.0.0.1:81/"),
            ("http://127.0.0.1:81", "http://localhost:81"),
            ("http://127.0.0.1", "http://127.0.0.1:80"),
        ):
            for names in ({"baseline_url": other}, {"prefill_urls": other, "decode_urls": "http://127.0.0.1:82"}):
                with self.subTest(other), self.assertRaisesRegex(UsageError, "are the same server"):
                    Deployment.of(url, **names)
        Deployment.of("http://127.0.0.1:81/a", "http://127.0.0.1:81/b")


class TestKey(unittest.TestCase):
    def setUp(self):
        self.server = StubServer(self, Talkative)
        self.server.keys = []
        self.port = self.server.server_port

    def ask(self, host="localhost"):
        requests.get(f"http://{host}:{self.port}/generate", timeout=10)

    def test_it_goes_to_the_deployment_however_its_name_is_written(self):
        with external.key_sent(Deployment(f"http://LocalHost:{self.port}", api_key=KEY)):
            self.ask("LocalHost")
        self.assertEqual(self.server.keys, [f"Bearer {KEY}"])

    def test_it_goes_to_nobody_else_and_is_not_sent_afterwards(self):
        with external.key_sent(Deployment("http://localhost:1", api_key=KEY)):
            self.ask()
        with external.key_sent(Deployment(f"http://localhost:{self.port}", api_key=KEY)):
            pass
        self.ask()
        self.assertEqual(self.server.keys, [None, None])

    def test_a_server_that_repeats_it(self):
        with self.assertRaisesRegex(NotReady, r"status 500: no such user: Bearer \(removed\)$"):
            external.ask(f"http://127.0.0.1:{self.port}", KEY)


class Stub(StubServer):
    """Answers a GET of a path in `gets` with what is there; POSTs as an SGLang server that always says the same.

    tamper  takes (path, request, answer) and returns what is answered; None: no answer but a status that is not 200
    """

    def __init__(self, test, gets, tamper=lambda path, request, answer: answer):
        self.gets, self.tamper = gets, tamper
        super().__init__(test)

    def reply(self, path, request):
        if request is None:
            return (200, self.gets[path]) if path in self.gets else (404, {})
        numbers = ("max_tokens", "temperature", "sampling_params")
        is_wrong = any(isinstance(request.get(name), str) for name in numbers)
        answer = self.tamper(path, request, None if is_wrong else self.plain(path, request))
        if isinstance(answer, list):
            return 200, "".join(f"data: {event}\n\n" for event in [*map(json.dumps, answer), "[DONE]"]).encode()
        return (200, answer) if answer is not None else (400 if is_wrong else 500, {"error": "no"})

    def plain(self, path, request):
        text, params = " It is 2.", request.get("sampling_params", {})
        size = request.get("max_tokens") or params.get("max_new_tokens")
        prompt = str(request.get("prompt") or request.get("text") or request.get("messages"))
        usage = {"prompt_tokens": len(prompt), "completion_tokens": size, "total_tokens": len(prompt) + size}
        if path == "/generate":
            return {"text": text, "meta_info": {**usage, "finish_reason": {"type": "length"}}}
        if request.get("stream"):
            halves = [{"text": text[:4], "finish_reason": None}, {"text": text[4:], "finish_reason": "length"}]
            return [{"choices": [half]} for half in halves] + [{"choices": [], "usage": usage}]
        choice = {"index": 0, "text": text, "message": {"content": text}, "finish_reason": "length"}
        return {"choices": [choice], "usage": usage}


MODELS, INFO = {"data": [{"id": "m"}]}, {"model_path": "/no/such/model"}
SERVER = {"/v1/models": MODELS, "/model_info": INFO}
PAIR = {**SERVER, "/get_server_info": {"prefill": [{"disaggregation_mode": "prefill"}],
                                       "decode": [{"disaggregation_mode": "decode"}]}}  # fmt: skip


def workers(*roles):
    return {**SERVER, "/workers": {"workers": [{"worker_type": role, "metadata": {}} for role in roles]}}


class TestCommand(FolderCase):
    def setUp(self):
        super().setUp()
        self.data = self.write("questions.jsonl", '{"question": "What is 1 + 1?", "answer": "#### 2"}\n' * 300)
        self.enterContext(mock.patch.dict(os.environ, without("SGLANG_PD_", "OPENAI_"), clear=True))

    def check(self, server, *words, code):
        """What was printed, errors included, by a command that must end with `code`."""
        ran = pdkit("check", server.url, "--quick", "--data", self.data, *words)
        self.assertEqual(ran.returned, code, ran.out + ran.err)
        return ran.out + ran.err

    def refused(self, gets):
        shown = self.check(server := Stub(self, gets), code=ExitCode.NOT_READY)
        self.assertEqual(shown.count("\n"), 1, shown)
        return shown.removeprefix(f"pdkit check: error: {server.url} ").strip()

    def test_a_sound_pair(self):
        shown = self.check(Stub(self, PAIR), code=ExitCode.PASSED)
        for line in (
            "prefill and decode: the load balancer reports 1 prefill and 1 decode",
            "usage adds up: yes",
            "streaming equals whole: yes",
            "/generate equals /v1/completions: yes",
            "chat answers: yes",
            "wrong requests are refused: yes",
            "GSM8K: score 1.000 of 40 questions (too few to pass the gate: without --quick)",
            "not checked: answers, no baseline to compare with (--baseline URL)",
            "not checked: counters, the servers have none",
        ):
            self.assertIn(f"{line}\n", shown)

    def test_what_is_wrong_fails_the_check_that_is_for_it(self):
        def counting_wrong(path, request, answer):
            if request.get("ignore_eos"):
                answer["usage"]["total_tokens"] += 1
            return answer

        def of_streams(change):
            return lambda path, request, answer: change(answer) if isinstance(answer, list) else answer

        def generating_else(path, request, answer):
            return answer | {"text": "else"} if path == "/generate" else answer

        def chatting_of_nothing(path, request, answer):
            if path == "/v1/chat/completions":
                answer["choices"][0]["finish_reason"] = "abort"
            return answer

        def answering_wrong(path, request, answer):
            if request.get("max_tokens") == 512 and path == "/v1/completions":
                answer["choices"][0]["text"] = " It is 3."
            return answer

        for tamper, check in (
            (counting_wrong, "usage adds up"),
            (of_streams(lambda events: events[1:]), "streaming equals whole"),
            (of_streams(lambda events: [*events[:-1], *events[-2:]]), "streaming equals whole"),
            (generating_else, "/generate equals /v1/completions"),
            (chatting_of_nothing, "chat answers"),
            (answering_wrong, "GSM8K"),
        ):
            with self.subTest(check):
                sound = lambda path, request, answer, tamper=tamper: answer and tamper(path, request, answer)  # noqa: E731
                shown = self.check(Stub(self, PAIR, sound), code=ExitCode.FAILED)
                failed = [line for line in shown.splitlines() if ": FAILED, " in line]
                found = [line.partition(": FAILED, ")[0] for line in failed]
                self.assertEqual(found[0], check)
                self.assertLessEqual({*found}, {check, "every request was answered"})  # it sees contradictions as well

    def test_a_server_that_takes_anything(self):
        taking = Stub(self, PAIR, lambda path, request, answer: answer or {"text": "?"})
        shown = self.check(taking, code=ExitCode.FAILED)
        self.assertIn("wrong requests are refused: FAILED, /v1/completions answers", shown)

    def test_a_deployment_that_stops_answering(self):
        asked = []

        def dying(path, request, answer):
            asked.append(path)
            return answer if len(asked) < 6 else None

        shown = self.check(server := Stub(self, PAIR, dying), code=ExitCode.FAILED)
        self.assertIn(f"not checked: all else, {server.url} does not answer any more\n", shown)
        self.assertNotIn("GSM8K", shown)

    def test_what_is_not_prefill_and_decode_is_one_line(self):
        alone = {**SERVER, "/server_info": {"disaggregation_mode": "null"}}
        half = {**PAIR, "/get_server_info": {"prefill": [{"disaggregation_mode": "prefill"}], "decode": [{}]}}
        fused = {**half, "/get_server_info": {**half["/get_server_info"], "decode": [{"disaggregation_mode": "null"}]}}
        fused_line = "is not a PD deployment: a server that the load balancer reports as decode has disaggregation_mode"
        for gets, line in (
            (alone, "is not a PD deployment: it is a monolithic server (/server_info: disaggregation_mode null)"),
            (fused, fused_line),
            (workers("regular"), "is not a PD deployment: the router reports no prefill server"),
            (workers("prefill"), "is not a PD deployment: the router reports no decode server"),
            ({"/v1/completions": {}}, "is not an SGLang server: it has no /v1/models; needed is SGLang's router or "),
            ({"/v1/models": MODELS}, "serves m, but is not an SGLang server: no /model_info that names a model_path; "),
        ):
            with self.subTest(line):
                self.assertTrue(self.refused(gets).startswith(line), self.refused(gets))

    def test_what_cannot_be_confirmed_has_not_passed(self):
        for gets in (SERVER, workers("prefill", "decode")):
            shown = self.check(Stub(self, gets), code=ExitCode.UNCONFIRMED)
            self.assertIn("not checked: prefill and decode, could not be confirmed: ", shown)
            self.assertIn("UNCONFIRMED: ", shown)

    def test_right_answers_of_the_baseline_must_not_be_lost(self):
        self.data.write_text('{"question": "What is 1 + 1?", "answer": "#### 2"}\n' * 1319)
        counted = itertools.count()

        def losing(path, request, answer):
            if path == "/v1/completions" and request.get("stop") and next(counted) % 8 == 0:
                answer["choices"][0]["text"] = " It is 3."
            return answer

        alone = {"/get_server_info": {"disaggregation_mode": None}}
        for tamper, says in (
            (None, r"GSM8K: score 1.000 of (\d+) questions, the baseline's is 1.000: 0 right answers lost, 0 gained"),
            (losing, r"GSM8K: FAILED, score 0.8\d\d of (\d+) questions, .*: \d+ right answers lost, 0 gained"),
        ):
            pair = Stub(self, PAIR, tamper) if tamper else Stub(self, PAIR)
            target = checks.CheckedDeployment(
                Deployment(pair.url, Stub(self, SERVER | alone).url), external.Served(("m",), "/no/such/model"),
                external.Servers(None), read_dataset(self.data),
            )  # fmt: skip
            row = checks.ask("GSM8K", checks.gsm8k, target)
            self.assertRegex(row.line(), says)
            self.assertLess(int(re.search(says, row.line())[1]), 385)

    def test_json_has_the_same(self):
        found = json.loads(self.check(Stub(self, PAIR), "--json", code=ExitCode.PASSED))
        self.assertEqual((found["verdict"], found["exit_code"]), ("PASSED", 0))
        self.assertIn({"check": "usage adds up", "state": "passed", "sentence": "yes", "evidence": []}, found["checks"])

    def test_loopback_is_not_asked_through_a_proxy(self):
        proxy = "http://127.0.0.1:9"
        with mock.patch.dict(os.environ, {"http_proxy": proxy, "HTTP_PROXY": proxy}):
            self.check(Stub(self, PAIR), code=ExitCode.PASSED)
            self.assertNotIn("no_proxy", os.environ)


class Parrot(StubServer):
    """A model whose next token follows from the tokens before it; `loses(ids, place)` says where a state is lost.

    rewritten  is added to each logprob
    """

    request_queue_size = 256

    def __init__(self, test, loses=lambda ids, place: False, rewritten=0.0):
        self.loses, self.rewritten = loses, rewritten
        test.asked = self.asked = []
        super().__init__(test)

    def reply(self, path, request):
        if request is None:
            own = {"/server_info": {"disaggregation_mode": "null", "context_length": 4096}, **SERVER}
            return (200, own[path]) if path in own else (404, {})
        self.asked.append(request)
        if path == "/v1/completions":
            params = {"max_new_tokens": request["max_tokens"], "stop": request.get("stop")}
            answer = self.answer_to(self.ids_of(request["prompt"]), params, request)
            usage = {name: answer["meta_info"][name] for name in ("prompt_tokens", "completion_tokens")}
            choice = {"index": 0, "text": answer["text"], "finish_reason": "length"}
            return 200, {"choices": [choice], "usage": usage}
        params, ids = request["sampling_params"], request.get("input_ids") or self.ids_of(request["text"])
        if isinstance(ids[0], list):
            return 200, [self.answer_to(*each, request) for each in zip(ids, params)]
        answer = self.answer_to(ids, params, request)
        return 200, f"data: {json.dumps(answer)}\n\ndata: [DONE]\n\n".encode() if request.get("stream") else answer

    def ids_of(self, text):
        return [2 + ord(character) % 200 for character in text]

    def answer_to(self, ids, params, request):
        stops, lost = params.get("stop") or [], self.loses(ids, len(ids) - 1)
        out, logprobs, text, found = [], [], "", []
        while len(out) < params.get("max_new_tokens", 16) and not found:
            digest = zlib.crc32(repr(((ids + out)[-40:], lost)).encode())
            out.append(2 + digest % 200)
            logprobs.append((-1 - digest % 97 / 100 + self.rewritten, out[-1], None))
            text += chr(ord("!") + out[-1] % 90)
            found = [text.find(stop) for stop in ([stops] if isinstance(stops, str) else stops) if stop in text]
            if out[-1] in params.get("stop_token_ids", ()):
                break
        meta = {"prompt_tokens": len(ids), "completion_tokens": len(out), "finish_reason": {"type": "length"}}
        if request.get("return_logprob"):
            meta |= {"output_token_logprobs": logprobs, "output_top_logprobs": [[each] for each in logprobs]}
            if request.get("logprob_start_len") == 0:
                meta["input_token_logprobs"] = [(None, ids[0], None)] + [(-1.0, token, None) for token in ids[1:]]
        return {"text": text[: min(found, default=len(text))], "output_ids": out, "meta_info": meta}


class TestComparison(unittest.TestCase):
    """Prompts from the baseline's own tokens, answers compared, and what the lengths of those that differ say."""

    def compare(self, exact=True, batches=True, prompt_logprobs=True, **settings):
        baseline, pair = Parrot(self), Parrot(self, **settings)
        geometry = parity.geometry_of(None, {"context_length": 4096, "page_size": 64})
        options = {"model": "m", "options": parity.QUICK, "exact": exact, "batches": batches}
        options["prompt_logprobs"] = prompt_logprobs
        return parity.Comparison(pair.url, baseline.url, geometry, parity.SUMS, **options).run()

    def test_an_equal_server(self):
        found = self.compare()
        self.assertEqual((found.equal, found.problems, found.hint), (found.total, (), None))
        self.assertGreater(found.total, 60)
        sent = [request for request in self.asked if "input_ids" in request]
        self.assertTrue(any(request.get("stream") for request in sent))
        self.assertTrue(any(isinstance(request["input_ids"][0], list) for request in sent))
        self.assertEqual({request["model"] for request in self.asked if "prompt" in request}, {"m"})

    def test_a_router_that_takes_no_batches_gets_none(self):
        found = self.compare(batches=False)
        self.assertEqual(found.problems, ())
        sent = [request["input_ids"] for request in self.asked if "input_ids" in request]
        self.assertFalse(any(isinstance(ids[0], list) for ids in sent))

    def test_where_logprobs_of_prompts_overwrite_memory_none_are_asked_for(self):
        self.compare(prompt_logprobs=False)
        self.assertFalse(any("logprob_start_len" in request for request in self.asked if "input_ids" in request))
        exposed = {"version": "0.5.23", "enable_dp_attention": True, "speculative_algorithm": "EAGLE"}
        deployment = SimpleNamespace(baseline_url="http://127.0.0.1:1", api_key=None)
        with mock.patch.object(checks, "server_info", return_value=exposed):
            row = checks.answers_equal(SimpleNamespace(deployment=deployment))
        self.assertIs(row.state, State.NOT_CHECKED)
        self.assertRegex(row.sentence, "overwrites memory .* without --speculative-algorithm")

    def test_only_servers_that_are_known_are_asked_for_logprobs_of_prompts(self):
        sound = {"version": "0.5.23", "enable_dp_attention": False}
        exposed = {"version": "0.5.23", "enable_dp_attention": True, "speculative_algorithm": "EAGLE"}
        for infos, asked in (((sound,), True), ((sound, exposed), False), ((sound, {}), False), ((), False)):
            self.assertIs(checks._may_be_asked_for_prompt_logprobs(Servers(None, prefill=infos)), asked, infos)

    def test_what_long_prompts_lose(self):
        for exact in (True, False):
            found = self.compare(exact, loses=lambda ids, place: place + 1 >= 128)
            self.assertTrue(found.problems)
            hint = "^only prompts of 128 tokens and more differ; up to 127 tokens all are right; the first output"
            self.assertRegex(found.hint, hint)

    def test_ten_lines_of_evidence_are_shown_and_the_rest_counted(self):
        for count, last in ((10, "    line 9"), (12, "    and 2 more: --json has them all")):
            row = checks.CheckRow("a check", State.FAILED, "found", tuple(f"line {i}" for i in range(count)))
            self.assertEqual(printed(command._print, row).out.splitlines()[-1], last)

    def test_a_router_that_rewrites_numbers(self):
        found = self.compare(rewritten=4e-15)
        self.assertEqual((found.equal, found.problems), (found.total, ()))
        found = self.compare(rewritten=1e-9)
        self.assertTrue(found.problems)
        self.assertLess(found.equal, found.total)  # though each has its tokens

    def test_what_every_prompt_loses(self):
        found = self.compare(loses=lambda ids, place: True)
        self.assertLess(found.equal, 3)  # one of 200 tokens may be right by chance
        self.assertRegex(found.hint, "^the first output token is wrong already")


class TestCounters(unittest.TestCase):
    ACCOUNT = ClientAccount((HttpAttempt("/generate", OK, None, 3, 0.1, 1),))

    def row(self, exact=True, **decode):
        before = PairCounters(ServerCounters(), ServerCounters())
        did = {"requests": 3, "received": 3, **decode}
        requests_ = decode.get("requests", 3)
        after = PairCounters(ServerCounters(requests=requests_, sent=requests_), ServerCounters(**did))
        return checks.counters(before, after, self.ACCOUNT, exact)

    def test_each_sequence_once(self):
        self.assertIs(self.row().state, State.PASSED)
        self.assertIs(checks.counters(None, None, self.ACCOUNT, True).state, State.NOT_CHECKED)

    def test_a_decode_server_that_computes_prompts_itself(self):
        for exact in (True, False):
            row = self.row(exact, prefill_tokens=7)
            self.assertEqual((row.state, row.sentence), (State.FAILED, "decode computed 7 prompt tokens itself"))

    def test_more_than_was_asked_for(self):
        self.assertIs(self.row(True, requests=4, received=4).state, State.FAILED)
        row = self.row(False, requests=4, received=4)
        self.assertIs(row.state, State.PASSED)
        self.assertIn("others used the servers", row.sentence)


class TestClient(FolderCase):
    """The light client scores as SGLang's `run_eval` does."""

    def test_the_last_number(self):
        from sglang.test.simple_eval_mixed_prefix_gsm8k import INVALID, get_answer_value

        for text in ("#### 18", "it is 1,234 dollars.", "-5 or -7", "3.50.", "7.", "none", "", "a1b2", "12 - 5", "x-3"):
            theirs = get_answer_value(text)
            self.assertEqual(client.last_number(text), None if theirs == INVALID else theirs, text)

    def test_the_data_set_is_that_of_sglang(self):
        self.assertEqual(gsm8k.GSM8K_URL, default_url())

    def test_a_question_without_an_answer_is_not_a_wrong_one(self):
        data = self.write("data.jsonl", '{"question": "q", "answer": "#### 2"}\n' * 50)
        server = Stub(self, {}, lambda path, request, answer: None)
        args = SimpleNamespace(base_url=server.url, model="m", gsm8k_data_path=str(data), num_examples=40, num_shots=5,
                               num_threads=2, max_tokens=512, timeout=10)  # fmt: skip
        with self.assertRaisesRegex(RequestFailed, r"of 40 questions got no answer, the first: status 500"):
            client.run(args)


if __name__ == "__main__":
    unittest.main()
