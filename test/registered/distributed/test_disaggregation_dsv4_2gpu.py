"""The plan of TestDisaggregationDSV4 on two GPUs, which prefill and decode share: DP attention, DeepEP, EAGLE.

The model is the nano of the width that DeepEP moves, trained by `pdkit model kernel-train --hidden-size 2048`.
"""

import unittest

import test_disaggregation_dsv4_1gpu as one_gpu
from pdkit.checks.accuracy.checks import GSM8KChecks
from pdkit.checks.gpu_pair import GpuPairChecks
from pdkit.deployment.monolithic import MonolithicBeside
from pdkit.deployment.multi_gpu import TwoGpuServers
from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(est_time=520, suite="stage-b-test-2-gpu-large")


class TestDisaggregationDSV4TwoGpus(GpuPairChecks, GSM8KChecks, MonolithicBeside, TwoGpuServers):
    parity_options = one_gpu.TestDisaggregationDSV4OneGpu.parity_options
    acceptance_length_prompts = 32

    def test_gsm8k(self):
        self.require_training()
        super().test_gsm8k()


if __name__ == "__main__":
    unittest.main()
