"""Target of one Hopper GPU, which SGLang's own prefill and decode share: a nano DeepSeek-V4 in kernel geometry."""

import os
import unittest

from pdkit.core.paths import ASSETS
from pdkit.deployment import fused_mhc, quirks
from pdkit.deployment.fixture import PlannedServers
from pdkit.deployment.ports import ClaimedPorts
from pdkit.models.cuda import store
from pdkit.models.cuda.config import HIDDEN

PAGE = 256  # of the prefix cache, SGLang's for DeepSeek-V4
INDEXED = 2048  # tokens from which on there are more compressed entries than the indexer selects: 512 of 4 tokens each

# The pool holds the 32 requests at full length: decode of SGLang 0.5.17 ends where it would have to retract one
# (docs/findings/decode-cannot-retract.md).
NANO_ARGS = """
    --trust-remote-code
    --context-length 8192 --max-total-tokens 262144 --swa-full-tokens-ratio 0.5
    --sampling-backend pytorch --grammar-backend none
    --random-seed 1
    --watchdog-timeout 900
    --speculative-algorithm EAGLE
    --speculative-num-steps 1 --speculative-eagle-topk 1 --speculative-num-draft-tokens 2
    --cuda-graph-max-bs-decode 4
""".split()
NANO_ENV = {"SGLANG_DSV4_FP4_EXPERTS": "0", **quirks.indexer_environment()}


class OneGpuServers(ClaimedPorts, PlannedServers):
    """The model is as small as the kernels allow."""

    target = "1xHopper"
    backend = "mooncake_tcp"

    model_name = os.getenv("SGLANG_PD_KERNEL_NANO") or str(store.best())
    gsm8k_data_path = str(ASSETS / "gsm8k_nano.jsonl")

    prefill_gpus = decode_gpus = range(1)

    # Three servers share the GPU: prefill, decode and the monolithic one that parity compares with.
    server_args = (
        """
        --tp-size 1
        --mem-fraction-static 0.3
        --max-running-requests 32 --chunked-prefill-size 512
    """.split()
        + NANO_ARGS
    )
    server_env = {**NANO_ENV, **fused_mhc.environment(HIDDEN)}

    @classmethod
    def setUpClass(cls) -> None:
        cls.require_gpus()
        store.provide(cls.model_name)
        super().setUpClass()

    @classmethod
    def require_training(cls) -> None:
        """Raises SkipTest where the model is random."""
        if not store.is_trained(cls.model_name):
            raise unittest.SkipTest(
                f"accuracy gate off: {cls.model_name} is random; pdkit model kernel-train trains one"
            )


class TrainedOneGpuServers(OneGpuServers):
    """The same, skipped where the model is random."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.require_gpus()
        cls.require_training()
        super().setUpClass()
