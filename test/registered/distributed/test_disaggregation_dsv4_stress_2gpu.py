"""The same rounds as test_disaggregation_dsv4_stress_1gpu.py on two GPUs: DP attention, DeepEP, EAGLE."""

import unittest

from pdkit.checks.accounting.checks import AccountingChecks
from pdkit.checks.stress import CoreDumps, StressChecks
from pdkit.deployment.monolithic import MonolithicBeside
from pdkit.deployment.multi_gpu import TwoGpuServers
from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(est_time=420, suite="stage-b-test-2-gpu-large")


class TestDisaggregationDSV4StressTwoGpus(AccountingChecks, StressChecks, CoreDumps, MonolithicBeside, TwoGpuServers):
    pass


if __name__ == "__main__":
    unittest.main()
