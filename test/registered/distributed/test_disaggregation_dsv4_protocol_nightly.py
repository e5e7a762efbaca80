"""test_disaggregation_dsv4_protocol.py with its two long waits whole: a minute of load, and a minute in which nobody asks."""

import unittest

import test_disaggregation_dsv4_protocol as protocol
from sglang.test.ci.ci_register import register_cpu_ci

register_cpu_ci(est_time=330, suite="stage-a-test-cpu", nightly=True)


class TestDisaggregationDSV4ProtocolNightly(protocol.TestDisaggregationDSV4Protocol):
    sustained_seconds = 60
    idle_seconds = 60


if __name__ == "__main__":
    unittest.main()
