"""SGLang's own prefill and decode on a machine without a GPU: DeepSeek-V4 on NIXL, served together, with its draft, spawned."""

import unittest

import test_disaggregation_dsv4 as dsv4
from pdkit.accounting_kit import RequestAccountingMixin
from pdkit.deployment.cpu import plan
from pdkit.deployment.cpu.exact import ExactParityMixin
from pdkit.monolithic_kit import MonolithicBesideMixin
from pdkit.parity_plan import PlanOptions
from sglang.test.ci.ci_register import register_cpu_ci
from test_disaggregation_sglang_cpu import SglangCpuPlan

register_cpu_ci(est_time=700, suite="stage-a-test-cpu", nightly=True)


class _Whole(
    RequestAccountingMixin, ExactParityMixin, MonolithicBesideMixin, SglangCpuPlan, dsv4.TestDisaggregationDSV4
):
    cpu_model = plan.DSV4
    parity_options = PlanOptions(longest=1100, rooms=16, in_flight=8, indexed=2, indexed_tokens=6)

    test_gsm8k = None  # random weights solve nothing


class TestDisaggregationSglangCpuNixl(_Whole):
    backend = "nixl"


class TestDisaggregationSglangCpuEagle(_Whole):
    """Two tokens a step are verified with the model's MTP layer as the draft."""

    more_server_args = plan.EAGLE


class TestDisaggregationSglangCpuSpawned(_Whole):
    """Processes start as in production: what only SGLang's spawned start can show is seen here."""

    forked = False

    test_parity_concurrent = test_parity_rooms = test_parity_shared_prefix = test_parity_request_parameters = None
    test_parity_prefix_cached = None


del _Whole

if __name__ == "__main__":
    unittest.main()
