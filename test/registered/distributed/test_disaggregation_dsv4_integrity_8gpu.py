"""DeepSeek-V4-Flash on 8xH200: prefill and decode must answer as one monolithic server does that ran there before."""

import unittest

from pdkit.checks.gpu_pair import GpuPairChecks
from pdkit.checks.integrity import IntegrityChecks
from pdkit.deployment.monolithic import MonolithicFirst
from pdkit.deployment.multi_gpu import EightGpuServers
from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(est_time=900, suite="stage-c-test-dsv4-8-gpu-h200")


class TestDisaggregationDSV4Integrity8GPU(GpuPairChecks, IntegrityChecks, MonolithicFirst, EightGpuServers):
    @classmethod
    def take_references(cls):
        super().take_references()
        cls.take_acceptance_reference()
        cls.take_first_drafts_reference()


if __name__ == "__main__":
    unittest.main()
