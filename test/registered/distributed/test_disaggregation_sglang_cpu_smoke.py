"""What each push asks of SGLang's own prefill and decode on a machine without a GPU: requests one at a time, to the bit.

A small Llama on Mooncake and on NIXL, and DeepSeek-V4's pools and states on Mooncake, each with prompts that end just
before, at and after the boundaries of its pages, chunks and compressed entries. All the rest runs nightly.
"""

import unittest

from pdkit.checks.accounting.checks import AccountingChecks
from pdkit.checks.parity.exact import ExactAloneChecks
from pdkit.checks.parity.plan import PlanOptions
from pdkit.deployment.cpu import plan
from pdkit.deployment.cpu.servers import SglangCpuServers
from pdkit.deployment.monolithic import MonolithicBeside
from sglang.test.ci.ci_register import register_cpu_ci

register_cpu_ci(est_time=105, suite="stage-a-test-cpu")


class _Smoke(AccountingChecks, ExactAloneChecks, MonolithicBeside, SglangCpuServers):
    parity_options = PlanOptions(longest=520, extra_lengths=())


class TestDisaggregationSglangCpuSmokeLlama(_Smoke):
    cpu_model = plan.LLAMA


class TestDisaggregationSglangCpuSmokeLlamaNixl(TestDisaggregationSglangCpuSmokeLlama):
    backend = "nixl"


class TestDisaggregationSglangCpuSmokeDSV4(_Smoke):
    cpu_model = plan.DSV4


del _Smoke

if __name__ == "__main__":
    unittest.main()
