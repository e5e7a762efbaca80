"""When a part of the deployment dies, freezes or hears wrong words, clients get an error in time or the right answer.

The model is a random DeepSeek-V4: an answer from a wrong state is a wrong answer.
"""

import unittest

import test_disaggregation_dsv4_embedded as embedded
from deployment_bridge import Fleet
from pdkit.checks.recovery.bootstrap_messages import DuplicateMessageChecks
from pdkit.checks.recovery.holding import HeldHandovers
from pdkit.checks.recovery.scenarios import RecoveryChecks
from sglang.test.ci.ci_register import register_cpu_ci

register_cpu_ci(est_time=280, suite="stage-a-test-cpu")


class TestDisaggregationDSV4Recovery(
    RecoveryChecks,
    DuplicateMessageChecks,
    HeldHandovers,
    Fleet,
    embedded.EmbeddedServers,
):
    model_name = str(embedded.ASSETS / "random-dsv4")
    random_weights = ["--load-format", "dummy", "--random-seed", "1"]

    @classmethod
    def prefill_args(cls):
        return super().prefill_args() + cls.random_weights

    @classmethod
    def decode_args(cls):
        return super().decode_args() + cls.random_weights


if __name__ == "__main__":
    unittest.main()
