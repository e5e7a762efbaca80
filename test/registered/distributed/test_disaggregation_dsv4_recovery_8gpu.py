"""The same scenarios with DeepSeek-V4-Flash on 8xH200: parts die and freeze, clients hear of it, service resumes."""

import unittest

import test_disaggregation_dsv4 as dsv4
from pdkit.fleet_kit import FleetMixin
from pdkit.recovery.clients import Ask
from pdkit.recovery.kit import BEFORE, DURING, IDLE, STREAMING, RecoveryMixin
from pdkit.recovery.messages import BootstrapMessagesMixin
from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(est_time=3600, suite="stage-c-test-dsv4-8-gpu-h200")

PAGES = "The following pages are left blank. " * 1500
COUNTING = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,"


class TestDisaggregationDSV4Recovery8GPU(
    RecoveryMixin, BootstrapMessagesMixin, FleetMixin, dsv4.TestDisaggregationDSV4
):
    router_timeout = 90
    bootstrap_timeout = waiting_timeout = 60
    settling = 60
    returning = 1200

    test_gsm8k = None
    test_a_bootstrap_message_is_duplicate = None  # what SGLang does with it is not defined

    @classmethod
    def asks(cls):
        """Nothing holds a hand-over here: prompts that take long are in the phases before, a long answer streams."""
        return {
            BEFORE: Ask(f"{PAGES}\n{COUNTING}", 8),
            DURING: Ask(f"{PAGES}{PAGES}\n{COUNTING}", 8),
            STREAMING: Ask(COUNTING, 600, stream=True),
            IDLE: Ask(COUNTING, 8),
        }


if __name__ == "__main__":
    unittest.main()
