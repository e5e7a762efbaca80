"""The same as test_disaggregation_dsv4_1gpu.py with NIXL instead of Mooncake."""

import unittest

import test_disaggregation_dsv4_1gpu as one_gpu
from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(est_time=220, suite="stage-b-test-1-gpu-large")


class TestDisaggregationDSV4OneGpuNixl(one_gpu.TestDisaggregationDSV4OneGpu):
    backend = "nixl"


if __name__ == "__main__":
    unittest.main()
