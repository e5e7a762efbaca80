"""Prefill and decode must answer as one monolithic server does, to the bit, and reject what the transfer corrupted.

The model is a random DeepSeek-V4: it is never sure of itself, so that each piece of its state shows in its logprobs.
"""

import unittest

from pdkit.checks.accounting.checks import AccountingChecks
from pdkit.checks.integrity import IntegrityChecks
from pdkit.checks.kinds import ParityAndKindChecks
from pdkit.deployment.embedded import RandomEmbeddedServers
from pdkit.deployment.monolithic import MonolithicBeside
from pdkit.engine.test_backends import BIT_FLIPS, WITHHELD
from sglang.test.ci.ci_register import register_cpu_ci

register_cpu_ci(est_time=75, suite="stage-a-test-cpu")


class TestDisaggregationDSV4Integrity(
    AccountingChecks, IntegrityChecks, ParityAndKindChecks, MonolithicBeside, RandomEmbeddedServers
):
    bitwise = True
    parallel_samples = True
    corrupted_lengths = failing_lengths = tuple(BIT_FLIPS)
    withheld_lengths = WITHHELD
    request_timeout = 120

    @classmethod
    def prefill_args(cls):
        return super().prefill_args() + ["--disaggregation-transfer-backend", "pdkit.engine.test_backends:BitFlip"]


if __name__ == "__main__":
    unittest.main()
