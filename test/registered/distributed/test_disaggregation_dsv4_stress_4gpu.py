"""The rounds of test_disaggregation_dsv4_stress_1gpu.py to servers of four ranks each, which share four GPUs.

TP 4, DP attention 4, DeepEP, EAGLE as in the 8-GPU plan, with decode on prefill's GPUs: a rank of 0.5.17 ended there.
"""

import unittest
from itertools import pairwise

import test_disaggregation_dsv4_stress_2gpu as two_gpus
from pdkit.deployment.multi_gpu import FourGpuServers
from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(est_time=420, suite="stage-c-test-4-gpu-h100")

TWO = two_gpus.TestDisaggregationDSV4StressTwoGpus.server_args


class TestDisaggregationDSV4StressFourGpus(two_gpus.TestDisaggregationDSV4StressTwoGpus):
    target = FourGpuServers.target
    prefill_gpus = decode_gpus = range(4)
    server_args = ["4" if flag in ("--tp-size", "--dp-size") else word for flag, word in pairwise(["", *TWO])]


if __name__ == "__main__":
    unittest.main()
