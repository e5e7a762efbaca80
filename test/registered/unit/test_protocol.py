"""Clients of a load balancer, against a stub: what they put together, and how far an answer is compared."""

import json
import socket
import sys
import threading
import time
import types
import unittest
from pathlib import Path
from unittest import mock

import requests
from cases import printed
from pdkit.checks.http import IDLE_S, MINI_LB, Client
from pdkit.checks.protocol.checks import ProtocolChecks
from pdkit.checks.protocol.reference import (
    Reference,
    ask_reference,
    counting_prompts,
    is_best,
    through_each_load_balancer,
)
from pdkit.core.ci_register import register_cpu_ci
from pdkit.deployment.relay import Relay
from pdkit.deployment.router import healthy_workers, is_ready
from stub_server import JsonHandler, StubServer

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from broken_router import BREAKAGES  # noqa: E402

register_cpu_ci(est_time=3, suite="stage-a-test-cpu")

TOKENS = [" 9", " 10", " 11"]


class Handler(JsonHandler):
    """Goes on with TOKENS; the margin of each over the second best is in `server.margins`."""

    def do_GET(self):
        self.answer(self.server.ready)

    def do_POST(self):
        body = self.body()
        if body.get("stream"):
            return self._stream()
        if self.path == "/generate":
            tops = [[[-0.1, index, None], [-0.1 - margin, 9, None]] for index, margin in enumerate(self.server.margins)]
            said = {"output_top_logprobs": tops, "output_token_logprobs": [top[0] for top in tops]}
            return self.answer(200, {"output_ids": [0, 1, 2], "meta_info": said})
        logprobs = {"tokens": TOKENS, "token_logprobs": [-0.1] * 3, "top_logprobs": [], "text_offset": []}
        choice = {"index": 0, "text": "".join(TOKENS), "finish_reason": "length", "logprobs": logprobs}
        choices = {"choices": [choice]} if body["prompt"] else {"error": {"message": "empty"}}
        self.answer(200, {"id": "1", "object": "text_completion", "created": 1, "model": "m"} | choices)

    def _stream(self):
        events = [{"choices": [{"index": 0, "text": token, "finish_reason": None}]} for token in ["", *TOKENS]]
        events[-1]["choices"][0] |= {"finish_reason": "stop", "matched_stop": 7}
        events.append({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}})
        lines = [json.dumps({"id": "1", "object": "text_completion", "created": 1, "model": "m"} | e) for e in events]
        content = "".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"]).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


class TestBreakages(unittest.TestCase):
    def test_each_scenario_is_shown_a_broken_router(self):
        scenarios = {name for name in dir(ProtocolChecks) if name.startswith("test_")}
        self.assertEqual({scenario for scenario, *_ in BREAKAGES}, scenarios)


record = types.SimpleNamespace
BEST, AS_GOOD, WORSE = (" There", -2.0), (" In", -2.0), (" Both", -3.0)


