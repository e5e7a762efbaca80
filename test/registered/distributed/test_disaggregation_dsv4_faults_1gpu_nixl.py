"""The same as test_disaggregation_dsv4_faults_1gpu.py with NIXL instead of Mooncake."""

import unittest

import test_disaggregation_dsv4_faults_1gpu as faults
from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(est_time=520, suite="stage-b-test-1-gpu-large")


class TestDisaggregationDSV4FaultsOneGpuNixl(faults.TestDisaggregationDSV4FaultsOneGpu):
    backend = "nixl"


if __name__ == "__main__":
    unittest.main()
