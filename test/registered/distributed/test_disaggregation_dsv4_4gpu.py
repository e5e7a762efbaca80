"""The same as test_disaggregation_dsv4_2gpu.py with GPUs of their own for prefill and decode: half of the 8-GPU plan."""

import unittest

import test_disaggregation_dsv4_2gpu as two_gpus
from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(est_time=400, suite="stage-c-test-4-gpu-h100")


class TestDisaggregationDSV4FourGpus(two_gpus.TestDisaggregationDSV4TwoGpus):
    rung = "4xHopper"

    prefill_gpus = range(0, 2)
    decode_gpus = range(2, 4)


if __name__ == "__main__":
    unittest.main()
