"""What clients of DeepSeek-V4-Flash as prefill and decode meet: see test_disaggregation_dsv4_protocol.py."""

import unittest

import test_disaggregation_dsv4 as dsv4
from pdkit.protocol_kit import ProtocolMixin
from pdkit.router_kit import RustRouterBesideMixin
from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(est_time=900, suite="stage-c-test-dsv4-8-gpu-h200")


class TestDisaggregationDSV4Protocol8GPU(ProtocolMixin, RustRouterBesideMixin, dsv4.TestDisaggregationDSV4):
    prefix_cache_tokens = None  # the next request may meet another data-parallel rank, with a cache of its own

    test_gsm8k = None


if __name__ == "__main__":
    unittest.main()
