"""SGLang's own servers on one GPU: parts die and freeze, clients hear of it, service resumes."""

import unittest

import test_disaggregation_dsv4 as dsv4
import test_disaggregation_dsv4_1gpu as one_gpu
from pdkit.fleet_kit import FleetMixin
from pdkit.recovery.few_shot import few_shot_asks
from pdkit.recovery.kit import RecoveryMixin
from pdkit.recovery.messages import BootstrapMessagesMixin
from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(est_time=600, suite="stage-b-test-1-gpu-large")

LONG = 110  # solved problems of about 70 tokens: sixteen chunks of prefill


class TestDisaggregationDSV4RecoveryOneGpu(
    RecoveryMixin, BootstrapMessagesMixin, FleetMixin, one_gpu.OneGpuPlan, dsv4.TestDisaggregationDSV4
):
    bitwise = False
    router_timeout = 20
    bootstrap_timeout = waiting_timeout = 10
    server_args = [*one_gpu.OneGpuPlan.server_args, "--disable-radix-cache"]  # long prompts are to stay long

    test_gsm8k = None
    test_a_bootstrap_message_is_duplicate = None  # what SGLang does with it is not defined

    @classmethod
    def setUpClass(cls):
        dsv4.require_gpus(cls)
        cls.require_training()
        super().setUpClass()

    @classmethod
    def asks(cls):
        return few_shot_asks(cls.gsm8k_data_path, LONG, 1000)


if __name__ == "__main__":
    unittest.main()
