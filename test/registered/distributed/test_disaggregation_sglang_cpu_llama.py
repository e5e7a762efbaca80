"""SGLang's own prefill and decode with a small float32 Llama, on a machine without a GPU: on Mooncake and on NIXL."""

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


if __name__ == "__main__":
    unittest.main()