class TestLogprobs(unittest.TestCase):
    """What decode takes may be listed second: of two tokens whose logprobs are equal to the bit."""

    assertBest = ProtocolChecks.assertBest
    require_prompt_logprobs = ProtocolChecks.require_prompt_logprobs
    prompt_logprobs_are_fatal = None
    tops = [BEST, AS_GOOD, WORSE]

    def prompts(self, count):
        return ["1"] * count

    def openai(self, completed, said):
        """The scenario's verdict on 12 times the token `completed` of a completion, `said` of a chat."""
        (token, logprob), tops = completed, [dict(self.tops)] * 12
        logprobs = record(tokens=[token] * 12, token_logprobs=[logprob] * 12, top_logprobs=tops)
        entries = [record(token=token, logprob=logprob) for token, logprob in (said, *self.tops)]
        content = [record(token=said[0], logprob=said[1], top_logprobs=entries[1:])] * 12
        client = mock.Mock()
        client.complete.side_effect = [
            record(choices=[record(text=token * 12, logprobs=logprobs)]),
            record(tokens=logprobs.tokens),
            record(choices=[record(logprobs=None)]),
        ]
        client.chat.return_value = record(choices=[record(logprobs=record(content=content))])
        ProtocolChecks.test_logprobs_of_completions_and_chat.scenario(self, client)

    def generate(self, taken):
        """The same of `/generate`, by token ids."""
        ids = {token: number for number, (token, _) in enumerate(self.tops)}
        inputs = [[None if at == 0 else -1.0, at, None] for at in range(5)]
        meta = {
            "input_token_logprobs": inputs,
            "output_token_logprobs": [[taken[1], ids[taken[0]], None]] * 6,
            "output_top_logprobs": [[[logprob, ids[token], None] for token, logprob in self.tops]] * 6,
            "prompt_tokens": 5,
        }
        whole, tail = {"output_ids": [ids[taken[0]]] * 6}, {"input_token_logprobs": inputs[1:]}
        client = mock.Mock(balancer=record(merges_streams=False))
        client.generate.side_effect = whole | {"meta_info": meta}, {"meta_info": tail}
        ProtocolChecks.test_input_logprobs_are_merged.scenario(self, client)

    def test_either_of_two_that_are_as_good(self):
        for taken in (BEST, AS_GOOD):
            self.openai(taken, taken)
            self.generate(taken)

    def test_no_other(self):
        for taken in (WORSE, (BEST[0], -2.5), (WORSE[0], BEST[1])):
            for ask in (lambda taken: self.openai(taken, BEST), lambda taken: self.openai(BEST, taken), self.generate):
                with self.assertRaisesRegex(AssertionError, "greedy takes the best"):
                    ask(taken)

    def test_where_logprobs_of_a_prompt_are_fatal_none_are_asked_for(self):
        self.prompt_logprobs_are_fatal = "they end it"
        for scenario in ("test_input_logprobs_are_merged", "test_first_token_is_the_end_of_text"):
            client = mock.Mock()
            with self.assertRaisesRegex(unittest.SkipTest, "they end it"):
                getattr(ProtocolChecks, scenario).scenario(self, client)
            client.generate.assert_not_called()

    def test_two_alternatives_that_read_the_same(self):
        self.tops = [BEST, AS_GOOD, (AS_GOOD[0], -3.0)]
        self.openai(AS_GOOD, BEST)
        with self.assertRaisesRegex(AssertionError, "greedy takes the best"):
            self.openai((BEST[0], -2.5), BEST)

    def test_is_best(self):
        tops = [(-1.0, 5), (-1.0, 7), (-2.0, 9)]
        self.assertEqual([token for token in range(10) for p in (-1.0, -2.0) if is_best((p, token), tops)], [5, 7])
        self.assertTrue(is_best((-1.0, 8), tops[:2]), "a third that is as good as all that are listed")


class TestThroughEachLoadBalancer(unittest.TestCase):
    def ran(self, skipping):
        """The result of a scenario that is skipped through the load balancers in `skipping`, and what it printed."""

        class Case(unittest.TestCase):
            clients = [record(name="one"), record(name="other")]

            @through_each_load_balancer
            def test_it(self, client):
                if client.name in skipping:
                    self.skipTest(f"not {client.name}")

        result = unittest.TestResult()
        shown = printed(Case("test_it").run, result).out
        return [reason for _, reason in result.skipped], shown

    def test_a_method_is_skipped_once_and_only_if_it_never_ran(self):
        self.assertEqual(self.ran(()), ([], ""))
        self.assertEqual(self.ran(("one",)), ([], "not through the one: not one\n"))
        self.assertEqual(self.ran(("one", "other"))[0], ["not one"])


