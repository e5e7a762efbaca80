"""The same test on any machine: prefill and decode are two embedded engines that serve a nano DeepSeek-V4 on CPU."""

import unittest

from pdkit.checks.accounting.checks import AccountingChecks
from pdkit.checks.accuracy.checks import GSM8KChecks
from pdkit.checks.age import AgeChecks
from pdkit.deployment.embedded import EmbeddedServers
from pdkit.deployment.monolithic import MonolithicBeside
from sglang.test.ci.ci_register import register_cpu_ci

register_cpu_ci(est_time=20, suite="stage-a-test-cpu")


class TestDisaggregationDSV4Embedded(AccountingChecks, AgeChecks, GSM8KChecks, MonolithicBeside, EmbeddedServers):
    """Parity comes first: 200 short requests, equal to the bit to what one monolithic server answers."""

    @classmethod
    def take_references(cls):
        cls.take_age_references()


if __name__ == "__main__":
    unittest.main()
