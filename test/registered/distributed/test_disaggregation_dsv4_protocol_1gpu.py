"""What clients of SGLang's own prefill and decode meet, on one GPU: see test_disaggregation_dsv4_protocol.py."""

import unittest

import test_disaggregation_dsv4 as dsv4
import test_disaggregation_dsv4_1gpu as one_gpu
from deployment_bridge import RustRouterBeside
from pdkit.checks.protocol.checks import ProtocolChecks
from pdkit.checks.protocol.reference import question_prompts
from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(est_time=300, suite="stage-b-test-1-gpu-large")


class TestDisaggregationDSV4ProtocolOneGpu(ProtocolChecks, RustRouterBeside, one_gpu.OneGpuServers):
    json_schema = False  # --grammar-backend none
    prefix_cache_tokens = 3 * one_gpu.PAGE  # with EAGLE less than two pages are not kept
    unending_tokens = 7000
    settle_seconds = 10

    @classmethod
    def setUpClass(cls):
        dsv4.require_gpus(cls)
        cls.require_training()
        super().setUpClass()

    @classmethod
    def prompts(cls, count):
        return question_prompts(cls.gsm8k_data_path, count)


if __name__ == "__main__":
    unittest.main()