class TestClient(unittest.TestCase):
    def setUp(self):
        self.server = StubServer(self, Handler)
        self.client = Client(MINI_LB, self.server.url, "m", 10)
        self.addCleanup(self.client.close)

    def test_a_stream_is_put_together(self):
        streamed = self.client.complete("8", 3, stream=True)
        self.assertEqual((streamed.text, streamed.texts), ("".join(TOKENS), TOKENS))
        self.assertEqual((streamed.finish_reasons, streamed.matched_stop, streamed.ids), (["stop"], 7, {"1"}))
        self.assertEqual(streamed.usage.completion_tokens, 3)

    def test_an_error_with_status_200_is_told(self):
        with self.assertRaisesRegex(AssertionError, 'without choices: .*"message":"empty"'):
            self.client.complete("", 3)

    def test_a_reference_is_certain_up_to_the_first_near_tie(self):
        for margins, margin, certain in (((5, 5, 5), 2, 3), ((5, 1, 5), 2, 1), ((1, 5, 5), 2, 0), ((5, 0.01, 5), 0, 3)):
            self.server.margins = margins
            reference = ask_reference(self.client, "8", 3, margin)
            self.assertEqual((reference.certain, reference.certain_text), (certain, "".join(TOKENS[:certain])))
            self.assertEqual((reference.prompt, reference.text, reference.ids), ("8", "".join(TOKENS), (0, 1, 2)))

    def test_no_connection_is_used_that_the_server_may_be_closing(self):
        class Impatient(Handler):
            protocol_version = "HTTP/1.1"
            asked = False

            def do_POST(self):
                if self.asked:
                    self.close_connection = True  # the time for another request was over, but it is on its way
                    return
                self.asked = True
                super().do_POST()

        client = Client(MINI_LB, StubServer(self, Impatient).url, "m", 10)
        self.addCleanup(client.close)
        client.complete("8", 3)
        time.sleep(1.5 * IDLE_S)
        self.assertEqual(client.complete("8", 3).choices[0].text, "".join(TOKENS))

    def test_text_that_no_token_spells_is_compared_where_all_is_certain(self):
        self.assertEqual(Reference("", "\u00e9", ("\u00c3", "\u00a9"), (1, 2), 2).certain_text, "\u00e9")

    def test_a_refused_generate_raises(self):
        with self.assertRaises(requests.ConnectionError):
            Client(MINI_LB, "http://127.0.0.1:1", "m", 1).generate(text="1")


class TestPrompts(unittest.TestCase):
    def test_each_counts_from_a_number_of_its_own(self):
        self.assertEqual(counting_prompts(2)[1], "200 201 202 203 204 205 206 207 208")
        self.assertEqual(len(set(counting_prompts(50))), 50)


class TestRouter(unittest.TestCase):
    def test_readiness(self):
        server = StubServer(self, Handler)
        for server.ready, ready in ((200, True), (503, False)):
            self.assertEqual(is_ready(server.url), ready)
        self.assertFalse(is_ready("http://127.0.0.1:1"))

    def test_how_many_servers_it_knows(self):
        server = StubServer(self, reply=lambda path, body: server.says)
        for server.says, known in (
            ((200, {"status": "ready", "healthy_workers": 3, "total_workers": 4}), 3),
            ((503, {"status": "not ready", "reason": "insufficient healthy workers"}), 0),
            ((200, b"OK"), 0),
        ):
            self.assertEqual(healthy_workers(server.url), known)
        self.assertEqual(healthy_workers("http://127.0.0.1:1"), 0)


class TestRelay(unittest.TestCase):
    def test_a_server_appears_and_leaves(self):
        server = StubServer(self, Handler)
        server.ready = 200
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = free.getsockname()
        url = f"http://{address[0]}:{address[1]}"
        self.assertFalse(is_ready(url))
        with Relay(address, server.server_address):
            self.assertTrue(is_ready(url))
            self.assertTrue(is_ready(url))
        self.assertFalse(is_ready(url))

    def test_an_end_of_one_direction_is_passed_on(self):
        with socket.create_server(("127.0.0.1", 0)) as upstream, socket.create_server(("127.0.0.1", 0)) as free:
            address = free.getsockname()
            free.close()

            def serve():
                connection, _ = upstream.accept()
                with connection:
                    said = b"".join(iter(lambda: connection.recv(100), b""))
                    connection.sendall(said[::-1])

            thread = threading.Thread(target=serve)
            thread.start()
            with Relay(address, upstream.getsockname()), socket.create_connection(address) as client:
                client.sendall(b"abc")
                client.shutdown(socket.SHUT_WR)
                self.assertEqual(client.recv(100), b"cba")
            thread.join()


if __name__ == "__main__":
    unittest.main()
