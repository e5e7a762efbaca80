"""When a part of the deployment dies, freezes or hears wrong words, clients get an error in time or the right answer.

The model is a random DeepSeek-V4: an answer from a wrong state is a wrong answer.
"""

import unittest

from pdkit.checks.recovery.bootstrap_messages import DuplicateMessageChecks
from pdkit.checks.recovery.holding import HeldTransfers
from pdkit.checks.recovery.scenarios import RecoveryChecks
from pdkit.deployment.embedded import RandomEmbeddedServers
from pdkit.deployment.fleet import Fleet
from sglang.test.ci.ci_register import register_cpu_ci

register_cpu_ci(est_time=135, suite="stage-a-test-cpu")


class TestDisaggregationDSV4Recovery(
    RecoveryChecks, DuplicateMessageChecks, HeldTransfers, Fleet, RandomEmbeddedServers
):
    pass


if __name__ == "__main__":
    unittest.main()
