"""The same as test_disaggregation_dsv4_recovery_1gpu.py with NIXL: its peers die, freeze and come back as well."""

import unittest

import test_disaggregation_dsv4_recovery_1gpu as one_gpu
from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(est_time=600, suite="stage-b-test-1-gpu-large")


class TestDisaggregationDSV4RecoveryOneGpuNixl(one_gpu.TestDisaggregationDSV4RecoveryOneGpu):
    backend = "nixl"


if __name__ == "__main__":
    unittest.main()
