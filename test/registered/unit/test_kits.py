"""The checks of transfer integrity, stress and placement: each way in which servers can go wrong fails its check."""

import subprocess
import threading
import unittest
from types import SimpleNamespace
from unittest import mock

from cases import FolderCase, printed
from pdkit.checks import placement
from pdkit.checks import stress as stress_kit
from pdkit.checks.accounting.checks import AccountingChecks
from pdkit.checks.integrity import IntegrityChecks
from pdkit.checks.parity.plan import Round, generate_probe
from pdkit.checks.parity.references import collect
from pdkit.checks.stress import FILLED_ROWS, StressChecks, rounds
from pdkit.core.ci_register import register_cpu_ci
from stub_server import StubServer

register_cpu_ci(est_time=7, suite="stage-a-test-cpu")

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


class TestIntegrity(unittest.TestCase):
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

        with mock.patch("pdkit.checks.integrity.SETTLE_SECONDS", 0.1):
            result = printed(Case(name).run).returned
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


PLAN = {"count": 200, "seed": 1, "most": 32, "longest": 700, "vocabulary": range(10, 250)}


class StressedServer(StubServer):
    """Answers /generate, until request number `last`; from then on does what `then` says."""

    def __init__(self, test, last=None, then="fail"):
        self.count, self.lock, self.last, self.then = 0, threading.Lock(), last, then
        super().__init__(test)

    def reply(self, path, body):
        with self.lock:
            self.count += 1
            spoiled = self.last is not None and self.count > self.last
        if spoiled and self.then in ("fail", "close"):
            return (500, {"error": "out of memory"}) if self.then == "fail" else None
        return 200, {"meta_info": {"completion_tokens": body["sampling_params"]["max_new_tokens"] - spoiled}}


class TestRounds(unittest.TestCase):
    def test_are_the_same_each_time(self):
        self.assertEqual(list(rounds(**PLAN)), list(rounds(**PLAN)))
        self.assertNotEqual(list(rounds(**PLAN)), list(rounds(**PLAN | {"seed": 2})))

    def test_are_mixed_and_short(self):
        found = list(rounds(**PLAN))
        self.assertEqual([each.number for each in found], list(range(1, 201)))
        self.assertEqual({each.kind for each in found}, {"edges", "any", "equal", "full", "one long"})
        sizes = {len(each.bodies) for each in found if each.kind != "full"}
        self.assertTrue(8 <= min(sizes) and max(sizes) <= 33, sizes)
        asked = {body["sampling_params"]["max_new_tokens"] for each in found for body in each.bodies}
        self.assertEqual(asked, set(range(1, 9)))

    def test_fill_a_batch_of_rows_to_the_end(self):
        full = [[len(body["input_ids"]) for body in each.bodies] for each in rounds(**PLAN) if each.kind == "full"]
        self.assertEqual({sum(lengths) for lengths in full}, {FILLED_ROWS})
        self.assertIn([64, 64], full, "two prompts of 64 tokens ended prefill of SGLang 0.5.17")


class TestStress(FolderCase):
    def run_kit(self, name="test_short_rounds_to_the_pair", settle=0.0, **servers):
        self.write("decode.log", "scheduler: illegal memory access\n")
        urls = {name: servers.get(name, StressedServer(self)).url for name in ("lb", "monolithic")}

        class Stressed(StressChecks, unittest.TestCase):
            lb_url, monolithic_url = urls.values()
            log_path = staticmethod(lambda server: self.root / f"{server}.log")
            stress_rounds = 20

        with mock.patch.object(stress_kit, "DEATH_SECONDS", settle):
            result = printed(Stressed(name).run).returned
        self.assertEqual(result.testsRun, 1)
        failed = result.failures + result.errors
        return failed[0][1] if failed else ""

    def test_sound_servers_pass(self):
        lb, monolithic = StressedServer(self), StressedServer(self)
        self.assertEqual(self.run_kit(lb=lb, monolithic=monolithic), "")
        self.assertEqual(monolithic.count, 0)
        expected = sum(len(each.bodies) for each in rounds(**PLAN | {"count": 20}))
        self.assertEqual(lb.count, expected)
        self.assertEqual(self.run_kit("test_short_rounds_to_the_monolithic_server", monolithic=monolithic), "")
        self.assertEqual(monolithic.count, expected)

    def test_a_failed_request_names_round_and_server_and_shows_the_logs(self):
        sizes = [len(each.bodies) for each in rounds(**PLAN | {"count": 20})]
        message = self.run_kit(lb=StressedServer(self, last=sum(sizes[:6])))
        self.assertIn("round 7 of 20 (seed 1, ", message)
        self.assertIn("to the prefill and decode, http://127.0.0.1:", message)
        self.assertIn("status 500", message)
        self.assertIn("scheduler: illegal memory access", message)

    def test_too_few_tokens_fail(self):
        self.assertRegex(self.run_kit(lb=StressedServer(self, last=100, then="one token less")), r"\d tokens of \d")

    def test_a_broken_connection_waits_for_the_death_behind_it(self):
        """The supervisor raises it in the main thread; here a mock of sleep does."""

        class ServerDied(BaseException):
            pass

        def wait(seconds):
            if seconds == 5:
                raise ServerDied("decode exited with code -9")

        with mock.patch.object(stress_kit.time, "sleep", wait):
            message = self.run_kit(settle=5, lb=StressedServer(self, last=0, then="close"))
        self.assertRegex(message, r"ServerDied: round 1 of 20 \(.*: decode exited with code -9")
        self.assertNotIn("last lines of", message, "a death has the log of who died")


class TestPlacement(unittest.TestCase):
    def setUp(self):
        # Each server is a shell; what uses the GPU is its child.
        self.servers = [self.server() for _ in range(2)]
        self.gpus = []
        observe = lambda environ: {"gpus": tuple(self.gpus)}  # noqa: E731
        self.enterContext(mock.patch.object(placement, "observe", observe))

    def server(self):
        process = subprocess.Popen(["sh", "-c", "sleep 60 & echo $!; wait"], stdout=subprocess.PIPE, text=True)
        child = int(process.stdout.readline())
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        self.addCleanup(subprocess.run, ["kill", str(child)])
        return process, child

    def check(self, prefill, decode):
        """What the test says where the children of the servers use these GPUs."""
        for (_, child), used in zip(self.servers, (prefill, decode)):
            for gpu in used:
                self.gpus[gpu].processes += (SimpleNamespace(pid=child),)

        class Case(AccountingChecks, placement.PlacementChecks, unittest.TestCase):
            lb_url = prefill_url = decode_url = None
            prefill_gpus, decode_gpus = range(0, 2), range(2, 4)
            process_prefill, process_decode = (process for process, _ in self.servers)

        result = printed(Case("test_servers_are_on_the_gpus_of_the_plan").run).returned
        return "skipped" if result.skipped else "passed" if result.wasSuccessful() else "failed"

    def test_where_the_servers_are(self):
        for what, prefill, decode, verdict in (
            ("as planned", (0, 1), (2, 3), "passed"),
            ("decode beside prefill", (0, 1), (0, 1), "failed"),
            ("a rank is missing", (0, 1), (2,), "failed"),
            ("a driver that names none of ours", (), (), "skipped"),
        ):
            with self.subTest(what):
                self.gpus[:] = [SimpleNamespace(processes=()) for _ in range(4)]
                self.assertEqual(self.check(prefill, decode), verdict)


if __name__ == "__main__":
    unittest.main()
