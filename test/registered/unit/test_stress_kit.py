"""the stress check: which rounds are sent, and that a failure names round, server and the log of who died."""

import sys
import threading
import unittest
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from cases import FolderCase
from pdkit.checks import stress as stress_kit
from pdkit.checks.stress import FILLED_ROWS, StressChecks, rounds
from pdkit.core.ci_register import register_cpu_ci
from stub_server import StubServer

register_cpu_ci(est_time=4, suite="stage-a-test-cpu")

PLAN = {"count": 200, "seed": 1, "most": 32, "longest": 700, "vocabulary": range(10, 250)}


class Server(StubServer):
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


class TestKit(FolderCase):
    def run_kit(self, name="test_short_rounds_to_the_pair", settle=0.0, **servers):
        class Stressed(StressChecks, unittest.TestCase):
            lb_url: str
            monolithic_url: str
            log_path: Callable[[str], Path]
            stress_rounds = 20

        for each in ("lb", "monolithic"):
            setattr(Stressed, f"{each}_url", servers.get(each, Server(self)).url)
        self.write("decode.log", "scheduler: illegal memory access\n")
        Stressed.log_path = staticmethod(lambda server: self.root / f"{server}.log")
        result = unittest.TestResult()
        with mock.patch.object(stress_kit, "DEATH_SECONDS", settle), mock.patch.object(sys, "stdout", mock.Mock()):
            Stressed(name).run(result)
        self.assertEqual(result.testsRun, 1)
        failed = result.failures + result.errors
        return failed[0][1] if failed else ""

    def test_sound_servers_pass(self):
        lb, monolithic = Server(self), Server(self)
        self.assertEqual(self.run_kit(lb=lb, monolithic=monolithic), "")
        self.assertEqual(monolithic.count, 0)
        expected = sum(len(each.bodies) for each in rounds(**PLAN | {"count": 20}))
        self.assertEqual(lb.count, expected)
        self.assertEqual(self.run_kit("test_short_rounds_to_the_monolithic_server", monolithic=monolithic), "")
        self.assertEqual(monolithic.count, expected)

    def test_a_failed_request_names_round_and_server_and_shows_the_logs(self):
        sizes = [len(each.bodies) for each in rounds(**PLAN | {"count": 20})]
        message = self.run_kit(lb=Server(self, last=sum(sizes[:6])))
        self.assertIn("round 7 of 20 (seed 1, ", message)
        self.assertIn("to the prefill and decode, http://127.0.0.1:", message)
        self.assertIn("status 500", message)
        self.assertIn("scheduler: illegal memory access", message)

    def test_too_few_tokens_fail(self):
        self.assertRegex(self.run_kit(lb=Server(self, last=100, then="one token less")), r"\d tokens of \d")

    def test_a_broken_connection_waits_for_the_death_behind_it(self):
        """The supervisor raises it in the main thread; here a mock of sleep does."""

        class ServerDied(BaseException):
            pass

        def wait(seconds):
            if seconds == 5:
                raise ServerDied("decode exited with code -9")

        with mock.patch.object(stress_kit.time, "sleep", wait):
            message = self.run_kit(settle=5, lb=Server(self, last=0, then="close"))
        self.assertRegex(message, r"ServerDied: round 1 of 20 \(.*: decode exited with code -9")
        self.assertNotIn("last lines of", message, "a death has the log of who died")


if __name__ == "__main__":
    unittest.main()
