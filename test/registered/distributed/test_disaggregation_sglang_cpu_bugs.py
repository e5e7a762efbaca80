"""A contributor's change to SGLang: bugs planted in a copy of it are caught on a machine without a GPU, and named."""

import unittest

from pdkit.checks.parity.plan import PlanOptions
from pdkit.deployment.cpu import plan
from pdkit.deployment.cpu.servers import SglangCpuServers
from pdkit.deployment.monolithic import MonolithicBeside
from pdkit.faults.planted_bugs import STATE_BUGS, PlantedBugChecks
from sglang.test.ci.ci_register import register_cpu_ci

register_cpu_ci(est_time=310, suite="stage-a-test-cpu", nightly=True)


class _Bugs(PlantedBugChecks, MonolithicBeside, SglangCpuServers):
    parity_options = PlanOptions(longest=600, extra_lengths=(450, 600), rooms=16, in_flight=8, indexed=0)
    request_timeout = 40
    server_env = {"SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND": "python"}  # by default a binary, in which none is planted


class TestDisaggregationSglangCpuBugs(_Bugs):
    cpu_model = plan.LLAMA
    more_server_args = ["--max-total-tokens", "1600", "--num-reserved-decode-tokens", "16"]


class TestDisaggregationSglangCpuStateBugs(_Bugs):
    cpu_model = plan.DSV4
    bugs = STATE_BUGS

    @classmethod
    def checks(cls):
        return {name: check for name, check in super().checks().items() if name == "alone"}

    @classmethod
    def take_references(cls) -> None:
        cls.reference_alone(cls.parity_plan().alone[0])


del _Bugs

if __name__ == "__main__":
    unittest.main()
