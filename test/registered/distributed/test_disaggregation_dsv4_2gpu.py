"""The plan of TestDisaggregationDSV4 on two GPUs, which prefill and decode share: DP attention, DeepEP, EAGLE.

The model is the nano of the width that DeepEP moves, trained by `scripts/train_kernel_nano.py --hidden-size 2048`.

    SGLANG_PD_KERNEL_NANO_2048  such a checkpoint, instead of the one in the cache
    SGLANG_PD_DEEPEP_MODE       SGLang's --deepep-mode, if not auto
"""

import os
import unittest

import test_disaggregation_dsv4 as dsv4
import test_disaggregation_dsv4_1gpu as one_gpu
from pdkit.accounting_kit import RequestAccountingMixin
from pdkit.claimed_ports import ClaimedRendezvousMixin
from pdkit.gate_kit import AcceptanceLengthMixin, FirstDraftsMixin
from pdkit.kernel_nano import cache
from pdkit.kernel_nano.config import DEEPEP_HIDDEN
from pdkit.monolithic_kit import MonolithicBesideMixin
from pdkit.parity_kit import ParityMixin
from pdkit.placement_kit import PlacementMixin
from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(est_time=520, suite="stage-b-test-2-gpu-large")


class TestDisaggregationDSV4TwoGpus(
    RequestAccountingMixin,
    AcceptanceLengthMixin,
    FirstDraftsMixin,
    PlacementMixin,
    ParityMixin,
    ClaimedRendezvousMixin,
    MonolithicBesideMixin,
    one_gpu.OneGpuPlan,
    dsv4.TestDisaggregationDSV4,
):
    rung = "2xHopper"
    model_name = os.getenv("SGLANG_PD_KERNEL_NANO_2048") or str(cache.best(DEEPEP_HIDDEN))

    prefill_gpus = decode_gpus = range(2)

    plan_args = (
        """
        --tp-size 2 --dp-size 2 --enable-dp-attention
        --mem-fraction-static 0.25
        --max-running-requests 64 --chunked-prefill-size 1024
    """.split()
        + one_gpu.OneGpuPlan.nano_args
    )
    server_args = plan_args + [
        *("--moe-a2a-backend", "deepep", "--deepep-mode", os.getenv("SGLANG_PD_DEEPEP_MODE") or "auto"),
        *("--deepep-config", '{"normal_dispatch":{"num_sms":96},"normal_combine":{"num_sms":96}}'),
    ]
    server_env = {
        **one_gpu.OneGpuPlan.nano_env,
        "SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK": "256",
        "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0",  # the other servers load on the same GPUs meanwhile
    }

    parity_options = one_gpu.TestDisaggregationDSV4OneGpu.parity_options
    acceptance_length_prompts = 32

    def test_gsm8k(self):
        self.require_training()
        super().test_gsm8k()


if __name__ == "__main__":
    unittest.main()
