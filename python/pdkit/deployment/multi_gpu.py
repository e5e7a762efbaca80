"""Targets of several Hopper GPUs: DP attention, DeepEP, EAGLE; the whole DeepSeek-V4-Flash, or a nano of its width."""

import os

from pdkit.deployment.fixture import PlannedServers
from pdkit.deployment.one_gpu import NANO_ARGS, NANO_ENV, OneGpuServers
from pdkit.deployment.ports import ClaimedRendezvous
from pdkit.models.cuda import store
from pdkit.models.cuda.config import DEEPEP_HIDDEN

DEEPEP_CONFIG = '{"normal_dispatch":{"num_sms":96},"normal_combine":{"num_sms":96}}'
DISPATCH_TOKENS = {"SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK": "256"}


class EightGpuServers(PlannedServers):
    """What test_disaggregation_dsv4.py launches: four H200 for prefill, four for decode.

    With DP attention the 4 data-parallel ranks are carved out of the 4 tensor-parallel ones: 4 GPUs a server.
    """

    target = "8xH200"
    model_name = os.getenv("SGLANG_PD_MODEL") or "sgl-project/DeepSeek-V4-Flash-FP8"
    gsm8k_data_path = os.getenv("SGLANG_PD_GSM8K") or None

    prefill_gpus = range(0, 4)
    decode_gpus = range(4, 8)
    gpu_memory_gb = 141

    server_args = f"""
        --trust-remote-code
        --tp 4 --dp 4 --enable-dp-attention
        --moe-a2a-backend deepep
        --deepep-config {DEEPEP_CONFIG}
        --max-running-requests 256
        --mem-fraction-static 0.7
        --speculative-algorithm EAGLE
        --speculative-num-steps 1 --speculative-eagle-topk 1 --speculative-num-draft-tokens 2
        --cuda-graph-max-bs-decode 128
    """.split()
    server_env = {"SGLANG_DSV4_FP4_EXPERTS": "0", **DISPATCH_TOKENS}

    @classmethod
    def setUpClass(cls) -> None:
        cls.require_gpus()
        super().setUpClass()


class TwoGpuServers(ClaimedRendezvous, OneGpuServers):
    """Prefill and decode share two GPUs. The model is the nano of the width that DeepEP moves.

    SGLANG_PD_KERNEL_NANO_2048  such a checkpoint, instead of the one in the cache
    SGLANG_PD_DEEPEP_MODE       SGLang's --deepep-mode, if not auto
    """

    target = "2xHopper"
    model_name = os.getenv("SGLANG_PD_KERNEL_NANO_2048") or str(store.best(DEEPEP_HIDDEN))

    prefill_gpus = decode_gpus = range(2)

    plan_args = (
        """
        --tp-size 2 --dp-size 2 --enable-dp-attention
        --mem-fraction-static 0.25
        --max-running-requests 64 --chunked-prefill-size 1024
    """.split()
        + NANO_ARGS
    )
    server_args = plan_args + [
        *("--moe-a2a-backend", "deepep", "--deepep-mode", os.getenv("SGLANG_PD_DEEPEP_MODE") or "auto"),
        *("--deepep-config", DEEPEP_CONFIG),
    ]
    server_env = {
        **NANO_ENV,
        **DISPATCH_TOKENS,
        "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0",  # the other servers load on the same GPUs meanwhile
    }


class TwoGpuServersWithoutDeepEP(TwoGpuServers):
    """Tokens go to the experts by NCCL's collectives."""

    server_args = [*TwoGpuServers.plan_args, "--ep-size", "2"]


class FourGpuServers(TwoGpuServers):
    """The same with GPUs of their own for prefill and decode: half of the 8-GPU plan."""

    target = "4xHopper"
    prefill_gpus = range(0, 2)
    decode_gpus = range(2, 4)
