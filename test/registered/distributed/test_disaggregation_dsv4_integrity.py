"""Prefill and decode must answer as one monolithic server does, to the bit, and reject what the transfer corrupted.

The model is a random DeepSeek-V4: it is never sure of itself, so that each piece of its state shows in its logprobs.
"""

import unittest

import test_disaggregation_dsv4_embedded as embedded
from deployment_bridge import MonolithicBeside
from pdkit.checks.accounting.checks import AccountingChecks
from pdkit.checks.integrity import IntegrityChecks
from pdkit.checks.parity.checks import ParityChecks
from pdkit.corruption import BIT_FLIPS
from sglang.test.ci.ci_register import register_cpu_ci

register_cpu_ci(est_time=145, suite="stage-a-test-cpu")


class TestDisaggregationDSV4Integrity(
    AccountingChecks,
    IntegrityChecks,
    ParityChecks,
    MonolithicBeside,
    embedded.EmbeddedServers,
):
    model_name = str(embedded.ASSETS / "random-dsv4")
    random_weights = ["--load-format", "dummy", "--random-seed", "1"]
    bit_flips = ["--disaggregation-transfer-backend", "pdkit.corruption:BitFlip"]

    bitwise = True
    corrupted_lengths = tuple(BIT_FLIPS)
    request_timeout = 120

    @classmethod
    def prefill_args(cls):
        return super().prefill_args() + cls.random_weights + cls.bit_flips

    @classmethod
    def decode_args(cls):
        return super().decode_args() + cls.random_weights

    @classmethod
    def monolithic_args(cls):
        return ["--disaggregation-mode", "null"] + cls.random_weights


if __name__ == "__main__":
    unittest.main()
