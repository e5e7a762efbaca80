"""The same test with SGLang's own engine and DeepSeek-V4's kernels on one Hopper GPU, which prefill and decode share.

The model is as small as the kernels allow. Trained by `scripts/train_kernel_nano.py` it solves GSM8K-like problems;
until then it is random, the score is not asked for, and what is left is that the pair answers as one server does.
"""

import os
import unittest
from dataclasses import replace
from pathlib import Path

import pdkit
import test_disaggregation_dsv4 as dsv4
from pdkit import fused_mhc, indexer_schedule
from pdkit.accounting_kit import RequestAccountingMixin
from pdkit.claimed_ports import ClaimedPortsMixin
from pdkit.faults.beside_kit import BalancerFaultsMixin
from pdkit.gate_kit import AcceptanceLengthMixin, FirstDraftsMixin
from pdkit.integrity_kit import TransferIntegrityMixin
from pdkit.kernel_nano import cache
from pdkit.kernel_nano.config import HIDDEN
from pdkit.kernel_nano.truth_kit import ReferenceMixin
from pdkit.monolithic_kit import MonolithicBesideMixin
from pdkit.numbers_kit import PairNumbersMixin
from pdkit.parity_kit import ParityMixin
from pdkit.parity_plan import PlanOptions
from pdkit.placement_kit import PlacementMixin
from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(est_time=220, suite="stage-b-test-1-gpu-large")

PAGE = 256  # of the prefix cache, SGLang's for DeepSeek-V4
INDEXED = 2048  # tokens from which on there are more compressed entries than the indexer selects: 512 of 4 tokens each


class OneGpuPlan(ClaimedPortsMixin):
    """What is launched; put it before `dsv4.TestDisaggregationDSV4`."""

    rung = "1xHopper"
    backend = "mooncake_tcp"

    model_name = os.getenv("SGLANG_PD_KERNEL_NANO") or str(cache.best())
    gsm8k_data_path = str(Path(pdkit.__file__).parent / "assets" / "gsm8k_nano.jsonl")

    prefill_gpus = decode_gpus = range(1)
    gpu_memory_gb = 80

    # The pool holds the 32 requests at full length: decode of SGLang 0.5.17 ends where it would have to retract one
    # (docs/findings/decode-cannot-retract.md).
    nano_args = (
        """
        --trust-remote-code
        --context-length 8192 --max-total-tokens 262144 --swa-full-tokens-ratio 0.5
        --sampling-backend pytorch --grammar-backend none
        --random-seed 1
        --watchdog-timeout 900
        --speculative-algorithm EAGLE
        --speculative-num-steps 1 --speculative-eagle-topk 1 --speculative-num-draft-tokens 2
    """.split()
        + [dsv4.CUDA_GRAPH_MAX_BS, "4"]
    )
    # Three servers share the GPU: prefill, decode and the monolithic one that parity compares with.
    server_args = (
        """
        --tp-size 1
        --mem-fraction-static 0.3
        --max-running-requests 32 --chunked-prefill-size 512
    """.split()
        + nano_args
    )

    nano_env = {"SGLANG_DSV4_FP4_EXPERTS": "0", **indexer_schedule.environment()}
    server_env = {**nano_env, **fused_mhc.environment(HIDDEN)}

    @classmethod
    def setUpClass(cls):
        dsv4.require_gpus(cls)
        cache.provide(cls.model_name)
        super().setUpClass()

    @classmethod
    def configure(cls):
        super().configure()
        cls.transfer_backend = ["--disaggregation-transfer-backend", cls.backend]
        cls.rdma_devices = []

    @classmethod
    def require_training(cls):
        """Raises SkipTest where the model is random."""
        if not cache.is_trained(cls.model_name):
            raise unittest.SkipTest(
                f"accuracy gate off: {cls.model_name} is random; scripts/train_kernel_nano.py trains a model"
            )


class TestDisaggregationDSV4OneGpu(
    RequestAccountingMixin,
    TransferIntegrityMixin,
    AcceptanceLengthMixin,
    FirstDraftsMixin,
    ReferenceMixin,
    PairNumbersMixin,
    BalancerFaultsMixin,
    PlacementMixin,
    ParityMixin,
    MonolithicBesideMixin,
    OneGpuPlan,
    dsv4.TestDisaggregationDSV4,
):
    parity_options = PlanOptions(longest=INDEXED + 600, extra_lengths=(700, 1000, INDEXED + 60, INDEXED + 600))
    acceptance_length_prompts = 32

    @classmethod
    def take_references(cls):
        try:
            super().take_references()
        except Exception as error:  # what fails here fails again, with its own message, in the test that needs it
            print(f"monolithic answers: {error}", flush=True)

    def _check_cached(self, round_, arm):
        # With EAGLE the prefix cache is keyed by pairs of tokens: of a prompt of one page and a token it keeps nothing.
        long = frozenset(probe.name for probe in round_.probes if (probe.prompt_length or 0) > 2 * PAGE)
        super()._check_cached(replace(round_, cached=round_.cached & long), arm)

    def test_gsm8k(self):
        self.require_training()
        super().test_gsm8k()

    def test_report_throughput(self):
        self.require_training()
        super().test_report_throughput()


if __name__ == "__main__":
    unittest.main()
