"""The same rounds as test_disaggregation_dsv4_stress_1gpu.py on two GPUs: DP attention, DeepEP, EAGLE."""

import unittest

import test_disaggregation_dsv4 as dsv4
import test_disaggregation_dsv4_1gpu as one_gpu
import test_disaggregation_dsv4_2gpu as two_gpus
import test_disaggregation_dsv4_stress_1gpu as stress
from pdkit.accounting_kit import RequestAccountingMixin
from pdkit.claimed_ports import ClaimedRendezvousMixin
from pdkit.monolithic_kit import MonolithicBesideMixin
from pdkit.stress_kit import StressMixin
from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(est_time=420, suite="stage-b-test-2-gpu-large")


class TestDisaggregationDSV4StressTwoGpus(
    RequestAccountingMixin,
    StressMixin,
    stress.CoreDumpsMixin,
    ClaimedRendezvousMixin,
    MonolithicBesideMixin,
    one_gpu.OneGpuPlan,
    dsv4.TestDisaggregationDSV4,
):
    rung = two_gpus.TestDisaggregationDSV4TwoGpus.rung
    model_name = two_gpus.TestDisaggregationDSV4TwoGpus.model_name
    prefill_gpus = decode_gpus = range(2)
    server_args = two_gpus.TestDisaggregationDSV4TwoGpus.server_args
    server_env = two_gpus.TestDisaggregationDSV4TwoGpus.server_env

    test_gsm8k = None


if __name__ == "__main__":
    unittest.main()
