"""Two prefill and two decode servers behind one router, SGLang's mini LB and its router: pairs are right and fail alone.

The model is a random DeepSeek-V4: an answer from another request's state is a wrong answer.
"""

import unittest

import test_disaggregation_dsv4_embedded as embedded
from deployment_bridge import Fleet
from pdkit.checks.recovery.holding import HELD_TRANSFER, HandoverValve
from pdkit.checks.scale_out import ScaleOutChecks
from pdkit.engine.test_backends import Valve
from pdkit.scale_out_kit import ScaleOutServers
from sglang.test.ci.ci_register import register_cpu_ci

register_cpu_ci(est_time=120, suite="stage-a-test-cpu")


class TestDisaggregationDSV4ScaleOut(HandoverValve, ScaleOutChecks, ScaleOutServers, Fleet, embedded.EmbeddedServers):
    model_name = str(embedded.ASSETS / "random-dsv4")
    random_weights = ["--load-format", "dummy", "--random-seed", "1"]

    @classmethod
    def prefill_args(cls):
        return super().prefill_args() + cls.random_weights

    @classmethod
    def decode_args(cls):
        return super().decode_args() + cls.random_weights

    @classmethod
    def decode_2_args(cls):
        return super().decode_2_args() + HELD_TRANSFER

    def spoil(self):
        self.valve.turn(Valve.REFUSE)

    def mend(self):
        self.valve.turn(None)


if __name__ == "__main__":
    unittest.main()
