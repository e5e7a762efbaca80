"""What clients of DeepSeek-V4-Flash as prefill and decode meet: see test_disaggregation_dsv4_protocol.py."""

import unittest

from pdkit.checks.protocol.checks import ProtocolChecks
from pdkit.deployment import quirks
from pdkit.deployment.multi_gpu import EightGpuServers
from pdkit.deployment.router import RustRouterBeside
from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(est_time=900, suite="stage-c-test-dsv4-8-gpu-h200")


class TestDisaggregationDSV4Protocol8GPU(ProtocolChecks, RustRouterBeside, EightGpuServers):
    prefix_cache_tokens = None  # the next request may meet another data-parallel rank, with a cache of its own
    if EightGpuServers.gsm8k_data_path:  # a small model: it writes blanks for ever, and nothing stands before its texts
        server_args = [*EightGpuServers.server_args, "--constrained-json-disable-any-whitespace"]
        unending_tokens = 7000
        empty_text_is_fatal = quirks.empty_text_is_fatal()


if __name__ == "__main__":
    unittest.main()
