"""Hundreds of mixed short rounds to a monolithic server, then to prefill and decode, on one GPU; nobody may die.

A server that dies leaves a CUDA core beside its log (`cuda-gdb -c FILE` names the kernel).
"""

import os
import unittest

import test_disaggregation_dsv4 as dsv4
import test_disaggregation_dsv4_1gpu as one_gpu
from pdkit.accounting_kit import RequestAccountingMixin
from pdkit.monolithic_kit import MonolithicBesideMixin
from pdkit.stress_kit import StressMixin
from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(est_time=300, suite="stage-b-test-1-gpu-large")


class CoreDumpsMixin:
    """Servers leave light CUDA cores where their logs are."""

    @classmethod
    def launch(cls, name, command):
        cores = {"SGLANG_CUDA_COREDUMP": "1", "SGLANG_CUDA_COREDUMP_DIR": os.path.join(cls.log_dir, "cuda_cores")}
        cls.server_env = {**cls.server_env, **cores}
        return super().launch(name, command)


class TestDisaggregationDSV4StressOneGpu(
    RequestAccountingMixin,
    StressMixin,
    CoreDumpsMixin,
    MonolithicBesideMixin,
    one_gpu.OneGpuPlan,
    dsv4.TestDisaggregationDSV4,
):
    test_gsm8k = None


if __name__ == "__main__":
    unittest.main()
