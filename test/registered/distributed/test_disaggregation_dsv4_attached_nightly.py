"""`pdkit check` with all its questions, and against servers of which something is wrong: it says so, by the right check."""

import os
import unittest
from pathlib import Path

import pdkit
import self_prefilling_engine
import test_disaggregation_dsv4_attached as attached
from pdkit.checks.parity.forced import ForcedParityChecks
from pdkit.core.errors import ExitCode
from pdkit.deployment.router import RustRouterBeside
from pdkit.faults.servers import FaultSwitchServers
from sglang.test.ci.ci_register import register_cpu_ci

register_cpu_ci(est_time=330, suite="stage-a-test-cpu", nightly=True)


class TestDisaggregationDSV4AttachedWhole(attached.TestDisaggregationDSV4Attached):
    """Sound servers, all that is asked of them."""

    is_quick = False


class TestDisaggregationDSV4AttachedFaults(FaultSwitchServers, RustRouterBeside, ForcedParityChecks, attached.Attached):
    """Servers of which something is wrong while a test says so."""

    server_module = self_prefilling_engine.__name__
    request_timeout = 120
    forced_tokens = 64

    @classmethod
    def configure(cls):
        super().configure()
        cls.self_prefilling = Path(cls.temporary_path("self-prefilling-", "on"))
        folder = str(Path(__file__).parent)
        cls.server_env = {
            **cls.server_env,
            self_prefilling_engine.VARIABLE: str(cls.self_prefilling),
            "PYTHONPATH": os.pathsep.join((folder, str(Path(pdkit.__file__).parents[1]))),
        }

    def test_the_router_lists_its_servers(self):
        printed = self.check(self.router_url, "--quick", "--baseline", self.monolithic_url)
        self.assertIn("prefill and decode: the router reports 1 prefill and 1 decode\n", printed)
        self.assertRegex(printed, "(?m)^counters: each of ")

    def test_a_fault_fails_the_check_that_is_for_it(self):
        baseline = ["--baseline", self.monolithic_url]
        exact = ["--prefill-urls", self.prefill_url, "--decode-urls", self.decode_url]
        equal = "answers equal the baseline"
        for fault, words, check, sentence in (
            ("128x-compressed-zeroed", baseline, equal, "only prompts of 128 tokens and more differ"),
            ("128x-compressed-shifted", baseline, equal, r"prompts of \d{3} tokens and more differ"),
            ("request-duplicated", exact, "counters", r"prefill started \d+, the client asked for \d+ sequences"),
            ("transfer-fails-one-in-ten", [], "every request was answered", r"^\d+ of \d+$"),
        ):
            with self.subTest(fault):
                self.switch.turn(fault)
                self.addCleanup(self.switch.turn, None)
                state, found = self.quick(*words, expected=ExitCode.FAILED)[check]
                self.assertEqual(state, "failed")
                self.assertRegex(found, sentence)

    def test_a_fault_is_seen_against_a_record(self):
        path = self.temporary_path("record-", "good.json")
        self.check(self.lb_url, "--baseline-record", path, "--record")
        for fault, code in ((None, ExitCode.PASSED), ("rounded-to-bf16", ExitCode.DRIFTED), ("noise-1e-3", ExitCode.DRIFTED),
                            ("newest-1-lost", ExitCode.FAILED), ("128x-compressed-zeroed", ExitCode.FAILED)):  # fmt: skip
            with self.subTest(fault):
                self.switch.turn(fault)
                self.addCleanup(self.switch.turn, None)
                self.check(self.lb_url, "--baseline-record", path, expected=code)

    def test_a_fault_is_seen_by_teacher_forced_parity(self):
        for fault in ("rounded-to-bf16", "newest-1-lost"):
            with self.subTest(fault):
                self.switch.turn(fault)
                self.addCleanup(self.switch.turn, None)
                forced = self.forced_parity()
                print(fault, forced.report(), flush=True)
                self.assertTrue(forced.problems)

    def test_a_pair_whose_decode_computes_prompts_itself_does_not_pass(self):
        self.self_prefilling.touch()
        self.addCleanup(self.self_prefilling.unlink)
        rows = self.quick("--baseline", self.monolithic_url, expected=ExitCode.FAILED)
        self.assertRegex(rows["counters"][1], r"^decode computed \d+ prompt tokens itself$")
        self.assertEqual([name for name, (state, _) in rows.items() if state == "failed"], ["counters"])


if __name__ == "__main__":
    unittest.main()
