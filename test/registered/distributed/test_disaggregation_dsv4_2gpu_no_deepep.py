"""The same as test_disaggregation_dsv4_2gpu.py without DeepEP: tokens go to the experts by NCCL's collectives."""

import unittest

import test_disaggregation_dsv4_2gpu as two_gpus
from pdkit.deployment.multi_gpu import TwoGpuServersWithoutDeepEP
from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(est_time=520, suite="stage-b-test-2-gpu-large")


class TestDisaggregationDSV4TwoGpusNoDeepEP(TwoGpuServersWithoutDeepEP, two_gpus.TestDisaggregationDSV4TwoGpus):
    pass


if __name__ == "__main__":
    unittest.main()
