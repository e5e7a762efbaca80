"""DeepSeek-V4-Flash with prefill and decode on four H200 GPUs each must still solve GSM8K.

A wrong KV transfer leaves the model fluent and only makes its answers worse, so answers are what is scored.
"""

import unittest
from types import SimpleNamespace

from sglang.srt.utils import get_device_count
from sglang.test.ci.ci_register import register_cuda_ci
from sglang.test.run_eval import run_eval
from sglang.test.server_fixtures.disaggregation_fixture import PDDisaggregationServerBase
from sglang.test.test_utils import (
    DEFAULT_TIMEOUT_FOR_SERVER_LAUNCH,
    is_in_ci,
    popen_launch_pd_server,
    try_cached_model,
)

register_cuda_ci(est_time=250, suite="stage-c-test-dsv4-8-gpu-h200")

MODEL = "sgl-project/DeepSeek-V4-Flash-FP8"

# With DP attention the 4 data-parallel ranks are carved out of the 4 tensor-parallel ones: 4 GPUs per server.
SERVER_ARGS = """
    --trust-remote-code
    --tp 4 --dp 4 --enable-dp-attention
    --moe-a2a-backend deepep
    --deepep-config {"normal_dispatch":{"num_sms":96},"normal_combine":{"num_sms":96}}
    --max-running-requests 256
    --mem-fraction-static 0.7
    --speculative-algorithm EAGLE
    --speculative-num-steps 1 --speculative-eagle-topk 1 --speculative-num-draft-tokens 2
    --cuda-graph-max-bs-decode 128
""".split()

SERVER_ENV = {
    "SGLANG_DSV4_FP4_EXPERTS": "0",
    "SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK": "256",
}


@unittest.skipUnless(
    is_in_ci() or get_device_count() >= 8, "needs 8 H200 GPUs; on this machine the same test runs as: scripts/run.sh"
)
class TestDisaggregationDSV4(PDDisaggregationServerBase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.model = try_cached_model(MODEL)
        cls.launch_all()

    @classmethod
    def start_prefill(cls):
        cls.process_prefill = cls.start_server(
            cls.prefill_url,
            ["--disaggregation-mode", "prefill"],
            cls.prefill_nccl_port,
            gpus=range(0, 4),
        )

    @classmethod
    def start_decode(cls):
        cls.process_decode = cls.start_server(
            cls.decode_url,
            ["--base-gpu-id", "4", "--disaggregation-mode", "decode"],
            cls.decode_nccl_port,
            gpus=range(4, 8),
        )

    @classmethod
    def start_server(cls, url, side_args, nccl_port, gpus):
        other_args = [
            *SERVER_ARGS,
            *side_args,
            "--disaggregation-bootstrap-port",
            cls.bootstrap_port,
            "--nccl-port",
            nccl_port,
            *cls.transfer_backend,
            *cls.rdma_devices_for(gpus),
        ]
        return popen_launch_pd_server(
            cls.model, url, timeout=DEFAULT_TIMEOUT_FOR_SERVER_LAUNCH, other_args=other_args, env=SERVER_ENV
        )

    def test_gsm8k(self):
        args = SimpleNamespace(
            base_url=self.lb_url,
            model=self.model,
            eval_name="gsm8k",
            api="completion",
            max_tokens=512,
            num_examples=200,
            num_threads=128,
        )
        metrics = run_eval(args)
        print(f"{metrics=}")
        self.assertGreater(metrics["score"], 0.95)


if __name__ == "__main__":
    unittest.main()
