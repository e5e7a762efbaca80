"""Two prefill and two decode servers behind one router, SGLang's mini LB and its router: pairs are right and fail alone.

The model is a random DeepSeek-V4: an answer from another request's state is a wrong answer.
"""

import unittest

from pdkit.checks.recovery.holding import HELD_TRANSFER, TransferValve
from pdkit.checks.scale_out import ScaleOutChecks
from pdkit.deployment.embedded import RandomEmbeddedServers
from pdkit.deployment.fleet import TwoPairs
from pdkit.engine.test_backends import Valve
from sglang.test.ci.ci_register import register_cpu_ci

register_cpu_ci(est_time=25, suite="stage-a-test-cpu")


class TestDisaggregationDSV4ScaleOut(TransferValve, ScaleOutChecks, TwoPairs, RandomEmbeddedServers):
    @classmethod
    def decode_2_args(cls):
        return super().decode_2_args() + HELD_TRANSFER

    def spoil(self):
        self.valve.turn(Valve.REFUSE)

    def mend(self):
        self.valve.turn(None)


if __name__ == "__main__":
    unittest.main()
