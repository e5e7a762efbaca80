"""Acceptance length: read from what servers answer, gated, and never passed unchecked."""

import json
import threading
import unittest
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from pdkit.acceptance import (
    Acceptance,
    AcceptanceError,
    AcceptanceGate,
    NotApplicable,
    from_meta_info,
    from_server_info,
    measure,
    read_server_info,
    speculative_algorithm,
)
from pdkit.ci_register import register_cpu_ci

register_cpu_ci(est_time=3, suite="stage-a-test-cpu")


def server(*lengths, algorithm="EAGLE"):
    """`/server_info` as SGLang answers it, one rank a length; None is a rank that has not logged a batch yet."""
    states = [{"last_gen_throughput": 1.0, **({"avg_spec_accept_length": x} if x else {})} for x in lengths]
    return {"speculative_algorithm": algorithm, "tp_size": 4, "internal_states": states}


def mini_lb(prefill, decode):
    """`/get_server_info` as the mini LB of sglang-router 0.3.2 nests it."""
    states = [state for info in decode for state in info["internal_states"]]
    dummy = [{"last_gen_throughput": 0.0, "avg_spec_accept_length": None}]
    return {"internal_states": states or dummy, "prefill": prefill, "decode": decode}


def meta(tokens, steps):
    return {"completion_tokens": tokens, "spec_verify_ct": steps, "spec_accept_length": tokens / steps}


class StubServer(ThreadingHTTPServer):
    """Answers each path with its JSON, or with 404."""

    def __init__(self, test, answers):
        asked = self.asked = []

        class Handler(BaseHTTPRequestHandler):
            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                asked.append((self.path, json.loads(body) if body else None))
                found = self.path in answers
                content = json.dumps(answers[self.path] if found else {}).encode()
                self.send_response(200 if found else 404)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = answer

            def log_message(self, *args):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        test.addCleanup(thread.join)
        test.addCleanup(self.server_close)
        test.addCleanup(self.shutdown)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class TestServerInfo(unittest.TestCase):
    def test_every_rank_of_decode_counts(self):
        measured = from_server_info(server(1.8, 1.7, None, 1.9))
        self.assertEqual((measured.algorithm, measured.lengths, measured.lowest), ("EAGLE", (1.8, 1.7, 1.9), 1.7))

    def test_through_the_mini_lb_decode_is_read_and_prefill_is_not(self):
        info = mini_lb([server(1.0)], [server(1.8), server(1.6)])
        self.assertEqual(from_server_info(info).lengths, (1.8, 1.6))

    def test_no_speculation_is_not_applicable(self):
        for info in (
            server(None, algorithm=None),
            {"internal_states": []},
            mini_lb([server(None)], [server(None, algorithm=None)]),
            mini_lb([], []),
        ):
            measured = from_server_info(info)
            self.assertIsInstance(measured, NotApplicable)
            self.assertIn("does not speculate", measured.report())

    def test_speculation_without_a_length_is_an_error(self):
        for info in (server(None, None), server(), mini_lb([], [server(None)])):
            with self.assertRaisesRegex(AcceptanceError, r"speculates \(EAGLE\), but none of its \d ranks"):
                from_server_info(info)


class TestMetaInfo(unittest.TestCase):
    def test_is_pooled_over_steps_not_over_requests(self):
        measured = from_meta_info("EAGLE", [meta(100, 50), meta(10, 10), {"completion_tokens": 1}])
        self.assertEqual(measured.lengths, (110 / 60,))
        self.assertIn("2 requests, 60 steps", measured.source)

    def test_speculation_without_a_verification_step_is_an_error(self):
        for metas in ([], [{"completion_tokens": 5}], [{"completion_tokens": 5, "spec_verify_ct": 0}]):
            with self.assertRaisesRegex(AcceptanceError, f"none of {len(metas)} requests"):
                from_meta_info("EAGLE", metas)

    def test_no_speculation_is_not_applicable(self):
        self.assertIsInstance(from_meta_info(None, [{"completion_tokens": 5}]), NotApplicable)


class TestGate(unittest.TestCase):
    def gate(self, *lengths, reference=2.0, ratio=0.95):
        return AcceptanceGate(Acceptance("EAGLE", "test", lengths), reference, ratio)

    def test_the_lowest_rank_must_reach_the_share_of_the_reference(self):
        self.gate(1.9).assert_passed()
        self.gate(2.5, 1.9).assert_passed()
        for lengths in ((1.899,), (2.5, 1.899), (1.0,)):
            with self.assertRaises(AssertionError):
                self.gate(*lengths).assert_passed()

    def test_ratio(self):
        self.assertTrue(self.gate(1.6, ratio=0.8).passed)
        self.assertFalse(self.gate(1.59, ratio=0.8).passed)

    def test_the_failure_message_is_the_report(self):
        gate = self.gate(1.5, 1.8)
        with self.assertRaises(AssertionError) as caught:
            gate.assert_passed()
        self.assertEqual(str(caught.exception), gate.report())
        self.assertIn("FAIL, 1.5000, 1.8000 (test; EAGLE), needs 1.9000 = 0.95 x 2; ratio 0.7500", gate.report())

    def test_no_reference_is_no_pass(self):
        with self.assertRaisesRegex(ValueError, "acceptance length 1.7000, but there is no reference"):
            self.gate(1.7, reference=None)

    def test_refuses_what_makes_no_sense(self):
        for reference, ratio in ((0.9, 0.95), (float("nan"), 0.95), (2.0, 0.0), (2.0, 1.1)):
            with self.subTest(reference=reference, ratio=ratio), self.assertRaises(ValueError):
                self.gate(1.7, reference=reference, ratio=ratio)


class TestServers(unittest.TestCase):
    def test_get_server_info_where_there_is_no_other_name(self):
        lb = StubServer(self, {"/get_server_info": mini_lb([], [server(1.8)])})
        self.assertEqual(speculative_algorithm(read_server_info(lb.url)), "EAGLE")
        self.assertEqual([path for path, _ in lb.asked], ["/server_info", "/get_server_info"])

    def test_measures_its_own_load_greedily(self):
        decode = StubServer(self, {"/server_info": server(None)})
        lb = StubServer(self, {"/generate": [{"meta_info": meta(30, 20)}, {"meta_info": meta(30, 10)}]})
        measured = measure(lb.url, decode.url, ["a", "b"], max_new_tokens=30)
        self.assertEqual(measured.lengths, (2.0,))
        sampling = {"temperature": 0, "max_new_tokens": 30}
        self.assertEqual(lb.asked, [("/generate", {"text": ["a", "b"], "sampling_params": sampling})])

    def test_sends_nothing_where_nothing_can_be_measured(self):
        decode = StubServer(self, {"/server_info": server(None, algorithm=None)})
        lb = StubServer(self, {})
        self.assertIsInstance(measure(lb.url, decode.url, ["a"]), NotApplicable)
        self.assertEqual(lb.asked, [])

    def test_a_server_that_does_not_answer_is_one_clear_line(self):
        silent = StubServer(self, {})
        speculating = StubServer(self, {"/server_info": server(None), "/generate": {"error": "no"}})
        for url, decode_url, message in (
            (silent.url, silent.url, "does not say whether it speculates: 404"),
            (silent.url, speculating.url, "did not answer 1 prompts: .*404"),
            (speculating.url, speculating.url, "did not answer 1 prompts"),
        ):
            with self.assertRaisesRegex(AcceptanceError, message) as caught:
                measure(url, decode_url, ["a"])
            self.assertNotIn("\n", str(caught.exception))


if __name__ == "__main__":
    unittest.main()
