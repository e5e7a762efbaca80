"""The same as test_disaggregation_dsv4_2gpu.py with GPUs of their own for prefill and decode: half of the 8-GPU plan."""

import unittest

import test_disaggregation_dsv4_2gpu as two_gpus
from pdkit.deployment.multi_gpu import FourGpuServers
from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(est_time=400, suite="stage-c-test-4-gpu-h100")


class TestDisaggregationDSV4FourGpus(FourGpuServers, two_gpus.TestDisaggregationDSV4TwoGpus):
    pass


if __name__ == "__main__":
    unittest.main()
