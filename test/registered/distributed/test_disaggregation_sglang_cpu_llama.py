"""The main job with SGLang's own servers on a machine without a GPU, on Mooncake and on NIXL.

The model is a small Llama, trained to solve GSM8K-like problems and served in float32.
"""

import unittest

from pdkit.checks.accounting.checks import AccountingChecks
from pdkit.checks.accuracy.checks import GSM8KChecks
from pdkit.checks.parity.exact import ExactParityChecks
from pdkit.checks.parity.plan import PlanOptions
from pdkit.deployment.cpu import plan
from pdkit.deployment.cpu.servers import SglangCpuServers
from pdkit.deployment.monolithic import MonolithicBeside
from sglang.test.ci.ci_register import register_cpu_ci

register_cpu_ci(est_time=150, suite="stage-a-test-cpu", nightly=True)


class TestDisaggregationSglangCpuLlama(
    AccountingChecks, GSM8KChecks, ExactParityChecks, MonolithicBeside, SglangCpuServers
):
    cpu_model = plan.LLAMA
    parity_options = PlanOptions(rooms=24, in_flight=8)


class TestDisaggregationSglangCpuLlamaNixl(TestDisaggregationSglangCpuLlama):
    backend = "nixl"


if __name__ == "__main__":
    unittest.main()
