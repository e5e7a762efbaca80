"""The same test with SGLang's own engine and DeepSeek-V4's kernels on one Hopper GPU, which prefill and decode share.

The model is as small as the kernels allow. Trained by `pdkit model kernel-train` it solves GSM8K-like problems;
until then it is random, the score is not asked for, and what is left is that the pair answers as one server does.
"""

import unittest

from pdkit.checks.accuracy.checks import GSM8KChecks
from pdkit.checks.gpu_pair import GpuPairChecks
from pdkit.checks.integrity import IntegrityChecks
from pdkit.checks.parity.plan import PlanOptions
from pdkit.checks.reference.checks import ReferenceChecks
from pdkit.checks.timings import TimingChecks
from pdkit.deployment.monolithic import MonolithicBeside
from pdkit.deployment.one_gpu import INDEXED, OneGpuServers
from pdkit.faults.lb_faults import BalancerFaultChecks
from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(est_time=220, suite="stage-b-test-1-gpu-large")


class OneGpuChecks(GpuPairChecks, IntegrityChecks, ReferenceChecks, TimingChecks, BalancerFaultChecks):
    """What there is room for where a monolithic server stays up."""


class TestDisaggregationDSV4OneGpu(OneGpuChecks, GSM8KChecks, MonolithicBeside, OneGpuServers):
    parity_options = PlanOptions(longest=INDEXED + 600, extra_lengths=(700, 1000, INDEXED + 60, INDEXED + 600))
    acceptance_length_prompts = 32

    @classmethod
    def take_references(cls):
        try:
            super().take_references()
        except Exception as error:  # what fails here fails again, with its own message, in the test that needs it
            print(f"monolithic answers: {error}", flush=True)

    def test_gsm8k(self):
        self.require_training()
        super().test_gsm8k()

    def test_report_throughput(self):
        self.require_training()
        super().test_report_throughput()


if __name__ == "__main__":
    unittest.main()
