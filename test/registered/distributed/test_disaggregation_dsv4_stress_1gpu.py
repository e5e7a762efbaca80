"""Hundreds of mixed short rounds to a monolithic server, then to prefill and decode, on one GPU; nobody may die.

A server that dies leaves a CUDA core beside its log (`cuda-gdb -c FILE` names the kernel).
"""

import unittest

from pdkit.checks.accounting.checks import AccountingChecks
from pdkit.checks.stress import CoreDumps, StressChecks
from pdkit.deployment.monolithic import MonolithicBeside
from pdkit.deployment.one_gpu import OneGpuServers
from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(est_time=300, suite="stage-b-test-1-gpu-large")


class TestDisaggregationDSV4StressOneGpu(AccountingChecks, StressChecks, CoreDumps, MonolithicBeside, OneGpuServers):
    pass


if __name__ == "__main__":
    unittest.main()
