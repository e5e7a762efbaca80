"""The check of transfer integrity: each way in which a pair of servers can go wrong fails it."""

import threading
import unittest
from types import SimpleNamespace
from unittest import mock

from pdkit.checks.integrity import IntegrityChecks
from pdkit.checks.parity.plan import Round, generate_probe
from pdkit.checks.parity.references import collect
from pdkit.core.ci_register import register_cpu_ci
from stub_server import StubServer

register_cpu_ci(est_time=2, suite="stage-a-test-cpu")

CORRUPTED = (6, 7)
GENERATED = {"output_ids": [5], "meta_info": {"output_token_logprobs": [[-0.5, 5, None]]}}


class PairOfServers(StubServer):
    """Balancer, /prefill and /decode in one, with the counters of the embedded engine.

    rejected      lengths of prompts that are rejected, with `status` and `error`; status 0: without an answer
    failures      how many of those the counters show; starts: how often each was started
    computed      share of the prompts' tokens that prefill computed, `by_decode` those that decode did
    sent_again    share of the bytes of a KV transfer that are sent when its prompt is cached; received: of those sent
    """

    def __init__(self, test, **behaviour):
        sound = {"rejected": CORRUPTED, "status": 500, "error": "Checksum mismatch", "failures": 1, "health": 200}
        sound |= {"rooms": 0, "starts": 1, "computed": 1, "by_decode": 0, "sent_again": 1, "received": 1}
        self.does = SimpleNamespace(**{**sound, **behaviour})
        self.served = self.failed = self.tokens = self.sent = 0
        self.cached, self.lock = set(), threading.Lock()
        super().__init__(test)

    def reply(self, path, body):
        if body is None:
            return (self.does.health, b"") if path.endswith("/health") else (200, self.info(path.split("/")[1]))
        if "flush_cache" in path:
            return 200, b""
        with self.lock:
            if self.serves(tuple(body["input_ids"])):
                return 200, GENERATED
        return (self.does.status, self.does.error) if self.does.status else None

    def serves(self, ids):
        if len(ids) in self.does.rejected:
            self.failed += 1
            return False
        self.served += 1
        self.sent += 100 * len(ids) * (self.does.sent_again if ids in self.cached else 1)
        self.tokens += 0 if ids in self.cached else len(ids)
        self.cached.add(ids)
        return True

    def info(self, side):
        does, is_prefill = self.does, side == "prefill"
        return {
            "engine": {
                "requests": self.served + self.failed * does.starts * is_prefill,
                "prefill_tokens": self.tokens * (does.computed if is_prefill else does.by_decode),
            },
            "transfer": {
                "sent": self.served * is_prefill,
                "received": self.served * (not is_prefill),
                "failed": self.failed * does.failures,
                "bytes": self.sent * (1 if is_prefill else does.received),
            },
            "rooms": does.rooms * is_prefill,
        }


class TestKit(unittest.TestCase):
    def run_kit(self, name, lengths=CORRUPTED, random=False, **behaviour):
        pair = PairOfServers(self, **behaviour)
        probes = tuple(generate_probe(f"p{length}", [length] * length, 1) for length in (1, 3, 8, 9))

        class Case(IntegrityChecks, unittest.TestCase):
            lb_url, prefill_url, decode_url = pair.url, f"{pair.url}/prefill", f"{pair.url}/decode"
            model = monolithic_url = gsm8k_data_path = None
            corrupted_lengths, corruption_is_random, request_timeout = lengths, random, 5

            def parity_plan(self):
                return SimpleNamespace(rooms=[Round("rooms", probes[:2])], alone=[Round("alone", probes[2:])])

            def check_parity(self, rounds):
                for round_ in rounds:
                    collect(self.lb_url, round_, self.request_timeout)

        with mock.patch("pdkit.checks.integrity.SETTLE_SECONDS", 0.1), mock.patch("builtins.print"):
            result = unittest.TestResult()
            Case(name).run(result)
        self.assertEqual(result.errors, [])
        return result

    def assert_fails(self, name, message, **behaviour):
        with self.subTest(**behaviour):
            ((_, told),) = self.run_kit(name, **behaviour).failures
            self.assertIn(message, told)

    def test_corrupted_transfers(self):
        name = "test_corrupted_handover_is_rejected"
        self.assertTrue(self.run_kit(name).wasSuccessful())
        self.assertTrue(self.run_kit(name, lengths=()).skipped)
        self.assertTrue(self.run_kit(name, lengths=(), random=True, rejected=(8, 9)).wasSuccessful())
        no_error = "no error that names 'checksum'"
        for message, behaviour in (
            ("corrupted-7: its KV transfer was corrupted, and it was served", {"rejected": (6,)}),
            ("its KV transfer was healthy, and it was rejected", {"rejected": (3, *CORRUPTED)}),
            (f"corrupted-7: status 500, {no_error}", {"error": "internal error"}),
            (f"corrupted-7: status 400, {no_error}", {"status": 400}),
            (f"corrupted-7: status 0, {no_error}", {"status": 0}),
            ("nothing was rejected", {"rejected": ()}),
            ("nothing was served", {"rejected": range(100)}),
            ("KV transfers that failed, as prefill and decode count them", {"failures": 0}),
            ("were started again in secret: prefill started 8", {"starts": 2}),
            ("health of prefill after a corrupted KV transfer", {"health": 503}),
            ("still held after corrupted KV transfers", {"rooms": 1}),
        ):
            self.assert_fails(name, message, **behaviour)

    def test_division_of_labour(self):
        name = "test_prefill_did_the_work"
        self.assertTrue(self.run_kit(name).wasSuccessful())
        for message, behaviour in (
            ("decode prefilled 21 tokens itself", {"by_decode": 1}),
            ("0 != 21", {"computed": 0}),
            ("bytes that decode received, and that prefill sent", {"received": 0.5}),
            ("must be transferred as a whole", {"sent_again": 0.5}),
            ("still held when all was answered: 1 rooms", {"rooms": 1}),
        ):
            self.assert_fails(name, message, **behaviour)


if __name__ == "__main__":
    unittest.main()
