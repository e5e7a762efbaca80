"""What clients of SGLang's own prefill and decode meet, on one GPU: see test_disaggregation_dsv4_protocol.py."""

import unittest

from pdkit.checks.protocol.checks import ProtocolChecks
from pdkit.deployment import quirks
from pdkit.deployment.one_gpu import PAGE, TrainedOneGpuServers
from pdkit.deployment.router import RustRouterBeside
from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(est_time=300, suite="stage-b-test-1-gpu-large")


class TestDisaggregationDSV4ProtocolOneGpu(ProtocolChecks, RustRouterBeside, TrainedOneGpuServers):
    json_schema = False  # --grammar-backend none
    prefix_cache_tokens = 3 * PAGE  # with EAGLE less than two pages are not kept
    unending_tokens = 7000
    empty_text_is_fatal = quirks.empty_text_is_fatal()
    settle_seconds = 10


if __name__ == "__main__":
    unittest.main()
