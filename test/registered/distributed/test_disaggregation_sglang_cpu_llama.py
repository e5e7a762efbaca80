"""The main job with SGLang's own servers on a machine without a GPU, on Mooncake and on NIXL.

The model is a small Llama, trained to solve GSM8K-like problems and served in float32.
"""

import unittest

import test_disaggregation_dsv4 as dsv4
from pdkit.accounting_kit import RequestAccountingMixin
from pdkit.deployment.cpu import plan
from pdkit.deployment.cpu.exact import ExactParityMixin
from pdkit.monolithic_kit import MonolithicBesideMixin
from pdkit.parity_plan import PlanOptions
from sglang.test.ci.ci_register import register_cpu_ci
from test_disaggregation_sglang_cpu import SglangCpuPlan

register_cpu_ci(est_time=150, suite="stage-a-test-cpu")


class TestDisaggregationSglangCpuLlama(
    RequestAccountingMixin, ExactParityMixin, MonolithicBesideMixin, SglangCpuPlan, dsv4.TestDisaggregationDSV4
):
    cpu_model = plan.LLAMA
    parity_options = PlanOptions(rooms=24, in_flight=8)


class TestDisaggregationSglangCpuLlamaNixl(TestDisaggregationSglangCpuLlama):
    backend = "nixl"

    test_parity_concurrent = test_parity_shared_prefix = test_parity_request_parameters = None  # as on Mooncake


if __name__ == "__main__":
    unittest.main()
