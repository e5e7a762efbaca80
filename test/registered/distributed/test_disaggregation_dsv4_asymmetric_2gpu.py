"""Prefill and decode of different tensor parallelism, and three prefill servers to one decode server, on two GPUs.

Every rank of DeepSeek-V4 holds the whole KV cache, so prefill of one rank sends its state to each of decode's two, and
of two prefill ranks one sends. Attention is tensor parallel here, without DP attention and DeepEP. Sums over two ranks
are rounded otherwise than over one: parity's reference is a monolithic server of one rank, its control arm one of two.
"""

import unittest

import test_disaggregation_dsv4_2gpu as two_gpus
from pdkit.checks.accuracy.checks import GSM8KChecks
from pdkit.checks.gpu_pair import GpuPairChecks
from pdkit.checks.parity.references import References
from pdkit.deployment.monolithic import MonolithicBeside
from pdkit.deployment.multi_gpu import TwoGpuServers
from pdkit.deployment.one_gpu import NANO_ARGS, OneGpuServers
from sglang.srt.server_args import ServerArgs
from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(est_time=760, suite="stage-b-test-2-gpu-large")


PLAIN_ALL_REDUCE = (
    ["--enforce-disable-flashinfer-allreduce-fusion"]
    if hasattr(ServerArgs, "enforce_disable_flashinfer_allreduce_fusion")
    else []
)


class AsymmetricServers(MonolithicBeside, OneGpuServers):
    """`prefill_gpus` and `decode_gpus` say how many ranks each side has.

    control_ranks  of the server that parity's control arm is asked of; None: of the monolithic server, as elsewhere
    """

    target = "2xHopper"
    model_name = TwoGpuServers.model_name
    # Two ranks without DP attention waited for ever where FlashInfer's all-reduce was set up (0.5.23, two H200s).
    server_args = [
        *"--mem-fraction-static 0.2 --max-running-requests 32 --chunked-prefill-size 512".split(),
        *NANO_ARGS,
        *PLAIN_ALL_REDUCE,
    ]
    server_env = TwoGpuServers.server_env
    control_ranks = 2
    control_url: str | None
    control_port = control_nccl_port = None

    @classmethod
    def prefill_args(cls):
        return super().prefill_args() + ["--tp-size", str(len(cls.prefill_gpus))]

    @classmethod
    def decode_args(cls):
        return super().decode_args() + ["--tp-size", str(len(cls.decode_gpus))]

    @classmethod
    def monolithic_args(cls):
        return super().monolithic_args() + ["--tp-size", "1", "--base-gpu-id", "1"]

    @classmethod
    def control_args(cls):
        """Flags of the server that the control arm is asked of."""
        return [*cls.server_args, "--nccl-port", cls.control_nccl_port, "--tp-size", str(cls.control_ranks)]

    @classmethod
    def configure(cls):
        super().configure()
        cls.control_url = f"http://{cls.base_host}:{cls.control_port}" if cls.control_ranks else None

    @classmethod
    def start_decode(cls):
        super().start_decode()
        if cls.control_url:
            cls.launch_server("control", cls.control_url, cls.control_args())

    @classmethod
    def launch_lb(cls):
        if cls.control_url:
            cls.wait_server_ready(f"{cls.control_url}/health")
        super().launch_lb()


class AsymmetricChecks(GpuPairChecks, GSM8KChecks):
    """What each such pair is asked."""

    needs = ("control_url", "require_training")

    parity_options = two_gpus.TestDisaggregationDSV4TwoGpus.parity_options
    acceptance_length_prompts = 32

    @classmethod
    def configure(cls):
        super().configure()
        cls.references = References(cls.bitwise, cls.request_timeout, control_url=cls.control_url)

    def test_gsm8k(self):
        self.require_training()
        super().test_gsm8k()


class TestDisaggregationDSV4OneToTwo(AsymmetricChecks, AsymmetricServers):
    prefill_gpus, decode_gpus = range(1), range(2)


class TestDisaggregationDSV4TwoToOne(AsymmetricChecks, AsymmetricServers):
    prefill_gpus, decode_gpus = range(2), range(1, 2)


class TestDisaggregationDSV4ThreeToOne(AsymmetricChecks, AsymmetricServers):
    """The mini LB draws one of three prefill servers for each request; decode has one rank."""

    prefill_gpus, decode_gpus = range(1), range(1, 2)
    control_ranks = None  # all have one rank
    prefill_2_port = prefill_3_port = prefill_2_nccl_port = prefill_3_nccl_port = None
    bootstrap_2_port = bootstrap_3_port = None

    @classmethod
    def configure(cls):
        super().configure()
        cls.prefill_2_url, cls.prefill_3_url = (
            f"http://{cls.base_host}:{port}" for port in (cls.prefill_2_port, cls.prefill_3_port)
        )
        cls.prefill_urls = [cls.prefill_url, cls.prefill_2_url, cls.prefill_3_url]

    @classmethod
    def start_prefill(cls):
        super().start_prefill()
        for number, url, gpu in ((2, cls.prefill_2_url, 1), (3, cls.prefill_3_url, 0)):
            swap = {
                cls.bootstrap_port: getattr(cls, f"bootstrap_{number}_port"),
                cls.prefill_nccl_port: getattr(cls, f"prefill_{number}_nccl_port"),
            }
            args = [swap.get(arg, arg) for arg in cls.prefill_args()] + ["--base-gpu-id", str(gpu)]
            cls.launch_server(f"prefill {number}", url, args)

    @classmethod
    def start_lb(cls, command):
        """The fixture's command with the two other prefill servers."""
        more = [(cls.prefill_2_url, cls.bootstrap_2_port), (cls.prefill_3_url, cls.bootstrap_3_port)]
        return super().start_lb(command + [word for url, port in more for word in ("--prefill", url, str(port))])

    @classmethod
    def launch_lb(cls):
        for url in (cls.prefill_2_url, cls.prefill_3_url):
            cls.wait_server_ready(f"{url}/health")
        super().launch_lb()


if __name__ == "__main__":
    unittest.main()
