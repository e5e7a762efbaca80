"""SGLang's own prefill and decode with DeepSeek-V4's model code, pools and state transfer, on a machine without a GPU.

The model is random and has the geometry of the real KV pages. What is replaced in SGLang: `pdkit.deployment.cpu`.
Requests are sent one at a time and must be answered as SGLang's own monolithic server answers them, to the bit. Among
them are prompts that end just before, at and after multiples of 128 and 256: what a compressor's ring holds of an
unfinished entry shows there alone, and in logprobs only.
"""

import unittest
from pathlib import Path

import pdkit
import test_disaggregation_dsv4 as dsv4
from pdkit.accounting_kit import RequestAccountingMixin
from pdkit.deployment.cpu import plan
from pdkit.deployment.cpu.exact import ExactParityMixin
from pdkit.deployment.cpu.servers import SglangCpuMixin
from pdkit.monolithic_kit import MonolithicBesideMixin
from pdkit.parity_plan import PlanOptions
from sglang.test.ci.ci_register import register_cpu_ci

register_cpu_ci(est_time=150, suite="stage-a-test-cpu")


class SglangCpuPlan(SglangCpuMixin):
    """What is launched; put it before `dsv4.TestDisaggregationDSV4`."""

    server_class = dsv4.Server
    gsm8k_data_path = str(Path(pdkit.__file__).parent / "assets" / "gsm8k_nano.jsonl")


class TestDisaggregationSglangCpu(
    RequestAccountingMixin, ExactParityMixin, MonolithicBesideMixin, SglangCpuPlan, dsv4.TestDisaggregationDSV4
):
    cpu_model = plan.DSV4
    parity_options = PlanOptions(longest=1100, alone_tokens=6, rooms=16, in_flight=8, indexed=1, indexed_tokens=4)

    test_gsm8k = None  # random weights solve nothing
    # Served together: asked in test_disaggregation_sglang_cpu_nightly.py, whose answers take longer.
    test_parity_concurrent = test_parity_rooms = test_parity_shared_prefix = test_parity_request_parameters = None
    test_parity_prefix_cached = None

    @classmethod
    def take_references(cls):
        for round_ in (*cls.parity_plan().alone, *cls.parity_plan().indexed):
            cls.reference_alone(round_)


if __name__ == "__main__":
    unittest.main()
