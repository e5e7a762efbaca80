"""A contributor's change to SGLang: bugs planted in a copy of it are caught on a machine without a GPU, and named."""

import unittest

import test_disaggregation_dsv4 as dsv4
from pdkit.deployment.cpu import plan
from pdkit.deployment.cpu.bugs import STATE_BUGS, PlantedBugsMixin
from pdkit.deployment.cpu.exact import ExactParityMixin
from pdkit.monolithic_kit import MonolithicBesideMixin
from pdkit.parity_plan import PlanOptions
from sglang.test.ci.ci_register import register_cpu_ci
from test_disaggregation_sglang_cpu import SglangCpuPlan

register_cpu_ci(est_time=700, suite="stage-a-test-cpu", nightly=True)


class _Bugs(PlantedBugsMixin, ExactParityMixin, MonolithicBesideMixin, SglangCpuPlan, dsv4.TestDisaggregationDSV4):
    parity_options = PlanOptions(longest=600, extra_lengths=(450, 600), rooms=16, in_flight=8, indexed=0)
    request_timeout = 40
    server_env = {"SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND": "python"}  # by default a binary, in which none is planted

    test_gsm8k = test_parity_alone = test_parity_prefix_cached = test_parity_concurrent = test_parity_rooms = None
    test_parity_shared_prefix = test_parity_where_the_indexer_chooses = test_parity_request_parameters = None


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
    def take_references(cls):
        cls.reference_alone(cls.parity_plan().alone[0])


del _Bugs

if __name__ == "__main__":
    unittest.main()
